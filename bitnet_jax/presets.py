"""Named recipes (hyper-parameters) and presets (whole configurations), and overrides of both."""

import dataclasses
import types
import typing
from dataclasses import replace

from bitnet_jax.config import SECTIONS, Config, DataConfig, Hyper, ModelConfig, Replicate, RunConfig
from bitnet_jax.fields import UserError, check_fields, check_known, shown


def _two_stages(run: RunConfig, **decay) -> Hyper:
    """The numbers of the troubleshooting report; `decay_rest` 1: every parameter is decayed."""
    half = run.steps // 2
    warmup = 375 if run.late_schedule or half > 375 else max(1, run.steps // 10)
    return Hyper(warmup_steps=float(warmup), decay_rest=1.0, **decay)


def _published(run: RunConfig) -> Hyper:
    """The schedule of the b1.58 training tips (microsoft/unilm, 2024), with a shorter warm-up.

    Each stage follows the line from its peak at the end of warm-up to 0 at the last step, that of
    stage 2 at two thirds of the first's rates; decay of 0.1 on matrices in stage 1, none in stage
    2. Warm-up: 375 steps there, at most steps / 20 here.
    """
    steps, peak = run.steps, run.published_peak
    warmup = max(1, min(375, steps // 20))
    left = (steps - steps // 2) / (steps - warmup)
    return Hyper(
        warmup_steps=float(warmup),
        lr_peak=peak,
        lr_stage1_end=peak * left,
        lr_stage2_start=peak / 1.5 * left,
        lr_final=0.0,
        decoupled_1=0.1,
        decoupled_2=0.0,
    )


RECIPES = {  # of a RunConfig
    "coupled": lambda run: _two_stages(run, coupled_1=0.1, coupled_2=0.05),
    "decoupled": lambda run: _two_stages(run, decoupled_1=0.1, decoupled_2=0.05),
    "published": _published,
}


LARGE = ModelConfig(dtype="bfloat16", remat=True)
LONG = RunConfig(steps=100_000, recipes=("published",), eval_every=100, save_every=500)
PRESETS = {
    "tiny": Config(
        ModelConfig(d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=64),
        DataConfig(tokenizer="bpe:300", seq_len=16, batch_size=4),
        run=RunConfig(steps=20, eval_every=5, save_every=5, checkpoint_every=10),
    ),
    # bitnet train --set run.recipes=published --seeds 0-2 --set run.published_peak=X: mean held-out
    # loss 5.61 at 1.5e-3, 5.52 at 3e-3, 5.58 at 4.5e-3, 6.08 at 9e-3 (2 CPU cores, jax 0.10.2).
    "quick": Config(run=RunConfig(published_peak=3e-3)),
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
            score_end=False,
            stripped_lines=True,
        ),
        run=RunConfig(
            1000, ("coupled", "decoupled"), late_schedule=True, eval_every=5, save_every=250
        ),
    ),
    "b158": Config(
        ModelConfig(),
        DataConfig(tokenizer="gpt2", seq_len=32, batch_size=4, eval_batches=4),
        run=RunConfig(steps=1000, recipes=("published",), save_every=250),
    ),
    "125m": Config(
        replace(LARGE, d_model=768, n_layers=12, n_heads=12, n_kv_heads=12, d_ff=2048),
        DataConfig(tokenizer="gpt2", seq_len=1024, batch_size=32),
        run=replace(LONG, steps=10_000),
    ),
    "700m": Config(
        replace(LARGE, d_model=1536, n_layers=24, n_heads=24, n_kv_heads=24, d_ff=4096),
        DataConfig(tokenizer="gpt2", seq_len=2048, batch_size=16),
        run=LONG,
    ),
    "2b": Config(  # the shape of BitNet b1.58 2B4T (arXiv 2504.12285), with its tokenizer's folder
        replace(
            LARGE,
            vocab_size=128_256,
            d_model=2560,
            n_layers=30,
            n_heads=20,
            n_kv_heads=5,
            d_ff=6912,
            scan_layers=True,
        ),
        DataConfig(tokenizer="hf:bitnet-b1.58-2B-4T", seq_len=2048, batch_size=256),
        run=LONG,
    ),
}


def preset(name: str) -> Config:
    """Return a preset by name; raises UserError when there is none."""
    check_known(name, PRESETS, "preset")
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
            raise UserError(f"--set {shown(text)}: write it as section.field=value")
        check_known(section, (*SECTIONS, "hyper"), "--set section")
        kind = Hyper if section == "hyper" else SECTIONS[section]
        fields = {f.name: f.type for f in dataclasses.fields(kind) if f.name != "extra"}
        check_known(name, fields, f"{section} field")
        parsed = _parse(value, fields[name], path)
        (hyper if section == "hyper" else sections.setdefault(section, {}))[name] = parsed
    check_fields(Hyper(**hyper), "hyper")
    changed = {k: replace(getattr(cfg, k), **v) for k, v in sections.items()}
    return replace(cfg, **changed), hyper


def make_replicates(
    cfg: Config, seeds: list[int], hyper_overrides: dict[str, float]
) -> list[Replicate]:
    """One replicate per recipe and seed, seeds fastest; checks the schedules."""
    for name in cfg.run.recipes:
        check_known(name, RECIPES, "recipe in run.recipes:")
    replicates = [
        Replicate(name, seed, RECIPES[name](cfg.run).replace(**hyper_overrides))
        for name in cfg.run.recipes
        for seed in seeds
    ]
    for rep in replicates:
        check_replicate(cfg.run, rep)
    return replicates


def check_replicate(run: RunConfig, rep: Replicate) -> None:
    """Raise UserError if a replicate has no name for a folder, no seed, or no schedule."""
    name = rep.name
    if not (0 < len(name) <= 100 and name.isprintable() and "/" not in name):
        raise UserError(
            f"replicate {shown(name)}: its name must be 1 to 100 printable characters without /"
        )
    if not 0 <= rep.seed < 2**32:
        raise UserError(f"replicate {name}: seed={shown(rep.seed)}: must lie in 0 .. {2**32 - 1}")
    check_hyper(run, rep.hyper)


def check_hyper(run: RunConfig, hyper: Hyper) -> None:
    """Raise UserError if the numbers of a replicate make no schedule."""
    check_fields(hyper, "hyper")
    if hyper.quant_warmup_steps > run.steps:
        raise UserError(
            f"hyper.quant_warmup_steps={hyper.quant_warmup_steps:g} lies past the last step "
            f"({run.steps}); use 0 to {run.steps}"
        )
    if hyper.warmup_steps > run.boundary and not run.late_schedule:
        raise UserError(
            f"hyper.warmup_steps={hyper.warmup_steps:g} lies past the stage boundary at step "
            f"{run.boundary} (run.steps={run.steps}); use 0 to {run.boundary}"
        )


def _parse(text: str, kind, path: str):
    if isinstance(kind, types.UnionType):
        if text.lower() in ("none", "null", ""):
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{path}={shown(text)}: expected true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"{path}={shown(text)}: expected {wanted}") from None
