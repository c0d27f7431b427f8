"""Do the quantisers, the model, the loss and the optimiser do what they should before training?

The report's four quantisation checks and six sanity checks. Those that cannot fail, such as a loss
between 1 and 15, are replaced by ones that can: every check prints what it measured beside what
sound code gives. Nothing is trained but single steps; the exit status is 1 when a check fails.

The first of run.recipes is checked, b158 by default. Expected: all pass, but with the report's
recipe one fails: its weight decay goes through Adam, which scales it up to steps of the learning
rate.

    python -m experiments.checks
    python -m experiments.checks --set run.recipes=report
"""

import sys
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import data, optim, quant, train, triage
from bitnet_jax import program as programs
from bitnet_jax.model import Transformer
from bitnet_jax.program import Program
from experiments import common, page

NAME = "checks"
INIT_LOSS, HEAD_GAIN, DECAY, LOSS = 0.05, 0.1, 1e-4, 1e-3  # tolerances


class Check(NamedTuple):
    """One line of the table."""

    name: str
    measured: str
    expected: str
    passed: bool


@dataclass(frozen=True)
class Subject:
    """A program of one replicate, and what several checks look at."""

    program: Program

    @cached_property
    def cfg(self):
        return self.program.cfg

    @cached_property
    def hyper(self):
        return triage.numbers(self.program)

    @cached_property
    def state(self) -> train.TrainState:
        """The start, without the axis of replicates."""
        return jax.tree.map(lambda x: x[0], self.program.init())

    @cached_property
    def windows_BL(self):
        """The batch of the first step, with the token after each window."""
        return triage.served(self.program, 1)[0]

    @cached_property
    def end_of_text(self) -> int:
        return self.program.tokens.tokenizer.end_of_text

    @cached_property
    def logits_BLV(self):
        return triage.logits(self.cfg, self.state.params, self.hyper, self.windows_BL[:, :-1])

    @cached_property
    def stepped(self):
        """State and scalars after one step at the peak learning rate."""
        hyper = triage.numbers(self.program, peak=True)
        args = (self.cfg, self.end_of_text, self.state, hyper, self.windows_BL, 1)
        return triage.train_steps(*args)


def train_and_eval_agree(s: Subject) -> Check:
    """The logits under differentiation, as training computes them, and those of an evaluation."""
    apply = partial(Transformer(s.cfg.model).apply, tokens_BL=s.windows_BL[:, :-1], hyper=s.hyper)
    trained = jax.jit(lambda p: jax.vjp(lambda q: apply({"params": q}), p)[0])(s.state.params)
    different = int(jnp.sum(trained != s.logits_BLV))
    return Check("training and evaluation give equal logits", *_count(different))


def weights_deterministic(s: Subject) -> Check:
    """Dequantised weights, compiled and not, element by element."""
    largest = quant.LARGEST_CODE[s.cfg.model.weight_format]
    quantise = partial(quant.quantize_weight, strength=s.hyper.weight_quant, dtype=jnp.float32)
    compiled = jax.jit(lambda w: quantise(w, largest=largest))
    different = sum(
        int(jnp.sum(quantise(w, largest=largest) != compiled(w)))
        for w in train.matrices(s.state.params).values()
    )
    return Check("weight quantisation is deterministic", *_count(different))


def activations_deterministic(s: Subject) -> Check:
    """Quantised activations, compiled with all rows and alone: a row must not see the others."""
    x = jax.random.normal(jax.random.key(0), (16, s.cfg.model.d_model))
    quantise = partial(quant.quantize_activation, strength=s.hyper.act_quant)
    together = jax.jit(quantise)(x)
    alone = jnp.concatenate([quantise(row[None]) for row in x])
    different = int(jnp.sum(together != alone))
    return Check("activation quantisation is deterministic, row by row", *_count(different))


def all_finite(s: Subject) -> Check:
    """Logits, then gradients and optimiser state after one step."""
    state, scalars = s.stepped
    leaves = jax.tree.leaves((s.logits_BLV, scalars, state.params, state.opt_state))
    bad = sum(int(jnp.sum(~jnp.isfinite(x))) for x in leaves) + int(state.failed > 0)
    return Check("logits, gradients and optimiser state are finite", *_count(bad))


def codes_in_range(s: Subject) -> Check:
    """Every quantised weight is a whole number of steps of its tensor's scale."""
    largest = quant.LARGEST_CODE[s.cfg.model.weight_format]
    seen, off = set(), 0.0
    for w in train.matrices(s.state.params).values():
        q = quant.quantize_weight(w, jnp.ones(()), jnp.float32, largest)
        codes = np.asarray(q * quant.weight_scale(w, largest))
        seen |= set(np.unique(np.round(codes)).astype(int).tolist())
        off = max(off, float(np.abs(codes - np.round(codes)).max()))
    allowed = set(range(-largest, largest + 1))
    measured = (
        f"{sorted(seen) if len(seen) < 4 else f'{min(seen)} to {max(seen)}'}, off by {off:.1g}"
    )
    wanted = "-1, 0, 1" if largest == 1 else f"-{largest} to {largest}"
    return Check("weight codes", measured, wanted, seen <= allowed and off < 1e-3)


def straight_through(s: Subject) -> Check:
    """Gradient of sum(c Q(w)) against c, elementwise, under jit and scan."""
    found = triage.straight_through(quant.LARGEST_CODE[s.cfg.model.weight_format])
    worst = max(found.values())
    told = ", ".join(f"{key.removeprefix('ste_')} {x:.2g}" for key, x in found.items())
    return Check("quantisers pass gradients straight through", f"off by {told}", "0", worst == 0)


def configuration(s: Subject) -> Check:
    """Parameters counted, against the formula for the configured sizes."""
    m = s.cfg.model
    d, f, kv = m.d_model, m.d_ff, m.n_kv_heads * (m.d_model // m.n_heads)
    norms = 2 * d + (d + f if m.layout == "b158" else 3 * d + f)
    block = 2 * d * d + 2 * d * kv + 3 * d * f + norms
    vocab = s.program.tokens.tokenizer.vocab_size
    wanted = m.n_layers * block + d + vocab * d * (2 - m.tied_embedding) + vocab * m.output_bias
    found = sum(x.size for x in jax.tree.leaves(s.state.params))
    return Check("parameters of the configured model", f"{found:,}", f"{wanted:,}", found == wanted)


def causal(s: Subject) -> Check:
    """Logits before a token that is changed: all must stay, bit by bit, and later ones change."""
    tokens_BL, place = s.windows_BL[:, :-1], s.cfg.data.seq_len // 2
    other_BL = tokens_BL.at[:, place].set((tokens_BL[:, place] + 1) % s.cfg.model.vocab_size)
    changed = triage.logits(s.cfg, s.state.params, s.hyper, other_BL) != s.logits_BLV
    before, after = int(jnp.sum(changed[:, :place])), bool(jnp.any(changed[:, place:]))
    measured, expected, passed = _count(before)
    return Check("earlier logits do not see a later token", measured, expected, passed and after)


def initial_loss(s: Subject) -> Check:
    """Gaussian logits of standard deviation s, independent of the text, cost ln V + s^2 / 2."""
    found, _ = triage.predictions(s.program, s.state.params, 0)
    wanted = np.log(s.cfg.model.vocab_size) + found["logit_std"] ** 2 / 2
    close = abs(found["loss"] - wanted) < INIT_LOSS
    return Check(
        "loss before training", f"{found['loss']:.3f}", f"{wanted:.3f} = ln V + s^2/2", close
    )


def head_gain(s: Subject) -> Check:
    """Spread of the logits over that of a unit-RMS hidden state times the output matrix."""
    gain = triage.logit_gain(s.program, s.state.params)
    return Check(
        "scale of the logits before training", f"{gain:.3f}", "1", abs(gain - 1) < HEAD_GAIN
    )


def padding(s: Subject) -> Check:
    """Weights of targets that mark the end of text, which is also the padding."""
    windows = np.array(s.windows_BL)
    windows[:, -1] = windows[:, 1] = s.end_of_text
    weights = np.asarray(data.score_weights(windows, s.end_of_text, s.cfg.data.score_last))
    scored = int(weights[windows[:, 1:] == s.end_of_text].sum())
    return Check("padding and end of text are not scored", *_count(scored))


def targets(s: Subject) -> Check:
    """The loss that a training step reports, against one computed here from x[t + 1]."""
    found = triage.data_audit(s.program, s.state.params, 0, float(s.stepped[1]["loss"]))
    measured = f"x[t + {found['offset']}], loss off by {found['loss_error']:.2g}"
    passed = found["offset"] == 1 and found["loss_error"] < LOSS
    return Check("the target of position t", measured, "x[t + 1]", passed)


def decay(s: Subject) -> Check:
    """Norms after updates with zero gradients, in the group that is farthest from its product."""
    found = triage.decay_audit(s.cfg.optim, s.cfg.run, s.hyper, s.state.params)
    group, a = max(found.items(), key=lambda x: abs(x[1]["factor"] / x[1]["expected"] - 1))
    sound = abs(a["factor"] / a["expected"] - 1) < DECAY
    scope = "" if sound else ": decay is not " + ("decoupled" if a["spread"] > DECAY else "scaled")
    measured = f"{a['factor']:.4f} ({group}){scope}"
    return Check(
        "norm after zero gradients", measured, f"{a['expected']:.4f} = prod(1 - lr decay)", sound
    )


def everything_moves(s: Subject) -> Check:
    """Parameters that one step leaves as they were."""
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), s.state.params, s.stepped[0].params)
    still = [optim.path_name(path) for path, m in jax.tree.leaves_with_path(moved) if not m]
    measured = ", ".join(still[:2]) + (f" and {len(still) - 2} more" if len(still) > 2 else "")
    return Check("parameters that a step does not move", measured or "none", "none", not still)


QUANTISATION = (
    train_and_eval_agree,
    weights_deterministic,
    activations_deterministic,
    all_finite,
    codes_in_range,
    straight_through,
)
SANITY = (
    configuration,
    causal,
    initial_loss,
    head_gain,
    padding,
    targets,
    decay,
    everything_moves,
)


def _count(n: int) -> tuple[str, str, bool]:
    return f"{n} differ" if n else "0", "0", n == 0


def table(title: str, checks: list[Check]) -> page.Table:
    """Check, measured, expected, verdict."""
    rows = [[c.name, c.measured, c.expected, "ok" if c.passed else "FAILED"] for c in checks]
    return page.Table(title, ["check", "measured", "expected", "verdict"], rows)


def body(request: common.Request) -> None:
    replicate = request.replicates[0]
    subject = Subject(programs.build(request.cfg, [replicate]))
    failed = []
    for title, part in (("Quantisation", QUANTISATION), ("Sanity", SANITY)):
        found = [check(subject) for check in part]
        failed += [c.name for c in found if not c.passed]
        print(page.text_table(table(f"{title}, recipe {replicate.name}", found)) + "\n")
    print("failed: " + ", ".join(failed) if failed else "all passed")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    common.main(__doc__, NAME, "quick", body, quick=("run.recipes=b158",))
