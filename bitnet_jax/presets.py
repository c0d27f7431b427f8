"""Named recipes (hyper-parameters) and presets (whole configurations), and overrides of both."""

import dataclasses
import types
import typing
from dataclasses import replace

from bitnet_jax.config import (
    HYPER_FIELDS,
    Config,
    DataConfig,
    Hyper,
    ModelConfig,
    Replicate,
    RunConfig,
    UserError,
)


def _report_hyper(steps: int, **decay) -> Hyper:
    warmup = 375 if steps // 2 > 375 else max(1, steps // 10)
    return Hyper(warmup_steps=float(warmup), decay_rest=1.0, **decay)


def _b158_hyper(steps: int) -> Hyper:
    """Each stage follows the line from its peak at the end of warm-up to 0 at the last step."""
    warmup = max(1, min(375, steps // 20))
    left = (steps - steps // 2) / (steps - warmup)
    return Hyper(
        warmup_steps=float(warmup),
        lr_peak=1.5e-3,
        lr_stage1_end=1.5e-3 * left,
        lr_stage2_start=1.0e-3 * left,
        lr_final=0.0,
        decoupled_1=0.1,
        decoupled_2=0.0,
    )


RECIPES = {
    "report": lambda steps: _report_hyper(steps, coupled_1=0.1, coupled_2=0.05),
    "report_decoupled": lambda steps: _report_hyper(steps, decoupled_1=0.1, decoupled_2=0.05),
    "b158": _b158_hyper,
}


PRESETS = {
    "tiny": Config(
        ModelConfig(d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=64),
        DataConfig(tokenizer="bpe:300", seq_len=16, batch_size=4),
        run=RunConfig(steps=20, eval_every=5, save_every=5, checkpoint_every=10),
    ),
    "quick": Config(),
    "report": Config(
        ModelConfig(layout="report", vocab_size=50257, tied_embedding=False, rope_theta=10_000.0),
        DataConfig(
            tokenizer="gpt2",
            seq_len=32,
            batch_size=4,
            order="sequential",
            eval_batches=4,
            track="first_batch",
            score_last=False,
        ),
        run=RunConfig(1000, ("report", "report_decoupled"), eval_every=5, save_every=250),
    ),
    "b158": Config(
        ModelConfig(),
        DataConfig(tokenizer="gpt2", seq_len=32, batch_size=4, eval_batches=4),
        run=RunConfig(steps=1000, recipes=("b158",), save_every=250),
    ),
    "125m": Config(
        ModelConfig(
            d_model=768, n_layers=12, n_heads=12, n_kv_heads=12, d_ff=2048, dtype="bfloat16"
        ),
        DataConfig(tokenizer="gpt2", seq_len=1024, batch_size=32),
        run=RunConfig(steps=10_000, recipes=("b158",), eval_every=100, save_every=500),
    ),
    "700m": Config(
        ModelConfig(
            d_model=1536, n_layers=24, n_heads=24, n_kv_heads=24, d_ff=4096, dtype="bfloat16"
        ),
        DataConfig(tokenizer="gpt2", seq_len=2048, batch_size=16),
        run=RunConfig(steps=100_000, recipes=("b158",), eval_every=100, save_every=500),
    ),
}


def preset(name: str) -> Config:
    """Return a preset by name; raises UserError when there is none."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def override(cfg: Config, assignments: list[str]) -> tuple[Config, dict[str, float]]:
    """Apply `section.field=value` strings; returns the Config and the overrides of `hyper.*`.

    Raises UserError that names the field, the value and what is accepted.
    """
    sections: dict[str, dict] = {}
    hyper: dict[str, float] = {}
    for text in assignments:
        path, equals, value = text.partition("=")
        section, _, name = path.strip().partition(".")
        if not equals or not name:
            raise UserError(f"--set {text}: write it as section.field=value")
        if section == "hyper":
            _known(name, HYPER_FIELDS, "hyper field")
            hyper[name] = _parse(value, float, path)
            continue
        _known(section, ["model", "data", "optim", "run", "hyper"], "--set section")
        part = getattr(cfg, section)
        fields = {f.name: f for f in dataclasses.fields(part)}
        _known(name, fields, f"{section} field")
        parsed = _parse(value, fields[name].type, path)
        choices = fields[name].metadata["choices"]
        if choices and parsed not in choices:
            raise UserError(f"{path}={value}: use {' or '.join(choices)}")
        sections.setdefault(section, {})[name] = parsed
    changed = {k: replace(getattr(cfg, k), **v) for k, v in sections.items()}
    return replace(cfg, **changed), hyper


def make_replicates(
    cfg: Config, seeds: list[int], hyper_overrides: dict[str, float]
) -> list[Replicate]:
    """One replicate per recipe and seed, seeds fastest; checks the schedules."""
    for name in cfg.run.recipes:
        if name not in RECIPES:
            raise UserError(
                f"run.recipes: unknown recipe {name!r}; known: {', '.join(sorted(RECIPES))}"
            )
    replicates = [
        Replicate(
            name, seed, cfg.data.seed, RECIPES[name](cfg.run.steps).replace(**hyper_overrides)
        )
        for name in cfg.run.recipes
        for seed in seeds
    ]
    for rep in replicates:
        check_hyper(cfg.run, rep.hyper)
    return replicates


def check_hyper(run: RunConfig, hyper: Hyper) -> None:
    """Raise UserError if the numbers of a replicate make no schedule."""
    for name in HYPER_FIELDS:
        if not 0 <= getattr(hyper, name) < float("inf"):
            raise UserError(f"hyper.{name}={getattr(hyper, name):g}: must be finite and at least 0")
    for name in ("weight_quant", "act_quant", "label_smoothing", "unscaled_1", "unscaled_2"):
        if getattr(hyper, name) > 1:
            raise UserError(f"hyper.{name}={getattr(hyper, name):g}: must lie between 0 and 1")
    if hyper.quant_warmup_steps > run.steps:
        raise UserError(
            f"hyper.quant_warmup_steps={hyper.quant_warmup_steps:g} lies past the last step "
            f"({run.steps}); use 0 to {run.steps}"
        )
    if hyper.warmup_steps > run.boundary:
        raise UserError(
            f"hyper.warmup_steps={hyper.warmup_steps:g} lies past the stage boundary at step "
            f"{run.boundary} (run.steps={run.steps}); use 0 to {run.boundary}"
        )


def _known(name, names, kind):
    if name not in names:
        raise UserError(f"unknown {kind} {name!r}; known: {', '.join(names)}")


def _parse(text: str, kind, path: str):
    if isinstance(kind, types.UnionType):
        if text.lower() in ("none", "null", ""):
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{path}={text}: expected true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"{path}={text}: expected {wanted}") from None
