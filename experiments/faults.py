"""Does triage name the fault that was built in, and stay silent on healthy runs?

Twelve faults, one run each: numbers that a recipe can get wrong (replicates of one program), and
code that is wrong (functions of the package are replaced while the run is built, trained and
examined; one program each). The healthy recipe, the report's with decoupled decay, is trained from
every seed of --seeds. Then `experiments.triage` examines every last checkpoint. A fault is
expressed when its held-out loss lies above the 95 % prediction interval of the healthy seeds:
otherwise it is none at this size, and nothing is asked of triage.

Expected: the first cause is right for at least 9 of 10 expressed faults, and no cause for a healthy
run.

    python -m experiments.faults --preset quick --seeds 0-4
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats as scipy_stats

from bitnet_jax import data, loss, model, quant, train
from bitnet_jax.program import Program
from experiments import common, page, stats, sweep, triage

NAME = "faults"
HEALTHY = "healthy"
RECIPE = "report_decoupled"
PADDED = 1 / 2  # share of a window that the padding fault fills


def without_straight_through():
    """Weights are quantised by formulas alone: rounding has no gradient."""

    def formulas(w, strength, dtype, largest=1):
        scale = quant.weight_scale(w, largest)
        q = quant.weight_codes(w, scale, largest) / scale
        return ((1 - strength) * w + strength * q).astype(dtype)

    return mock.patch.object(quant, "quantize_weight", formulas)


def shifted_twice():
    """The loss shifts targets that are shifted already: position t learns the token at t + 2."""

    def shifted(logits_BLV, targets_BL, weights_BL):
        return loss.next_token_loss(logits_BLV[:, :-1], targets_BL[:, 1:], weights_BL[:, 1:])

    return mock.patch.object(train, "next_token_loss", shifted)


@contextlib.contextmanager
def padding_scored():
    """Windows end in padding, which is end of text, and the loss scores it."""
    batches = Program.batches

    def padded(self, start, end):
        served = batches(self, start, end)
        windows = np.array(served)
        keep = int(windows.shape[-1] * (1 - PADDED))
        windows[..., keep:] = self.tokens.tokenizer.end_of_text
        return jax.device_put(windows, served.sharding)

    def everything(windows, end_of_text, score_last):
        return 0.0 * windows[..., 1:] + 1.0

    with (
        mock.patch.object(Program, "batches", padded),
        mock.patch.object(data, "score_weights", everything),
    ):
        yield


def one_batch():
    """Every step is served the first batch."""
    batches = Program.batches

    def repeated(self, start, end):
        first = batches(self, 0, 1)
        return jax.device_put(jnp.repeat(first, end - start, axis=1), first.sharding)

    return mock.patch.object(Program, "batches", repeated)


def unit_latents():
    """Latent weights of the ternary matrices start at N(0, 1)."""
    kernel_init = model.kernel_init

    def wide(cfg):
        def init(key, shape, dtype=jnp.float32):
            head = shape == (cfg.d_model, cfg.vocab_size)
            return (kernel_init(cfg) if head else jax.random.normal)(key, shape, dtype)

        return init

    return mock.patch.object(model, "kernel_init", wide)


def _rates(factor: float) -> dict[str, float]:
    """The recipe's learning rates times a factor."""
    rates = {"lr_peak": 1.5e-3, "lr_stage1_end": 1e-3, "lr_stage2_start": 1e-3, "lr_final": 1.5e-6}
    return {name: factor * rate for name, rate in rates.items()}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A way to go wrong, and the cause that triage should name first."""

    name: str
    cause: str
    hyper: Callable[[int], dict[str, float]] | None = None  # from the width of the model
    recipe: str = RECIPE
    code: Callable[[], AbstractContextManager] | None = None  # replaces functions of the package
    on_host: bool = False  # windows are cut on the host, where the code can change them


FAULTS = (
    Fault("coupled decay", "decay through Adam", lambda d: {}, "report"),
    Fault(
        "decay without the learning rate",
        "decay not scaled by the learning rate",
        lambda d: {"decoupled_1": 0, "decoupled_2": 0, "unscaled_1": 0.1, "unscaled_2": 0.05},
    ),
    Fault("frozen head", "output matrix not updated", lambda d: {"head_lr": 0}),
    Fault("learning rate 100x low", "learning rate too small", lambda d: _rates(0.01)),
    Fault("learning rate 10x high", "learning rate too high", lambda d: _rates(10)),
    Fault("no warm-up", "learning rate too high", lambda d: {"warmup_steps": 0}),
    Fault("logits over sqrt(d)", "logits scaled down", lambda d: {"logit_scale": d**-0.5}),
    Fault(
        "no straight-through gradient",
        "no straight-through gradient",
        code=without_straight_through,
    ),
    Fault("labels shifted twice", "shifted labels", code=shifted_twice),
    Fault("one repeated batch", "repeated batches", code=one_batch),
    Fault("N(0, 1) latent weights", "latent weights out of reach", code=unit_latents),
    Fault("padding scored", "padding is scored", code=padding_scored, on_host=True),
)
CAUSES = {fault.name: fault.cause for fault in FAULTS}


def examined(workdir, cfg, index) -> dict:
    """What triage finds in the last checkpoint of a replicate."""
    found = triage.examine(workdir, cfg.run.steps, index, windows=2, steps=100)
    causes = [c | {"score": round(c["score"], 3)} for c in found["causes"]]
    measured = {key: float(f"{x:.5g}") for key, x in found["measured"].items()}
    return {"causes": causes, "measured": measured}


def body(request: common.Request) -> None:
    def train_arms(request, arms):
        return sweep.train_arms(NAME, request, arms, extra=examined)

    one = dataclasses.replace(request, seeds=request.seeds[:1])
    rows = train_arms(request, [sweep.Arm(HEALTHY, RECIPE)])
    width = request.cfg.model.d_model
    numbers = [f for f in FAULTS if f.hyper is not None]
    rows += train_arms(one, [sweep.Arm(f.name, f.recipe, f.hyper(width)) for f in numbers])
    for fault in (f for f in FAULTS if f.code):
        cfg = request.cfg
        if fault.on_host:
            cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, gather="host"))
        jax.clear_caches()  # what was compiled knows nothing of the fault
        with fault.code():
            arm = sweep.Arm(fault.name, fault.recipe)
            rows += train_arms(dataclasses.replace(one, cfg=cfg), [arm])
        jax.clear_caches()
    common.conclude(NAME, __doc__, request.workdir, rows, analyse)


def limit(losses: list[float]) -> float:
    """Upper end of the 95 % prediction interval for one more healthy run; inf from one seed."""
    n, x = len(losses), np.asarray(losses)
    if n == 1:
        return math.inf
    half = scipy_stats.t.ppf(0.975, n - 1) * x.std(ddof=1) * math.sqrt(1 + 1 / n)
    return float(x.mean() + half)


def analyse(rows: list[dict]) -> page.Study:
    """Share of expressed faults whose cause comes first, and of healthy runs with any cause."""
    healthy = [row for row in rows if row["arm"] == HEALTHY]
    faulty = [row for row in rows if row["arm"] != HEALTHY]
    losses = [row["final"]["eval/loss"] for row in healthy]
    most, usual = limit(losses), stats.interval(losses)
    expressed = [row for row in faulty if row["final"]["eval/loss"] > most]
    silent = [row["arm"] for row in faulty if row not in expressed]
    right = [row for row in expressed if _first(row) == CAUSES[row["arm"]]]
    wrong = [row["arm"] for row in expressed if row not in right]
    alarms = sum(bool(row["causes"]) for row in healthy)
    k, m, n = len(right), len(expressed), len(healthy)
    lines = [_line(row, row in expressed) for row in [*faulty, *healthy]]
    low, high = stats.wilson(k, m) if m else (0, 1)
    result = (
        f"right cause first for {k} of {m} expressed faults (95 % Wilson interval {low:.0%} to "
        f"{high:.0%}); alarms on {alarms} of {n} healthy seeds; no harm to held-out loss seen "
        f"(healthy {usual.text()}, one more below {most:.2f}) from {', '.join(silent) or 'none'}"
    )
    met = m > 0 and k >= 0.9 * m and alarms == 0
    conclusion = (
        f"triage {'names' if met else 'does not yet name'} the fault in one checkpoint: {k} of {m} "
        f"first, {alarms} of {n} false alarms"
        + (f"; missed: {', '.join(wrong)}" if wrong else "")
        + (f"; not expressed at this size: {', '.join(silent)}" if silent else "")
    )
    return page.Study(
        arms=f"{len(faulty)} faults, one run each, and {n} healthy seeds",
        n=n,
        result=result,
        conclusion=conclusion,
        tables=[
            page.Table(
                "What triage names",
                ["fault", "seed", "held-out loss", "expressed", "first cause", "score", "second",
                 "right"],
                lines,
                "Expressed: the held-out loss is above the 95 % prediction interval of healthy "
                "seeds. Scores: 1 where an identity of sound code is violated outright.",
            )
        ],
    )  # fmt: skip


def _first(row) -> str | None:
    return row["causes"][0]["name"] if row["causes"] else None


def _line(row, expressed) -> list[str]:
    wanted, causes = CAUSES.get(row["arm"]), row["causes"]
    told = [c["name"] for c in causes[:2]] + ["none", ""][len(causes) :]
    score = f"{causes[0]['score']:.2f}" if causes else ""
    shown = "" if wanted is None else "yes" if expressed else "no"
    judged = "" if shown == "no" else "yes" if _first(row) == wanted else "no"
    where = [row["arm"], str(row["seed"]), f"{row['final']['eval/loss']:.3f}", shown]
    return [*where, told[0], score, told[1], judged]


if __name__ == "__main__":
    quick = (*common.SMALL, "run.steps=200", "run.save_every=200")
    common.main(__doc__, NAME, "quick", body, seeds="0-4", quick=quick, sweep=True)
