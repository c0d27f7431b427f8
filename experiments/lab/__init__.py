"""The frame of the questions: arms, rows, statistics, claims, exhibits."""
