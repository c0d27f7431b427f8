"""Do the quantisers, the model, the loss and the optimiser do what they should before training?

Checks of quantisation and of sanity, as the troubleshooting report has them. Those that cannot
fail, such as a loss between 1 and 15, are replaced by ones that can: every check says what it
measured beside what sound code gives. Nothing is trained but single steps.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import audit, optim, program, quant, restore, signatures, subject, train, updates
from bitnet_jax.config import Config, Replicate
from bitnet_jax.data import Batch
from bitnet_jax.model import Transformer
from bitnet_jax.train import STANDARD, Seams

INIT_LOSS, HEAD_GAIN, DECAY, LOSS = 0.05, 0.1, 1e-4, 1e-3  # tolerances
EVERY_START, FRESH_START = "every start", "fresh start"


class Outcome(NamedTuple):
    """What was measured, what sound code gives, and whether they agree."""

    measured: str
    expected: str
    passed: bool


@dataclass(frozen=True)
class Check:
    """A check of a start; `applies` is FRESH_START where imported weights may differ."""

    name: str
    part: str
    run: Callable[["Checked"], Outcome]
    applies: str = EVERY_START


@dataclass(frozen=True)
class Checked:
    """A subject at step 0, and what several checks look at."""

    subject: subject.Subject

    @property
    def cfg(self) -> Config:
        return self.subject.program.cfg

    @property
    def params(self):
        return self.subject.params

    @cached_property
    def batch(self) -> Batch:
        """The batch of the first step."""
        return jax.tree.map(lambda x: x[0], subject.served(self.subject.program, 1))

    @cached_property
    def logits_BLV(self):
        return self.subject.logits(self.batch.inputs)

    @cached_property
    def stepped(self):
        """State and numbers after one step at the peak learning rate."""
        s = self.subject
        batches = jax.tree.map(lambda x: x[None], self.batch)
        args = (s.state, s.peak, batches, s.program.evals.unigram_V)
        return subject.train_steps(*subject.fixed(s.program), *args)


def train_and_eval_agree(c: Checked) -> Outcome:
    """The logits under differentiation, as training computes them, and those of an evaluation."""
    model = Transformer(c.cfg.model, c.subject.program.seams.quantize_weight)
    apply = partial(model.apply, tokens_BL=c.batch.inputs, hyper=c.subject.hyper)
    trained = jax.jit(lambda p: jax.vjp(lambda q: apply({"params": q}), p)[0])(c.params)
    return _count(int(jnp.sum(trained != c.logits_BLV)))


def weights_deterministic(c: Checked) -> Outcome:
    """Dequantised weights, compiled and not, element by element."""
    make, strength = c.subject.program.seams.quantize_weight, c.subject.hyper.weight_quant
    quantise = partial(make, strength=strength, dtype=jnp.float32)
    compiled = jax.jit(lambda w: quantise(w))
    matrices = train.matrices(c.params).values()
    return _count(sum(int(jnp.sum(quantise(w) != compiled(w))) for w in matrices))


def activations_deterministic(c: Checked) -> Outcome:
    """Quantised activations, compiled with all rows and alone: a row must not see the others."""
    x = jax.random.normal(jax.random.key(0), (16, c.cfg.model.d_model))
    quantise = partial(quant.quantize_activation, strength=c.subject.hyper.act_quant)
    together = jax.jit(quantise)(x)
    alone = jnp.concatenate([quantise(row[None]) for row in x])
    return _count(int(jnp.sum(together != alone)))


def all_finite(c: Checked) -> Outcome:
    """Logits, then gradients and optimiser state after one step."""
    state, numbers = c.stepped
    leaves = jax.tree.leaves((c.logits_BLV, numbers, state.params, state.opt_state))
    return _count(sum(int(jnp.sum(~jnp.isfinite(x))) for x in leaves) + int(state.failed > 0))


def codes_in_range(c: Checked) -> Outcome:
    """Every quantised weight is a whole number of steps of its tensor's scale."""
    seen, off = set(), 0.0
    for w in train.matrices(c.params).values():
        q = c.subject.program.seams.quantize_weight(w, jnp.ones(()), jnp.float32)
        codes = np.asarray(q * quant.weight_scale(w))
        seen |= set(np.unique(np.round(codes[np.isfinite(codes)])).astype(int).tolist())
        off = max(off, float(np.abs(codes - np.round(codes)).max()))
    measured = f"{', '.join(map(str, sorted(seen)))}, off by {off:.1g}"
    return Outcome(measured, "-1, 0, 1", seen <= {-1, 0, 1} and off < 1e-3)


def straight_through(c: Checked) -> Outcome:
    """Gradient of sum(c Q(w)) against c, elementwise, under jit and scan."""
    deviations = audit.straight_through(c.subject)
    measured = ", ".join(f"{key.removeprefix('ste_')} {x:.2g}" for key, x in deviations.items())
    return Outcome(f"off by {measured}", "0", max(deviations.values()) == 0)


def weights_alive(c: Checked) -> Outcome:
    """Tensors that no model can work with: not finite, or ternary matrices with one code."""
    faults = subject.weight_faults(c.params)
    measured = "; ".join(f"{fault}: {_some(names)}" for fault, names in faults.items())
    return Outcome(measured or "none", "none", not faults)


def configuration(c: Checked) -> Outcome:
    """Parameters counted, against the formula for the configured sizes."""
    m = c.cfg.model
    d, f, kv = m.d_model, m.d_ff, m.n_kv_heads * (m.d_model // m.n_heads)
    norms = 2 * d + {"b158": d + f, "llama": 0, "report": 3 * d + f}[m.layout]
    block = 2 * d * d + 2 * d * kv + 3 * d * f + norms
    vocab = m.vocab_size
    wanted = m.n_layers * block + d + vocab * d * (2 - m.tied_embedding) + vocab * m.output_bias
    n_params = sum(x.size for x in jax.tree.leaves(c.params))
    return Outcome(f"{n_params:,}", f"{wanted:,}", n_params == wanted)


def causal(c: Checked) -> Outcome:
    """Logits before a token that is changed: all must stay, bit by bit, and later ones change."""
    inputs_BL, place = c.batch.inputs, c.cfg.data.seq_len // 2
    other_BL = inputs_BL.at[:, place].set((inputs_BL[:, place] + 1) % c.cfg.model.vocab_size)
    changed = c.subject.logits(other_BL) != c.logits_BLV
    after = bool(jnp.any(changed[:, place:]))
    outcome = _count(int(jnp.sum(changed[:, :place])))
    return outcome if after else Outcome("no logit changes", "later logits change", False)


def initial_loss(c: Checked) -> Outcome:
    """Gaussian logits of standard deviation s, independent of the text, cost ln V + s^2 / 2."""
    measured = audit.predictions(c.subject)
    wanted = measured["uniform_loss"] + measured["logit_std"] ** 2 / 2
    close = abs(measured["loss"] - wanted) < INIT_LOSS
    return Outcome(f"{measured['loss']:.3f}", f"{wanted:.3f} = ln V + s^2/2", close)


def head_gain(c: Checked) -> Outcome:
    """Spread of the logits over that of a unit-RMS hidden state times the output matrix."""
    gain = updates.logit_gain(c.subject)
    return Outcome(f"{gain:.3f}", "1", abs(gain - 1) < HEAD_GAIN)


def scored_targets(c: Checked) -> Outcome:
    """Weights of targets in windows with ends of text in the middle and at the last place."""
    windows, cfg = c.subject.program.windows, c.cfg.data
    tokens_N = np.array(windows.tokens_N[: cfg.seq_len + 1])
    tokens_N[[1, cfg.seq_len]] = windows.end_of_text
    batch = replace(windows, tokens_N=tokens_N).cut(np.zeros(1, np.int32))
    wanted = np.ones(cfg.seq_len)
    wanted[np.asarray(batch.targets[0]) == windows.end_of_text] = cfg.score_end
    wanted[-1] = wanted[-1] * cfg.score_last
    return _count(int((np.asarray(batch.weights[0]) != wanted).sum()))


def targets(c: Checked) -> Outcome:
    """The loss that training minimises, against one computed here from x[t + 1]."""
    labels = updates.labels(c.subject)
    measured = f"x[t + {labels['offset']}], loss off by {labels['loss_error']:.2g}"
    return Outcome(measured, "x[t + 1]", labels["offset"] == 1 and labels["loss_error"] < LOSS)


def decay(c: Checked) -> Outcome:
    """Norms after updates with zero gradients, in the group that is farthest from its product.

    A deviation fails where decay has a part in the updates of the ternary matrices.
    """
    factors = updates.decay(c.subject)
    groups = signatures.by_group(factors, "decay_factor")
    ratios = {g: x / factors[f"decay_expected_{g}"] for g, x in groups.items()}
    group = max(ratios, key=lambda g: abs(ratios[g] - 1))
    expected = f"{factors[f'decay_expected_{group}']:.4f} = prod(1 - lr decay)"
    measured = f"{groups[group]:.4f} ({group})"
    if abs(ratios[group] - 1) < DECAY:
        return Outcome(measured, expected, True)
    share = updates.updates(c.subject)["decay_share_matrix"]
    what = "scaled" if factors[f"decay_unscaled_{group}"] > DECAY else "decoupled"
    measured += f": not {what}, {share:.0%} of the updates of matrices"
    return Outcome(measured, expected, share < signatures.DECAY_SHARE)


def everything_moves(c: Checked) -> Outcome:
    """Parameters that one step leaves as they were."""
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), c.params, c.stepped[0].params)
    still = [optim.path_name(path) for path, m in jax.tree.leaves_with_path(moved) if not m]
    return Outcome(_some(still) or "none", "none", not still)


QUANTISATION, SANITY = "quantisation", "sanity"
CHECKS = (
    Check("training and evaluation give equal logits", QUANTISATION, train_and_eval_agree),
    Check("weight quantisation is deterministic", QUANTISATION, weights_deterministic),
    Check("activations are quantised row by row", QUANTISATION, activations_deterministic),
    Check("logits, gradients, optimiser state are finite", QUANTISATION, all_finite),
    Check("weight codes", QUANTISATION, codes_in_range),
    Check("quantisers pass gradients straight through", QUANTISATION, straight_through),
    Check("dead or broken weights", SANITY, weights_alive),
    Check("parameters of the configured model", SANITY, configuration),
    Check("earlier logits do not see a later token", SANITY, causal),
    Check("loss before training", SANITY, initial_loss, FRESH_START),
    Check("scale of the logits before training", SANITY, head_gain, FRESH_START),
    Check("which targets are scored", SANITY, scored_targets),
    Check("the target of position t", SANITY, targets),
    Check("norm after zero gradients", SANITY, decay),
    Check("parameters that a step does not move", SANITY, everything_moves),
)


def _count(n: int) -> Outcome:
    return Outcome(f"{n} differ" if n else "0", "0", n == 0)


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def examine(
    cfg: Config, replicate: Replicate, seams: Seams = STANDARD
) -> list[tuple[Check, Outcome]]:
    """The outcome of every check that applies to where this replicate starts; raises UserError."""
    built = program.build(cfg, [replicate], seams)
    nowhere = Path(os.devnull)  # a workdir without checkpoints: nothing is resumed
    state = jax.tree.map(lambda x: x[0], restore.start_state(built, nowhere)[0])
    return outcomes(subject.of_run(built, state))


def outcomes(s: subject.Subject) -> list[tuple[Check, Outcome]]:
    """The outcome of every check that applies to a subject at its start."""
    checked = Checked(s)
    applicable = [c for c in CHECKS if c.applies == EVERY_START or s.start is not None]
    with jax.set_mesh(s.program.mesh):
        return [(check, check.run(checked)) for check in applicable]


def terminal_lines(results: list[tuple[Check, Outcome]]) -> list[str]:
    """One line per check, failed ones marked, then `all passed` or `failed: NAMES`."""
    width = max(len(check.name) for check, _ in results)
    shown = []
    for check, outcome in results:
        mark = "ok    " if outcome.passed else "FAILED"
        beside = "" if outcome.passed else f", expected {outcome.expected}"
        shown.append(f"{mark} {check.name:{width}}  {outcome.measured}{beside}")
    failed = [check.name for check, outcome in results if not outcome.passed]
    return [*shown, f"failed: {', '.join(failed)}" if failed else "all passed"]
