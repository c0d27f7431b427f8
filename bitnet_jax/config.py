"""What a run is: static configuration, and hyper-parameters as data.

`Config` decides the compiled program. `Hyper` holds every number that a sweep varies: a pytree that
the jitted step takes as an argument, so one program serves every arm of a sweep.
"""

import dataclasses
from dataclasses import dataclass, field

import flax.struct
import jax
import jax.numpy as jnp

from bitnet_jax.fields import (
    COUNT,
    POSITIVE,
    UserError,
    check_fields,
    nearest,
    setting,
    shown,
)


def rope_scaling_numbers(text: str | None) -> tuple[float, float, float, float] | None:
    """Factor, low and high frequency factor and original length of `model.rope_scaling`.

    By the names of transformers' `_compute_llama3_parameters`. Raises UserError.
    """
    if text is None:
        return None
    kind, _, listed = text.partition(":")
    try:
        factor, low, high, length = map(float, listed.split(","))
    except ValueError:
        factor = low = high = length = 0.0
    if kind != "llama3" or not (1 <= factor < 1e6 and 0 < low < high < 1e6 and 1 <= length < 2**31):
        raise UserError(
            f"model.rope_scaling={shown(text)}: use none or llama3:FACTOR,LOW,HIGH,LENGTH with "
            "FACTOR >= 1 and LOW < HIGH, such as llama3:8,1,4,8192"
        )
    return factor, low, high, length


@dataclass(frozen=True)
class ModelConfig:
    layout: str = setting(
        "b158",
        "b158: pre-norms and two sub-norms, a scale per projection; llama: the same without "
        "sub-norms; report: pre-norms, a norm in every BitLinear, fused q/k/v and gate/up",
        choices=("b158", "llama", "report"),
    )
    activation: str = setting(
        "relu2",
        "of the gate, by transformers' name; relu2 is that of BitNet b1.58 2B4T, silu (SwiGLU) "
        "that of Llama and the only one that stock llama.cpp runs",
        choices=("relu2", "silu", "gelu", "gelu_pytorch_tanh", "relu"),
    )
    vocab_size: int | None = setting(
        None, "rows of the embedding; none: the tokenizer's", within=(2, 2**24)
    )
    d_model: int = setting(256, "width of the residual stream", within=(1, 2**20))
    n_layers: int = setting(4, "number of blocks", within=(1, 10_000))
    n_heads: int = setting(4, "query heads", within=(1, 2**20))
    n_kv_heads: int = setting(4, "key and value heads", within=(1, 2**20))
    d_ff: int = setting(512, "width of the gated feed-forward layer", within=(1, 2**20))
    tied_embedding: bool = setting(True, "use the embedding as the output head")
    output_bias: bool = setting(
        False, "add a bias to the logits, starting at the log unigram probabilities; never decayed"
    )
    weight_format: str = setting(
        "ternary",
        "codes, packed: ternary in 8 or 2 bits, which can be evaluated but not trained",
        choices=("ternary", "codes", "packed"),
    )
    rope_theta: float = setting(500_000.0, "base of the rotary frequencies", within=POSITIVE)
    rope_scaling: str | None = setting(
        None,
        "llama3:FACTOR,LOW,HIGH,LENGTH: slow rotary frequencies as Llama 3.1 and later have them",
    )
    norm_eps: float = setting(1e-5, "added to the mean square inside RMSNorm", within=(1e-30, 1.0))
    dtype: str = setting("float32", "compute type of activations", choices=("float32", "bfloat16"))
    remat: bool = setting(
        False,
        "keep only the input of each block for the backward pass, and compute the rest again: less "
        "memory, about a third more time",
        bookkeeping=True,
    )
    scan_layers: bool = setting(
        False,
        "compile one block and loop over the layers: compiles faster, may step slower",
        bookkeeping=True,
    )

    def __post_init__(self):
        check_fields(self, "model")
        rope_scaling_numbers(self.rope_scaling)
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise UserError(
                f"model.n_heads={self.n_heads} must divide model.d_model={self.d_model} "
                "into heads of even width"
            )
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"model.n_kv_heads={self.n_kv_heads} must divide model.n_heads={self.n_heads}"
            )


@dataclass(frozen=True)
class DataConfig:
    corpus: str = setting(
        "stdlib", "stdlib (this interpreter's standard library) | text:GLOB | tfds:NAME[/CONFIG]"
    )
    validation: str | None = setting(
        None, "held-out text: text:GLOB, or a tfds split; none: a held-out part of the corpus"
    )
    holdout: float = setting(
        0.05, "share of the corpus held out when validation is none", within=(1e-6, 0.999)
    )
    separator: str | None = setting(
        "<|endoftext|>", "stands between documents of a text file; none: a file is a document"
    )
    feature: str = setting("text", "name of the text field of tfds, .jsonl and .parquet corpora")
    prompt: str | None = setting(
        None,
        "name of a field with the prompt of each text, of .jsonl and .parquet: prompts are read "
        "and not scored, and a window begins with a prompt and holds whole documents",
    )
    tokenizer: str = setting(
        "bpe:4096",
        "bpe:N (trained on the corpus) | gpt2 (hub cache) | gpt2:FOLDER | hf:FOLDER",
    )
    seq_len: int = setting(64, "tokens in a window", within=(2, 2**24))
    batch_size: int = setting(8, "windows in a batch, per replicate", within=(1, 2**20))
    accumulate: int = setting(
        1,
        "parts of a batch that are computed one after another, their gradients summed: less memory",
        within=(1, 2**20),
        bookkeeping=True,
    )
    order: str = setting(
        "shuffled",
        "shuffled: each window once per epoch; sequential: in corpus order, from window "
        "seed * n / 8 on",
        choices=("shuffled", "sequential"),
    )
    gather: str = setting(
        "auto",
        "where windows are cut: on the device, on the host, or auto (by corpus size)",
        choices=("auto", "device", "host"),
        bookkeeping=True,
    )
    eval_batches: int = setting(
        2, "batches of held-out windows in an evaluation", within=COUNT, bookkeeping=True
    )
    held_out_positions: int = setting(
        16_384,
        "least number of positions in the large block, evaluated at the stage boundary and the end",
        within=COUNT,
        bookkeeping=True,
    )
    track: str = setting(
        "validation",
        "positions whose argmax is counted: the held-out ones, or the first training batch",
        choices=("validation", "first_batch"),
    )
    score_last: bool = setting(
        True, "score the last position of a window against the token that follows it"
    )
    stripped_lines: bool = setting(
        False, "read lines without the white space around them, empty ones left out, as one text"
    )
    score_end: bool = setting(True, "score positions whose target is the end of a text")

    def __post_init__(self):
        check_fields(self, "data")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"data.accumulate={self.accumulate} must divide data.batch_size={self.batch_size}"
            )
        kind = self.corpus.partition(":")[0]
        if kind not in ("stdlib", "text", "tfds") or (kind == "stdlib") != (self.corpus == kind):
            raise UserError(
                f"data.corpus={shown(self.corpus)}: unknown corpus; use stdlib, text:GLOB or "
                f"tfds:NAME[/CONFIG]{nearest(kind, ('stdlib', 'text', 'tfds'))}"
            )
        if self.prompt is not None and (kind != "text" or self.stripped_lines):
            with_ = f"data.corpus={shown(self.corpus)}" if kind != "text" else "data.stripped_lines"
            raise UserError(
                f"data.prompt={shown(self.prompt)}: not with {with_}; only .jsonl and .parquet "
                "files of text:GLOB have prompts"
            )
        if self.prompt is not None and self.gather == "device":
            raise UserError(
                f"data.gather=device: with data.prompt={shown(self.prompt)} windows are cut on the "
                "host; use auto"
            )
        kind, _, argument = self.tokenizer.partition(":")
        wrong = {"bpe": not argument.isdecimal(), "gpt2": False, "hf": not argument}
        if wrong.get(kind, True):
            raise UserError(
                f"data.tokenizer={shown(self.tokenizer)}: unknown tokenizer; use hf:FOLDER, bpe:N, "
                "gpt2 or gpt2:FOLDER"
            )
        if kind == "bpe" and not (len(argument) < 9 and 257 <= int(argument) <= 2**20):
            raise UserError(
                f"data.tokenizer={shown(self.tokenizer)}: a byte-level BPE needs 257 (256 bytes "
                f"and end of text) to {2**20} tokens"
            )


@dataclass(frozen=True)
class OptimConfig:
    beta1: float = setting(0.9, "Adam: decay of the mean of gradients", within=(0.0, 0.999999))
    beta2: float = setting(
        0.95, "Adam: decay of the mean of squared gradients", within=(0.0, 0.999999)
    )
    eps: float = setting(1e-8, "Adam: added to the root of the second moment", within=(1e-30, 1.0))
    clip_norm: float = setting(
        1.0, "gradients are scaled down to this global norm", within=POSITIVE
    )

    def __post_init__(self):
        check_fields(self, "optim")


@dataclass(frozen=True)
class RunConfig:
    steps: int = setting(
        500, "optimiser updates; stage 2 starts after half of them", within=(2, 2**31 - 2)
    )
    recipes: tuple[str, ...] = setting(
        ("coupled", "published"), "hyper-parameter sets, side by side"
    )
    published_peak: float = setting(
        1.5e-3,
        "highest learning rate of recipe published, whose other rates keep their ratio to it",
        within=(0.0, 1e3),
        bookkeeping=True,
    )
    late_schedule: bool = setting(
        False,
        "schedules step after the optimiser, as in the report's code: update 1 has the peak rate "
        "and no decay, update n the rate and decay of n - 1; warm-up takes 375 steps at any length",
    )
    eval_every: int = setting(20, "steps between evaluations", within=COUNT, bookkeeping=True)
    save_every: int = setting(
        100, "steps between checkpoints; the last two are kept", within=COUNT, bookkeeping=True
    )
    checkpoint_every: int = setting(
        1000, "steps between checkpoints that are kept for good", within=COUNT, bookkeeping=True
    )
    tracker: str = setting(
        "none",
        "also write the numbers to this package, which is installed apart (trackio keeps them on "
        "this machine, wandb asks for an account unless WANDB_MODE=offline)",
        choices=("none", "wandb", "trackio"),
        bookkeeping=True,
    )
    keep: int = setting(
        10,
        "at most so many checkpoints are kept for good, evenly spaced; besides, the last two and "
        "the boundary",
        within=(0, COUNT[1]),
        bookkeeping=True,
    )
    checkpoints: str | None = setting(
        None,
        "where checkpoints are: an absolute folder, or gs://BUCKET/FOLDER (which needs gcsfs and "
        "google-cloud-storage); none: inside the workdir, where all else is in any case",
        bookkeeping=True,
    )
    init: str | None = setting(
        None,
        "instead of from scratch: fork:WORKDIR[@STEP[:REPLICATE]], or hf:FOLDER, the master "
        "weights of a Hugging Face folder with a new optimiser",
    )
    reset_optimizer: bool = setting(False, "a fork starts with fresh moments of Adam")

    def __post_init__(self):
        check_fields(self, "run")
        if not self.recipes:
            raise UserError("run.recipes is empty; name at least one")
        if len(set(self.recipes)) < len(self.recipes):
            raise UserError(
                f"run.recipes={shown(','.join(self.recipes))}: names a recipe twice; "
                "use --seeds for more replicates of one"
            )
        if self.checkpoints is not None and not self.checkpoints.startswith(("/", "gs://")):
            raise UserError(
                f"run.checkpoints={shown(self.checkpoints)}: use an absolute folder or "
                "gs://BUCKET/FOLDER"
            )
        if self.init is not None and not self.init.startswith(("fork:", "hf:")):
            raise UserError(
                f"run.init={shown(self.init)}: use fork:WORKDIR[@STEP[:REPLICATE]] or hf:FOLDER"
            )
        if self.reset_optimizer and not (self.init or "").startswith("fork:"):
            raise UserError("run.reset_optimizer=true: only a fork can; set run.init=fork:WORKDIR")

    @property
    def boundary(self) -> int:
        """The last step of stage 1."""
        return self.steps // 2


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


SECTIONS = {f.name: f.type for f in dataclasses.fields(Config)}
BOOKKEEPING = {
    f"{section}.{f.name}"
    for section, kind in SECTIONS.items()
    for f in dataclasses.fields(kind)
    if f.metadata["bookkeeping"]
}
RATE, DECAY, SHARE = (0.0, 1e3), (0.0, 1e6), (0.0, 1.0)


@flax.struct.dataclass
class Hyper:
    """The numbers of one replicate. Scalars, or arrays of shape [R] once stacked."""

    warmup_steps: float = setting(375.0, "steps of linear warm-up", within=(0.0, 1e9))
    lr_peak: float = setting(1.5e-3, "learning rate at the end of warm-up", within=RATE)
    lr_stage1_end: float = setting(1.0e-3, "learning rate at the stage boundary", within=RATE)
    lr_stage2_start: float = setting(1.0e-3, "learning rate just after the boundary", within=RATE)
    lr_final: float = setting(1.5e-6, "learning rate at the last step", within=RATE)
    decoupled_1: float = setting(0.0, "decoupled weight decay (AdamW) in stage 1", within=DECAY)
    decoupled_2: float = setting(0.0, "decoupled weight decay (AdamW) in stage 2", within=DECAY)
    coupled_1: float = setting(
        0.0, "L2 added to the gradient before Adam (torch's Adam), stage 1", within=DECAY
    )
    coupled_2: float = setting(0.0, "L2 added to the gradient before Adam, stage 2", within=DECAY)
    decay_rest: float = setting(
        0.0, "share of the decay for embedding, head and norms (1: all)", within=DECAY
    )
    logit_scale: float = setting(1.0, "factor on the logits", within=(1e-6, 1e6))
    weight_quant: float = setting(
        1.0, "weight quantisation strength (0: none, 1: full)", within=SHARE
    )
    act_quant: float = setting(
        1.0, "activation quantisation strength (0: none, 1: int8)", within=SHARE
    )
    quant_warmup_steps: float = setting(
        0.0, "steps in which both strengths grow linearly from 0", within=(0.0, 1e9)
    )
    extra: dict[str, float] = setting(
        dict, "numbers that only an experiment's own loss, optimiser or quantiser reads"
    )


HYPER_FIELDS = tuple(f.name for f in dataclasses.fields(Hyper) if f.name != "extra")


@dataclass(frozen=True)
class Replicate:
    """One member of a run: which recipe and numbers, from which seed.

    The seed sets the initialisation and the order of the data: replicates of one seed share both.
    """

    name: str
    seed: int
    hyper: Hyper


def stack_hypers(replicates: list[Replicate]) -> Hyper:
    """Stack the numbers of R replicates into one Hyper of float32 arrays [R].

    Raises ValueError unless all have the same keys of `extra`.
    """
    hypers = [rep.hyper for rep in replicates]
    return jax.tree.map(lambda *numbers: jnp.array(numbers, jnp.float32), *hypers)
