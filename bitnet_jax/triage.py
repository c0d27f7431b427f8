"""Ten tests of one checkpoint: what its arrays, its optimiser and its batches say about the code.

Each test runs what training runs. Programs have one replicate, states no axis of replicates.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize
from scipy.special import entr

from bitnet_jax import collapse, data, optim, quant, train
from bitnet_jax.config import Config, Hyper, OptimConfig, RunConfig
from bitnet_jax.loss import next_token_loss
from bitnet_jax.model import Transformer
from bitnet_jax.program import Program
from bitnet_jax.train import TrainState

POSITIONS = 2048  # held-out positions that are looked at, at most
AUDIT_STEPS, AUDIT_SAMPLE = 100, 4096  # updates; weights of each parameter, from its start
SERVED_STEPS = 32  # batches in which windows are compared
OVERFIT_LOSS, OVERFIT_STEPS = 2.0, 25  # nats; steps between looks


@partial(jax.jit, static_argnums=0)
def logits(cfg: Config, params, hyper: Hyper, tokens_BL) -> jax.Array:
    """Float32 logits [B, L, V] of one replicate."""
    return Transformer(cfg.model).apply({"params": params}, tokens_BL, hyper)


@partial(jax.jit, static_argnums=(0, 1))
def train_steps(cfg: Config, end_of_text: int, state: TrainState, hyper: Hyper, windows_BL, n):
    """State after `n` >= 1 training steps on the same windows, and the scalars of the last one."""

    def step(_, carry):
        return train.train_step(cfg, carry[0], hyper, windows_BL, end_of_text)

    scalars = jax.eval_shape(step, 0, (state,))[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), scalars)
    return jax.lax.fori_loop(0, n, step, (state, zeros))


def numbers(program: Program, step=0, *, peak: bool = False) -> Hyper:
    """The replicate's numbers at a step as arrays; at `peak`, its peak learning rate always."""
    hyper = jax.tree.map(jnp.float32, program.replicates[0].hyper)
    if peak:
        ends = dict.fromkeys(("lr_stage1_end", "lr_stage2_start", "lr_final"), hyper.lr_peak)
        warmups = dict.fromkeys(("warmup_steps", "quant_warmup_steps"), jnp.zeros(()))
        return hyper.replace(**ends, **warmups)
    return train.at_step(hyper, step)


def held_out(program: Program) -> tuple[jax.Array, jax.Array]:
    """Held-out windows [B, L + 1] and the weights of their targets."""
    windows_BL = jnp.concatenate(program.evals.held_out_NBL)
    windows_BL = windows_BL[: max(1, POSITIONS // (windows_BL.shape[1] - 1))]
    return windows_BL, data.score_weights(windows_BL, program.tokens.tokenizer.end_of_text, True)


def served(program: Program, steps: int) -> jax.Array:
    """The windows of the first steps, as the run is served them: int32 [steps, B, L + 1]."""
    batches = program.batches(0, steps)[0]
    if program.train_N is None:
        return batches
    return data.gather(program.train_N, batches, program.cfg.data.seq_len)


def rms(leaves) -> float:
    """Root mean square over arrays."""
    return float(optax.tree.norm(leaves)) / np.sqrt(sum(x.size for x in jax.tree.leaves(leaves)))


def predictions(program: Program, params, step) -> tuple[dict[str, float], jax.Array]:
    """T1: loss, entropy and the other held-out numbers of `collapse.finalize`; and the logits."""
    windows_BL, weights_BL = held_out(program)
    z_BLV = logits(program.cfg, params, numbers(program, step), windows_BL[:, :-1])
    sums = collapse.stats(z_BLV[None], windows_BL[:, 1:], weights_BL, program.evals.token_bytes_V)
    found = collapse.finalize(sums, sums, program.evals.unigram_V)
    return {key.partition("/")[2]: float(x[0]) for key, x in found.items()}, z_BLV


@jax.jit
def _blended(scales, z_BLV, log_pi_V, targets_BL, weights_BL):
    return next_token_loss(scales[0] * z_BLV + scales[1] * log_pi_V, targets_BL, weights_BL)


_blended_gradient = jax.jit(jax.value_and_grad(_blended))


def rescue(z_BLV, targets_BL, weights_BL, unigram_V) -> dict[str, float]:
    """T2, T3: `scale` s minimises CE(s z); `bias` t, with its own s, CE(s z + t log pi)."""
    std = max(float(jnp.mean(jnp.std(z_BLV, axis=-1))), 1e-6)
    rest = (z_BLV / std, jnp.log(unigram_V), targets_BL, weights_BL)

    def fit(free):
        def value(x):
            loss, gradient = _blended_gradient(jnp.array([x[0], free * x[1]], jnp.float32), *rest)
            return float(loss), np.asarray(gradient, np.float64) * (1, free)

        return optimize.minimize(value, (std, 0.0), jac=True, method="L-BFGS-B")

    now, scaled, biased = float(_blended(jnp.array([std, 0.0]), *rest)), fit(0), fit(1)
    gains = {"scale_gain": now - scaled.fun, "bias_gain": now - biased.fun}
    return {"scale": float(scaled.x[0]) / std, "bias": float(biased.x[1])} | gains


def logit_gain(program: Program, params) -> float:
    """Spread of the logits over that of a hidden state of RMS 1 times the output matrix.

    About 1 before training, where the last norm's scale is 1 and the matrix knows no hidden state.
    """
    spread = predictions(program, params, 0)[0]["logit_std"]
    matrix = params["head"] if "head" in params else params["embed"]
    return spread / (rms(matrix) * np.sqrt(program.cfg.model.d_model))


def displacement(params, start, weight_format: str) -> dict[str, float]:
    """T4: by group, distance from the start and norm, over the norm at the start; codes changed."""
    groups = optim.param_groups(params)
    moved = train.by_group(jax.tree.map(jnp.subtract, params, start), groups)
    now, then = train.by_group(params, groups), train.by_group(start, groups)
    found = {}
    for group in now:
        unit = max(rms(then[group]), 1e-30)
        found[f"moved_{group}"] = rms(moved[group]) / unit
        found[f"norm_{group}"] = rms(now[group]) / unit
    now, then = train.codes(params, weight_format), train.codes(start, weight_format)
    changed = sum(int(jnp.sum(now[k] != then[k])) for k in now) / sum(q.size for q in now.values())
    return found | {"codes_changed": changed}


def decay_audit(cfg: OptimConfig, run: RunConfig, hyper: Hyper, params) -> dict[str, dict]:
    """T5: by group, what AUDIT_STEPS updates with zero gradients around the boundary do to weights.

    `factor` is the norm after over before. `expected` is prod(1 - lr_n decay_n) with all decay that
    the group is given: what decay gives that is decoupled and scaled by the learning rate.
    `spread` is the standard deviation of w_after / w_before: 0 where the decay multiplies weights.
    On a sample of the weights, since updates are elementwise.
    """
    groups = optim.param_groups(params)
    sample = jax.tree.map(lambda w: jnp.ravel(w)[:AUDIT_SAMPLE], params)
    tx = optim.make_optimizer(cfg, run, hyper, groups)
    first = max(0, min(run.boundary - AUDIT_STEPS // 2, run.steps - AUDIT_STEPS))
    last = min(first + AUDIT_STEPS, run.steps)
    state = jax.tree.map(lambda x: x + first * (x.dtype == jnp.int32), tx.init(sample))
    zeros = jax.tree.map(jnp.zeros_like, sample)

    def update(_, carry):
        updates, state = tx.update(zeros, carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), state

    shrunk, _ = jax.jit(lambda carry: jax.lax.fori_loop(first, last, update, carry))(
        (sample, state)
    )
    n = np.arange(first + 1, last + 1)
    lr = np.asarray(optim.learning_rate(hyper, n, run), np.float64)
    kinds = ("coupled", "decoupled", "unscaled")
    one, two = (float(sum(getattr(hyper, f"{kind}_{i}") for kind in kinds)) for i in (1, 2))
    before, after = train.by_group(sample, groups), train.by_group(shrunk, groups)
    found = {}
    for group in before:
        w, v = (np.concatenate(x[group]).astype(np.float64) for x in (before, after))
        share = {"matrix": 1.0, "bias": 0.0}.get(group, float(hyper.decay_rest))
        decay = np.where(n <= run.boundary, one, two) * share
        rate = lr * (float(hyper.head_lr) if group == optim.output_group(groups) else 1)
        found[group] = {
            "factor": float(np.linalg.norm(v) / np.linalg.norm(w)),
            "expected": float(np.prod(1 - rate * decay)),
            "spread": float(np.std(v[w != 0] / w[w != 0])),
        }
    return found


def gradient_audit(program: Program, state: TrainState) -> dict[str, float]:
    """T6: by group, RMS and share of zeros of the gradient on the first batch, and RMS of the
    update at the peak learning rate over RMS of the weights.

    The gradient is read off Adam's first moment after one training step from zero moments.
    """
    cfg, windows_BL = program.cfg, served(program, 1)[0]
    hyper, groups = numbers(program, peak=True), optim.param_groups(state.params)
    step = partial(train_steps, cfg, program.tokens.tokenizer.end_of_text)
    fresh = state.replace(opt_state=jax.tree.map(jnp.zeros_like, state.opt_state))
    bare = hyper.replace(coupled_1=jnp.zeros(()), coupled_2=jnp.zeros(()))
    after, scalars = step(fresh, bare, windows_BL, 1)
    clipped = 1 / max(float(scalars["grad_norm"]) / cfg.optim.clip_norm, 1)
    updated = step(state, hyper, windows_BL, 1)[0].params
    gradient = train.by_group(after.opt_state["adam"].mu, groups)
    moved = train.by_group(jax.tree.map(jnp.subtract, updated, state.params), groups)
    found = {"train_loss": float(scalars["loss"])}
    for group, leaves in train.by_group(state.params, groups).items():
        g = jnp.concatenate([jnp.ravel(x) for x in gradient[group]])
        found[f"gradient_{group}"] = rms(g) / (1 - cfg.optim.beta1) / clipped
        found[f"zeros_{group}"] = float(jnp.mean(g == 0))
        found[f"update_{group}"] = rms(moved[group]) / max(rms(leaves), 1e-30)
    return found


def straight_through(largest: int = 1) -> dict[str, float]:
    """T7: largest deviation of the gradient of sum(c * Q(w)) from c, under jit and scan."""
    w, c = jax.random.normal(jax.random.key(0), (2, 16, 8))
    one = jnp.ones(())
    quantisers = {
        "ste_weight": lambda x: quant.quantize_weight(x, one, jnp.float32, largest),
        "ste_activation": lambda x: quant.quantize_activation(x, one),
    }

    def gradient(q):
        def total(x):
            return jax.lax.scan(lambda t, _: (t + jnp.sum(c * q(x)), None), 0.0, length=2)[0]

        return jax.jit(jax.grad(total))(w)

    return {k: float(jnp.max(jnp.abs(gradient(q) - 2 * c))) for k, q in quantisers.items()}


def data_audit(program: Program, params, step, train_loss: float) -> dict[str, float]:
    """T8: what the first batches hold, and which targets give the loss that training computes.

    `offset` is the k in 0, 1, 2 for which the cross-entropy of x[t + k] without end of text is
    nearest to `train_loss` on the first batch, and `loss_error` the distance at k = 1, the sound
    one. `target_entropy` is that of the frequencies of scored targets, nats.
    """
    cfg, end_of_text = program.cfg.data, program.tokens.tokenizer.end_of_text
    epoch = data.n_windows(len(program.tokens.train_N), cfg.seq_len) // cfg.batch_size
    windows_NL = np.asarray(served(program, max(1, min(SERVED_STEPS, epoch))))
    windows_NL = windows_NL.reshape(-1, cfg.seq_len + 1)
    weights_NL = np.asarray(data.score_weights(windows_NL, end_of_text, cfg.score_last))
    counts_V = np.bincount(
        windows_NL[:, 1:].ravel(), weights_NL.ravel(), minlength=program.cfg.model.vocab_size
    )
    batch_BL = windows_NL[: cfg.batch_size]
    z_BLV = logits(program.cfg, params, numbers(program, step), batch_BL[:, :-1])
    last = cfg.seq_len - (not cfg.score_last)
    losses = []
    for k in range(3):
        n = min(last, cfg.seq_len + 1 - k)
        targets_BL = batch_BL[:, k : k + n]
        scored_BL = np.float32(targets_BL != end_of_text)
        losses.append(float(next_token_loss(z_BLV[:, :n], targets_BL, scored_BL)))
    return {
        "repeated": 1 - len(np.unique(windows_NL, axis=0)) / len(windows_NL),
        "end_of_text_scored": float(counts_V[end_of_text] / counts_V.sum()),
        "target_entropy": float(entr(counts_V / counts_V.sum()).sum()),
        "offset": int(np.argmin(np.abs(np.array(losses) - train_loss))),
        "loss_error": abs(losses[1] - train_loss),
    }


def overfit(program: Program, start: TrainState, windows: int, steps: int) -> dict[str, float]:
    """T9: loss on a few windows after training on them alone at the peak learning rate."""
    step = partial(train_steps, program.cfg, program.tokens.tokenizer.end_of_text)
    windows_BL, hyper = served(program, 1)[0, :windows], numbers(program, peak=True)
    state, loss, done = start, np.inf, 0
    while done < steps and loss > OVERFIT_LOSS:
        state, scalars = step(state, hyper, windows_BL, OVERFIT_STEPS)
        loss, done = float(scalars["loss"]), done + OVERFIT_STEPS
    return {"overfit_loss": loss, "overfit_steps": done}


def earlier_tokens(program: Program, params, step) -> float:
    """T10: CE of predictions from the last token alone, less CE with all before it, nats."""
    windows_BL, weights_BL = held_out(program)
    tokens_BL, now = windows_BL[:, :-1], numbers(program, step)
    both = [logits(program.cfg, params, now, x) for x in (tokens_BL.reshape(-1, 1), tokens_BL)]
    alone, whole = (
        float(next_token_loss(z.reshape(*tokens_BL.shape, -1), windows_BL[:, 1:], weights_BL))
        for z in both
    )
    return alone - whole


def measure(program: Program, state: TrainState, *, windows: int = 2, steps: int = 200) -> dict:
    """All tests of a checkpoint, as flat numbers; `windows` and `steps` are those of T9.

    The start is made again from the replicate's seed.
    """
    cfg, hyper, params, at = program.cfg, program.replicates[0].hyper, state.params, state.step
    start = jax.tree.map(lambda x: x[0], program.init())
    windows_BL, weights_BL = held_out(program)
    found, z_BLV = predictions(program, params, at)
    found |= rescue(z_BLV, windows_BL[:, 1:], weights_BL, program.evals.unigram_V)
    found |= {f"{k}_loss": program.references[k]["loss"] for k in ("uniform", "unigram", "bigram")}
    rates = np.asarray(optim.learning_rate(hyper, np.arange(1, cfg.run.steps + 1), cfg.run))
    found |= {"step": int(at), "steps": cfg.run.steps, "lr_peak": float(hyper.lr_peak)}
    found |= {"sum_lr": float(rates[: int(at)].sum()), "planned_lr": float(rates.sum())}
    found |= {"start_gain": logit_gain(program, start.params)}
    matrices = train.matrices(start.params).values()
    found |= {"start_latent": float(np.mean([jnp.mean(jnp.abs(w)) for w in matrices]))}
    found |= displacement(params, start.params, cfg.model.weight_format)
    for group, audit in decay_audit(cfg.optim, cfg.run, hyper, params).items():
        found |= {f"decay_{key}_{group}": x for key, x in audit.items()}
    found |= gradient_audit(program, state)
    found |= straight_through(quant.LARGEST_CODE[cfg.model.weight_format])
    found |= data_audit(program, params, at, found["train_loss"])
    found |= overfit(program, start, windows, steps)
    return found | {"earlier_tokens": earlier_tokens(program, params, at)}
