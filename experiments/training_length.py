"""Is there a sweet spot at 10,000 cycles?

The report's fourth recommendation. Runs of T = 1, 10 and 20 times `run.steps` (1000, 10,000 and
20,000 in `--preset report`), coupled and decoupled. Their schedules are tied to T; the warm-up of
0.375 `run.steps` is not. Compared: at the last steps; at equal steps, where the longer run is the
shorter one on another schedule, with the same seed and batches; and at equal summed learning rate.

The report's averages of 10,000 and 20,000 steps are of logs that end at step 2260. The same average
is made here of a log that is cut there: of all of the shortest run, of a small part of the longest.

    python -m experiments.training_length              # 3 min on 2 cores

Goes when a study of schedules covers these lengths.
"""

import functools
import itertools

import numpy as np

from bitnet_jax import charts, shrink
from bitnet_jax.config import Config
from bitnet_jax.fields import UserError
from bitnet_jax.metrics import DISTINCT, LOSS, MUTUAL_INFORMATION, TRAIN_LOSS, metric
from experiments.lab import rows
from experiments.lab.arms import Arm, Request, train_arms
from experiments.lab.claims import Claim
from experiments.lab.exhibits import PREDICTORS, signed
from experiments.lab.experiment import experiment
from experiments.lab.stats import NotEnough, ended, interval, mean, of, severe_share, values
from experiments.lab.studies import QUICK, SMALL

COUPLED, DECOUPLED = KINDS = ("coupled", "decoupled")
ARMS = tuple(Arm(kind, kind) for kind in KINDS)
TIMES = (1, 10, 20)  # lengths in units of run.steps
WARMUP = 0.375  # of run.steps: 375 of 1000
CUT = 2.26  # run.steps at which the report's logs of the longer runs end
KEYS = (LOSS, MUTUAL_INFORMATION, DISTINCT)


def train(request: Request, arms: list[Arm], measure) -> list[dict]:
    """Rows of runs whose warm-up does not depend on their length."""
    base = request.cfg.run.steps
    fixed = {} if "warmup_steps" in request.hyper else {"warmup_steps": round(WARMUP * base)}
    named = [Arm(arm.name, arm.recipe, **fixed) for arm in arms]
    return train_arms(request, named, functools.partial(measure, base=base))


def check(cfg: Config) -> None:
    if cfg.run.steps % cfg.run.eval_every:
        run = cfg.run
        raise UserError(f"run.eval_every={run.eval_every}: must divide run.steps={run.steps}")


def measure(run, base: int) -> dict[str, list]:
    """`at`: numbers at the ends of the shorter runs; `cut_log`: means over a log that is cut."""
    steps, trained = run.steps, np.array([row["step"] for row in run.trains[0]])
    at = np.flatnonzero(np.isin(steps, [times * base for times in TIMES]))
    columns = {key: run.column(key)[:, at] for key in KEYS}
    distinct_RN = run.column(DISTINCT)[:, (steps > 0) & (steps <= CUT * base)]
    losses_RN = run.column(TRAIN_LOSS, "train")[:, trained <= CUT * base]
    return {
        "at": [
            {"step": steps[at].tolist()} | {key: x_RN[i].tolist() for key, x_RN in columns.items()}
            for i in range(len(run.replicates))
        ],
        "cut_log": [
            {"unique": float(distinct_N.mean()), "train_loss": float(losses_N.mean())}
            for distinct_N, losses_N in zip(distinct_RN, losses_RN, strict=True)
        ],
    }


def lengths(df) -> list[int]:
    """The shortest length and its multiples; raises NotEnough where one is not there."""
    steps = [times * int(df["steps"].min()) for times in TIMES]
    if not set(steps) <= set(df["steps"]):
        raise NotEnough(f"lengths {sorted(set(df['steps']))}")
    return steps


def at_step(df, arm: str, steps: int, step: int, key: str):
    """A number of each seed of the runs of length `steps`, at the end of shorter ones."""
    runs = of(df, arm, steps)
    return runs.apply(lambda row: row[f"at/{key}"][row["at/step"].index(step)], axis=1)


def sum_lr(row) -> np.ndarray:
    """Summed learning rate after 0 .. T steps of a row's run."""
    return shrink.summed_rate(*rows.schedule(row["config"]))


def at_sum_lr(df, arm: str, steps: int, total: float, key: str):
    """A number of each seed where the summed learning rate is `total`, between evaluations."""
    return of(df, arm, steps).apply(
        lambda row: np.interp(total, sum_lr(row)[row["curve"]["step"]], row["curve"][key]), axis=1
    )


def longer(df, arm: str, column: str, short: int, long: int):
    """A number of the longer runs less that of the shorter ones, both at their ends."""
    return interval(values(df, arm, column, long) - values(df, arm, column, short))


def same_step(df, arm: str, key: str, short: int, long: int):
    """The same where the shorter ones end: schedules alone differ."""
    return interval(at_step(df, arm, long, short, key) - at_step(df, arm, short, short, key))


def same_rate(df, arm: str, key: str, short: int, long: int):
    """The same where the shorter ones' learning rates sum to as much."""
    total = sum_lr(of(df, arm, short).iloc[0])[-1]
    return interval(at_sum_lr(df, arm, long, total, key) - at_sum_lr(df, arm, short, total, key))


def falls(df) -> bool:
    return all(longer(df, DECOUPLED, LOSS, *pair).below for pair in itertools.pairwise(lengths(df)))


def middle_is_lowest(df) -> bool:
    short, mid, long = lengths(df)
    before, after = (longer(df, COUPLED, LOSS, *pair) for pair in ((short, mid), (mid, long)))
    some = any(ended(df, COUPLED, steps).any() for steps in lengths(df))
    return before.below and after.above and not some


def shortest_is_most_distinct(df) -> bool:
    short, *others = lengths(df)
    return all(
        longer(df, kind, column, short, long).below
        for kind in KINDS
        for column in ("unique_stage1", LOSS)
        for long in others
    )


CLAIMS = (
    Claim("decoupled", "decoupled, every longer run ends with a lower loss", falls, QUICK),
    Claim(
        "coupled",
        "coupled, no run of any length has learned; those of the middle length end lowest",
        middle_is_lowest,
        QUICK,
    ),
    Claim(
        "distinct",
        "the shortest run has the most distinct predictions in stage 1, and the highest loss",
        shortest_is_most_distinct,
        QUICK,
    ),
    Claim(
        "schedule",
        "coupled runs of the two longer lengths differ by 0.2 nats at the same step, by schedule",
        lambda df: same_step(df, COUPLED, LOSS, *lengths(df)[1:]).within(0.2, np.inf),
        QUICK,
    ),
)


def show(df, exhibits) -> None:
    table_rows = []
    for kind, steps in itertools.product(KINDS, lengths(df)):
        numbers = ("unique_stage1", "unique_stage2", "cut_log/unique")
        cells = [mean(df, kind, key, steps).text(".1f") for key in numbers]
        severe = severe_share(df, kind, steps).text(".1%")
        train_loss = mean(df, kind, "cut_log/train_loss", steps).text()
        table_rows.append([f"{kind}, {steps} steps", *cells, severe, train_loss])
    heads = ["distinct, stage 1", "stage 2", "cut log", "severe", "cut log: training loss"]
    exhibits.grid("The report's statistics", ["run", *heads], table_rows)
    exhibits.table(df, KEYS)
    ways = {"at the ends": longer, "at the same step": same_step, "at equal rates": same_rate}
    table_rows = [
        [f"{kind}, {long} - {short}",
         *(signed(way(df, kind, key, short, long), metric(key).format)
           for key in (LOSS, DISTINCT) for way in ways.values())]
        for kind, (short, long) in itertools.product(KINDS, itertools.combinations(lengths(df), 2))
    ]  # fmt: skip
    heads = [f"{name} {way}" for name in ("loss", "distinct") for way in ways]
    note = "Where the shorter run ends; rates: at equal summed learning rate, between evaluations."
    exhibits.grid("Longer less shorter", ["runs", *heads], table_rows, note)
    marks = tuple((name, df[name].iloc[0]) for name in PREDICTORS)
    for key in (LOSS, DISTINCT):
        panels = []
        for kind in KINDS:
            series = [
                charts.Series(f"T = {row['steps']}", row["curve"]["step"], row["curve"][key])
                for _, row in df[df["arm"] == kind].iterrows()
            ]
            title, references = f"{metric(key).title}, {kind}", marks if key == LOSS else ()
            panels.append(charts.Panel(series, title, metric(key).unit, references=references))
        exhibits.panels(panels, "One line per seed.")


if __name__ == "__main__":
    quick = (*SMALL, "run.steps=40", "run.eval_every=5")
    experiment(
        __doc__, ARMS, measure, CLAIMS, show, seeds="0-2", quick=quick, lengths="1,10,20",
        check=check, train=train,
    )  # fmt: skip
