"""Experiments: one script per question; each docstring gives its command and expected answer."""
