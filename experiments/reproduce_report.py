"""Does the report's recipe, to the letter, give the report's numbers?

Its model, data order, optimiser, schedules and tracking (every 5 steps, on the first training
batch) at 1000, 10,000 and 20,000 steps. Beside its Section 5 and its milestones stand ours, and the
ledger of its numeric claims, each recomputed (`lab/ledger.py`). `--preset quick`, a smaller model
on shuffled text at 200, 2000 and 4000 steps, can agree with the pattern, not with the numbers.

    python -m experiments.reproduce_report
    python -m experiments.reproduce_report --preset report --seeds 0-4 \
        --set data.corpus=text:books.train.txt.xz --set data.validation=text:books.validation.txt.xz

Goes when the ledger, on rows to the letter, has no number left that is not decided.
"""

import functools

import numpy as np
import pandas as pd

from bitnet_jax import shrink
from bitnet_jax.config import Config
from bitnet_jax.fields import UserError
from bitnet_jax.metrics import DISTINCT, ENTROPY, LOGIT_STD, LOSS
from experiments.lab import ledger, rows, trajectory
from experiments.lab.arms import Arm, Request, train_arms
from experiments.lab.claims import Claim
from experiments.lab.exhibits import CORE
from experiments.lab.experiment import experiment
from experiments.lab.measures import large_weights
from experiments.lab.stats import NotEnough, each, interval, of
from experiments.lab.studies import BOOKS, BOOKS_UNSTRIPPED, FULL, TRACKED

COUPLED = "coupled"
ARMS = (Arm(COUPLED),)
LARGE = (("above_1.1/all", "|w| > 1.1", ",.0f"), ("above_1.1/predicted", "predicted", ",.0f"))
EARLY = {5: (72, 103), 50: (46, 88), 100: (6, 11)}  # distinct predictions of our runs, by step
STAGES = {1: (13, 20), 2: (3.2, 5.1)}  # their means, by stage
MEAN_LOSS, LAST_LOSS = 9.60, 9.92  # the report's, in training, of 1000 steps


def train(request: Request, arms: list[Arm], measure) -> list[dict]:
    base = request.cfg.run.steps
    return train_arms(request, arms, functools.partial(measure, base=base))


def check(cfg: Config) -> None:
    if cfg.data.track != "first_batch":
        what = "the report tracks its first training batch; use first_batch"
        raise UserError(f"data.track={cfg.data.track}: {what}")


def measure(run, base: int) -> dict[str, list]:
    """What the report tells of a run, in a study whose shortest run has `base` steps."""
    return {
        "numbers": ledger.measure(run, base),
        "sample": [replicate["continuations"][0] for replicate in run.summary["replicates"]],
        "above_1.1": large_weights(run),
    }


def shortest(df):
    """Rows of the shortest length; raises NotEnough without it or with too few of its seeds."""
    runs = ledger.by_length(df)[ledger.LENGTHS[0]]
    each(runs, COUPLED, LOSS)
    return of(runs, COUPLED)


def ratio(df, column: str, other: str):
    runs = shortest(df)
    return runs[column] / runs[other].astype(float)


def longer(df):
    """Rows of the longer runs; raises NotEnough for fewer of a length than a claim needs."""
    _, *longer_runs = ledger.by_length(df).values()
    trained = [runs for runs in longer_runs if len(runs)]
    if not trained:
        raise NotEnough("no longer runs")
    for runs in trained:
        each(runs, COUPLED, LOSS)
    return pd.concat(trained)


def half_steps(df) -> np.ndarray:
    """Step at which the logit spread of each seed is halved, over the predicted one; NaN: never."""
    config = df["config"].iloc[0]
    bound = config["model"]["d_model"] ** -0.5
    predicted = shrink.half_spread_step(*rows.schedule(config), bound)
    spreads = [(np.array(c["step"]), np.array(c[LOGIT_STD]) / c[LOGIT_STD][0]) for c in df["curve"]]
    measured = np.array([trajectory.half_step(*spread) for spread in spreads], float)
    return measured / (np.nan if predicted is None else predicted)


def count_alone_recovers(df) -> bool:
    """Whether the logits of every longer run are gone where its count has risen."""
    runs, (before, at) = longer(df), (f"numbers/milestones/{step}/" for step in (500, 1000))
    rises = runs[at + "unique"] >= 3 * runs[before + "unique"]
    gone = runs[at + "logit_std"] < 1e-4 * runs["numbers/start_logit_std"]
    return bool((rises & gone & (abs(runs[at + "loss"] - runs["uniform"]) < 0.001)).all())


def never_below(df) -> bool:
    shortest(df)
    return bool(df["numbers/transit"].isna().all() and (df[LOSS] - df["unigram"] > 0.4).all())


def losses_around(df) -> bool:
    """Whether both losses of the report lie between the lowest and the highest of ours."""
    means, lasts = (shortest(df)[f"numbers/loss_{name}"] for name in ("mean", "final"))
    return all(x.min() <= y <= x.max() for x, y in ((means, MEAN_LOSS), (lasts, LAST_LOSS)))


def lie_in(df, column: str, ranges: dict[int, tuple[float, float]]) -> bool:
    """Whether a number of every shortest run lies in its range, by step or by stage."""
    runs = shortest(df)
    return all(runs[column.format(k)].between(*ends).all() for k, ends in ranges.items())


def flat(df) -> bool:
    shortest(df)
    return bool((df["numbers/late_entropy"] > 0.9 * df["uniform"]).all())


CLAIMS = (
    Claim(
        "never",
        "no run is below the loss of word frequencies at any evaluation; each ends 0.4 nats above",
        never_below,
        *(FULL, BOOKS, BOOKS_UNSTRIPPED),
    ),
    Claim(
        "stages",
        "as reported, the shortest runs predict less than half as many distinct tokens in stage 2",
        lambda df: bool((ratio(df, "unique_stage2", "unique_stage1") < 0.5).all()),
        *(FULL, BOOKS, BOOKS_UNSTRIPPED),
    ),
    Claim(
        "flat",
        "past 30 % of every run predictions are nearly uniform: mean entropy over 90 % of ln V",
        flat,
        *(FULL, BOOKS, BOOKS_UNSTRIPPED),
    ),
    Claim(
        "early",
        "distinct predictions at steps 5, 50, 100: 72-103, 46-88, 6-11; the report has 95, 70, 6",
        lambda df: lie_in(df, "numbers/milestones/{}/unique", EARLY),
        FULL,
    ),
    Claim(
        "means",
        "mean distinct predictions of stages 1 and 2: 13-20 and 3.2-5.1; the report has 15.1, 3.6",
        lambda df: lie_in(df, "numbers/unique_stage{}", STAGES),
        FULL,
    ),
    Claim(
        "large",
        "after 1000 steps the weights above 1.1 are those that decay alone leaves, within 0.1 %",
        lambda df: interval(ratio(df, "above_1.1/all", "above_1.1/predicted")).within(0.999, 1.001),
        FULL,
    ),
    Claim(
        "half",
        "the logit spread of 1000 steps is halved within 6 % of the predicted step, nothing fitted",
        lambda df: bool((abs(half_steps(shortest(df)) - 1) < 0.06).all()),
        FULL,
    ),
    Claim(
        "recovery",
        "longer runs: from step 500 to 1000 the count triples, the logits vanish, the loss is ln V",
        count_alone_recovers,
        *(FULL, BOOKS),
    ),
    Claim(
        "losses",
        "the report's training losses of 1000 steps, mean 9.60 and last 9.92, lie among ours",
        losses_around,
        FULL,
    ),
)


def show(df, exhibits) -> None:
    exhibits.tables += ledger.beside(df)
    if ledger.is_full_size(df):
        exhibits.tables.append(ledger.table(ledger.recompute(df)))
    exhibits.table(df, (*CORE, *LARGE))
    for steps in sorted(set(df["steps"])):
        for key in (DISTINCT, LOSS, ENTROPY):
            exhibits.curves(df, key, steps=steps)


if __name__ == "__main__":
    quick = (*TRACKED, "run.steps=200", "run.eval_every=10")
    experiment(
        __doc__, ARMS, measure, CLAIMS, show, quick=quick, lengths="1,10,20", check=check,
        train=train,
    )  # fmt: skip
