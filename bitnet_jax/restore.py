"""The ways a state comes to be: resumed, forked, imported, from scratch; one replicate of it."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from bitnet_jax import checkpoint, config, config_file, hf, log, optim, sharding, train
from bitnet_jax.config import Config, Replicate
from bitnet_jax.fields import UserError, nearest
from bitnet_jax.program import Program
from bitnet_jax.tokenizer import Tokenizer, load_folder


def start_state(program: Program, workdir: Path) -> tuple[train.TrainState, int]:
    """Where training starts: resume this workdir, else as `run.init` says, else from scratch."""
    steps = checkpoint.kept_steps(workdir)
    if steps:
        check_saved_rows(workdir, steps[-1])
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
    folder = epath.Path(folder) if checkpoint.is_remote(folder) else Path(folder)
    steps = checkpoint.kept_steps(folder)
    if not steps:
        raise UserError(f"{text}: {_no_source(folder)}")
    return folder, steps[-1] if step is None else int(step), index and int(index)


def _no_source(folder: Path) -> str:
    """Why nothing can be loaded of a folder without checkpoints, and what can be."""
    if is_hf_folder(folder):
        return f"a folder of transformers has no steps; write {folder} alone"
    wanted = "write WORKDIR[@STEP[:REPLICATE]], or a folder of transformers"
    if folder.is_dir():
        return f"no checkpoints in {folder}; {wanted}"
    beside = [path.name for path in folder.parent.glob("*/")] if folder.parent.is_dir() else []
    return f"no checkpoints in {folder}, which is not there; {wanted}{nearest(folder.name, beside)}"


def load_replicate(
    workdir: Path, step: int, index: int
) -> tuple[Config, Replicate, train.TrainState]:
    """Configuration, identity and state (NumPy) of one replicate of a checkpoint; UserError."""
    cfg, replicates = config_file.from_json(
        checkpoint.load_config(workdir, step), f"{workdir}@{step}"
    )
    abstract_state = jax.eval_shape(lambda: train.init_state(cfg, replicates[0].hyper, 0))
    state = checkpoint.restore_replicate(workdir, step, index, abstract_state)
    return cfg, replicates[index], jax.device_get(state)


def load_replicates(workdir: Path, step: int) -> tuple[Config, list[Replicate], train.TrainState]:
    """Configuration, identities and states [R, ...] of a checkpoint, NumPy; raises UserError."""
    cfg, replicates = config_file.from_json(
        checkpoint.load_config(workdir, step), f"{workdir}@{step}"
    )
    states = jax.eval_shape(
        jax.vmap(lambda seed: train.init_state(cfg, replicates[0].hyper, seed)),
        np.zeros(len(replicates), np.uint32),
    )
    return cfg, replicates, jax.device_get(checkpoint.restore(workdir, step, states))


@dataclass(frozen=True)
class Model:
    """One trained model, wherever it comes from."""

    label: str
    cfg: Config
    hyper: config.Hyper  # at the model's step
    params: dict
    tokenizer: Tokenizer


def load_model(source: str) -> Model:
    """The model of `WORKDIR[@STEP[:REPLICATE]]` or of a Hugging Face folder; raises UserError."""
    if is_hf_folder(Path(source)):
        cfg, params, tokenizer = hf.load(Path(source))
        return Model(source, cfg, hf.strengths(Path(source), cfg.model), params, tokenizer)
    workdir, step, index = checkpoint_place(source)
    cfg, replicate, state = load_replicate(workdir, step, index or 0)
    label = f"{workdir}@{step}:{index or 0} ({replicate.name}, seed {replicate.seed})"
    hyper = train.at_step(replicate.hyper, state.step)
    return Model(label, cfg, hyper, state.params, run_tokenizer(workdir, step))


def run_tokenizer(workdir: Path, step: int) -> Tokenizer:
    """The tokenizer of a workdir; raises UserError unless its checkpoint was trained with it."""
    if checkpoint.is_remote(workdir):
        raise UserError(f"{workdir}: holds checkpoints; the tokenizer is in the run's workdir")
    folder = workdir / "tokenizer"
    tokenizer = load_folder(folder)
    if tokenizer.key != saved_corpus(workdir, step)["tokenizer"]["key"]:
        raise UserError(
            f"{folder}: damaged or replaced: not the tokenizer that the run was trained with"
        )
    return tokenizer


def saved_corpus(workdir: Path, step: int) -> dict:
    """What a checkpoint was trained on: `identity` of data.TokenData."""
    saved = checkpoint.load_config(workdir, step)
    if "corpus" not in saved:
        raise UserError(f"{workdir}: step {step} does not say its corpus: of an older version")
    return saved["corpus"]


def check_rows(workdir: Path, sealed: dict | None, when: str) -> int:
    """Bytes of metrics.jsonl that were `sealed` (log.seal); UserError unless they are the same."""
    path = workdir / "metrics.jsonl"
    if sealed is None or log.seal(path, sealed["bytes"]) != sealed:
        raise UserError(
            f"{path}: not as it was when {when}; to go on without it, fork: "
            f"--set run.init=fork:{workdir} --workdir {workdir}-2"
        )
    return sealed["bytes"]


def check_saved_rows(workdir: Path, step: int) -> int:
    """Bytes of metrics.jsonl up to a checkpoint; UserError unless they are as they were then."""
    sealed = checkpoint.load_config(workdir, step).get("metrics")
    return check_rows(workdir, sealed, f"step {step} was saved")


def evaluations(workdir: Path, step: int, index: int) -> list[dict]:
    """The evaluations of a replicate up to a checkpoint; raises UserError as `check_rows` does."""
    size = check_saved_rows(workdir, step)
    with (workdir / "metrics.jsonl").open("rb") as file:
        rows = [json.loads(line) for line in file.read(size).splitlines()]
    return [row for row in rows if (row["kind"], row["replicate"]) == ("eval", index)]


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder is laid out as Hugging Face's, complete or not; a workdir is not."""
    path = folder / "config.json"
    return any(folder.glob("*.safetensors*")) or (
        path.is_file() and '"model_type"' in path.read_text(encoding="utf-8", errors="replace")
    )


def fork_state(program: Program, source: str) -> tuple[train.TrainState, int]:
    """Restore WORKDIR[@STEP[:REPLICATE]]: all replicates, or one copied to all of this run's."""
    folder, step, index = checkpoint_place(source)
    if step >= program.cfg.run.steps:
        raise UserError(
            f"run.init=fork:{source}: step {step} is past run.steps={program.cfg.run.steps}"
        )
    if index is None:
        return checkpoint.restore(folder, step, program.abstract_state), step
    abstract_state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), program.abstract_state
    )
    state = checkpoint.restore_replicate(folder, step, index, abstract_state)
    n_rep = len(program.replicates)
    copies = jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (n_rep, *x.shape)), state)
    return jax.tree.map(sharding.put, copies, program.state_sharding), step


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
            f"{start}: not its tokenizer: data.tokenizer={program.cfg.data.tokenizer} differs; add "
            f"--set data.tokenizer=hf:{folder}"
        )
    differing = [
        f"model.{name}={value}"
        for name, value in vars(replace(cfg.model, dtype=ours.dtype)).items()
        if value != getattr(ours, name) and f"model.{name}" not in config.BOOKKEEPING
    ]
    if differing:
        raise UserError(f"{start}: another model; add --set {' --set '.join(differing)}")
    groups, n_rep = optim.param_groups(params), len(program.replicates)

    def replicated(tree):
        return jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (n_rep, *x.shape)), tree)

    norms = train.group_norms(params, groups)
    where = program.state_sharding
    return program.init().replace(
        params=jax.tree.map(sharding.put, replicated(params), where.params),
        init_norm=jax.tree.map(sharding.put, replicated(norms), where.init_norm),
    )
