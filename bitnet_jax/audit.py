"""Tests of one model: what its weights, its optimiser and its batches say about the code.

Each test runs what training runs and gives flat numbers; its docstring says what they are. `_G`
stands for a parameter group: matrix, embedding, head, norm, bias. A model without a text, its
optimiser or its start (a Hugging Face folder, an imported run) is examined by the other tests, and
the ones left out are named. Losses, entropies and mutual information are in nats.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from bitnet_jax import collapse, quant, updates
from bitnet_jax.data import Batch
from bitnet_jax.loss import cross_entropy
from bitnet_jax.subject import (
    OPTIMISER,
    START,
    TEXT,
    WEIGHTS,
    Subject,
    codes_by_path,
    fixed,
    logits,
    open_source,
)

TRAINING_TOKENS, PIECE = 4_000_000, 32  # tokens read; of a piece of text
DEAD_ZEROS = 0.99  # share of zeros above which a matrix passes next to nothing on


def codes(s: Subject) -> dict:
    """`nonfinite`: share of weights that are NaN or infinite. `dead_matrices`: share of the ternary
    matrices with one code only or more than DEAD_ZEROS zeros. `zero_rate`, `zero_rate_most`: share
    of zeros, over all and in the matrix with the most."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(s.params)]
    bad = sum(int((~np.isfinite(x)).sum()) for x in leaves if x.dtype.kind == "f")
    measured = {"nonfinite": bad / sum(x.size for x in leaves)}
    if bad:
        return measured
    by_path = codes_by_path(s.params).values()
    zeros = [float((q == 0).mean()) for q in by_path]
    one_code = np.array([q.min() == q.max() for q in by_path])
    return measured | {
        "dead_matrices": float(np.mean(one_code | (np.array(zeros) > DEAD_ZEROS))),
        "zero_rate": float(np.average(zeros, weights=[q.size for q in by_path])),
        "zero_rate_most": max(zeros),
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _stats(cfg, seams, params, hyper, batch, nats_KBL, token_bytes_V):
    z_BLV = logits(cfg, seams, params, hyper, batch.inputs)
    return collapse.stats(z_BLV, batch.targets, batch.weights, token_bytes_V, nats_KBL)


def predictions(s: Subject) -> dict:
    """The numbers of `collapse.finalize` and `finalize_large` over the large held-out block,
    without their prefixes, and `uniform_loss`, `unigram_loss` on the same positions."""
    evals, parts = s.program.evals, []
    for inputs, targets, weights, nats_KBL in zip(
        *(evals.large.inputs, evals.large.targets, evals.large.weights, evals.large_nats_NKBL),
        strict=True,
    ):
        args = (s.params, s.hyper, Batch(inputs, targets, weights), nats_KBL, evals.token_bytes_V)
        parts.append(jax.device_get(_stats(*fixed(s.program), *args)))
    sums = jax.tree.map(lambda *x: np.sum(x, axis=0), *parts)
    numbers = collapse.finalize(sums, sums, evals.unigram_V) | collapse.finalize_large(sums)
    measured = {key.partition("/")[2]: float(x[0]) for key, x in numbers.items()}
    vocab = s.program.cfg.model.vocab_size
    unigram = measured["loss"] - measured["minus_unigram"]
    return measured | {"unigram_loss": unigram, "uniform_loss": float(np.log(vocab))}


@jax.jit
def _blended(scales, z_BLV, log_pi_V, batch):
    return cross_entropy(scales[0] * z_BLV + scales[1] * log_pi_V, batch)


_blended_gradient = jax.jit(jax.value_and_grad(_blended))


def rescue(z_BLV, batch: Batch, unigram_V) -> dict:
    """`scale` s minimises CE(s z), and gains `scale_gain`; `bias` t, with its own s, minimises
    CE(s z + t log pi), and gains `bias_gain`."""
    std = max(float(jnp.mean(jnp.std(z_BLV, axis=-1))), 1e-6)
    rest = (z_BLV / std, jnp.log(unigram_V), batch)

    def fit(free):
        def value(x):
            loss, gradient = _blended_gradient(jnp.array([x[0], free * x[1]], jnp.float32), *rest)
            return float(loss), np.asarray(gradient, np.float64) * (1, free)

        return optimize.minimize(value, (std, 0.0), jac=True, method="L-BFGS-B")

    now, scaled, biased = float(_blended(jnp.array([std, 0.0]), *rest)), fit(0), fit(1)
    gains = {"scale_gain": now - scaled.fun, "bias_gain": now - biased.fun}
    return {"scale": float(scaled.x[0]) / std, "bias": float(biased.x[1])} | gains


def temperature(s: Subject) -> dict:
    """The numbers of `rescue` on held-out positions."""
    return rescue(s.logits_BLV, s.held_out, s.program.evals.unigram_V)


def context(s: Subject) -> dict:
    """`earlier_tokens`: KL from the predictions with a window's own tokens to those with another
    window's tokens before the last one, which stays: 0 where these are not looked at."""
    inputs_BL, length = s.held_out.inputs, s.held_out.inputs.shape[-1]
    log_q_BLV = jax.nn.log_softmax(s.logits_BLV)
    other_BL = jnp.roll(inputs_BL, 1, axis=0)
    divergences = []
    for place in sorted({max(1, length * k // 4 - 1) for k in (1, 2, 3, 4)}):
        mixed_BL = jnp.where(jnp.arange(length) < place, other_BL, inputs_BL)
        p_BV = log_q_BLV[:, place]
        q_BV = jax.nn.log_softmax(s.logits(mixed_BL)[:, place])
        divergences.append(float(jnp.mean(jnp.sum(jnp.exp(p_BV) * (p_BV - q_BV), axis=-1))))
    return {"earlier_tokens": float(np.mean(divergences))}


def causality(s: Subject) -> dict:
    """`future_leak`: largest change of the logits before a place when all tokens from it on change,
    over the spread of the logits: 0 in a causal model."""
    inputs_BL = s.held_out.inputs[:8]
    changed_BL, place = collapse.later_changed(inputs_BL, s.program.cfg.model.vocab_size)
    before, after = (s.logits(x)[:, :place] for x in (inputs_BL, changed_BL))
    return {"future_leak": float(collapse.future_leak(before, after))}


def straight_through(s: Subject) -> dict:
    """`ste_weight`, `ste_activation`: largest deviation of the gradient of sum(c Q(w)) from c,
    under jit and scan."""
    return quantiser_gradients(s.program.seams.quantize_weight)


def quantiser_gradients(quantize_weight: Callable) -> dict:
    """The numbers of `straight_through`."""
    w, c = jax.random.normal(jax.random.key(0), (2, 16, 8))
    full_strength = jnp.ones(())
    quantisers = {
        "ste_weight": lambda x: quantize_weight(x, full_strength, jnp.float32),
        "ste_activation": lambda x: quant.quantize_activation(x, full_strength),
    }

    def gradient(q):
        def total(x):
            return jax.lax.scan(lambda t, _: (t + jnp.sum(c * q(x)), None), 0.0, length=2)[0]

        return jax.jit(jax.grad(total))(w)

    return {k: float(jnp.max(jnp.abs(gradient(q) - 2 * c))) for k, q in quantisers.items()}


def text(s: Subject) -> dict:
    """Of the training text's first TRAINING_TOKENS tokens: `repeated_text`, share of its pieces of
    PIECE tokens, at all places, that occurred before; `repeated_documents`, share of its documents;
    `unused_vocabulary`, share of the vocabulary that does not occur in it, and `unused_mass`, the
    mean probability that the model gives to all of that."""
    tokens = s.program.tokens
    tokens_N = np.asarray(tokens.train_N[:TRAINING_TOKENS])
    unused_V = np.bincount(tokens_N, minlength=s.program.cfg.model.vocab_size) == 0
    mean_V = np.asarray(jnp.mean(jax.nn.softmax(s.logits_BLV), axis=(0, 1)), np.float64)
    documents = np.split(tokens_N, np.flatnonzero(tokens_N == tokens.tokenizer.end_of_text) + 1)
    documents = [d.tobytes() for d in documents if len(d)]
    return {
        "repeated_text": repeated_pieces(tokens_N),
        "repeated_documents": 1 - len(set(documents)) / len(documents),
        "unused_vocabulary": float(unused_V.mean()),
        "unused_mass": float(mean_V[unused_V].sum()),
    }


def repeated_pieces(tokens_N: np.ndarray, length: int = PIECE) -> float:
    """Share of the pieces of `length` tokens, at all places, that occur at an earlier place."""
    n = len(tokens_N) - length + 1
    if n < 2:
        return 0.0
    hashes = np.zeros(n, np.uint64)
    for k in range(length):  # a polynomial modulo 2^64 with an odd base
        token = tokens_N[k : k + n].astype(np.uint64) + np.uint64(1)
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + token * np.uint64(0xBF58476D1CE4E5B9)
    return 1 - len(np.unique(hashes)) / n


# ------------------------------------------------------------------------------------ all of them


@dataclass(frozen=True)
class Test:
    """A test, what it needs of a subject, and one line of what it measured."""

    name: str
    needs: tuple[str, ...]
    measure: Callable[[Subject], dict]
    line: Callable[[dict], str]


def _groups(m: dict, key: str, spec: str) -> str:
    by_group = {k.removeprefix(f"{key}_"): x for k, x in m.items() if k.startswith(f"{key}_")}
    return ", ".join(f"{group} {x:{spec}}" for group, x in by_group.items())


TESTS = (
    Test(
        "codes",
        (WEIGHTS,),
        codes,
        lambda m: (
            f"zeros {m['zero_rate']:.1%}, most in one matrix {m['zero_rate_most']:.1%}, "
            f"dead matrices {m['dead_matrices']:.0%}"
        ),
    ),
    Test(
        "calibration",
        (TEXT,),
        predictions,
        lambda m: (
            f"loss {m['loss']:.3f}, entropy {m['entropy']:.3f}, unigram "
            f"{m['unigram_loss']:.3f}, difference {m['minus_unigram']:+.3f} (standard error "
            f"{m['minus_unigram_se']:.3f})"
        ),
    ),
    Test(
        "temperature",
        (TEXT,),
        temperature,
        lambda m: (
            f"best scale {m['scale']:.2g} gains {m['scale_gain']:.3f}, with "
            f"{m['bias']:.2g} times the unigram's logarithm {m['bias_gain']:.3f}"
        ),
    ),
    Test(
        "context",
        (TEXT,),
        context,
        lambda m: (
            f"mutual information {m['mutual_information']:.3f}, tokens before the last one "
            f"{m['earlier_tokens']:.3f}"
        ),
    ),
    Test(
        "causality",
        (TEXT,),
        causality,
        lambda m: f"later tokens move earlier logits by {m['future_leak']:.2g} of their spread",
    ),
    Test(
        "straight-through",
        (WEIGHTS,),
        straight_through,
        lambda m: (
            f"off by {m['ste_weight']:.2g} (weights), {m['ste_activation']:.2g} (activations)"
        ),
    ),
    Test(
        "text",
        (TEXT,),
        text,
        lambda m: (
            f"pieces that occurred before {m['repeated_text']:.1%}, documents "
            f"{m['repeated_documents']:.1%}; vocabulary unused {m['unused_vocabulary']:.0%}, "
            f"with {m['unused_mass']:.1%} of the probability"
        ),
    ),
    Test(
        "schedule",
        (OPTIMISER,),
        updates.schedule,
        lambda m: (
            f"step {m['step']} of {m['steps']}, learning rates sum to {m['sum_lr']:.2g} of "
            f"{m['planned_lr']:.2g}"
        ),
    ),
    Test(
        "decay",
        (OPTIMISER,),
        updates.decay,
        lambda m: (
            f"left after {updates.AUDIT_STEPS} updates without gradients: "
            f"{_groups(m, 'decay_factor', '.4g')}"
        ),
    ),
    Test(
        "updates",
        (TEXT, OPTIMISER),
        updates.updates,
        lambda m: (
            f"over weights: {_groups(m, 'update', '.2g')}; by decay: "
            f"{_groups(m, 'decay_share', '.0%')}; clipping leaves {m['clip_factor']:.2g}"
        ),
    ),
    Test(
        "batches",
        (TEXT, OPTIMISER),
        updates.batches,
        lambda m: (
            f"windows served again {m['repeated']:.0%}, padding among scored targets "
            f"{m['padding_scored']:.1%}"
        ),
    ),
    Test(
        "labels",
        (TEXT, OPTIMISER),
        updates.labels,
        lambda m: (
            f"the loss is nearest to that of x[t + {m['offset']}] ({m['offset_error']:.2g} "
            f"off), {m['loss_error']:.2g} from that of x[t + 1]"
        ),
    ),
    Test(
        "displacement",
        (TEXT, START),
        updates.displacement,
        lambda m: (
            f"{_groups(m, 'moved', '.2g')}; codes changed {m['codes_changed']:.1%}; logits "
            f"at the start {m['start_gain']:.2g} of theory"
        ),
    ),
    Test(
        "one batch",
        (TEXT, START),
        updates.overfit,
        lambda m: f"loss {m['overfit_loss']:.2f} after {m['overfit_steps']} steps",
    ),
)


def measure(s: Subject) -> tuple[dict, dict[str, str]]:
    """The numbers of all tests, and for each test that was left out what it needs."""
    precision = "float32" if s.program.cfg.model.dtype == "float32" else "default"
    measured, left_out = {}, {}
    with jax.set_mesh(s.program.mesh), jax.default_matmul_precision(precision):
        for test in TESTS:
            if measured.get("nonfinite"):
                left_out[test.name] = "finite weights"
            elif missing := s.lacks(test.needs):
                left_out[test.name] = missing
            else:
                measured |= test.measure(s)
    return measured, left_out


def examine(source: str, text: str | None = None) -> dict:
    """Name, seed, step, `measured` and `left_out` of a SOURCE; raises UserError."""
    subject = open_source(source, text)
    measured, left_out = measure(subject)
    replicate = subject.program.replicates[0]
    about = {"source": source, "name": replicate.name, "seed": replicate.seed}
    return about | {"step": subject.step, "measured": measured, "left_out": left_out}


def terminal_lines(measured: dict, left_out: dict[str, str]) -> list[str]:
    """One line per test, then one that names those left out."""
    width = max(len(test.name) for test in TESTS)
    if measured["nonfinite"]:
        shown = [f"{'codes':{width}}  not finite: {measured['nonfinite']:.2%} of the weights"]
    else:
        shown = [f"{t.name:{width}}  {t.line(measured)}" for t in TESTS if t.name not in left_out]
    for needs in sorted(set(left_out.values())):
        names = ", ".join(name for name, need in left_out.items() if need == needs)
        shown.append(f"left out, without {needs}: {names}")
    return shown
