"""What an audit examines: one replicate of a run, or a model alone, and the text beside it."""

import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import data, hf, optim, program, quant, restore, train
from bitnet_jax.config import Config, Hyper, Replicate
from bitnet_jax.data import Batch
from bitnet_jax.fields import UserError
from bitnet_jax.model import Transformer
from bitnet_jax.program import Program
from bitnet_jax.train import Seams, TrainState

POSITIONS = 2048  # held-out positions whose logits are kept at once
LONGEST = 512  # tokens of a window of another text
WEIGHTS, TEXT, OPTIMISER, START = "weights", "text", "optimiser", "start"


@dataclass(frozen=True)
class Subject:
    """One replicate of a run, or a model alone, with the text that it is examined on.

    `state` is None where no optimiser is known, `start` where the initialisation is not. Where
    there is no text, `no_text` says why and how to give one.
    """

    program: Program
    params: Any
    step: int
    state: TrainState | None = None
    start: TrainState | None = None
    overfit_steps: int = 200
    no_text: str | None = None

    @property
    def hyper(self) -> Hyper:
        """The replicate's numbers at the step, as arrays."""
        return train.at_step(arrays(self.program.replicates[0].hyper), self.step)

    @property
    def peak(self) -> Hyper:
        """The same with the peak learning rate always, and no warm-up."""
        hyper = arrays(self.program.replicates[0].hyper)
        ends = dict.fromkeys(("lr_stage1_end", "lr_stage2_start", "lr_final"), hyper.lr_peak)
        warmups = dict.fromkeys(("warmup_steps", "quant_warmup_steps"), jnp.zeros(()))
        return hyper.replace(**ends, **warmups)

    @functools.cached_property
    def held_out(self) -> Batch:
        """Windows of the large held-out block [B, L], about POSITIONS positions."""
        rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), self.program.evals.large)
        n = max(2, POSITIONS // rows.inputs.shape[-1])
        return jax.tree.map(lambda x: x[:n], rows)

    @functools.cached_property
    def logits_BLV(self) -> jax.Array:
        """Logits of `held_out`."""
        return self.logits(self.held_out.inputs)

    def logits(self, inputs_BL, hyper: Hyper | None = None, params=None) -> jax.Array:
        """Float32 logits [B, L, V]."""
        params = self.params if params is None else params
        return logits(*fixed(self.program), params, hyper or self.hyper, inputs_BL)

    def lacks(self, needs: tuple[str, ...]) -> str | None:
        """The first of the needs that is not there, text with why; None where all are."""
        missing = {
            TEXT: self.no_text and f"{TEXT} ({self.no_text})",
            OPTIMISER: OPTIMISER if self.state is None else None,
            START: START if self.start is None else None,
        }
        return next((missing[need] for need in needs if missing.get(need)), None)


def arrays(hyper: Hyper) -> Hyper:
    """The numbers as float32 scalars."""
    return jax.tree.map(jnp.float32, hyper)


def fixed(program: Program) -> tuple[Config, Seams]:
    """What compiled functions are specialised on."""
    return program.cfg, program.seams


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits(cfg: Config, seams: Seams, params, hyper: Hyper, inputs_BL) -> jax.Array:
    """Float32 logits [B, L, V] of one replicate."""
    model = Transformer(cfg.model, seams.quantize_weight)
    return model.apply({"params": params}, inputs_BL, hyper)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_steps(cfg: Config, seams: Seams, state, hyper: Hyper, batches_K: Batch, unigram_V):
    """State after one training step on each batch of [K, B, L], and the last step's numbers."""

    def step(state, batch):
        state, _, numbers = train.train_step(cfg, seams, state, hyper, batch, unigram_V)
        return state, numbers

    state, numbers_K = jax.lax.scan(step, state, batches_K)
    return state, jax.tree.map(lambda x: x[-1], numbers_K)


def served(program: Program, steps: int) -> Batch:
    """The batches of the first steps as the run is served them: [steps, B, L]."""
    batches = jax.tree.map(lambda x: x[0], program.batches(0, steps))
    if not isinstance(batches, Batch):
        batches = program.windows.cut(batches, program.train_N)
    return batches


def norm(leaves) -> float:
    """L2 norm over arrays, in NumPy: one compiled operation per shape would take longer."""
    squares = (np.square(np.asarray(x), dtype=np.float64).sum() for x in jax.tree.leaves(leaves))
    return float(sum(squares)) ** 0.5


def rms(leaves) -> float:
    """Root mean square over arrays."""
    return norm(leaves) / sum(x.size for x in jax.tree.leaves(leaves)) ** 0.5


def codes_by_path(params) -> dict[str, np.ndarray]:
    """Int8 codes of the ternary matrices, packed or not, by the path of their layer."""
    codes = {}
    for path, w in jax.tree.leaves_with_path(params):
        layer, _, leaf = optim.path_name(path).rpartition("/")
        if re.fullmatch(r"block_\d+/(attn|ffn)/\w+", layer) and leaf in ("kernel", "packed"):
            w = jnp.asarray(w)
            ternary = quant.unpack_ternary if leaf == "packed" else _codes
            codes[layer] = np.asarray(ternary(w))
    return codes


def _codes(w):
    return quant.weight_codes(w, quant.weight_scale(w)).astype(jnp.int8)


def weight_faults(params) -> dict[str, list[str]]:
    """Parameters that no trained model has, by what is wrong with them, the worst first.

    Values that are not finite (a packed scale among them), ternary matrices with one code only,
    packed scales of 0. Empty where nothing is wrong.
    """
    named = {optim.path_name(path): np.asarray(w) for path, w in jax.tree.leaves_with_path(params)}
    faults = {
        "values that are not finite": [
            name for name, w in named.items() if w.dtype.kind == "f" and not np.isfinite(w).all()
        ],
        "one code only": [
            layer for layer, q in codes_by_path(params).items() if q.min() == q.max()
        ],
        "scale 0": [
            name for name, w in named.items() if w.ndim == 0 and name.endswith("/scale") and w == 0
        ],
    }
    return {fault: names for fault, names in faults.items() if names}


# ----------------------------------------------------------------------------- where it comes from


def open_source(source: str, text: str | None = None) -> Subject:
    """The subject of a SOURCE: WORKDIR[@STEP[:REPLICATE]], or a Hugging Face folder.

    `text` is a glob of files that replaces a run's corpus; without it, and where a run's corpus
    cannot be used any more, the subject has no text. Raises UserError.
    """
    if restore.is_hf_folder(Path(source)):
        return open_hf(Path(source), text)
    workdir, step, index = restore.checkpoint_place(source)
    return open_run(workdir, step, index or 0, text)


def open_run(workdir: Path, step: int, index: int, text: str | None = None) -> Subject:
    """One replicate of a checkpoint, with optimiser and, unless it was imported, its start."""
    cfg, replicate, state = restore.load_replicate(workdir, step, index)
    if text:
        restore.run_tokenizer(workdir, step)
        cfg = replace(cfg, data=on_text(cfg.data, text, f"hf:{workdir / 'tokenizer'}"))
        return of_run(program.build(cfg, [replicate]), state)
    try:
        built = program.build(cfg, [replicate])
        check_corpus(workdir, step, cfg.data, built.tokens.identity)
    except UserError as error:
        built, why = program.without_text(cfg, [replicate]), f"{error}; --text GLOB gives another"
        return Subject(built, state.params, int(state.step), state, no_text=why)
    return of_run(built, state)


def of_run(built: Program, state: TrainState) -> Subject:
    """A state without the axis of replicates, of a program of one replicate."""
    start = None
    if built.cfg.run.init is None:
        start = jax.tree.map(lambda x: x[0], built.init())
    return Subject(built, state.params, int(state.step), state, start)


def open_hf(folder: Path, text: str | None) -> Subject:
    """A Hugging Face model, packed or not, on the text of `text`: no optimiser, no start."""
    cfg, params, _ = hf.load(folder)
    params = jax.tree.map(jnp.asarray, params)
    replicate = Replicate(folder.name, 0, hf.strengths(folder, cfg.model))
    if not text:
        built = program.without_text(cfg, [replicate])
        return Subject(built, params, 0, no_text="--text GLOB gives one")
    cfg = replace(cfg, data=on_text(cfg.data, text, cfg.data.tokenizer))
    return Subject(program.build(cfg, [replicate]), params, 0)


def on_text(cfg: data.DataConfig, text: str, tokenizer: str) -> data.DataConfig:
    """The same windows of another text, of which a part is held out."""
    length = min(cfg.seq_len, LONGEST)
    corpus = {"corpus": f"text:{text}", "validation": None, "tokenizer": tokenizer, "prompt": None}
    return replace(cfg, seq_len=length, **corpus)


def check_corpus(workdir: Path, step: int, cfg: data.DataConfig, identity: dict) -> None:
    """Raise UserError unless the corpus is the one that the checkpoint was trained on."""
    if restore.saved_corpus(workdir, step) != identity:
        raise UserError(f"{workdir}: data.corpus={cfg.corpus} has changed since the run")
