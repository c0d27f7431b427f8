"""Arms times seeds as replicates of one compiled program (one per shape), resumable by group."""

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from bitnet_jax import config, data, log, presets, program, run, train
from bitnet_jax.config import Config, Replicate
from experiments import results
from experiments.common import Request

MEMORY = {"cpu": 6 << 30, "gpu": 64 << 30, "tpu": 12 << 30}  # for the replicates of one program


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting of a sweep: a recipe, changed numbers, and changes of static fields."""

    name: str
    recipe: str
    hyper: dict[str, float] = dataclasses.field(default_factory=dict)
    model: dict = dataclasses.field(default_factory=dict)  # each distinct one compiles a program
    run: dict = dataclasses.field(default_factory=dict)  # likewise


# From a finished workdir, the configuration and a replicate's index to further fields of its row.
Extra = Callable[[Path, Config, int], dict]


def train_arms(
    name: str,
    request: Request,
    arms: list[Arm],
    *,
    extra: Extra | None = None,
    keep_checkpoints: bool = False,
) -> list[dict]:
    """Train every chosen arm from every seed and return one row each, in that order.

    A group is as many replicates of one shape as fit the memory; it has a workdir of its own, so
    that a repeated command goes on where it was stopped and repeats no finished group. Checkpoints
    of a finished group are removed unless kept.
    """
    arms = chosen(request, arms)
    rows = {}
    for cfg, members in groups(request, arms):
        workdir = request.workdir / config.run_id(name, cfg, members)
        finished = workdir / "rows.json"
        if not finished.exists():
            print(f"{name}: {', '.join(dict.fromkeys(rep.name for rep in members))}")
            run.run(cfg, members, workdir, resume=True)
            group = [
                results.summarise(workdir, i)
                | {"preset": request.preset}
                | (extra(workdir, cfg, i) if extra else {})
                for i in range(len(members))
            ]
            log.write_json(finished, group)
            if not keep_checkpoints:
                shutil.rmtree(workdir / "checkpoints")
        for row in json.loads(finished.read_text()):
            rows[row["arm"], row["seed"]] = row
    order = [(arm.name, seed) for arm in arms for seed in request.seeds]
    return [rows[key] for key in order]


def chosen(request: Request, arms: list[Arm]) -> list[Arm]:
    """The arms whose names have one of `request.only` in them; raises UserError when none does."""
    found = [arm for arm in arms if not request.only or any(x in arm.name for x in request.only)]
    if not found:
        names = "; ".join(arm.name for arm in arms)
        raise config.UserError(f"--only {','.join(request.only)}: no such arm among {names}")
    return found


_load = functools.lru_cache(maxsize=1)(program.load_replicates)


def load_replicate(workdir: Path, step: int, index: int):
    """`program.load_replicate` for one replicate after the other: reads the checkpoint once."""
    cfg, replicates, states = _load(workdir, step)
    return cfg, replicates[index], jax.tree.map(lambda x: x[index], states)


def groups(request, arms):
    """Pairs of configuration and replicates that one program trains."""
    shapes: dict[Config, list[Replicate]] = {}
    for arm in arms:
        with _named(arm.name):
            cfg = dataclasses.replace(
                request.cfg,
                model=dataclasses.replace(request.cfg.model, **arm.model),
                run=dataclasses.replace(request.cfg.run, recipes=(arm.recipe,), **arm.run),
            )
            numbers = request.hyper | arm.hyper
            made = presets.make_replicates(cfg, request.seeds, numbers)
        cfg = dataclasses.replace(
            cfg, run=dataclasses.replace(cfg.run, recipes=request.cfg.run.recipes)
        )
        named = [dataclasses.replace(rep, name=arm.name) for rep in made]
        shapes.setdefault(cfg, []).extend(named)
    for cfg, members in shapes.items():
        most = request.at_once or _at_once(cfg, members[0])
        for start in range(0, len(members), most):
            yield cfg, members[start : start + most]


@contextlib.contextmanager
def _named(arm):
    """Say which arm a mistake belongs to."""
    try:
        yield
    except config.UserError as error:
        raise config.UserError(f"arm {arm}: {error}") from None


def _at_once(cfg, replicate):
    """How many replicates fit: parameters, gradients, two moments, updates; logits and softmax."""
    vocab = data.load(cfg.data).tokenizer.vocab_size
    cfg = program.resolve_vocab(cfg, vocab)
    state = jax.eval_shape(lambda: train.init_state(cfg, replicate.hyper, 0))
    n_params = sum(x.size for x in jax.tree.leaves(state.params))
    logits = cfg.data.batch_size * cfg.data.seq_len * vocab
    return max(1, MEMORY[jax.default_backend()] // (4 * (5 * n_params + 4 * logits)))
