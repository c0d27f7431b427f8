"""Does triage name faults that it was not developed on, and stay silent on healthy runs?

Eighteen faults that no test and no threshold had seen, one run each, on a text, a vocabulary, a
width and seeds of their own; 42 healthy runs of four sizes, three vocabularies and two texts at
learning rates within 3 times of the recipe's. Written down before the first run:

- Right is, for a fault with a detector, that triage names one of the causes listed first. Eleven
  have no detector: any alarm is found, silence is missed. An alarm is a verdict of alarm at the
  last step, or any cause of triage. A mechanism or an identity that is named first and is not in
  the list is a wrong name.
- A fault does harm when its held-out loss lies above the 95 % prediction interval of one more
  healthy run of its program. Of others nothing is asked; the table has them all.
- False alarms: alarms of healthy runs. Verdicts of all are judged; triage looks at the first seed
  of each rate and size, because it costs more than the run.
- Run once, faults first, nothing changed afterwards.

The text is the King James Bible of Debian's bible-kjv (4.38), public domain:

    bible -f gen1:1-rev22:21 | sed 's/^[^ ]* //' > runs/kjv.txt
    python -m experiments.held_out_faults
"""

import dataclasses
from collections import Counter

from bitnet_jax import signatures, verdict
from bitnet_jax.metrics import HELD_OUT_LOSS
from experiments.lab import arms, planted, studies
from experiments.lab.arms import Arm, Group, Request, train_group
from experiments.lab.claims import Claim
from experiments.lab.exhibits import VERDICT
from experiments.lab.experiment import experiment
from experiments.lab.faulty import published_rates as rates
from experiments.lab.planted import FAULTS, PLANTED, planted_arm
from experiments.lab.stats import SEEDS, NotEnough, each, prediction_interval
from experiments.lab.studies import KJV, KJV_STDLIB

HEALTHY, SLOW = "healthy", "rate a third"
RATES = {"a third": 1 / 3, "as published": 1.0, "3 times": 3.0}
# Width, vocabulary, corpus.
OTHER_SIZES = (48, 2048, None), (64, 512, "stdlib"), (128, 1024, "stdlib")


def other_size(rate: str, width: int, vocab: int, corpus: str | None) -> Arm:
    fields = {"model.d_model": width, "model.d_ff": 2 * width, "model.vocab_size": vocab,
              "data.tokenizer": f"bpe:{vocab}"}  # fmt: skip
    fields |= {"data.corpus": corpus} if corpus else {}
    name = f"{HEALTHY}, {width} wide, {vocab} tokens, rate {rate}"
    return Arm(name, recipe="published", fields=fields, **rates(RATES[rate]))


CONTROLS = [planted_arm(f"{HEALTHY}, rate {rate}", **rates(x)) for rate, x in RATES.items()]
OTHERS = [other_size(rate, *size) for size in OTHER_SIZES for rate in RATES]
ARMS = (*(arm for arm, _, _ in FAULTS.values()), *CONTROLS, *OTHERS)
CONTROL = "healthy, rate as published"


def train(request: Request, arms_: list[Arm], measure) -> list[dict]:
    """Rows of the faults and of their controls, one program, then of the other healthy runs."""
    wanted, rows = arms.chosen(request, arms_), []
    arms.check_free(request, wanted)
    if any(arm.seams is PLANTED for arm in wanted):
        with planted.in_place():
            rows += train_group(request, planted_group(request, wanted), measure)
    short = dataclasses.replace(request, only=(), recipes=(), seeds=request.seeds[:SEEDS])
    others = [arm for arm in wanted if arm.seams is not PLANTED]
    for group in arms.groups(short, others) if others else ():
        rows += train_group(short, group, measure)
    return rows


def planted_group(request: Request, wanted: list[Arm]) -> Group:
    """Each fault from its seed and each control from all, as one program."""
    replicates, bases = [], []
    for arm in (arm for arm in wanted if arm.seams is PLANTED):
        seeds = [FAULTS[arm.name][2]] if arm.name in FAULTS else request.seeds
        cfg, reps, base = arms.replicates(dataclasses.replace(request, seeds=seeds), arm, 1)
        replicates += reps
        bases += [base] * len(reps)
    return Group(cfg, arms.with_same_extra(replicates), bases, PLANTED)


def is_healthy(df):
    return df["arm"].str.startswith(HEALTHY)


def is_alarm(row) -> bool:
    """Whether the verdict at the last step is an alarm, or triage names a cause."""
    return verdict.LABELS[row[VERDICT]].severity == verdict.ALARM or bool(row["causes"])


def harmful(df):
    """Rows of faults whose loss one more control would not have; NotEnough without any."""
    controls = each(df, CONTROL, HELD_OUT_LOSS)
    rows = df[~is_healthy(df) & (df[HELD_OUT_LOSS] > prediction_interval(controls)[1])]
    if not len(rows):
        raise NotEnough("no fault does harm")
    return rows


def first(row) -> str:
    return row["causes"][0]["name"] if row["causes"] else "none"


def outcome(row) -> str:
    """Of a fault: named, wrong name, found (an alarm that names no wrong mechanism) or missed."""
    if first(row) in FAULTS[row["arm"]][1]:
        return "named"
    if KINDS.get(first(row), signatures.SYMPTOM) != signatures.SYMPTOM:
        return "wrong name"
    return "found" if is_alarm(row) else "missed"


def outcomes(df, with_detector: bool) -> Counter:
    """How many harmful faults came out in which way; NotEnough without any."""
    rows = harmful(df)
    rows = rows[[bool(FAULTS[arm][1]) == with_detector for arm in rows["arm"]]]
    if not len(rows):
        raise NotEnough("no such fault does harm")
    return Counter(rows.apply(outcome, axis=1))


def false_alarms(df):
    """Healthy runs that raise an alarm; NotEnough without healthy runs."""
    rows = df[is_healthy(df)]
    if not len(rows):
        raise NotEnough("no healthy run")
    return rows[rows.apply(is_alarm, axis=1)]


def are_slow(df, count: int, of: int) -> bool:
    """Whether there are so many false alarms of so many runs, all at a third of the rate."""
    alarms = false_alarms(df)
    slow = alarms["arm"].str.endswith(SLOW).all()
    return (len(alarms), int(is_healthy(df).sum())) == (count, of) and bool(slow)


KINDS = {cause.name: cause.kind for cause in signatures.CAUSES}
CLAIMS = (
    Claim(
        "named",
        "triage names first 2 of 5 harmful held-out faults of which it has a detector",
        lambda df: outcomes(df, with_detector=True) == Counter(named=2, found=1, missed=2),
        KJV,
    ),
    Claim(
        "found",
        "5 of 10 harmful held-out faults without a detector raise an alarm, and none a wrong name",
        lambda df: outcomes(df, with_detector=False) == Counter(found=5, missed=5),
        KJV,
    ),
    Claim(
        "silent",
        "8 of 24 healthy runs raise an alarm, each at a third of the published learning rate",
        lambda df: are_slow(df, 8, of=24),
        KJV,
    ),
    Claim(
        "beside",
        "3 of 18 healthy runs on Python's library do, each at a third of the published rate",
        lambda df: are_slow(df, 3, of=18),
        KJV_STDLIB,
    ),
)


def show(df, exhibits) -> None:
    table_rows = []
    for _, row in df[~is_healthy(df)].iterrows():
        harm = row.name in harmful(df).index
        right = " or ".join(FAULTS[row["arm"]][1]) or "any alarm"
        cells = [row[VERDICT], first(row), "yes" if harm else "no", outcome(row)]
        table_rows.append([row["arm"], right, f"{row[HELD_OUT_LOSS]:.3f}", *cells])
    heads = ["fault", "right", "held-out loss", "verdict", "first cause", "harm", "outcome"]
    note = "Harm: a loss above the 95 % prediction interval of one more healthy run."
    if table_rows:
        exhibits.grid("Held-out faults, one run each", heads, table_rows, note)
    table_rows = []
    for arm, rows in df[is_healthy(df)].groupby("arm", sort=False):
        alarms = [x for x in rows[VERDICT] if verdict.LABELS[x].severity == verdict.ALARM]
        named = [x[0]["name"] if x else "" for x in rows["causes"] if x is not None]
        losses = f"{rows[HELD_OUT_LOSS].min():.2f} to {rows[HELD_OUT_LOSS].max():.2f}"
        cells = [str(len(rows)), losses, f"{rows['unigram'].mean():.2f}", ", ".join(alarms) or "0",
                 str(len(named)), ", ".join(filter(None, named)) or "0"]  # fmt: skip
        table_rows.append([arm, *cells])
    heads = ["", "runs", "held-out loss", "unigram", "alarms", "seen by triage", "causes"]
    exhibits.grid("Healthy runs", heads, table_rows)


if __name__ == "__main__":
    experiment(
        __doc__,
        ARMS,
        planted.triage,
        CLAIMS,
        show,
        seeds="11-15",
        quick=studies.HELD_OUT,
        train=train,
    )
