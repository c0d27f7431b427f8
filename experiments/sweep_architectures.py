"""Would another architecture support vocabulary diversity?

The seventh recommendation of the troubleshooting report: one change of the model at a time (width,
logit scale, tied embedding, precision, an auxiliary loss for vocabulary coverage), in the report's
recipe (decay coupled into Adam) and in the same recipe with decoupled decay. The base is the
report's layout: untied, ternary weights, int8 activations, logit scale 1.

The tied arm scales the logits by 1/sqrt(width): the layout draws its embedding from N(0, 1), and
without the factor the logits would start with a standard deviation of sqrt(width) rather than 1.
It still starts by predicting its input, since a token's embedding is most similar to itself.

    python -m experiments.sweep_architectures --seeds 0-4          # 33 min on 1 core

Goes when the critical coupled decay is known as a function of width, logit scale and precision.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from bitnet_jax import quant
from bitnet_jax.metrics import LOSS, MUTUAL_INFORMATION
from bitnet_jax.train import Seams
from experiments.lab.arms import Arm, times_width
from experiments.lab.claims import Claim
from experiments.lab.experiment import experiment
from experiments.lab.stats import cured, difference, ended
from experiments.lab.studies import QUICK, SMALL
from experiments.regularisers import regularised_loss


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def quantize_to_maximum(
    w: jax.Array, strength: jax.Array, dtype: jnp.dtype, largest: int
) -> jax.Array:
    """Codes / s with codes clip(round(w s), -largest, largest) and s = largest / max(max|w|, 1e-5).

    Symmetric, one scale for the tensor, identity gradient; the other arguments are those of
    `quant.quantize_weight`.
    """
    w32 = w.astype(jnp.float32)
    scale = largest / jnp.maximum(jnp.max(jnp.abs(w32)), quant.EPS)
    codes = jnp.clip(jnp.round(w32 * scale), -largest, largest)
    return quant.blend(w, quant.divide(codes, scale), strength).astype(dtype)


def _forward(w, strength, dtype, largest):
    return quantize_to_maximum(w, strength, dtype, largest), (jnp.zeros((0,), w.dtype), strength)


def _backward(dtype, largest, residuals, grad):
    like_w, strength = residuals
    return grad.astype(like_w.dtype), jnp.zeros_like(strength)


quantize_to_maximum.defvjp(_forward, _backward)
QUANTISERS = {
    "int4": partial(quantize_to_maximum, largest=7),
    "int8": partial(quantize_to_maximum, largest=127),
}


BASE, DENSE, LOUD, TIED = "base", "full precision", "logits x 16", "tied embedding"
CHANGES = {  # arguments of Arm
    BASE: {},
    "half width": {"fields": times_width(0.5)},
    "double width": {"fields": times_width(2.0)},
    "logits x 4": {"logit_scale": 4.0},
    LOUD: {"logit_scale": 16.0},
    TIED: {
        "fields": {"model.tied_embedding": True},
        "logit_scale": lambda cfg: cfg.model.d_model**-0.5,
    },
    DENSE: {"weight_quant": 0.0, "act_quant": 0.0},
    "ternary weights only": {"act_quant": 0.0},
    "8-bit weights": {"seams": Seams(quantize_weight=QUANTISERS["int8"])},
    "4-bit weights": {"seams": Seams(quantize_weight=QUANTISERS["int4"])},
    "quantisation warm-up": {"quant_warmup_steps": lambda cfg: cfg.run.steps // 5},
    "coverage loss": {"extra": {"coverage": 1.0}, "seams": Seams(loss=regularised_loss)},
}
KINDS = ("coupled", "decoupled")
ARMS = tuple(
    Arm(f"{kind} {name}", kind, **change) for kind in KINDS for name, change in CHANGES.items()
)
QUIET = [name for name in CHANGES if "logits" not in name and name != TIED]


def ended_by_none(df) -> bool:
    """Whether no coupled arm has learned where the same architecture, with AdamW, has."""
    return not any(cured(df, f"coupled {x}", f"decoupled {x}").any() for x in QUIET)


def ended_by_scale(df) -> bool:
    healthy = f"decoupled {BASE}"
    return cured(df, f"coupled {LOUD}", healthy).all() and (
        difference(df, f"coupled {LOUD}", healthy).above
    )


def decoupling_helps(df) -> bool:
    names = [name for name in CHANGES if name != LOUD]
    return all(
        difference(df, f"decoupled {x}", f"coupled {x}").within(-math.inf, -0.4) for x in names
    )


def like_dense(df) -> bool:
    """Whether 4-bit and 8-bit weights end near full precision, in both recipes."""
    return all(
        difference(df, f"{kind} {bits} weights", f"{kind} {DENSE}").within(-0.1, 0.1)
        for kind in KINDS
        for bits in ("4-bit", "8-bit")
    )


CLAIMS = (
    Claim(
        "none",
        "no width, precision, warm-up or coverage loss ends the coupled collapse where AdamW does",
        ended_by_none,
        QUICK,
    ),
    Claim(
        "scale",
        "logits times 16 end the coupled collapse in every seed, at a higher loss than AdamW's",
        ended_by_scale,
        QUICK,
    ),
    Claim(
        "decoupling",
        "AdamW lowers the loss by 0.4 nats or more in every architecture but logits times 16",
        decoupling_helps,
        QUICK,
    ),
    Claim(
        "bits",
        "4-bit and 8-bit weights end within 0.1 nats of full precision, coupled and with AdamW",
        like_dense,
        QUICK,
    ),
    Claim(
        "healthy",
        "with AdamW, all architectures but tied embedding and logits times 16 learn in every seed",
        lambda df: all(
            ended(df, f"decoupled {x}").all() == (x not in (TIED, LOUD)) for x in CHANGES
        ),
        QUICK,
    ),
)


def show(df, exhibits) -> None:
    names = [name for name in CHANGES if name != BASE]
    keys = (LOSS, MUTUAL_INFORMATION)
    for kind in KINDS:
        pairs = [(f"{kind} {name}", f"{kind} {BASE}") for name in names]
        exhibits.differences(df, pairs, keys, f"Each change, {kind}")
    pairs = [(f"decoupled {name}", f"coupled {name}") for name in CHANGES]
    exhibits.differences(df, pairs, keys, "Decoupling, in each architecture")
    exhibits.table(df)
    exhibits.dots(df, LOSS)
    exhibits.dots(df, MUTUAL_INFORMATION)


if __name__ == "__main__":
    quick = (*SMALL, "run.steps=250", "run.save_every=250")
    experiment(__doc__, ARMS, None, CLAIMS, show, quick=quick)
