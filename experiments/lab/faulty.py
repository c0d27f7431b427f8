"""An optimiser with two faults, and learning rates that are off by a factor."""

import jax

from bitnet_jax import optim, presets
from bitnet_jax.train import Seams

# Numbers of `Hyper.extra` for `optimizer`: with these it is the standard one.
SOUND = {"head_frozen": 0.0, "unscaled_1": 0.0, "unscaled_2": 0.0}


def optimizer(cfg, run, hyper, groups) -> optim.Optimizer:
    """The standard one with two faults by `extra`: a share of the output matrix's update that is
    dropped (`head_frozen`), and a decay of every parameter that no learning rate multiplies
    (`unscaled_1` in stage 1, `unscaled_2`)."""
    sound, extra = optim.make_optimizer(cfg, run, hyper, groups), hyper.extra

    def update(grads, state, params, **more):
        updates, state = sound.update(grads, state, params, **more)
        n = state["lr"].count
        decay = optim.by_stage(n, run, extra["unscaled_1"], extra["unscaled_2"])
        left = {optim.output_group(groups): 1.0 - extra["head_frozen"]}
        faulty = jax.tree.map(
            lambda group, u, w: left.get(group, 1.0) * u - decay * w, groups, updates, params
        )
        return faulty, state

    return optim.Optimizer(sound.init, update, sound.decay_part)


FAULTY = Seams(optimizer=optimizer)


def rates(factor: float) -> dict[str, float]:
    """The learning rates of the recipes `coupled` and `decoupled` times a factor."""
    peak, end, last = 1.5e-3, 1e-3, 1.5e-6
    sound = {"lr_peak": peak, "lr_stage1_end": end, "lr_stage2_start": end, "lr_final": last}
    return {name: factor * rate for name, rate in sound.items()}


def published_rates(factor: float) -> dict:
    """The learning rates of the recipe `published` times a factor, at the arm's length."""

    def rate(name):
        return lambda cfg: factor * getattr(presets.RECIPES["published"](cfg.run), name)

    names = ("lr_peak", "lr_stage1_end", "lr_stage2_start", "lr_final")
    return {name: rate(name) for name in names}
