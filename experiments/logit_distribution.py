"""How can entropy be near its maximum while only a few tokens are predicted?

The report's third recommendation and its "entropy/concentration paradox": the distribution of the
logits along the coupled recipe and along the decoupled one. At every kept step, over the held-out
positions: percentiles of the logits centred over the vocabulary, the share of their variance that
no context changes, the gap of the two largest, ties, and softmax in float32 and in bfloat16 against
float64.

Two explanations compete. Numerics: softmax in few bits would show as ties, sums that are not 1, or
an entropy that float64 does not confirm. Small logits: V logits of standard deviation s around a
common mean give an entropy of about ln V - s^2 / 2 whatever the argmax is, and the argmax is the
same wherever the context moves the logits by less than the largest ones are apart.

    python -m experiments.logit_distribution           # 1 min on 2 cores
    python -m experiments.logit_distribution --preset report --set run.checkpoint_every=100 \
        --set data.corpus=text:books.train.txt.xz

Goes when a law of the critical decay gives the spread of the logits at the end.
"""

import functools

import jax
import numpy as np

from bitnet_jax import charts, data, train
from bitnet_jax.model import Transformer
from experiments.lab import logits
from experiments.lab.arms import Arm
from experiments.lab.claims import Claim
from experiments.lab.experiment import experiment
from experiments.lab.stats import each, interval, of
from experiments.lab.studies import QUICK, SMALL

COUPLED, DECOUPLED = ARM_NAMES = ("coupled", "decoupled")
# Distinct predictions and those of the predictors are counted over the positions measured here.
ARMS = tuple(Arm(name, name, fields={"data.track": "validation"}) for name in ARM_NAMES)
LOGITS = (
    ("entropy", ".3f"), ("gaussian_entropy", ".3f"), ("std", ".3f"), ("distinct", ".0f"),
    ("mode_share", ".2f"), ("gap", ".3f"), ("context_std", ".3f"), ("shared", ".3f"),
    ("bimodality", ".2f"), ("skewness", ".2f"),
)  # fmt: skip
SOFTMAX = (
    ("tied", ".4f"), ("argmax_changed", ".4f"), ("prediction_changed", ".4f"),
    ("sum_error", ".1e"), ("entropy_error", ".1e"), ("kl", ".1e"),
)  # fmt: skip


def measure(run) -> dict[str, list]:
    """Numbers of `logits.describe` at initialisation and at every kept step."""
    held_out = data.small_block(run.cfg.data, data.held_out_windows(run.cfg.data, run.tokens))
    steps, by_replicate = [0, *run.kept_steps], [[] for _ in run.replicates]
    for step in steps:
        params = run.states_at(step).params
        for i, rep in enumerate(run.replicates):
            args = run.cfg.model, run.replicate(params, i), train.at_step(rep.hyper, step)
            z_NBLV = np.stack([forward(*args, inputs_BL) for inputs_BL in held_out.inputs])
            by_replicate[i].append(logits.describe(z_NBLV.reshape(-1, z_NBLV.shape[-1])))
    return {
        "logits": [
            {"step": steps} | {k: [float(f"{x[k]:.5g}") for x in numbers] for k in numbers[0]}
            for numbers in by_replicate
        ]
    }


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, hyper, tokens_BL):
    """Float32 logits [B, L, V], without the reduced precision that accelerators default to."""
    with jax.default_matmul_precision("float32"):
        return Transformer(model).apply({"params": params}, tokens_BL, hyper)


def last(df, arm: str, key: str):
    """A number at the last step by seed."""
    return each(df, arm, f"logits/{key}").map(lambda steps: steps[-1])


def largest(df, key: str) -> float:
    """The largest value over arms, seeds and steps."""
    return max(max(steps) for arm in ARM_NAMES for steps in each(df, arm, f"logits/{key}"))


def paradox(df) -> bool:
    known = df["references"].iloc[0]
    entropy, distinct = (interval(last(df, COUPLED, key)) for key in ("entropy", "distinct"))
    return (
        entropy.low > 0.95 * known["uniform"]["entropy"]
        and distinct.high < known["bigram"]["distinct"] / 3
    )


def small_but_not_normal(df) -> bool:
    """Whether coupled logits are small, and normal ones of their spread were flatter still."""
    top = of(df, COUPLED)["uniform"]
    missing, normal = (top - last(df, COUPLED, x) for x in ("entropy", "gaussian_entropy"))
    return interval(missing).high < 0.3 and interval(normal / missing).high < 1 / 3


CLAIMS = (
    Claim(
        "paradox",
        "coupled: entropy above 95 % of ln V, under a third of the bigram's distinct predictions",
        paradox,
        QUICK,
    ),
    Claim(
        "spread",
        "coupled, ln V less the entropy is under 0.3 nats, and s^2 / 2 is under a third of that",
        small_but_not_normal,
        QUICK,
    ),
    Claim(
        "same",
        "over half of the positions predict the same token coupled, under 15 % decoupled",
        lambda df: (
            interval(last(df, COUPLED, "mode_share")).low > 0.5
            and interval(last(df, DECOUPLED, "mode_share")).high < 0.15
        ),
        QUICK,
    ),
    Claim(
        "context",
        "coupled, the context moves a logit by under a third of what it does decoupled",
        lambda df: (
            interval(last(df, COUPLED, "context_std") / last(df, DECOUPLED, "context_std")).high
            < 1 / 3
        ),
        QUICK,
    ),
    Claim(
        "numerics",
        "softmax in float32 agrees with float64 to 1e-6 at every step, and changes no prediction",
        lambda df: (
            max(largest(df, f"float32/{x}") for x in ("sum_error", "entropy_error")) < 1e-6
            and largest(df, "float32/prediction_changed") == 0
        ),
        QUICK,
    ),
    Claim(
        "bfloat16",
        "softmax in bfloat16 changes the entropy by under 0.002 nats, under 10 % of predictions",
        lambda df: (
            largest(df, "bfloat16/entropy_error") < 0.002
            and largest(df, "bfloat16/prediction_changed") < 0.1
        ),
        QUICK,
    ),
)


def show(df, exhibits) -> None:
    arms, known = list(dict.fromkeys(df["arm"])), df["references"].iloc[0]
    table_rows = [
        [arm, *(interval(x[-1] for x in of(df, arm)[f"logits/{key}"]).text(spec)
                for key, spec in LOGITS)]
        for arm in arms
    ]  # fmt: skip
    note = ("std: over the vocabulary. gaussian_entropy: ln V - std^2 / 2. gap: of the first two. "
            "shared: the part of the variance that no context changes, context_std the rest. "
            "bimodality: above 0.56 several modes, or strong skewness.")  # fmt: skip
    exhibits.grid("Logits at the last step", ["arm", *(key for key, _ in LOGITS)], table_rows, note)
    table_rows = [
        [f"{arm}, {dtype}", *(f"{max(x[-1] for x in of(df, arm)[f'logits/{dtype}/{key}']):{spec}}"
                              for key, spec in SOFTMAX)]
        for arm in arms
        for dtype in ("float32", "bfloat16")
    ]  # fmt: skip
    note = "The largest over seeds, at the last step; training and evaluation use float32."
    exhibits.grid("Is softmax accurate?", ["in", *(key for key, _ in SOFTMAX)], table_rows, note)
    half = int(df["steps"].iloc[0]) // 2
    curves = {arm: means(df, arm) for arm in arms}
    series = [
        charts.Series(label, x["step"], x[key])
        for arm, x in curves.items()
        for label, key in ((arm, "entropy"), (f"{arm}: ln V - s²/2", "gaussian_entropy"))
    ]
    marks = (("ln V", known["uniform"]["entropy"]), ("bigram", known["bigram"]["entropy"]))
    exhibits.panels([charts.Panel(series, "Entropy", "nats", half, marks)])
    series = [charts.Series(arm, x["step"], x["distinct"]) for arm, x in curves.items()]
    marks = (("text", known["targets"]["distinct"]), ("bigram", known["bigram"]["distinct"]))
    exhibits.panels([charts.Panel(series, "Distinct predictions", "tokens", half, marks)])
    fans = [(arm, x["step"], {p: x[f"p{p}"] for p in logits.PERCENTILES})
            for arm, x in curves.items()]  # fmt: skip
    exhibits.drawing(charts.fan_chart(fans, ylabel="centred logit", boundary=half),
                     "Percentiles over positions and vocabulary; means over seeds.")  # fmt: skip


def means(df, arm: str) -> dict[str, list]:
    """Means over the seeds of an arm of every number of the logits, by step."""
    runs = of(df, arm)
    columns = [c for c in df if c.startswith("logits/")]
    return {c[len("logits/") :]: np.mean(np.stack(runs[c]), axis=0).tolist() for c in columns}


if __name__ == "__main__":
    experiment(__doc__, ARMS, measure, CLAIMS, show,
               quick=(*SMALL, "run.checkpoint_every=50"))  # fmt: skip
