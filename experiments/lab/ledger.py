"""The numeric claims of the troubleshooting report, each beside what our runs of its recipe give.

A number is `reproduced` when it lies within the 95 % prediction interval for one more run of ours,
give or take its own rounding; `not decided` when that interval is wider than half of what the
number could be, or there is one run and so no interval; `explained` when it follows from something
that the report did not say. What the report computes from its own numbers, and what holds by
construction, is counted apart.

    python -m experiments.lab.ledger                   # from the rows of reproduce_report
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from bitnet_jax.config import RunConfig
from bitnet_jax.metrics import (
    DISTINCT,
    LOGIT_STD,
    LOSS,
    TRACK_ENTROPY,
    TRACK_LOSS,
    TRAIN_LOSS,
)
from bitnet_jax.verdict import SEVERE
from experiments.lab import stats, studies, trajectory
from experiments.lab.exhibits import Table, text_table
from experiments.lab.finished import Finished
from experiments.lab.measures import first_below_unigram
from experiments.lab.trajectory import Trajectory

MEASURED, EXPLAINED, ARITHMETIC, BUILT = (
    "measured",
    "explained",
    "own arithmetic",
    "by construction",
)
REPRODUCED, DIFFERENT, UNDECIDED = "reproduced", "not reproduced", "not decided"
CONSISTENT, CONTRADICTORY, UNKNOWN = "consistent", "self-contradictory", "not checkable"
LENGTHS = (1000, 10_000, 20_000)
LN_V, TRACKED = 10.82, 128  # ln 50257; positions whose predictions are counted
COUNT, SHARE, NATS, SPREAD = (1, TRACKED), (0, 1), (0, LN_V), (0, 1)
CUT = 2260  # the step at which the report's logs of its longer runs end
DEAD = 0.01  # of the first spread of the logits: they no longer tell words apart


@dataclass(frozen=True)
class Entry:
    """One claim: the reported number, its digits after the point, and how it is recomputed.

    `column` is that of the frame of `reproduce_report`'s rows at `steps`, `possible` the range that
    the number could lie in; of other kinds `judge` gives what is found, and whether it agrees.
    """

    claim: str
    reported: float | str
    digits: int = 0
    steps: int = LENGTHS[0]
    column: str = ""
    possible: tuple[float, float] = (0, 1)
    kind: str = MEASURED
    judge: Callable[[pd.DataFrame], tuple[str, bool]] | None = None

    @property
    def as_reported(self) -> str:
        """The number with its digits."""
        number = isinstance(self.reported, int | float)
        return f"{self.reported:.{self.digits}f}" if number else self.reported


@dataclass(frozen=True)
class Line:
    """An entry with what was found and what that makes of it."""

    entry: Entry
    ours: str
    status: str


# Claim, column, digits, possible range, and the reported values at the three lengths (None: none).
MEASUREMENTS = (
    ("most distinct predictions", "unique_max", 0, COUNT, (95, None, None)),
    ("most distinct, first 452", "partial_unique_max", 0, COUNT, (None, 98, 95)),
    ("fewest distinct predictions", "unique_min", 0, COUNT, (1, None, None)),
    ("fewest distinct, first 452", "partial_unique_min", 0, COUNT, (None, 1, 1)),
    ("distinct, average", "unique_mean", 1, COUNT, (9.4, None, None)),
    ("distinct, average, first 452", "partial_unique_mean", 1, COUNT, (None, 28.6, 26.4)),
    ("distinct, average of stage 1", "unique_stage1", 1, COUNT, (15.1, None, None)),
    ("distinct, average of stage 2", "unique_stage2", 1, COUNT, (3.6, None, None)),
    ("severe share", "severe_share", 3, SHARE, (0.285, None, None)),
    ("severe share, first 452", "partial_severe_share", 3, SHARE, (None, 0.007, 0.077)),
    ("first severe evaluation at step", "first_severe", 0, (5, 1000), (130, None, None)),
    ("first with one prediction at step", "first_complete", 0, (5, 1000), (140, None, None)),
    ("recoveries", "recoveries", 0, (0, 100), (2, None, None)),
    ("distinct at the end", "unique_final", 0, COUNT, (8, 5, 6)),
    ("lowest loss", "loss_min", 2, NATS, (8.23, None, None)),
    ("lowest loss, first 452", "partial_loss_min", 2, NATS, (None, 8.71, 8.57)),
    ("highest loss", "loss_max", 2, NATS, (10.94, None, None)),
    ("highest loss, first 452", "partial_loss_max", 2, NATS, (None, 11.01, 10.93)),
    ("average loss", "loss_mean", 2, NATS, (9.60, None, None)),
    ("average loss, first 452", "partial_loss_mean", 2, NATS, (None, 10.52, 10.50)),
    ("loss at the end", "loss_final", 2, NATS, (9.92, 9.74, 9.76)),
    ("entropy of the collapsed run", "late_entropy", 2, NATS, (10.7, None, None)),
    ("spread of the logits (ours: at the start)", "start_logit_std", 2, SPREAD, (0.58, None, None)),
)
MILESTONES = {  # by length: step and distinct predictions there
    1000: {5: 95, 50: 70, 100: 6, 130: 2, 140: 1, 500: 5, 600: 1, 700: 5},
    10_000: {100: 9, 500: 5, 1000: 68, 1500: 39, 2000: 15},
    20_000: {100: 10, 500: 5, 1000: 56, 1500: 35, 2000: 24},
}


def measure(run: Finished, base: int) -> list[dict]:
    """What entries read, by replicate, in a study whose shortest run has `base` steps."""
    paths, transits = trajectory.of_run(run), first_below_unigram(run)
    return [
        statistics(run, i, path, transit)
        | {"milestones": milestones(base, run.cfg.run, run.evals[i])}
        for i, (path, transit) in enumerate(zip(paths, transits, strict=True))
    ]


def statistics(run: Finished, i: int, path: Trajectory, transit: int | None) -> dict:
    """The report's statistics of one replicate; `transit`: first step below the unigram's loss."""
    severe, episodes = path.unique < SEVERE, trajectory.episodes(path)
    stage_1, partial = path.steps <= run.cfg.run.boundary, path.steps <= CUT
    losses = np.array([row[TRAIN_LOSS] for row in run.trains[i]])
    cut_losses, cut_unique = losses[: partial.sum()], path.unique[partial]
    first, late = run.evals[i][0], [r for r in run.evals[i] if r["step"] > 0.3 * run.cfg.run.steps]
    unrounded = {
        "unique_mean": path.unique.mean(),
        "unique_stage1": path.unique[stage_1].mean(),
        "unique_stage2": path.unique[~stage_1].mean(),
        "severe_share": severe.mean(),
        "loss_min": losses.min(),
        "loss_max": losses.max(),
        "loss_mean": losses.mean(),
        "loss_final": losses[-1],
        "partial_unique_mean": cut_unique.mean(),
        "partial_severe_share": severe[partial].mean(),
        "partial_loss_mean": cut_losses.mean(),
        "partial_loss_min": cut_losses.min(),
        "partial_loss_max": cut_losses.max(),
        "start_loss": first[TRACK_LOSS],
        "start_entropy": first[TRACK_ENTROPY],
        "start_logit_std": first[LOGIT_STD],
        "late_entropy": np.mean([row[TRACK_ENTROPY] for row in late]),
        "late_logit_std": np.mean([row[LOGIT_STD] for row in late]),
    }
    return {name: float(f"{value:.5g}") for name, value in unrounded.items()} | {
        "evaluations": len(path.steps),
        "unique_min": int(path.unique.min()),
        "unique_max": int(path.unique.max()),
        "partial_unique_min": int(cut_unique.min()),
        "partial_unique_max": int(cut_unique.max()),
        "unique_final": int(path.unique[-1]),
        "first_severe": trajectory.first_severe(path),
        "first_complete": trajectory.first_complete(path),
        "transit": transit,
        "severe_after_transit": 0 if transit is None else int(severe[path.steps > transit].sum()),
        "recoveries": sum(e.recovery is not None for e in episodes),
        "count_recoveries": sum(e.count_only is not None for e in episodes),
    }


def milestones(base: int, run: RunConfig, evals: list[dict]) -> dict[str, dict]:
    """The evaluations nearest to the report's milestones, after step 0, by the report's step.

    A run of `base` steps stands for the report's of 1000: milestones are at the same share of it.
    """
    length, every = run.steps * LENGTHS[0] // base, run.eval_every
    at, nearest = {row["step"]: row for row in evals}, {}
    for reported in MILESTONES.get(length, ()):
        step = round(reported * run.steps / length / every) * every
        step = min(max(every, step), run.steps)
        nearest[str(reported)] = {
            "step": step,
            "unique": at[step][DISTINCT],
            "loss": float(f"{at[step][LOSS]:.5g}"),
            "logit_std": float(f"{at[step][LOGIT_STD]:.3g}"),
        }
    return nearest


def start_law(df: pd.DataFrame) -> tuple[str, bool]:
    """The highest loss is that of the start: ln V + s^2 / 2 for Gaussian logits."""
    std, loss = df["numbers/start_logit_std"].mean(), df["numbers/start_loss"].mean()
    law = df["uniform"].iloc[0] + std**2 / 2
    return f"{loss:.2f} at the start, law {law:.2f} (s = {std:.3f})", abs(loss - law) < 0.1


def partial_log(df: pd.DataFrame) -> tuple[str, bool]:
    """452 points of a run that is evaluated every 5 steps."""
    share = 452 * 5 / int(df["steps"].iloc[0])
    return f"452 evaluations every 5 steps end at step 2260, {share:.0%} of the run", share < 0.5


def recovery_of_count(df: pd.DataFrame) -> tuple[str, bool]:
    """The recovery at step 1000: a higher count, as the loss rises and the logits are gone."""
    before, at = (df.filter(like=f"numbers/milestones/{t}/") for t in (500, 1000))
    before.columns = at.columns = [name.rpartition("/")[2] for name in at]
    left = (at["logit_std"] / df["numbers/start_logit_std"]).max()
    rises = (at["unique"] > before["unique"]).all() and (at["loss"] > before["loss"]).all()
    counts = f"{before['unique'].mean():.0f} to {at['unique'].mean():.0f} distinct"
    ours = f"{counts}, loss {at['loss'].mean():.2f}, at most {left:.2%} of the first spread left"
    return ours, bool(rises and left < DEAD)


def evaluations(df: pd.DataFrame) -> tuple[str, bool]:
    counted = df["numbers/evaluations"]
    return f"{counted.iloc[0]:.0f}", set(counted) == {200}


def own(claim: str, reported: str, ours: str, agrees: bool) -> Entry:
    """Something that the report says of its own numbers."""
    return Entry(claim, reported, kind=ARITHMETIC, judge=lambda df: (ours, agrees))


def large_weights(df: pd.DataFrame) -> tuple[str, bool]:
    """Nearly all in the embedding, as many as coupled decay alone leaves of N(0, 1) entries."""
    counted, predicted = df["above_1.1/all"], df["above_1.1/predicted"].iloc[0]
    share = df["above_1.1/embedding"].sum() / counted.sum()
    ours = f"{counted.mean():,.0f}, {share:.1%} in the embedding; predicted {predicted:,.0f}"
    return ours, bool((abs(counted / predicted - 1) < 0.02).all() and share > 0.98)


ENTRIES = (
    *(Entry(f"{claim}, {steps} steps", value, digits, steps, f"numbers/{column}", possible)
      for claim, column, digits, possible, values in MEASUREMENTS
      for steps, value in zip(LENGTHS, values, strict=True) if value is not None),
    *(Entry(f"distinct at step {step} of {length}", count, 0, length,
            f"numbers/milestones/{step}/unique", COUNT)
      for length, counts in MILESTONES.items() for step, count in counts.items()),
    Entry("highest loss is that of the start", "10.93 to 11.01", kind=EXPLAINED, judge=start_law),
    Entry("weights outside [-1, 1]", "981,223", kind=EXPLAINED, judge=large_weights),
    *(Entry(f"452 evaluations of the {steps}-step run", "452", steps=steps, kind=EXPLAINED,
            judge=partial_log) for steps in LENGTHS[1:]),
    *(Entry(f'"RECOVERY!", step 1000 of {steps}', f"5 to {MILESTONES[steps][1000]}", steps=steps,
            kind=EXPLAINED, judge=recovery_of_count) for steps in LENGTHS[1:]),
    Entry("evaluations of the 1000-step run, every 5", "200", kind=BUILT, judge=evaluations),
    own("average of all = average of stage 1, longer runs", "28.6 = 28.6, 26.4 = 26.4",
        'equal only if stage 2 is missing; stage 2 is "MUCH WORSE"', False),
    own("average of the 1000-step run from its stages", "9.4", "(15.1 + 3.6) / 2 = 9.35", True),
    own("severe share of the 10000-step run", "0.9 % and 0.7 %",
        f"3 / 452 = {3 / 452:.2%}; 4 / 452 = {4 / 452:.2%}", False),
    own('"ALL runs collapse to 2-6 unique tokens"', "2-6", "its table: 8, 5, 6", False),
    own('first collapse "step 140"', "140", "its rule (fewer than 3) is met at 130", False),
    own('stage 2 worse "in all runs"', "three", "stage 2 is given for one run", False),
    own("stage-1 average 1.9 and 1.7 times that of 1000 steps", "1.9x, 1.7x",
        f"{28.6 / 15.1:.2f}, {26.4 / 15.1:.2f}", True),
    own("decay of stage 2 prevents the early collapse", "28.5 % to 0.7 %",
        "the collapse at step 140 comes before stage 2 (step 501)", False),
    Entry("lines of the logs", "1133, 13143, 23000+", steps=0),
)  # fmt: skip


def recompute(df: pd.DataFrame) -> list[Line]:
    """Every entry, from the rows of one study of `reproduce_report`.

    Numbers of another size than the report's are not checkable by it.
    """
    full = is_full_size(df)
    return [judge(entry, df[df["steps"] == entry.steps], full) for entry in ENTRIES]


def is_full_size(df: pd.DataFrame) -> bool:
    """Whether the models are as large as the report's."""
    first = df["config"].iloc[0]["model"]
    return (first["d_model"], first["vocab_size"]) == (256, 50257)


def judge(entry: Entry, runs: pd.DataFrame, full: bool) -> Line:
    """One entry, from the rows of its length."""
    if entry.kind == ARITHMETIC:
        ours, agrees = entry.judge(runs)
        return Line(entry, ours, CONSISTENT if agrees else CONTRADICTORY)
    if not full or not len(runs):
        return Line(entry, "", UNKNOWN)
    if entry.judge is not None:
        ours, agrees = entry.judge(runs)
        good = "holds" if entry.kind == BUILT else EXPLAINED
        return Line(entry, ours, good if agrees else DIFFERENT)
    values = runs[entry.column].dropna()
    ours, spec = stats.interval(values), f".{entry.digits}f"
    if len(values) < 2:
        return Line(entry, ours.text(spec) or "never", UNDECIDED if len(values) else DIFFERENT)
    low, high = stats.prediction_interval(values)
    ours = replace(ours, low=low, high=high).text(spec)
    possible = entry.possible[1] - entry.possible[0]
    if high - low > possible / 2:
        return Line(entry, ours, UNDECIDED)
    half = 0.5 * 10**-entry.digits if entry.digits else 0.0  # of the rounding; counts have none
    inside = low - half <= entry.reported <= high + half
    return Line(entry, ours, REPRODUCED if inside else DIFFERENT)


def counts(results: list[Line]) -> dict[str, dict[str, int]]:
    """How many entries of each kind have each status."""
    tally = Counter((line.entry.kind, line.status) for line in results)
    kinds = dict.fromkeys(line.entry.kind for line in results)
    return {k: {s: n for (kind, s), n in tally.items() if kind == k} for k in kinds}


def by_length(df: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """The rows by the length of the report's run that they stand for: where its step 500 lies."""
    share = df["numbers/milestones/500/step"] / df["steps"]
    length = share.map(lambda x: min(LENGTHS, key=lambda steps: abs(500 / steps - x)))
    return {steps: df[length == steps] for steps in LENGTHS}


def beside(df: pd.DataFrame) -> list[Table]:
    """The report's numbers and its milestones, each beside ours, whatever the size of the model."""
    runs = by_length(df)
    table_rows = []
    for claim, column, digits, _, values in MEASUREMENTS:
        table_rows.append([claim])
        for steps, value in zip(LENGTHS, values, strict=True):
            cells, spec = ["", ""], f".{digits}f"
            if value is not None:
                ours = runs[steps][f"numbers/{column}"] if len(runs[steps]) else []
                cells = [f"{value:{spec}}", stats.interval(ours).text(spec)]
            table_rows[-1] += cells
    heads = [""]
    for steps, ours in runs.items():
        heads += [f"report, {steps}", f"ours, {ours['steps'].iloc[0]}" if len(ours) else "ours"]
    note = "Ours: mean [95 % t interval] over seeds. First 452: up to step 2260."
    return [Table("The report's numbers", heads, table_rows, note), milestone_table(runs)]


def milestone_table(runs: dict[int, pd.DataFrame]) -> Table:
    """Distinct predictions at the report's milestones, and what stands behind ours."""
    table_rows = []
    for length, ours in runs.items():
        for step, reported in MILESTONES[length].items() if len(ours) else ():
            at = f"numbers/milestones/{step}/"
            cells = [
                stats.interval(ours[at + key]).text(spec)
                for key, spec in (("unique", ".0f"), ("loss", ".2f"), ("logit_std", ".4f"))
            ]
            where = [str(int(ours[name].iloc[0])) for name in ("steps", at + "step")]
            table_rows.append([*where, str(reported), *cells])
    heads = ["run of", "step", "distinct, report", "ours", "held-out loss", "spread of the logits"]
    note = "Where the loss is ln V and the logits have no spread, near ties are counted."
    return Table("Milestones", heads, table_rows, note)


def table(results: list[Line]) -> Table:
    """The ledger as a table."""
    cells = [[x.entry.claim, x.entry.as_reported, x.ours, x.status] for x in results]
    note = "; ".join(
        f"{kind}: {', '.join(f'{n} {status}' for status, n in by_status.items())}"
        for kind, by_status in counts(results).items()
    )
    return Table("Ledger", ["claim", "reported", "ours [one more run]", "status"], cells, note)


def main() -> None:
    print(text_table(table(recompute(studies.FULL.frame("reproduce_report")))))


if __name__ == "__main__":
    main()
