"""Arms times seeds as replicates of one compiled program (one per shape), resumable by group."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax

from bitnet_jax import (
    checkpoint,
    config,
    config_file,
    data,
    log,
    presets,
    products,
    program,
    run,
    train,
)
from bitnet_jax.config import Config, Replicate
from bitnet_jax.fields import UserError, check_known
from bitnet_jax.train import STANDARD, Seams
from experiments.lab import rows
from experiments.lab.finished import Finished

MEMORY = {"cpu": 6 << 30, "gpu": 64 << 30, "tpu": 12 << 30}  # for the replicates of one program


class Arm:
    """One setting of a question: a recipe, numbers and fields that it changes, seams that it uses.

    `numbers` are those of `Hyper`, `extra` those of `Hyper.extra`, `fields` static ones by
    `section.field` (each distinct set compiles a program). A value may be a function of the
    configuration at the arm's length: `quant_warmup_steps=lambda cfg: cfg.run.steps // 5`.
    `lengths` are the multiples of run.steps at which it is trained; empty: all of the request's.
    """

    def __init__(
        self,
        name: str,
        recipe: str = "coupled",
        *,
        fields: dict | None = None,
        extra: dict[str, float] | None = None,
        seams: Seams = STANDARD,
        lengths: tuple[int, ...] = (),
        **numbers,
    ):
        check_known(recipe, presets.RECIPES, f"recipe of arm {name}:")
        for number in numbers:
            check_known(number, config.HYPER_FIELDS, f"number of arm {name}:")
        self.name, self.recipe, self.seams, self.lengths = name, recipe, seams, lengths
        self.fields, self.extra, self.numbers = fields or {}, extra or {}, numbers

    def __repr__(self):
        return f"Arm({self.name!r})"


def times_width(factor: float) -> dict:
    """Fields that widen the residual stream and the feed-forward layer."""
    return {
        "model.d_model": lambda cfg: int(factor * cfg.model.d_model),
        "model.d_ff": lambda cfg: int(factor * cfg.model.d_ff),
    }


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked of a question."""

    name: str  # of the question
    preset: str
    cfg: Config  # before any arm's changes
    hyper: dict[str, float]  # numbers that --set gave to every arm
    seeds: list[int]
    workdir: Path  # the folder of the groups' workdirs and of the page
    lengths: tuple[int, ...] = (1,)  # multiples of run.steps
    only: tuple[str, ...] = ()  # parts of the names of the arms to train; empty: all
    recipes: tuple[str, ...] = ()  # of the arms to train; empty: all
    assigned: tuple[str, ...] = ()  # fields that --set gave
    dry_run: bool = False
    at_once: int | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Replicates that one program trains; `bases` is what each one's arm changed, as it was."""

    cfg: Config
    replicates: list[Replicate]
    bases: list[dict]
    seams: Seams = STANDARD


Measure = Callable[
    [Finished], dict[str, list]
]  # name -> one value (a number, dict, ...) per replicate


def train_arms(
    request: Request, arms: list[Arm], measure: Measure | None = None, *, keep: bool = False
) -> list[dict]:
    """Train every chosen arm at every length from every seed; rows in that order.

    A repeated command goes on where it was stopped and repeats no finished group. Checkpoints of a
    finished group are removed unless kept.
    """
    by_place = {}
    for group in groups(request, arms):
        for row in train_group(request, group, measure, keep=keep):
            by_place[rows.place(row)[1:]] = row
    names = {arm.name: i for i, arm in enumerate(arms)}
    return sorted(
        by_place.values(), key=lambda row: (names[row["arm"]], rows.place(row)[3], row["seed"])
    )


def train_group(
    request: Request,
    group: Group,
    measure: Measure | None = None,
    *,
    keep: bool = False,
    prepare: Callable[[Path], None] = lambda workdir: None,
) -> list[dict]:
    """Train one group in a workdir of its own and return its rows.

    `prepare` is called with the workdir before the run starts or resumes.
    """
    workdir = place(request, group)
    finished = workdir / "rows.json"
    if not finished.exists():
        print(f"{request.name}: {', '.join(dict.fromkeys(rep.name for rep in group.replicates))}")
        prepare(workdir)
        run.run(group.cfg, group.replicates, workdir, resume=True, seams=group.seams)
        done = Finished(workdir)
        new_rows = done.rows(group.bases, request.preset)
        measured = measure(done) if measure else {}
        for name, values in measured.items():
            for row, value in zip(new_rows, values, strict=True):
                row["extra"][name] = value
        log.write_json(finished, new_rows)
        if not keep:
            checkpoint.place(workdir).rmtree()
    return json.loads(finished.read_text())


def place(request: Request, group: Group) -> Path:
    """The workdir of a group."""
    return request.workdir / config_file.run_id(request.name, group.cfg, group.replicates)


def groups(request: Request, arms: list[Arm]) -> list[Group]:
    """The chosen arms at every length, as programs that fit the memory; raises UserError."""
    wanted = chosen(request, arms)
    check_free(request, wanted)
    shapes: dict[tuple, list[tuple[Replicate, dict, tuple[str, ...]]]] = {}
    for arm in wanted:
        for length in request.lengths:
            if not arm.lengths or length in arm.lengths:
                cfg, reps, base = replicates(request, arm, length)
                recipes, run_ = cfg.run.recipes, dataclasses.replace(cfg.run, recipes=("any",))
                by_codes = products.full_strength(reps[0].hyper)  # of all in a program, or of none
                shape = dataclasses.replace(cfg, run=run_), arm.seams, by_codes
                shapes.setdefault(shape, []).extend((rep, base, recipes) for rep in reps)
    all_groups = []
    for (cfg, seams, _), parts in shapes.items():
        most = request.at_once or _at_once(cfg, parts[0][0])
        for start in range(0, len(parts), most):
            reps, bases, recipes = zip(*parts[start : start + most], strict=True)
            names = tuple(dict.fromkeys(name for names in recipes for name in names))
            run_ = dataclasses.replace(cfg.run, recipes=names)
            cfg_ = dataclasses.replace(cfg, run=run_)
            all_groups.append(Group(cfg_, with_same_extra(reps), list(bases), seams))
    return all_groups


def describe(group: Group) -> str:
    """One line: replicates, length and arms."""
    names = ", ".join(dict.fromkeys(rep.name for rep in group.replicates))
    return f"{len(group.replicates)} replicates, {group.cfg.run.steps} steps: {names}"


def replicates(request: Request, arm: Arm, length: int) -> tuple[Config, list[Replicate], dict]:
    """Configuration and replicates of an arm at a length, and what it changed, as it was."""
    cfg = _with(request.cfg, {"run.steps": length * request.cfg.run.steps})
    cfg = _with(cfg, {"run.recipes": (arm.recipe,)})
    before = {path: _at(cfg, path) for path in arm.fields}
    with _named(arm.name):
        cfg_ = _with(cfg, {path: _value(value, cfg) for path, value in arm.fields.items()})
        numbers = {name: float(_value(value, cfg)) for name, value in arm.numbers.items()}
        reps = presets.make_replicates(cfg_, request.seeds, request.hyper | numbers)
    extra = {name: float(_value(value, cfg)) for name, value in arm.extra.items()}
    named = [
        dataclasses.replace(rep, name=arm.name, hyper=rep.hyper.replace(extra=extra))
        for rep in reps
    ]
    return cfg_, named, before | {f"hyper.{name}": x for name, x in request.hyper.items()}


def check_free(request: Request, arms: list[Arm]) -> None:
    """Raise UserError when the user sets a number or a field that an arm sets, too."""
    for arm in arms:
        own = {*arm.fields, *(f"hyper.{name}" for name in arm.numbers)}
        for path in request.assigned:
            if path in own:
                raise UserError(f"--set {path}: arm {arm.name!r} sets it itself")


def chosen(request: Request, arms: list[Arm]) -> list[Arm]:
    """The arms of the wanted recipes with a part of `only` in their names; raises UserError.

    A part that is an arm's whole name picks that arm alone.
    """
    names = {arm.name for arm in arms}

    def wanted(arm):
        parts = [p for p in request.only if p == arm.name or (p in arm.name and p not in names)]
        return (parts or not request.only) and (
            not request.recipes or arm.recipe in request.recipes
        )

    matching = [arm for arm in arms if wanted(arm)]
    if not matching:
        asked = f"--only {','.join(request.only)}" if request.only else ""
        asked += f" run.recipes={','.join(request.recipes)}" if request.recipes else ""
        raise UserError(f"{asked.strip()}: no such arm among {'; '.join(a.name for a in arms)}")
    return matching


def with_same_extra(reps: tuple[Replicate, ...]) -> list[Replicate]:
    """Replicates of one program with the same names in `Hyper.extra`; 0 where an arm has none."""
    names = sorted({name for rep in reps for name in rep.hyper.extra})
    return [
        dataclasses.replace(
            rep, hyper=rep.hyper.replace(extra={k: rep.hyper.extra.get(k, 0.0) for k in names})
        )
        for rep in reps
    ]


def _value(value, cfg: Config):
    return value(cfg) if callable(value) else value


def _at(cfg: Config, path: str):
    """The value of a `section.field`, as JSON has it; raises UserError for an unknown one."""
    section, _, name = path.partition(".")
    check_known(section, config.SECTIONS, "section of a field:")
    value = dataclasses.asdict(getattr(cfg, section))
    check_known(name, value, f"{section} field")
    return list(value[name]) if isinstance(value[name], tuple) else value[name]


def _with(cfg: Config, fields: dict) -> Config:
    """A configuration with some `section.field` replaced."""
    sections: dict[str, dict] = {}
    for path, value in fields.items():
        section, _, name = path.partition(".")
        sections.setdefault(section, {})[name] = value
    changed = {k: dataclasses.replace(getattr(cfg, k), **v) for k, v in sections.items()}
    return dataclasses.replace(cfg, **changed)


@contextlib.contextmanager
def _named(arm: str):
    """Say which arm a mistake belongs to."""
    try:
        yield
    except UserError as error:
        raise UserError(f"arm {arm}: {error}") from None


def _at_once(cfg: Config, replicate: Replicate) -> int:
    """How many replicates fit: parameters, gradients, two moments, updates; logits and softmax."""
    vocab = data.load(cfg.data).tokenizer.vocab_size
    cfg = program.resolve_vocab(cfg, vocab)
    state = jax.eval_shape(lambda: train.init_state(cfg, replicate.hyper, 0))
    n_params = sum(x.size for x in jax.tree.leaves(state.params))
    logits = cfg.data.batch_size * cfg.data.seq_len * vocab
    return max(1, MEMORY[jax.default_backend()] // (4 * (5 * n_params + 4 * logits)))
