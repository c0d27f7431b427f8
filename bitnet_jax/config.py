"""What a run is: static configuration, and hyper-parameters as data.

`Config` decides the compiled program. `Hyper` holds every number that a sweep varies: a pytree that
the jitted step takes as an argument, so one program serves every arm of a sweep.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

import flax.struct
import jax
import jax.numpy as jnp


class UserError(Exception):
    """A mistake in what the user asked for: shown as one line, exit status 2."""


def _field(default, text, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


def _positive(part, section, *names):
    for name in names:
        if not getattr(part, name) > 0:
            raise UserError(f"{section}.{name}={getattr(part, name)}: must be positive")


@dataclass(frozen=True)
class ModelConfig:
    layout: str = _field(
        "b158",
        "b158: pre-norms and two sub-norms, a scale per projection; "
        "report: pre-norms, a norm in every BitLinear, fused q/k/v and gate/up",
        ("b158", "report"),
    )
    vocab_size: int | None = _field(None, "rows of the embedding; none: the tokenizer's")
    d_model: int = _field(256, "width of the residual stream")
    n_layers: int = _field(4, "number of blocks")
    n_heads: int = _field(4, "query heads")
    n_kv_heads: int = _field(4, "key and value heads")
    d_ff: int = _field(512, "width of the gated feed-forward layer")
    tied_embedding: bool = _field(True, "use the embedding as the output head")
    output_bias: bool = _field(
        False, "add a bias to the logits, starting at the log unigram probabilities; never decayed"
    )
    weight_format: str = _field(
        "ternary",
        "what quantised weights hold: absmean ternary, or absmax 4 or 8 bits; "
        "packed: ternary in 2 bits, which can be evaluated but not trained",
        ("ternary", "int4", "int8", "packed"),
    )
    rope_theta: float = _field(500_000.0, "base of the rotary frequencies")
    norm_eps: float = _field(1e-5, "added to the mean square inside RMSNorm")
    dtype: str = _field("float32", "compute type of activations", ("float32", "bfloat16"))

    def __post_init__(self):
        _positive(self, "model", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
        _positive(self, "model", "rope_theta", "norm_eps")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise UserError(f"model.vocab_size={self.vocab_size}: needs at least 2 tokens")
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
    corpus: str = _field(
        "stdlib", "stdlib (this interpreter's standard library) | text:GLOB | tfds:NAME[/CONFIG]"
    )
    validation: str | None = _field(
        None, "held-out text: text:GLOB, or a tfds split; none: a held-out part of the corpus"
    )
    holdout: float = _field(0.05, "share of the corpus held out when validation is none")
    feature: str = _field("text", "tfds: name of the text feature")
    tokenizer: str = _field(
        "bpe:4096",
        "bpe:N (trained on the corpus) | gpt2 (hub cache) | gpt2:FOLDER | hf:FOLDER",
    )
    seq_len: int = _field(64, "tokens in a window")
    batch_size: int = _field(8, "windows in a batch, per replicate")
    order: str = _field(
        "shuffled",
        "shuffled: each window once per epoch; sequential: in corpus order",
        ("shuffled", "sequential"),
    )
    seed: int = _field(0, "seed of the batch order, shared by all replicates (paired)")
    gather: str = _field(
        "auto",
        "where windows are cut: on the device, on the host, or auto (by corpus size)",
        ("auto", "device", "host"),
    )
    eval_batches: int = _field(2, "batches of held-out windows in an evaluation")
    track: str = _field(
        "validation",
        "positions whose argmax is counted: the held-out ones, or the first training batch",
        ("validation", "first_batch"),
    )
    score_last: bool = _field(
        True, "score the last position of a window against the token that follows it"
    )

    def __post_init__(self):
        _positive(self, "data", "batch_size", "eval_batches")
        if self.seq_len < 2:
            raise UserError(f"data.seq_len={self.seq_len}: a window needs at least 2 tokens")
        if not 0 < self.holdout < 1:
            raise UserError(f"data.holdout={self.holdout}: must lie between 0 and 1")
        kind = self.corpus.partition(":")[0]
        if kind not in ("stdlib", "text", "tfds") or (kind == "stdlib") != (self.corpus == kind):
            raise UserError(
                f"data.corpus={self.corpus}: unknown corpus; use stdlib, text:GLOB or "
                "tfds:NAME[/CONFIG]"
            )
        kind, _, argument = self.tokenizer.partition(":")
        wrong = {"bpe": not argument.isdecimal(), "gpt2": False, "hf": not argument}
        if wrong.get(kind, True):
            raise UserError(
                f"data.tokenizer={self.tokenizer}: unknown tokenizer; use hf:FOLDER, bpe:N, "
                "gpt2 or gpt2:FOLDER"
            )
        if kind == "bpe" and int(argument) < 257:
            raise UserError(
                f"data.tokenizer={self.tokenizer}: a byte-level BPE needs at least 257 tokens "
                "(256 bytes and end of text)"
            )


@dataclass(frozen=True)
class OptimConfig:
    beta1: float = _field(0.9, "Adam: decay of the mean of gradients")
    beta2: float = _field(0.95, "Adam: decay of the mean of squared gradients")
    eps: float = _field(1e-8, "Adam: added to the root of the second moment")
    clip_norm: float = _field(1.0, "gradients are scaled down to this global norm")

    def __post_init__(self):
        _positive(self, "optim", "eps", "clip_norm")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name}={getattr(self, name)}: must lie in [0, 1)")


@dataclass(frozen=True)
class RunConfig:
    steps: int = _field(500, "optimiser updates; stage 2 starts after half of them")
    recipes: tuple[str, ...] = _field(("report", "b158"), "hyper-parameter sets, side by side")
    eval_every: int = _field(20, "steps between evaluations")
    save_every: int = _field(100, "steps between checkpoints; the last two are kept")
    checkpoint_every: int = _field(1000, "steps between checkpoints that are kept for good")
    init: str | None = _field(
        None,
        "instead of from scratch: fork:WORKDIR[@STEP[:REPLICATE]], or hf:FOLDER, the master "
        "weights of a Hugging Face folder with a new optimiser",
    )
    reset_optimizer: bool = _field(False, "a fork starts with fresh moments of Adam")

    def __post_init__(self):
        _positive(self, "run", "eval_every", "save_every", "checkpoint_every")
        if self.steps < 2:
            raise UserError(f"run.steps={self.steps}: two stages need at least 2 steps")
        if not self.recipes:
            raise UserError("run.recipes is empty; name at least one")
        if self.init is not None and not self.init.startswith(("fork:", "hf:")):
            raise UserError(
                f"run.init={self.init}: use fork:WORKDIR[@STEP[:REPLICATE]] or hf:FOLDER"
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


@flax.struct.dataclass
class Hyper:
    """The numbers of one replicate. Scalars, or arrays of shape [R] once stacked."""

    warmup_steps: float = _field(375.0, "steps of linear warm-up")
    lr_peak: float = _field(1.5e-3, "learning rate at the end of warm-up")
    lr_stage1_end: float = _field(1.0e-3, "learning rate at the stage boundary")
    lr_stage2_start: float = _field(1.0e-3, "learning rate just after the boundary")
    lr_final: float = _field(1.5e-6, "learning rate at the last step")
    decoupled_1: float = _field(0.0, "decoupled weight decay (AdamW) in stage 1")
    decoupled_2: float = _field(0.0, "decoupled weight decay (AdamW) in stage 2")
    coupled_1: float = _field(0.0, "L2 added to the gradient before Adam (torch's Adam), stage 1")
    coupled_2: float = _field(0.0, "L2 added to the gradient before Adam, stage 2")
    unscaled_1: float = _field(0.0, "decay not multiplied by the learning rate (a fault), stage 1")
    unscaled_2: float = _field(0.0, "decay not multiplied by the learning rate (a fault), stage 2")
    decay_rest: float = _field(0.0, "share of the decay for embedding, head and norms (1: all)")
    head_lr: float = _field(1.0, "factor on the updates of the output matrix (0: frozen)")
    logit_scale: float = _field(1.0, "factor on the logits")
    weight_quant: float = _field(1.0, "weight quantisation strength (0: none, 1: full)")
    act_quant: float = _field(1.0, "activation quantisation strength (0: none, 1: int8)")
    quant_warmup_steps: float = _field(0.0, "steps in which both strengths grow linearly from 0")
    label_smoothing: float = _field(0.0, "share of the target spread evenly over the vocabulary")
    z_loss: float = _field(0.0, "weight of (log sum exp of the logits)^2")
    entropy_bonus: float = _field(0.0, "weight of 1 - entropy / ln V")
    frequency_penalty: float = _field(0.0, "weight of the predictions' mean log unigram frequency")
    diversity_bonus: float = _field(0.0, "weight of the probability of tokens seen in the window")
    coverage: float = _field(0.0, "weight of KL(unigram || mean prediction of the batch)")
    unlikelihood: float = _field(0.0, "weight of -log(1 - q) of the window's earlier tokens")


HYPER_FIELDS = tuple(f.name for f in dataclasses.fields(Hyper))


@dataclass(frozen=True)
class Replicate:
    """One member of a run: which recipe, which seeds, which numbers."""

    name: str
    seed: int
    data_seed: int
    hyper: Hyper


def stack_hypers(replicates: list[Replicate]) -> Hyper:
    """Stack the numbers of R replicates into one Hyper of float32 arrays [R]."""
    hypers = [rep.hyper for rep in replicates]
    return jax.tree.map(lambda *numbers: jnp.array(numbers, jnp.float32), *hypers)


def to_json(cfg: Config, replicates: list[Replicate]) -> dict:
    """The resolved configuration as plain JSON values."""
    return {
        **json.loads(json.dumps(dataclasses.asdict(cfg))),
        "replicates": [dataclasses.asdict(rep) for rep in replicates],
    }


def from_json(tree: dict) -> tuple[Config, list[Replicate]]:
    """Inverse of `to_json`; extra keys at the top (provenance) are ignored."""
    parts = {}
    for part in dataclasses.fields(Config):
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in tree[part.name].items()}
        parts[part.name] = part.type(**values)
    replicates = [Replicate(**{**r, "hyper": Hyper(**r["hyper"])}) for r in tree["replicates"]]
    return Config(**parts), replicates


def run_id(name: str, cfg: Config, replicates: list[Replicate]) -> str:
    """`name` and eight hex digits of the resolved configuration."""
    text = json.dumps(to_json(cfg, replicates), sort_keys=True)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
