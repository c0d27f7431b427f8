"""Is there a sweet spot at 10,000 cycles?

The report's fourth recommendation. Runs of T = 1, 10 and 20 times `run.steps` (1000, 10,000 and
20,000 steps in `--preset report`) with its recipe (coupled decay) and the same decoupled, in two
schedules:

    tied     the stage boundary, the learning rate's ends and the change of decay scale with T; the
             warm-up does not (375 of 1000 steps, the report's), so it is the same for all T
    common   the longest run's schedule for all: a shorter run is the longest one stopped at its T

A step depends on nothing after it, so the common runs are read off the longest; this is checked by
training it once more up to the shortest T and comparing every number of its log. Distinct tokens
and loss are recorded at every 1000 steps (in units of the report's), without keeping the weights,
and compared at equal steps and at equal summed learning rate. The report's averages come from logs
of 452 points, one in 5 steps, that is from steps 5 to 2260 of its 10,000 and 20,000; the same
average is shown for a log cut there.

Expected: no. Runs of unequal T differ at equal steps by their schedule alone; a cut log averages
another part of training for each T, mostly before the collapse is over.

    python -m experiments.training_length --preset quick
    python -m experiments.training_length --preset report --set data.corpus=text:books/*.txt
"""

import functools
import itertools
import json
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import charts, config, log, optim, program, run
from bitnet_jax.config import Config, Hyper, RunConfig
from experiments import common, compare, page, stats, sweep, trajectory

NAME = "training_length"
QUICK = (*common.SMALL, "run.steps=40", "run.eval_every=5")
KINDS = {"coupled": "report", "decoupled": "report_decoupled"}
TIMES = (1, 10, 20)  # lengths of the runs in units of run.steps
WARMUP = 0.375  # of run.steps: 375 of 1000
CUT = 452 * 5 / 1000  # where the report's logs of 10,000 and 20,000 steps end, in the same units
GRID = (*(k / 8 for k in range(1, 9)), 1.5, 2.0, 2.5, *range(3, 21))  # steps of comparisons
LOSS, MI, UNIQUE = "eval/loss", "collapse/mutual_information", "collapse/unique_tokens"
KEYS = {LOSS: "held-out loss", MI: "context MI", UNIQUE: "distinct"}
SPECS = {key: compare.SPECS[key] for key in KEYS}


def arms(request: common.Request) -> list[sweep.Arm]:
    """Both recipes at three lengths, every one with its own schedule."""
    base = request.cfg.run.steps
    hyper = {} if "warmup_steps" in request.hyper else {"warmup_steps": float(round(WARMUP * base))}
    return [
        sweep.Arm(
            f"{kind} {times * base}",
            recipe,
            hyper,
            run={
                "steps": times * base,
                "save_every": max(1, times * base // 4),
                "checkpoint_every": times * base,
            },
        )
        for times in TIMES
        for kind, recipe in KINDS.items()
    ]


def grid(base: int, run: RunConfig) -> list[int]:
    """Evaluated steps next to GRID's multiples of `base`, up to the last one of the run."""
    evaluated = [*range(run.eval_every, run.steps, run.eval_every), run.steps]
    wanted = [times * base for times in GRID if times * base <= run.steps]
    return sorted({min(evaluated, key=lambda step: abs(step - at)) for at in wanted})


def details(base: int, workdir: Path, cfg: Config, index: int) -> dict:
    """Fields of a row: numbers at the steps of `grid`, averages of a cut log, the early stop."""
    path = trajectory.read(workdir, index)
    logged = {
        row["step"]: row
        for row in _rows(workdir)
        if row["kind"] == "eval" and row["replicate"] == index
    }
    losses = [
        row["train/loss"]
        for row in _rows(workdir)
        if row["kind"] == "train" and row["replicate"] == index and row["step"] <= CUT * base
    ]
    steps, cut = grid(base, cfg.run), path.steps <= CUT * base
    out = {
        "base": base,
        "at": {"step": steps}
        | {key: [float(f"{logged[step][key]:.5g}") for step in steps] for key in KEYS},
        "cut_log": {
            "points": int(cut.sum()),
            "unique": float(f"{path.unique[cut].mean():.5g}"),
            "severe": int((path.unique[cut] < trajectory.SEVERE).sum()),
            "train_loss": float(f"{np.mean(losses):.5g}"),
        },
    }
    if cfg.run.steps == TIMES[-1] * base:
        out["stopped_early"] = {"step": base, "identical": stops_identically(workdir, base)[index]}
    return out


@functools.lru_cache(maxsize=1)
def _rows(workdir: Path) -> list[dict]:
    return log.read_rows(workdir / "metrics.jsonl")


@functools.cache
def stops_identically(workdir: Path, stop: int) -> list[bool]:
    """Train a finished run again, but only to step `stop`: are its logged numbers the same?"""
    cfg, members = config.from_json(json.loads((workdir / "config.json").read_text()))
    built = program.build(cfg, members)
    make_rows = run.row_maker(built)
    ends = [0, *(end for end in run.chunk_ends(cfg.run) if end <= stop)]
    again = []
    precision = "float32" if cfg.model.dtype == "float32" else "default"
    with jax.set_mesh(built.mesh), jax.default_matmul_precision(precision):
        state = built.init()
        for start, end in itertools.pairwise(ends):
            state, *numbers = built.train_chunk(state, built.batches(start, end))
            again += make_rows(end, *jax.device_get(numbers))
    first = [row for row in _rows(workdir) if 0 < row["step"] <= stop]
    return [_numbers(again, i) == _numbers(first, i) for i in range(len(members))]


def _numbers(rows, index):
    """The numbers of a replicate's rows; a verdict looks back at step 0, too."""
    return [
        {key: value for key, value in row.items() if isinstance(value, int | float)}
        for row in rows
        if row["replicate"] == index
    ]


def sum_lr(row: dict) -> np.ndarray:
    """Summed learning rate after 0 .. T steps of a row's run."""
    steps = np.arange(row["steps"] + 1)
    hyper = Hyper(**row["hyper"])
    return np.cumsum(np.asarray(optim.learning_rate(hyper, steps, RunConfig(row["steps"])), float))


def lengths(rows: list[dict]) -> list[int]:
    """The three lengths of the runs, ascending."""
    return [times * max(row["base"] for row in rows) for times in TIMES]


def at_step(rows: list[dict], arm: str, step: int, key: str) -> dict[int, float]:
    """A number of each seed at a step of `grid`."""
    return {
        row["seed"]: row["at"][key][row["at"]["step"].index(step)]
        for row in rows
        if row["arm"] == arm
    }


def at_sum_lr(rows: list[dict], arm: str, total: float, key: str) -> dict[int, float]:
    """A number of each seed where the summed learning rate is `total`, between evaluations."""
    return {
        row["seed"]: float(np.interp(total, sum_lr(row)[row["curve"]["step"]], row["curve"][key]))
        for row in rows
        if row["arm"] == arm
    }


def field(rows: list[dict], arm: str, name: str) -> dict[int, float]:
    """A field of each seed's row, or of a section of it for `cut_log/NAME` and `final/KEY`."""
    section, _, inner = name.partition("/")
    return {
        row["seed"]: row[section][inner] if inner else row[section]
        for row in rows
        if row["arm"] == arm
    }


def parting(rows: list[dict], arm: str, control: str, key: str) -> tuple[int | None, int | None]:
    """Last step to which two runs are equal in all seeds; first whose interval excludes 0.

    Paired within seeds, over the common steps of `grid`; None where there is no such step. One seed
    has no interval, hence no first step.
    """
    steps = [
        set.intersection(*(set(r["at"]["step"]) for r in rows if r["arm"] == name))
        for name in (arm, control)
    ]
    equal, first = None, None
    together = True
    for step in sorted(steps[0] & steps[1]):
        a, b = (at_step(rows, name, step, key) for name in (arm, control))
        together = together and a == b
        if together:
            equal = step
        elif first is None and stats.paired(a, b).effect:
            first = step
    return equal, first


def analyse(rows: list[dict]) -> page.Study:
    """Lengths against each other at their ends, at equal steps and at equal summed rate."""
    n, (short, mid, long) = compare.n_seeds(rows), lengths(rows)
    rows = [row for row in rows if row["base"] == short]
    checked = [row["stopped_early"]["identical"] for row in rows if "stopped_early" in row]
    told, concluded = [], []
    unigram = rows[0]["references"]["unigram"]["loss"]
    for kind in KINDS:
        ends = {
            t: compare.difference(rows, f"{kind} {mid}", f"{kind} {t}", LOSS) for t in (short, long)
        }
        counts = [
            stats.paired(field(rows, f"{kind} {mid}", f), field(rows, f"{kind} {long}", f))
            for f in ("unique_stage1", "cut_log/unique")
        ]
        told.append(
            f"{kind}: held-out loss of {mid} steps against {short} {stats.effect_text(ends[short])}"
            f", against {long} {stats.effect_text(ends[long])}; distinct tokens of {mid} against "
            f"{long}, stage-1 average {stats.effect_text(counts[0], '+.1f')}, cut log "
            f"{stats.effect_text(counts[1], '+.1f')}"
        )
        told.append(f"{kind}, {_along(rows, kind)}")
        mine = [r["final"][LOSS] for r in rows if r["arm"].startswith(f"{kind} ")]
        above = sum(loss > unigram for loss in mine)
        concluded.append(
            f"{kind}: {sweet_spot(ends[short], ends[long], mid)}, {above} of {len(mine)} runs end "
            "above the unigram's"
        )
    told.append(
        f"the longest run trained again to step {short} has the same log in {sum(checked)} of "
        f"{len(checked)} runs"
    )
    told.append(_diversity(rows, short, long))
    names = [(f"{k} {a}", f"{k} {b}") for k in KINDS for a, b in ((mid, short), (mid, long))]
    return page.Study(
        arms=f"{short}, {mid} and {long} steps, coupled and decoupled; schedule tied to the length "
        "or common",
        n=n,
        result="; ".join(told),
        conclusion="; ".join(concluded),
        tables=[
            statistics_table(rows),
            compare.arm_table(rows),
            compare.difference_table(rows, names, "Lengths at their last steps"),
            schedule_table(rows),
            parting_table(rows),
            sum_lr_table(rows),
            *(checkpoint_table(rows, kind) for kind in KINDS),
        ],
        figures=[
            (caption, charts.panels_svg([panel]))
            for caption, drawn in panels(rows)
            for panel in drawn
        ],
    )


def sweet_spot(against_short: stats.Interval, against_long: stats.Interval, mid: int) -> str:
    """What the final losses of the middle length, minus those of the others, say about it."""
    if against_short.high < 0 and against_long.high < 0:
        return f"{mid} steps end with the lowest held-out loss"
    if against_long.low > 0:
        return f"no sweet spot at {mid} steps: the longest run ends with a lower loss"
    if against_short.low > 0:
        return f"no sweet spot at {mid} steps: the shortest run ends with a lower loss"
    unclear = against_long if against_long.low <= 0 <= against_long.high else against_short
    return f"no sweet spot seen at {mid} steps ({stats.effect_text(unclear)})"


def _along(rows, kind):
    """The middle length against the longest at the same step and at the same summed rate."""
    _, mid, long = lengths(rows)
    total = sum_lr(next(row for row in rows if row["arm"] == f"{kind} {mid}"))[-1]
    names = [f"{kind} {t}" for t in (mid, long)]
    step = stats.paired(*(at_step(rows, name, mid, LOSS) for name in names))
    rate = stats.paired(*(at_sum_lr(rows, name, total, LOSS) for name in names))
    return (
        f"{mid} against {long} steps, both at step {mid} {stats.effect_text(step)}, both at the "
        f"same summed learning rate {stats.effect_text(rate)}"
    )


def _diversity(rows, short, long):
    """Whether longer runs look more diverse, by the report's averages and by equal steps."""
    whole = {
        kind: stats.paired(*(field(rows, f"{kind} {t}", "unique_stage1") for t in (long, short)))
        for kind in KINDS
    }
    cut = {
        kind: stats.paired(*(field(rows, f"{kind} {t}", "cut_log/unique") for t in (long, short)))
        for kind in KINDS
    }
    same = {
        kind: stats.paired(*(at_step(rows, f"{kind} {t}", short, UNIQUE) for t in (long, short)))
        for kind in KINDS
    }
    return "; ".join(
        f"{kind}, distinct tokens of {long} against {short} steps: stage-1 average "
        f"{stats.effect_text(whole[kind], '+.1f')}, cut log "
        f"{stats.effect_text(cut[kind], '+.1f')}, both at step {short} "
        f"{stats.effect_text(same[kind], '+.1f')}"
        for kind in KINDS
    )


def statistics_table(rows: list[dict]) -> page.Table:
    """The report's own numbers of every run beside loss and mutual information."""
    heads = ["run", "stage 1", "stage 2", "severe", "cut log", "cut log: severe"]
    heads += ["cut log: train loss", *(f"{name} at T" for name in KEYS.values())]
    lines = []
    for arm, members in compare.by_arm(rows).items():

        def told(name, spec, arm=arm, members=members):
            return stats.interval(field(members, arm, name).values()).text(spec)

        severe = np.mean([r["severe"] / r["evaluations"] for r in members])
        cut_severe = np.mean([r["cut_log"]["severe"] / r["cut_log"]["points"] for r in members])
        line = [arm, told("unique_stage1", ".1f"), told("unique_stage2", ".1f"), f"{severe:.1%}"]
        line += [told("cut_log/unique", ".1f"), f"{cut_severe:.1%}"]
        line += [told("cut_log/train_loss", ".2f"), *(told(f"final/{k}", SPECS[k]) for k in KEYS)]
        lines.append(line)
    note = (
        f"Averages of distinct tokens, n = {compare.n_seeds(rows)} seeds; severe: fewer than "
        f"{trajectory.SEVERE}. The cut log ends at step {int(CUT * rows[0]['base'])}, as the "
        "report's did at 2260: all of the shortest run, a small part of the longest."
    )
    return page.Table("The report's statistics", heads, lines, note)


def schedule_table(rows: list[dict]) -> page.Table:
    """Schedule tied to T against the longest run's, at the last step of the shorter run."""
    short, mid, long = lengths(rows)
    lines = []
    for kind, t in itertools.product(KINDS, (short, mid)):
        line = [f"{kind}, step {t}"]
        for key in KEYS:
            tied, common_ = (at_step(rows, f"{kind} {x}", t, key) for x in (t, long))
            line.append(stats.effect_text(stats.paired(tied, common_), "+" + SPECS[key]))
        lines.append(line)
    note = (
        f"Same seeds, batches and step: tied minus common (the run of {long} steps stopped there)."
    )
    return page.Table("Tied against common schedule", ["", *KEYS.values()], lines, note)


def parting_table(rows: list[dict]) -> page.Table:
    """Where runs of unequal length part at equal steps."""
    short, mid, long = lengths(rows)
    lines = []
    for kind, (a, b) in itertools.product(KINDS, ((short, long), (mid, long))):
        line = [f"{kind} {a} and {b}"]
        for key in KEYS:
            equal, first = parting(rows, f"{kind} {a}", f"{kind} {b}", key)
            line += [str(equal or "none"), str(first or "no effect seen")]
        lines.append(line)
    heads = [head for name in KEYS.values() for head in (f"{name}: equal until", "parts at")]
    warmup = rows[0]["hyper"]["warmup_steps"]
    note = (
        f"Equal: to 5 digits in all seeds, at the compared steps. Parts: first step whose paired "
        f"95 % interval (n = {compare.n_seeds(rows)}) excludes 0; looking at many steps is not "
        f"corrected for. Learning rates are the same up to the end of warm-up, step {warmup:.0f}."
    )
    return page.Table("At equal steps", ["runs", *heads], lines, note)


def sum_lr_table(rows: list[dict]) -> page.Table:
    """Shorter against longest run where both have spent the same summed learning rate."""
    short, mid, long = lengths(rows)
    lines = []
    for kind, t, share in itertools.product(KINDS, (short, mid), (0.5, 1.0)):
        first = next(row for row in rows if row["arm"] == f"{kind} {t}")
        total = share * sum_lr(first)[-1]
        line = [f"{kind} {t} - {long}", f"{total:.3f}"]
        for key in KEYS:
            a, b = (at_sum_lr(rows, f"{kind} {x}", total, key) for x in (t, long))
            line.append(stats.effect_text(stats.paired(a, b), "+" + SPECS[key]))
        lines.append(line)
    note = "At half and all of the shorter run's sum; linear between evaluations."
    heads = ["runs", "summed learning rate", *KEYS.values()]
    return page.Table("At equal summed learning rate", heads, lines, note)


def checkpoint_table(rows: list[dict], kind: str) -> page.Table:
    """Distinct tokens and loss of the longer runs at every unit of the report's 1000 steps."""
    base, mid, long = lengths(rows)
    lines = []
    for step in grid_of(rows, f"{kind} {long}"):
        if step < base:
            continue
        line = [str(step)]
        for t in (mid, long):
            for key in (UNIQUE, LOSS):
                known = step <= t
                found = at_step(rows, f"{kind} {t}", step, key).values() if known else ()
                line.append(stats.interval(found).text(SPECS[key]) if known else "")
        lines.append(line)
    heads = [f"{name}, T = {t}" for t in (mid, long) for name in ("distinct", "loss")]
    return page.Table(f"Along the longer runs, {kind}", ["step", *heads], lines)


def grid_of(rows: list[dict], arm: str) -> list[int]:
    """Steps of `grid` of an arm."""
    return next(row["at"]["step"] for row in rows if row["arm"] == arm)


def panels(rows: list[dict]) -> list[tuple[str, list[charts.Panel]]]:
    """Loss and distinct tokens against the step, and loss against the summed learning rate."""
    reference = rows[0]["references"]
    lines = tuple((name, reference[name]["loss"]) for name in ("uniform", "unigram", "bigram"))
    marks = (
        ("text", reference["targets"]["distinct"]),
        ("bigram", reference["bigram"]["distinct"]),
    )
    out = []
    for kind in KINDS:
        members = [row for row in rows if row["arm"].startswith(f"{kind} ")]

        def panel(key, title, ylabel, references, by_rate=False, members=members):
            series = []
            for r in members:
                x = np.array(r["curve"]["step"])
                x = sum_lr(r)[x] / r["hyper"]["lr_peak"] if by_rate else x
                series.append(charts.Series(f"T = {r['steps']}", x.tolist(), r["curve"][key]))
            return charts.Panel(series, title, ylabel, None, references)

        drawn = [
            panel(LOSS, f"Held-out loss, {kind}", "nats per token", lines),
            panel(UNIQUE, f"Distinct predictions, {kind}", "tokens", marks),
            panel(LOSS, f"Loss by summed rate, {kind}", "nats per token", lines, True),
        ]
        caption = (
            "One line per seed. By summed rate, a step counts as its learning rate's share of "
            "the peak rate."
        )
        out.append((caption, drawn))
    return out


def body(request: common.Request) -> None:
    extra = functools.partial(details, request.cfg.run.steps)
    rows = sweep.train_arms(NAME, request, arms(request), extra=extra)
    common.conclude(NAME, __doc__, request.workdir, rows, analyse)


if __name__ == "__main__":
    common.main(__doc__, NAME, "quick", body, seeds="0-2", quick=QUICK, sweep=True)
