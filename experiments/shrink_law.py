"""Does coupled decay shrink the logits as theory says?

Theory (`bitnet_jax/shrink.py`), nothing fitted: where the loss gradient of a weight is small,
coupled decay moves it towards 0 by the learning rate at every update. So the spread of the logits
falls as (1 - S / b)^1.5, with S the summed learning rate and b the bound of the head's
initialisation, and is halved at a step that depends on the warm-up, not on the amount of decay.
Embedding entries without gradient follow a scalar Adam recursion. Measured: the coupled recipe, it
with other warm-ups and other amounts of decay, and the decoupled one. The law is one of the onset:
it says nothing of what the gradient makes of the logits later.

    python -m experiments.shrink_law --seeds 0-4       # 10 min on 2 cores
    python -m experiments.shrink_law --preset report --seeds 0-4 --set data.tokenizer=bpe:2048 \
        --set model.vocab_size=none --set model.d_model=64 --set model.n_layers=2 \
        --set model.d_ff=128 --set run.eval_every=10 --set run.save_every=1000 \
        --set data.corpus=text:books.train.txt.xz --set data.validation=text:books.validation.txt.xz

Goes when a law of the critical decay covers onset and end.
"""

import numpy as np

from bitnet_jax import charts, shrink
from bitnet_jax.config import Config
from bitnet_jax.fields import UserError
from bitnet_jax.metrics import LOGIT_STD, LOSS, MUTUAL_INFORMATION, UPDATE_SHARE
from experiments.lab.arms import Arm
from experiments.lab.claims import Claim
from experiments.lab.experiment import experiment
from experiments.lab.measures import large_weights
from experiments.lab.stats import difference, each, ended, interval, of
from experiments.lab.studies import BOOKS, QUICK, SMALL
from experiments.lab.trajectory import half_step

COUPLED, DECOUPLED = "coupled", "decoupled"
SHORT, LONG = "warm-up T/40", "warm-up 2T/5"
LESS, LEAST, MORE = "decay 0.01", "decay 0.001", "decay 1"
LAWFUL = (COUPLED, SHORT, LONG, MORE)  # where decay outweighs the gradient
GROUPS = ("embedding", "head", "matrix")
POINTS = 50  # of a curve that is kept
ARMS = (
    Arm(COUPLED),
    Arm(SHORT, warmup_steps=lambda cfg: max(1, round(0.025 * cfg.run.steps))),
    Arm(LONG, warmup_steps=lambda cfg: round(0.4 * cfg.run.steps)),
    Arm(LEAST, coupled_1=0.001, coupled_2=0.0005),
    Arm(LESS, coupled_1=0.01, coupled_2=0.005),
    Arm(MORE, coupled_1=1.0, coupled_2=0.5),
    Arm(DECOUPLED, "decoupled"),
)


def check(cfg: Config) -> None:
    if cfg.model.layout != "report":
        what = "the law is for the uniform initialisation of model.layout=report"
        raise UserError(f"model.layout={cfg.model.layout}: {what}")


def measure(run) -> dict[str, list]:
    by_replicate = [against_law(run, i) for i in range(len(run.replicates))]
    return {"shrink": by_replicate, "above_1.1": large_weights(run)}


def against_law(run, i: int) -> dict:
    """The law beside the log of one replicate, and the parts of its updates that are decay."""
    cfg, hyper, steps = run.cfg.run, run.replicates[i].hyper, run.steps
    bound, std = run.cfg.model.d_model**-0.5, run.column(LOGIT_STD)[i]
    law, ratio = shrink.spread_ratio(shrink.summed_rate(cfg, hyper)[steps], bound), std / std[0]
    expected = shrink.half_spread_step(cfg, hyper, bound)
    shares = {g: run.column(UPDATE_SHARE + g, "train")[i] for g in GROUPS}
    trained = np.array([row["step"] for row in run.trains[i]])
    return {
        "half_step": half_step(steps, ratio),
        "half_step_predicted": None if expected is None else float(f"{expected:.4g}"),
        "law_error": float(np.abs(ratio - law)[law >= 0.5].max()),
        "share": {"step": thin(trained)} | {g: thin(share) for g, share in shares.items()},
        "mean_share": {g: float(share.mean()) for g, share in shares.items()},
        "spread": {"step": thin(steps), "measured": thin(ratio), "law": thin(law)},
    }


def thin(values) -> list:
    """POINTS of a curve, each with four significant digits, or as it is when a whole number."""
    kept = values[np.unique(np.linspace(0, len(values) - 1, POINTS).astype(int))].tolist()
    return [x if isinstance(x, int) else float(f"{x:.4g}") for x in kept]


def head_share(df, arm: str):
    """Mean part of the head's updates that is decay until half the spread is predicted."""
    runs = of(df, arm)
    step, share = (np.stack(runs[f"shrink/share/{key}"]) for key in ("step", "head"))
    until = step <= each(df, arm, "shrink/half_step_predicted").to_numpy()[:, None]
    return interval(share.mean(axis=1, where=until))


def distance(df, arm: str) -> np.ndarray:
    """Largest distance of the spread ratio from the law over the whole run, by seed."""
    measured, law = (np.stack(each(df, arm, f"shrink/spread/{key}")) for key in ("measured", "law"))
    return np.abs(measured - law).max(axis=1)


def off(df, arm: str, measured: str, predicted: str) -> float:
    """Largest relative distance of a number from its prediction; NaN where a seed lacks one."""
    errors = each(df, arm, measured) / each(df, arm, predicted) - 1
    return float(errors.abs().max(skipna=False))


def off_step(df, arm: str) -> float:
    return off(df, arm, "shrink/half_step", "shrink/half_step_predicted")


def never_halved(df, arm: str) -> bool:
    far = each(df, arm, "shrink/law_error") > 0.1
    return bool(of(df, arm)["shrink/half_step"].isna().all() and far.all())


CLAIMS = (
    Claim(
        "onset",
        "coupled decay of 0.1 or 1 takes the logit spread to its half by the law, within 0.02",
        lambda df: all((each(df, arm, "shrink/law_error") < 0.02).all() for arm in LAWFUL),
        *(BOOKS, QUICK),
    ),
    Claim(
        "step",
        "the step of half the spread is predicted within 5 % at three warm-ups, nothing fitted",
        lambda df: all(off_step(df, arm) < 0.05 for arm in (COUPLED, SHORT, LONG)),
        *(BOOKS, QUICK),
    ),
    Claim(
        "only",
        "the law covers the onset only: later the coupled recipe's spread is over 0.2 away from it",
        lambda df: bool((distance(df, COUPLED) > 0.2).all()),
        *(BOOKS, QUICK),
    ),
    Claim(
        "less",
        "coupled decay of 0.01 or 0.001 leaves the law by over 0.1, and never halves the spread",
        lambda df: never_halved(df, LESS) and never_halved(df, LEAST),
        *(BOOKS, QUICK),
    ),
    Claim(
        "head",
        "until half the spread, decay is over 70 % of the head's updates; decoupled, under 2 %",
        lambda df: head_share(df, COUPLED).low > 0.7 and head_share(df, DECOUPLED).high < 0.02,
        *(BOOKS, QUICK),
    ),
    Claim(
        "amount",
        "coupled decay of 0.001 has learned in every seed, and ends within 0.1 nats of AdamW's",
        lambda df: ended(df, LEAST).all() and difference(df, LEAST, DECOUPLED).within(-0.1, 0.1),
        *(BOOKS, QUICK),
    ),
    Claim(
        "large",
        "coupled decay of 0.1 or 1 has not learned in any seed, whatever the warm-up",
        lambda df: not any(ended(df, arm).any() for arm in LAWFUL),
        *(BOOKS, QUICK),
    ),
    Claim(
        "counts",
        "embedding entries above 1.1 are within 3 % of those that coupled decay alone leaves",
        lambda df: all(
            off(df, arm, "above_1.1/embedding", "above_1.1/predicted") < 0.03
            for arm in (*LAWFUL, LESS, LEAST)
        ),
        *(BOOKS, QUICK),
    ),
)


def show(df, exhibits) -> None:
    columns = (
        ("shrink/half_step_predicted", "half spread at step, predicted", ".0f"),
        ("shrink/half_step", "measured", ".0f"),
        ("shrink/law_error", "spread from the law until then", ".3f"),
        ("above_1.1/embedding", "embedding |w| > 1.1", ",.0f"),
        ("above_1.1/predicted", "predicted", ",.0f"),
    )
    exhibits.table(df, columns, title="The law and the log")
    shares = [(f"shrink/mean_share/{g}", f"{g}: decay's part", ".1%") for g in GROUPS]
    exhibits.table(df, (LOSS, MUTUAL_INFORMATION, LOGIT_STD, *shares), control=DECOUPLED)
    all_arms, half = set(df["arm"]), int(df["steps"].iloc[0]) // 2
    for arms in ((COUPLED, SHORT, LONG), (COUPLED, LESS, LEAST, MORE)):
        arms = [arm for arm in arms if arm in all_arms]
        spreads = [x for arm in arms for x in curves(df, arm, "spread", "measured", arm)]
        laws = [x for arm in arms for x in curves(df, arm, "spread", "law", "law")[:1]]
        exhibits.panels([charts.Panel([*spreads, *laws], "Logit spread", "share of the first")])
    for arm in [arm for arm in (COUPLED, DECOUPLED) if arm in all_arms]:
        parts = [x for group in GROUPS for x in curves(df, arm, "share", group, group)]
        exhibits.panels([charts.Panel(parts, f"{arm}: decay's part of updates", "share", half)])


def curves(df, arm: str, kind: str, key: str, label: str) -> list[charts.Series]:
    """A kept curve of every seed of an arm."""
    pairs = zip(*(of(df, arm)[f"shrink/{kind}/{x}"] for x in ("step", key)), strict=True)
    return [charts.Series(label, step, curve) for step, curve in pairs]


if __name__ == "__main__":
    experiment(__doc__, ARMS, measure, CLAIMS, show, check=check,
               quick=(*SMALL, "run.eval_every=5"))  # fmt: skip
