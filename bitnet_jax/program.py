"""Everything a run holds fixed: tokens, devices, the compiled functions."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import config, data, products, quant, reference, sharding, train
from bitnet_jax.config import Config, Replicate
from bitnet_jax.fields import UserError
from bitnet_jax.train import STANDARD, Seams

DEVICE_BYTES = 1 << 30  # a larger training split stays on the host


@dataclass(frozen=True)
class Program:
    """Replicates on their devices; arrays of R replicates have a leading axis [R].

    Without text, `tokens`, `evals` and `windows` are None: only parameters can be looked at.
    """

    cfg: Config
    replicates: list[Replicate]
    seams: Seams
    tokens: data.TokenData | None
    references: dict  # of reference.references
    mesh: jax.sharding.Mesh
    hyper: config.Hyper
    evals: train.EvalData | None
    windows: data.Windows | None  # of the training split
    train_N: jax.Array | None  # the training split on the device; None: windows are cut on the host

    def init(self) -> train.TrainState:
        """All replicates at step 0, created where they live."""
        seeds = np.array([r.seed for r in self.replicates], np.uint32)
        init = jax.jit(self._init, out_shardings=self.state_sharding)
        return init(self.hyper, seeds, self.evals.unigram_V)

    def _init(self, hyper, seeds, unigram_V):
        init = functools.partial(train.init_state, self.cfg, seams=self.seams)
        return jax.vmap(init, in_axes=(0, 0, None))(hyper, seeds, unigram_V)

    @functools.cached_property
    def state_sharding(self):
        """Where the leaves of the state live."""
        return sharding.state_sharding(self.mesh, self._state_shapes)

    @functools.cached_property
    def abstract_state(self):
        """Shapes, types and shardings of the state."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self._state_shapes,
            self.state_sharding,
        )

    @functools.cached_property
    def _state_shapes(self):
        seeds = jax.ShapeDtypeStruct(self.hyper.lr_peak.shape, jnp.uint32)
        return jax.eval_shape(self._init, self.hyper, seeds, self.evals.unigram_V)

    def train_chunk(self, state, batches):
        """(state, train numbers, eval numbers) after one chunk; the state is donated."""
        return self.jitted_chunk(state, self.hyper, self.evals, self.train_N, batches)

    @functools.cached_property
    def jitted_chunk(self):
        """The program of `train.make_train_chunk`; it compiles once per length of chunk."""
        chunk = train.make_train_chunk(self.cfg, self.windows, self.seams)
        # Pinned, because the compiler may otherwise return the state under other shardings.
        out = (self.state_sharding, sharding.replicated(self.mesh), sharding.replicated(self.mesh))
        return jax.jit(chunk, donate_argnums=0, out_shardings=out)

    @functools.cached_property
    def evaluate(self):
        """state -> eval numbers."""
        everywhere = sharding.replicated(self.mesh)
        compiled = jax.jit(train.make_eval(self.cfg, self.seams), out_shardings=everywhere)
        return lambda state: compiled(state, self.hyper, self.evals)

    @functools.cached_property
    def evaluate_large(self):
        """state -> numbers of the large block."""
        everywhere = sharding.replicated(self.mesh)
        compiled = jax.jit(train.make_large_eval(self.cfg, self.seams), out_shardings=everywhere)
        return lambda state: compiled(state, self.hyper, self.evals)

    def batches(self, start: int, end: int):
        """What the steps start + 1 .. end read, for every replicate.

        Window ids [R, K, B] where the split is on the device, else a Batch [R, K, B, L].
        """
        cfg, n = self.cfg.data, len(self.windows)
        ids_RKB = np.stack(
            [data.window_ids(cfg, n, rep.seed, start, end) for rep in self.replicates]
        )
        if self.train_N is not None:
            return sharding.put(ids_RKB, sharding.by_replicate(self.mesh))
        return self._cut_here(ids_RKB)

    def _cut_here(self, ids_RKB: np.ndarray) -> data.Batch:
        """The windows as a Batch of which each process cuts what its devices need."""
        placement = sharding.batches(self.mesh)
        cut = functools.cache(lambda key: self.windows.cut(ids_RKB[tuple(slice(*k) for k in key)]))

        def field(name):
            def part(index):
                rows = tuple(i.indices(n) for i, n in zip(index, ids_RKB.shape, strict=False))
                return getattr(cut(rows), name)

            shape = (*ids_RKB.shape, self.cfg.data.seq_len)
            return jax.make_array_from_callback(shape, placement, part)

        return data.Batch(field("inputs"), field("targets"), field("weights"))


def resolve_vocab(cfg: Config, vocab_size: int) -> Config:
    """Fill in or check `model.vocab_size` against the tokenizer's.

    The model of a Hugging Face folder may have more rows than its tokenizer has tokens: padding.
    """
    rows = cfg.model.vocab_size
    if rows is not None and rows > vocab_size and cfg.data.tokenizer.startswith("hf:"):
        return cfg
    if rows not in (None, vocab_size):
        raise UserError(
            f"model.vocab_size={cfg.model.vocab_size}, but tokenizer {cfg.data.tokenizer} has "
            f"{vocab_size} tokens; set model.vocab_size={vocab_size} or none"
        )
    return replace(cfg, model=replace(cfg.model, vocab_size=vocab_size))


def build(cfg: Config, replicates: list[Replicate], seams: Seams = STANDARD) -> Program:
    """Load the corpus and place everything on the devices."""
    tokens = data.load(cfg.data)
    cfg = resolve_vocab(cfg, tokens.tokenizer.vocab_size)
    windows = data.train_windows(cfg.data, tokens)
    evals, references = evaluation(cfg, tokens, windows, [rep.seed for rep in replicates])
    if cfg.data.accumulate > 1 and seams.loss is not STANDARD.loss:
        raise UserError(
            f"data.accumulate={cfg.data.accumulate}: not with an experiment's own loss, which need "
            "not be a mean over positions"
        )
    n_rep, batch, parts = len(replicates), cfg.data.batch_size, cfg.data.accumulate
    mesh = sharding.make_mesh(n_rep, batch // parts)
    if note := sharding.idle_note(n_rep, batch, parts, jax.device_count()):
        print(f"note: {note}")
    everywhere = sharding.replicated(mesh)
    standard = seams.quantize_weight is quant.quantize_weight
    used = products.choose((rep.hyper for rep in replicates), standard=standard)
    on_device = cfg.data.gather == "device" or (
        cfg.data.gather == "auto"
        and tokens.train_N.nbytes <= DEVICE_BYTES
        and cfg.data.prompt is None
    )
    return Program(
        cfg,
        replicates,
        replace(seams, products=used),
        tokens,
        references,
        mesh,
        sharding.put(config.stack_hypers(replicates), sharding.by_replicate(mesh)),
        sharding.put(evals, everywhere),
        windows,
        sharding.put(tokens.train_N, everywhere) if on_device else None,
    )


def without_text(cfg: Config, replicates: list[Replicate]) -> Program:
    """The program of a model whose text is not there; its size of the vocabulary is known."""
    mesh = sharding.make_mesh(len(replicates), cfg.data.batch_size)
    hyper = sharding.put(config.stack_hypers(replicates), sharding.by_replicate(mesh))
    return Program(cfg, replicates, STANDARD, None, {}, mesh, hyper, None, None, None)


def evaluation(cfg: Config, tokens, windows: data.Windows, seeds: list[int]):
    """What evaluations look at (a train.EvalData), and the predictors' scores there (JSON values).

    `windows` are those of the training split; each seed tracks its own first batch of them.
    """
    held_out = data.held_out_windows(cfg.data, tokens)
    small, large = data.small_block(cfg.data, held_out), data.large_block(cfg.data, held_out)
    tracked = None
    if cfg.data.track == "first_batch":
        first = [data.window_ids(cfg.data, len(windows), seed, 0, 1)[0] for seed in seeds]
        tracked = windows.cut(np.stack(first))
    predictors = reference.fit(tokens.train_N, cfg.model.vocab_size, tokens.train_scored_N)
    scores = predictors.score(large)
    references = reference.references(predictors, small, tracked)
    references["held_out"] = {
        "positions": int(large.weights.sum()),
        "unigram": {"loss": reference.scored_mean(scores.unigram_nats, large)},
        "bigram": {"loss": reference.scored_mean(scores.bigram_nats, large)},
    }
    nats_NKBL = np.stack([scores.unigram_nats, scores.bigram_nats], axis=1, dtype=np.float32)
    evals = train.EvalData(
        small=small,
        large=large,
        large_nats_NKBL=nats_NKBL,
        tracked=tracked,
        unigram_V=predictors.unigram_V.astype(np.float32),
        token_bytes_V=tokens.tokenizer.token_bytes_V.astype(np.float32),
    )
    return evals, references
