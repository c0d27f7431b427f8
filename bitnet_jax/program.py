"""Everything a run holds fixed: tokens, devices, the start state and the compiled functions."""

import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import checkpoint, config, data, hf, loss, optim, reference, sharding, train
from bitnet_jax.config import Config, Replicate, UserError

DEVICE_BYTES = 1 << 30  # a larger training split stays on the host


@dataclass(frozen=True)
class Program:
    """Replicates on their devices; arrays of R replicates have a leading axis [R]."""

    cfg: Config
    replicates: list[Replicate]
    tokens: data.TokenData
    references: dict  # of reference.references
    mesh: jax.sharding.Mesh
    hyper: config.Hyper
    evals: train.EvalData
    train_N: jax.Array | None  # the training split on the device; None: windows are cut on the host

    def init(self) -> train.TrainState:
        """All replicates at step 0, created where they live."""
        seeds = jnp.array([r.seed for r in self.replicates], jnp.uint32)
        init = jax.jit(_init_fn(self.cfg), out_shardings=self.state_sharding)
        return init(self.hyper, seeds, self.evals.unigram_V)

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
        return jax.eval_shape(_init_fn(self.cfg), self.hyper, seeds, self.evals.unigram_V)

    def train_chunk(self, state, batches):
        """(state, train numbers, eval numbers) after one chunk; the state is donated."""
        return self.jitted_chunk(state, self.hyper, self.evals, self.train_N, batches)

    @functools.cached_property
    def jitted_chunk(self):
        """The program of `train.make_train_chunk`; it compiles once per length of chunk."""
        used = tuple(
            name
            for name in loss.REGULARISERS
            if any(getattr(rep.hyper, name) for rep in self.replicates)
        )
        chunk = train.make_train_chunk(self.cfg, self.tokens.tokenizer.end_of_text, used)
        # Pinned, because the compiler may otherwise return the state under other shardings.
        out = (self.state_sharding, sharding.replicated(self.mesh), sharding.replicated(self.mesh))
        return jax.jit(chunk, donate_argnums=0, out_shardings=out)

    @functools.cached_property
    def evaluate(self):
        """state -> eval numbers."""
        compiled = jax.jit(train.make_eval(self.cfg, self.tokens.tokenizer.end_of_text))
        return lambda state: compiled(state, self.hyper, self.evals)

    def batches(self, start: int, end: int) -> jax.Array:
        """Window ids, or windows, of the steps start + 1 .. end for every replicate."""
        n = data.n_windows(len(self.tokens.train_N), self.cfg.data.seq_len)
        ids_RKB = np.array(
            [
                [
                    data.window_ids(self.cfg.data, n, rep.data_seed, step)
                    for step in range(start, end)
                ]
                for rep in self.replicates
            ]
        )
        if self.train_N is None:
            ids_RKB = data.gather(self.tokens.train_N, ids_RKB, self.cfg.data.seq_len)
        return jax.device_put(ids_RKB, sharding.by_replicate(self.mesh))


def _init_fn(cfg):
    init = functools.partial(train.init_state, cfg)
    return jax.vmap(init, in_axes=(0, 0, None))


def resolve_vocab(cfg: Config, vocab_size: int) -> Config:
    """Fill in or check `model.vocab_size` against the tokenizer's."""
    if cfg.model.vocab_size not in (None, vocab_size):
        raise UserError(
            f"model.vocab_size={cfg.model.vocab_size}, but tokenizer {cfg.data.tokenizer} has "
            f"{vocab_size} tokens; set model.vocab_size={vocab_size} or none"
        )
    return replace(cfg, model=replace(cfg.model, vocab_size=vocab_size))


def build(cfg: Config, replicates: list[Replicate]) -> Program:
    """Load the corpus and place everything on the devices."""
    tokens = data.load(cfg.data)
    cfg = resolve_vocab(cfg, tokens.tokenizer.vocab_size)
    held_out_NBL = data.eval_blocks(cfg.data, tokens.validation_N)
    tracked_BL = None
    if cfg.data.track == "first_batch":
        tracked_BL = data.first_batch(cfg.data, tokens.train_N, replicates[0].data_seed)
    flat = held_out_NBL.reshape(-1, held_out_NBL.shape[-1])
    weights = data.score_weights(flat, tokens.tokenizer.end_of_text, True)
    references = reference.references(
        tokens.train_N,
        cfg.model.vocab_size,
        flat,
        weights,
        flat if tracked_BL is None else tracked_BL,
    )
    unigram_V = reference.unigram_probs(tokens.train_N, cfg.model.vocab_size)

    mesh = sharding.make_mesh(len(replicates), cfg.data.batch_size)
    everywhere = sharding.replicated(mesh)
    hyper = jax.device_put(config.stack_hypers(replicates), sharding.by_replicate(mesh))
    evals = train.EvalData(
        held_out_NBL,
        tracked_BL,
        unigram_V.astype(np.float32),
        tokens.tokenizer.token_bytes_V.astype(np.float32),
    )
    on_device = cfg.data.gather == "device" or (
        cfg.data.gather == "auto" and tokens.train_N.nbytes <= DEVICE_BYTES
    )
    return Program(
        cfg,
        replicates,
        tokens,
        references,
        mesh,
        hyper,
        jax.device_put(evals, everywhere),
        jax.device_put(np.asarray(tokens.train_N), everywhere) if on_device else None,
    )


def start_state(program: Program, workdir: Path) -> tuple[train.TrainState, int]:
    """Where training starts: resume this workdir, else as `run.init` says, else from scratch."""
    steps = checkpoint.kept_steps(workdir)
    if steps:
        return checkpoint.restore(workdir, steps[-1], program.abstract_state), steps[-1]
    kind, _, source = (program.cfg.run.init or "").partition(":")
    if kind == "hf":
        return imported_state(program, Path(source)), 0
    if kind == "fork":
        state, step = fork_state(program, source)
        return (fresh_moments(program, state) if program.cfg.run.reset_optimizer else state), step
    return program.init(), 0


def fresh_moments(program: Program, state: train.TrainState) -> train.TrainState:
    """Adam's moments and its count of bias correction set to 0, as in a new optimiser.

    The step and the counts of the schedules stay: learning rate and decay go on as planned.
    """
    adam = jax.tree.map(jnp.zeros_like, state.opt_state["adam"])
    reset = state.replace(opt_state=state.opt_state | {"adam": adam})
    return jax.device_put(reset, program.state_sharding)


def checkpoint_place(text: str) -> tuple[Path, int, int | None]:
    """Folder, step and replicate of `WORKDIR[@STEP[:REPLICATE]]`; the step defaults to the last.

    Raises UserError when the folder holds no checkpoints.
    """
    folder, step, index = re.fullmatch(r"(.*?)(?:@(\d+)(?::(\d+))?)?", text).groups()
    steps = checkpoint.kept_steps(Path(folder))
    if not steps:
        raise UserError(
            f"{text}: no checkpoints in {folder}; write it as WORKDIR[@STEP[:REPLICATE]]"
        )
    return Path(folder), steps[-1] if step is None else int(step), index and int(index)


def load_replicate(
    workdir: Path, step: int, index: int
) -> tuple[Config, Replicate, train.TrainState]:
    """Configuration, identity and state of one replicate of a checkpoint; raises UserError."""
    cfg, replicates = config.from_json(checkpoint.load_config(workdir, step))
    one = jax.eval_shape(lambda: train.init_state(cfg, replicates[0].hyper, 0))
    state = checkpoint.restore_replicate(workdir, step, index, one)
    return cfg, replicates[index], state


def load_replicates(workdir: Path, step: int) -> tuple[Config, list[Replicate], train.TrainState]:
    """Configuration, identities and states [R, ...] of a checkpoint, NumPy; raises UserError."""
    cfg, replicates = config.from_json(checkpoint.load_config(workdir, step))
    states = jax.eval_shape(
        jax.vmap(lambda seed: train.init_state(cfg, replicates[0].hyper, seed)),
        np.zeros(len(replicates), np.uint32),
    )
    return cfg, replicates, jax.device_get(checkpoint.restore(workdir, step, states))


def fork_state(program: Program, source: str) -> tuple[train.TrainState, int]:
    """Restore WORKDIR[@STEP[:REPLICATE]]: all replicates, or one copied to all of this run's."""
    folder, step, index = checkpoint_place(source)
    if step >= program.cfg.run.steps:
        raise UserError(
            f"run.init=fork:{source}: step {step} is past run.steps={program.cfg.run.steps}"
        )
    if index is None:
        return checkpoint.restore(folder, step, program.abstract_state), step
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), program.abstract_state)
    state = checkpoint.restore_replicate(folder, step, index, one)
    n_rep = len(program.replicates)
    copies = jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (n_rep, *x.shape)), state)
    return jax.device_put(copies, program.state_sharding), step


def imported_state(program: Program, folder: Path) -> train.TrainState:
    """All replicates at step 0 with the master weights of a Hugging Face folder.

    Raises UserError naming the fields in which the folder's model differs from the configuration.
    """
    cfg, params, tokenizer = hf.load(folder)
    start, ours = f"run.init=hf:{folder}", program.cfg.model
    if cfg.model.weight_format == "packed":
        raise UserError(f"{start}: packed weights cannot be trained; export the master weights")
    if tokenizer.key != program.tokens.tokenizer.key:
        raise UserError(
            f"{start}: not its tokenizer: data.tokenizer={program.cfg.data.tokenizer} differs; set "
            f"data.tokenizer=hf:{folder}"
        )
    differing = [
        f"model.{name}={value}"
        for name, value in vars(replace(cfg.model, dtype=ours.dtype)).items()
        if value != getattr(ours, name)
    ]
    if differing:
        raise UserError(f"{start}: another model; set {' '.join(differing)}")
    groups, n_rep = optim.param_groups(params), len(program.replicates)

    def replicated(tree):
        return jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (n_rep, *x.shape)), tree)

    norms = train.group_norms(params, groups)
    state = program.init().replace(params=replicated(params), init_norm=replicated(norms))
    return jax.device_put(state, program.state_sharding)
