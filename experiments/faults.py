"""Does triage name the fault that was built in, and stay silent on healthy runs?

Twelve faults, one run each: numbers that a recipe can get wrong, wrong code in a seam of the step,
and functions of the package that are replaced while a run is built, trained and examined. A fault
does harm when its held-out loss lies above the 95 % prediction interval of the healthy seeds; of
others nothing is asked. In-sample: triage was developed on such faults.

    python -m experiments.faults                       # 7 min on 1 core

Goes when faults that nobody had in mind while writing triage are collected instead.
"""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import audit, causes, data, loss, model, program, quant, subject
from bitnet_jax.metrics import LOSS
from bitnet_jax.train import Seams
from experiments.lab.arms import Arm, Request, check_free, chosen, groups, train_group
from experiments.lab.claims import Claim
from experiments.lab.experiment import experiment
from experiments.lab.faulty import FAULTY, SOUND, rates
from experiments.lab.stats import SEEDS, NotEnough, of, prediction_interval, values
from experiments.lab.studies import QUICK, SMALL

HEALTHY, NOTHING = "healthy", contextlib.nullcontext()
TRAIN_WINDOWS, WINDOW_IDS, KERNEL_INIT = data.train_windows, data.window_ids, model.kernel_init


def rounding_alone(w, strength, dtype):
    """Weights are quantised by formulas alone: rounding has no gradient."""
    scale = quant.weight_scale(w)
    q = quant.weight_codes(w, scale) / scale
    return ((1 - strength) * w + strength * q).astype(dtype)


def shifted_loss(logits_BLV, batch, hyper, unigram_V):
    """Targets that are shifted already are shifted again: position t learns the token at t + 2."""
    rest = batch.replace(targets=batch.targets[:, 1:], weights=batch.weights[:, 1:])
    return loss.training_loss(logits_BLV[:, :-1], rest, hyper, unigram_V)


class PaddedWindows(data.Windows):
    """Windows whose second half is padding, which is end of text and is scored."""

    def cut(self, ids, tokens_N=None) -> data.Batch:
        batch = super().cut(ids, tokens_N)
        place_L, text = np.arange(self.seq_len), (self.seq_len + 1) // 2
        inputs = jnp.where(place_L < text, batch.inputs, self.end_of_text)
        targets = jnp.where(place_L + 1 < text, batch.targets, self.end_of_text)
        return data.Batch(inputs, targets, jnp.ones_like(batch.weights))


def padded_windows(cfg, tokens) -> data.Windows:
    return PaddedWindows(**vars(TRAIN_WINDOWS(cfg, tokens)))


def first_ids(cfg, n_windows, seed, start, end) -> np.ndarray:
    """Every step is served the first batch."""
    return np.repeat(WINDOW_IDS(cfg, n_windows, seed, 0, 1), end - start, axis=0)


def wide_init(cfg):
    """Latent weights of the ternary matrices start at N(0, 1)."""

    def init(key, shape, dtype=jnp.float32):
        head = shape == (cfg.d_model, cfg.vocab_size)
        return (KERNEL_INIT(cfg) if head else jax.random.normal)(key, shape, dtype)

    return init


@dataclasses.dataclass(frozen=True)
class Fault:
    """A way to go wrong, the cause that triage should name first, and what is replaced for it."""

    arm: Arm
    cause: str
    patch: contextlib.AbstractContextManager = NOTHING


decoupled = functools.partial(Arm, recipe="decoupled")
UNSCALED = {"unscaled_1": 0.1, "unscaled_2": 0.05}
NO_DECAY = {"decoupled_1": 0.0, "decoupled_2": 0.0}
FAULTS = (
    Fault(decoupled(HEALTHY), "none"),
    Fault(Arm("coupled decay"), "decay through Adam"),
    Fault(decoupled("decay without the learning rate", extra=SOUND | UNSCALED, seams=FAULTY,
                    **NO_DECAY), "decay not scaled by the learning rate"),
    Fault(decoupled("frozen head", extra=SOUND | {"head_frozen": 1.0}, seams=FAULTY),
          "output matrix not updated"),
    Fault(decoupled("learning rate 100x low", **rates(0.01)), "learning rate too small"),
    Fault(decoupled("learning rate 10x high", **rates(10)), "learning rate too high"),
    Fault(decoupled("no warm-up", warmup_steps=0), "learning rate too high"),
    Fault(decoupled("logits over sqrt(d)", logit_scale=lambda cfg: cfg.model.d_model**-0.5),
          "logits scaled down"),
    Fault(decoupled("no straight-through gradient", seams=Seams(quantize_weight=rounding_alone)),
          "no straight-through gradient"),
    Fault(decoupled("labels shifted twice", seams=Seams(loss=shifted_loss)), "shifted labels"),
    Fault(decoupled("one repeated batch"), "repeated batches",
          mock.patch.object(data, "window_ids", first_ids)),
    Fault(decoupled("N(0, 1) latent weights"), "latent weights out of reach",
          mock.patch.object(model, "kernel_init", wide_init)),
    Fault(decoupled("padding scored"), "padding is scored",
          mock.patch.object(data, "train_windows", padded_windows)),
)  # fmt: skip
BY_ARM = {fault.arm.name: fault for fault in FAULTS}
ARMS = tuple(fault.arm for fault in FAULTS)


def train(request: Request, arms: list[Arm], measure) -> list[dict]:
    """Rows of the healthy seeds, and of each fault from the first seed, with its code in place."""
    wanted, rows = chosen(request, arms), []
    check_free(request, wanted)
    for arm in wanted:
        seeds = request.seeds if arm.name == HEALTHY else request.seeds[:1]
        of_arm = dataclasses.replace(request, only=(), recipes=(), seeds=seeds)
        with BY_ARM[arm.name].patch:
            for group in groups(of_arm, [arm]):
                rows += train_group(of_arm, group, functools.partial(measure, seams=group.seams))
    return rows


def measure(run, seams: Seams) -> dict[str, list]:
    """`causes` that triage names in the last checkpoint, best first; the numbers it `measured`."""
    named, measured = [], []
    for i, replicate in enumerate(run.replicates):
        built = program.build(run.cfg, [replicate], seams)
        state = jax.tree.map(jnp.asarray, run.replicate(run.states, i))
        numbers, _ = audit.measure(subject.of_run(built, state))
        named.append([dataclasses.asdict(finding) for finding in causes.rank(numbers)])
        measured.append({key: float(f"{x:.5g}") for key, x in numbers.items()})
    return {"causes": named, "measured": measured}


def healthy(df):
    """Rows of the healthy seeds; raises NotEnough for fewer than SEEDS."""
    rows = of(df, HEALTHY)
    if len(rows) < SEEDS:
        raise NotEnough(f"{len(rows)} healthy seeds")
    return rows


def harmful(df):
    """Rows of faults whose loss one more healthy run would not have; NotEnough without any."""
    limit = prediction_interval(healthy(df)[LOSS])[1]
    rows = df[(df["arm"] != HEALTHY) & (df[LOSS] > limit)]
    if not len(rows):
        raise NotEnough("no fault does harm")
    return rows


def is_named(row) -> bool:
    """Whether the first cause, or `none`, is that of the row's arm."""
    first = row["causes"][0]["name"] if row["causes"] else "none"
    return first == BY_ARM[row["arm"]].cause


def is_silent(df) -> bool:
    return not healthy(df)["causes"].map(len).any()


CLAIMS = (
    Claim(
        "named",
        "in-sample, one run each: triage names first every fault that does harm",
        lambda df: harmful(df).apply(is_named, axis=1).all(),
        QUICK,
    ),
    Claim("silent", "triage names no cause in any healthy run", is_silent, QUICK),
    Claim(
        "rate",
        "a learning rate 10 times higher is no fault at this size: it ends below every healthy run",
        lambda df: values(df, "learning rate 10x high", LOSS).max() < healthy(df)[LOSS].min(),
        QUICK,
    ),
)


def show(df, exhibits) -> None:
    table_rows, harm = [], harmful(df).index
    for i, row in df.iterrows():
        named = ", ".join(f"{x['name']} ({x['score']:.2f})" for x in row["causes"][:2])
        does = "" if row["arm"] == HEALTHY else "yes" if i in harm else "no"
        right = ("yes" if is_named(row) else "no") if i in harm else ""
        table_rows.append([row["arm"], str(row["seed"]), f"{row[LOSS]:.3f}", does, named, right])
    heads = ["fault", "seed", "held-out loss", "does harm", "first causes", "right"]
    note = "Harm: a loss above the 95 % prediction interval of one more healthy run."
    exhibits.grid("What triage names", heads, table_rows, note)


if __name__ == "__main__":
    quick = (*SMALL, "run.steps=200")
    experiment(__doc__, ARMS, measure, CLAIMS, show, seeds="0-4", quick=quick, train=train)
