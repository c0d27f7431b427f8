"""What coupled decay does to weights and logits: the theory of the collapse. Pure, and in NumPy.

**Rows without gradient.** A weight whose loss gradient is small against coupled decay moves,
through Adam's normaliser, towards 0 by the learning rate at every update. From that follow, without
a free parameter, how many weights stay large, how the logits shrink, and when.

**Stationary point.** Adam with L2 sees f g + decay w, f the clip factor min(1, clip / |g|). The
mean of that is 0 where f CE + decay / 2 |w|^2 is stationary. A model without context has the logits
z_v = sum_i gamma_i s_i w_vi, s_i = +-1 the normalised state, gamma the scale of the last norm. With
q the softmax of z and p the token frequencies, decay w_vi = f (p - q)_v gamma_i s_i and
decay gamma_i = f sum_v (p - q)_v w_vi s_i. Inserting the first in the second: gamma_i = 0, or
decay = f |p - q|_2. Since |p - q|_2 is largest where the logits are 0, nothing is left above the
decay f |p - 1/V|_2 (`stationary_edge`), at every width. How much of that a run of T updates meets
is another matter: gamma, which starts at 1, moves by no more than the summed learning rate.

**Occurrences.** The row of a rare token gets a gradient once in 1 / (n p_v) batches of n tokens.
One gradient of size g moves Adam, as long as it outweighs the decay, by lr (1 - beta1) /
sqrt(1 - beta2) sum_k (beta1 / sqrt(beta2))^k, whatever g is (`lift`: 5.8 lr at betas (.9, .95)),
and keeps the decay out for 2 ln(f g sqrt(1 - beta2) / (decay w)) / -ln(beta2) updates (`shelter`);
after that the decay takes one lr an update. A row survives where lift + shelter > 1 / (n p_v).

**Context.** Beside s the state of a position has a part of its own, sqrt(1 - rho) xi_x of its token
x. The rows' stationary parts along it, decay w_v = f gamma sqrt(1 - rho) sum_x C_xv xi_x with
C = p(x, v) - p(x) p(v), give the pair the logit kappa C_xv, kappa = width gamma^2 f (1 - rho) /
decay, and lower the loss by kappa |C|_F^2 as long as that is small. A run ends above the unigram
where that is less than what the decay costs the word frequencies.

**Mean field.** `mean_field` follows rows, gamma and the clip factor through a schedule on token
counts alone. Its assumptions: one normalised state for all positions (no context); a row's entries
start on the quantiles of the initialisation; tokens are drawn independently. What it holds was
chosen while looking at two points of experiments/critical_decay.py (centre, V 512); no number in it
is fitted.
"""

import itertools
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from bitnet_jax.config import Hyper, OptimConfig, RunConfig
from bitnet_jax.optim import by_stage, learning_rate


def summed_rate(run: RunConfig, hyper: Hyper) -> np.ndarray:
    """Sum of the learning rates of updates 1 .. n, for n = 0 .. T: [T + 1], float64."""
    rates = np.asarray(learning_rate(hyper, np.arange(1, run.steps + 1), run), np.float64)
    return np.concatenate([[0.0], np.cumsum(rates)])


def starved_weight(w0: np.ndarray, cfg: OptimConfig, run: RunConfig, hyper: Hyper) -> np.ndarray:
    """Where weights end that start at `w0` and receive nothing but coupled decay, float64.

    The scalar Adam recursion (Kingma & Ba 2015, algorithm 1) with gradient decay_n * w: what
    happens to the embedding rows of tokens that the batches do not contain.
    """
    w = np.array(w0, np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    lr = np.diff(summed_rate(run, hyper))
    n_all = np.arange(1, run.steps + 1)
    decay = np.asarray(by_stage(n_all, run, hyper.coupled_1, hyper.coupled_2), np.float64)
    for n in n_all:
        g = decay[n - 1] * hyper.decay_rest * w
        m = cfg.beta1 * m + (1 - cfg.beta1) * g
        v = cfg.beta2 * v + (1 - cfg.beta2) * g * g
        m_hat, v_hat = m / (1 - cfg.beta1**n), v / (1 - cfg.beta2**n)
        w = w - lr[n - 1] * m_hat / (np.sqrt(v_hat) + cfg.eps)
    return w


def shrink_limit(w0: np.ndarray, total: float) -> np.ndarray:
    """`starved_weight` when every update is a full step: |w0| less the summed rate, down to 0."""
    w0 = np.asarray(w0, np.float64)
    return np.sign(w0) * np.maximum(np.abs(w0) - total, 0)


def count_above(
    threshold: float, size: int, cfg: OptimConfig, run: RunConfig, hyper: Hyper
) -> float:
    """How many of `size` weights drawn from N(0, 1) `starved_weight` leaves above `threshold`."""
    start = np.linspace(threshold, threshold + 5, 50_001)
    end = starved_weight(start, cfg, run, hyper)
    return size * math.erfc(np.interp(threshold, end, start) / math.sqrt(2))


def spread_ratio(total: np.ndarray, bound: float) -> np.ndarray:
    """Standard deviation of logits over that at the start, once the head's rates sum to `total`.

    A head drawn from U(-bound, bound) and shrunk by `shrink_limit` has the mean square
    (bound - total)^3 / (3 bound), and logits of normalised states are proportional to its root:
    (1 - total / bound)^1.5, 0 beyond the bound.
    """
    return np.maximum(1 - np.asarray(total, np.float64) / bound, 0) ** 1.5


def half_spread_step(run: RunConfig, hyper: Hyper, bound: float) -> float | None:
    """Update (interpolated) at which `spread_ratio` is 1/2; None when the run ends before it."""
    total, half = summed_rate(run, hyper), bound * (1 - 0.5 ** (2 / 3))
    if total[-1] < half:
        return None
    return float(np.interp(half, total, np.arange(run.steps + 1)))


def gaussian_entropy(vocab: int, std: float) -> float:
    """ln V - std^2 / 2: entropy of the softmax of V independent draws from N(0, std^2).

    From ln sum exp(z) = ln V + std^2 / 2 and E_q z = std^2 for large V; nats.
    """
    return float(np.log(vocab) - std**2 / 2)


def scale_slope(loss: float, entropy: float) -> float:
    """d loss / d ln s of logits s z, at s = 1: loss - entropy, nats.

    loss = ln sum exp(z) - z_y and entropy = ln sum exp(z) - E_q z, so both sides are E_q z - z_y.
    Negative: larger logits of the same shape would lower the loss.
    """
    return loss - entropy


# ------------------------------------------------------------------ closed forms of the collapse


def stationary_edge(probs_V: np.ndarray, clip_factor: float = 1.0) -> float:
    """The decay above which no logits are stationary without context: f |p - 1/V|_2 (see above)."""
    p_V = np.asarray(probs_V, np.float64)
    return float(clip_factor * np.linalg.norm(p_V - 1 / len(p_V)))


def lift(beta1: float, beta2: float) -> float:
    """How far one lone gradient, of any size, moves a weight through Adam, in learning rates.

    The update k steps after it is (1 - beta1) beta1^k / sqrt((1 - beta2) beta2^k): a geometric sum.
    Infinite where beta1^2 >= beta2: the first moment outlives the second.
    """
    ratio = beta1 / math.sqrt(beta2) if beta2 else math.inf
    return (1 - beta1) / math.sqrt(1 - beta2) / (1 - ratio) if ratio < 1 else math.inf


def shelter(gradient: float, pull: float, beta2: float) -> float:
    """Updates for which the second moment of one `gradient` outweighs the `pull` of the decay."""
    left = gradient * math.sqrt(1 - beta2) / pull
    return 2 * math.log(left) / -math.log(beta2) if left > 1 and beta2 else 0.0


# -------------------------------------------------------------------------------- the mean field

ENTRIES = 8  # of a row that are followed: quantiles of the initialisation
SINGLE, BINS, PER_BIN = 768, 24, 16  # frequent tokens followed each; rarer ones by bins of rank
ALIVE = 0.1  # share of its initial norm that a row has while it is alive
START, END = 3000, 500  # updates that are followed of a longer run; rows settle in some hundreds


@dataclass(frozen=True)
class Setting:
    """What a training run is before it starts, as far as the theory knows it.

    `rates_T` are the learning rates of updates 1 .. T, `shape_T` their decays over that of the
    first update with any. `init` is the bound of a uniform or the deviation of a normal output
    matrix. `fan_in` sums the inputs of all other matrices, `fan_out` those of the matrices among
    them that write to the residual stream; they give the other matrices' part of the gradient.
    """

    probs_V: np.ndarray  # token frequencies
    rates_T: np.ndarray
    shape_T: np.ndarray
    width: int
    tokens: int  # in a batch
    fan_in: int
    fan_out: int
    init: float
    uniform: bool = True
    context: float = 3e-4  # sum of (p(x, y) - p(x) p(y))^2 over pairs; English books: 2.8 to 3.1e-4
    stream: float = 1.5  # deviation of the residual stream before the last norm
    ternary: bool = True
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    decay_head: float = 1.0  # share of the decay that each group gets
    decay_norm: float = 1.0
    decay_embedding: float = 1.0
    decay_matrix: float = 1.0


@dataclass(frozen=True)
class Path:
    """What becomes of L decays along the N updates `step`: arrays [N, L]; at the end [L]."""

    step: np.ndarray
    loss: np.ndarray  # nats, of a model without context
    entropy: np.ndarray
    spread: np.ndarray  # standard deviation of the logits over the vocabulary
    reach: np.ndarray  # logit of a pair of tokens over p(x, y) - p(x) p(y), were it stationary
    alive: np.ndarray  # tokens whose rows have more than a tenth of their initial norm
    mass: np.ndarray  # the share of the text that they make


def lumped(probs_V) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies of representative tokens, most frequent first, and how many each stands for."""
    p_V = np.sort(np.asarray(probs_V, np.float64))[::-1]
    if len(p_V) <= SINGLE + BINS * PER_BIN:
        return p_V, np.ones(len(p_V))
    ends = np.unique(np.geomspace(SINGLE, len(p_V), BINS + 1).astype(int))
    parts = [p_V[i : i + 1] for i in range(SINGLE)]
    for low, high in itertools.pairwise(ends):
        parts += np.array_split(p_V[low:high], min(PER_BIN, high - low))
    return np.array([x.mean() for x in parts]), np.array([float(len(x)) for x in parts])


def start_entries(setting: Setting, n: int = ENTRIES) -> np.ndarray:
    """`n` quantiles of an entry of the output matrix, with its exact mean square."""
    return _quantiles(setting.init, setting.uniform, n)


def _quantiles(size: float, uniform: bool, n: int) -> np.ndarray:
    middle = (np.arange(n) + 0.5) / n
    if uniform:
        return size * (2 * middle - 1) / math.sqrt(1 - 1 / n**2)
    values = np.array([NormalDist().inv_cdf(u) for u in middle])
    return size * values / np.sqrt(np.mean(values**2))


class _Adam:
    """Adam's moments of one array, and its step in units of the learning rate."""

    def __init__(self, shape, setting: Setting):
        self.m, self.v = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.n, self.of = 0, setting

    def step(self, g: np.ndarray, noise: float | np.ndarray = 0.0) -> np.ndarray:
        """m / (sqrt(v) + eps), both corrected for their start (Kingma & Ba 2015, algorithm 1).

        `noise` is the variance of gradients whose mean `g` is, over weights that move alike.
        """
        b1, b2 = self.of.beta1, self.of.beta2
        self.n += 1
        self.m *= b1
        self.m += (1 - b1) * g
        self.v *= b2
        self.v += (1 - b2) * (g * g + noise)
        root = np.sqrt(self.v * np.float32(1 / (1 - b2**self.n)))
        root += np.float32(self.of.eps)
        return self.m * np.float32(1 / (1 - b1**self.n)) / root


class _Field:
    """The state of `mean_field`: L decays side by side, N tokens, K entries of a row.

    The normalised state of a position is sqrt(rho) s + sqrt(1 - rho) times noise, s the direction
    that all positions share. Its size u in the residual stream is made by matrices (a mean weight
    of size u / fan_out, from 0; ternary codes follow half of what uniform latents move), the rest
    by what the stream has at the start, e, which decays; rho = u^2 / (u^2 + e^2).
    """

    def __init__(self, setting: Setting, decays_L: np.ndarray, seed: int):
        self.of, self.rng = setting, np.random.default_rng(seed)
        self.p_N, self.weight_N = lumped(setting.probs_V)
        n_l, n = len(decays_L), len(self.p_N)
        self.decay_L = np.asarray(decays_L, np.float64)
        self.w = np.tile(start_entries(setting).astype(np.float32), (n_l, n, 1))
        self.gamma, self.bias, self.f = np.ones(n_l), np.zeros(n_l), np.ones(n_l)
        self.e = np.tile(_quantiles(setting.stream, False, 64)[32:], (n_l, 1))
        parts = self.w, self.gamma, self.bias, self.e
        self.adams = [_Adam(part.shape, setting) for part in parts]

    def look(self) -> tuple[np.ndarray, ...]:
        """rho and the stream's mean square [L]; mean entries and ln q of the tokens [L, N]."""
        u = (0.5 if self.of.ternary else 1.0) * self.of.fan_out * self.bias
        e2, u2 = (self.e**2).mean(1), u**2
        square = e2 + u2 + 1e-6
        rho = (u2 + e2 * (self.weight_N * self.p_N**2).sum()) / square
        mean = self.w.mean(2)
        z = self.of.width * (self.gamma * np.sqrt(rho))[:, None] * mean
        z = z - z.max(1, keepdims=True)
        total = (self.weight_N * np.exp(z)).sum(1, keepdims=True)
        return rho, square, mean, z - np.log(total)

    def numbers(self) -> tuple[np.ndarray, ...]:
        """Loss, entropy and spread of the logits [L]."""
        _, _, _, log_q = self.look()
        share = self.weight_N * np.exp(log_q)
        loss, entropy = -(self.weight_N * self.p_N * log_q).sum(1), -(share * log_q).sum(1)
        by_token = self.weight_N / self.weight_N.sum()
        shared = log_q - (by_token * log_q).sum(1, keepdims=True)
        own = self.of.width * self.gamma**2 * (by_token * self.w.var(2)).sum(1)
        return loss, entropy, np.sqrt(own + (by_token * shared**2).sum(1))

    def reach(self, shape: float) -> np.ndarray:
        """width gamma^2 f (1 - rho) / decay [L]: see `context`; infinite without decay."""
        pull = np.maximum(self.decay_L * shape * self.of.decay_head, 1e-30)
        return self.of.width * self.gamma**2 * self.f * (1 - self.look()[0]) / pull

    def update(self, rate: float, shape: float) -> None:
        """One update on a batch of token counts drawn from the frequencies."""
        of, decay = self.of, self.decay_L * shape
        rho, square, mean, log_q = self.look()
        count_N = self.rng.poisson(of.tokens * self.p_N)
        excess = np.exp(log_q) - count_N / of.tokens
        pull = (self.weight_N * excess * mean).sum(1)
        g_w = self._row_gradients(rho, excess, count_N)
        g_gamma = np.sqrt(rho) * pull
        g_bias = self.gamma * pull * (1 - rho) / np.sqrt(square)
        # Of one position and one weight: what the rows' own parts send back, as noise.
        # The norms inside the blocks make up for the stream's size at the start.
        own = self.gamma**2 * (self.weight_N * self.p_N * self.w.var(2)).sum(1)
        own = own * of.stream**2 / square
        norm = np.sqrt(
            of.width * (self.weight_N * (g_w**2).mean(2)).sum(1)
            + of.width * (g_gamma**2 + of.fan_out * g_bias**2)
            + of.width * of.fan_in * own / of.tokens
        )
        f = np.minimum(1.0, of.clip / np.maximum(norm, 1e-30))
        self.f = 0.95 * self.f + 0.05 * f
        per_row = (f[:, None, None].astype(np.float32), decay[:, None, None].astype(np.float32))
        g_w *= per_row[0]
        g_w += np.float32(of.decay_head) * per_row[1] * self.w
        self.w -= np.float32(rate) * self.adams[0].step(g_w)
        self.gamma -= rate * self.adams[1].step(f * g_gamma + of.decay_norm * decay * self.gamma)
        noise = f**2 * own / of.tokens
        g_bias = f * g_bias + of.decay_matrix * decay * self.bias
        self.bias -= rate * self.adams[2].step(g_bias, noise)
        self.e -= rate * self.adams[3].step(of.decay_embedding * decay[:, None] * self.e)

    def _row_gradients(self, rho, excess, count_N) -> np.ndarray:
        """Gradients [L, N, K] of the entries, without the clip factor: shared part and noise."""
        g = np.repeat((excess * (self.gamma * np.sqrt(rho))[:, None])[:, :, None], ENTRIES, 2)
        hit = np.flatnonzero(count_N)
        noise = self.rng.standard_normal((len(hit), ENTRIES))
        # The mean over all entries of a row is less noisy than that over the few that are followed.
        noise -= noise.mean(1, keepdims=True)
        noise += self.rng.standard_normal((len(hit), 1)) / math.sqrt(self.of.width)
        size = np.sqrt(count_N[hit]) / self.of.tokens
        g[:, hit] -= (self.gamma * np.sqrt(1 - rho))[:, None, None] * noise * size[:, None]
        return g.astype(np.float32)


def followed(steps: int) -> np.ndarray:
    """Updates (from 1) of a run that the mean field goes through; all of a short one."""
    if steps <= START + END:
        return np.arange(1, steps + 1)
    return np.concatenate([np.arange(1, START + 1), np.arange(steps - END + 1, steps + 1)])


def mean_field(setting: Setting, decays_L, *, every: int = 10, seed: int = 0) -> Path:
    """What rows of the output matrix become under coupled decays, on token counts alone.

    `decays_L` are the decays of the first updates; `setting.shape_T` scales them along the run. Of
    runs of more than START + END updates only the first and the last ones are followed.
    """
    field = _Field(setting, np.asarray(decays_L, np.float64), seed)
    first = np.sqrt((start_entries(setting) ** 2).mean())
    steps, numbers = [0], [field.numbers()]
    updates = followed(len(setting.rates_T))
    for i, n in enumerate(updates):
        field.update(float(setting.rates_T[n - 1]), float(setting.shape_T[n - 1]))
        if (i + 1) % every == 0 or i + 1 == len(updates):
            steps.append(int(n))
            numbers.append(field.numbers())
    alive = np.sqrt((field.w**2).mean(2)) > ALIVE * first
    loss, entropy, spread = (np.array(x) for x in zip(*numbers, strict=True))
    counts = (alive * field.weight_N).sum(1), (alive * field.weight_N * field.p_N).sum(1)
    return Path(np.array(steps), loss, entropy, spread, field.reach(setting.shape_T[-1]), *counts)
