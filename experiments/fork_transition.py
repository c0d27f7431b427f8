"""Does the transition to stage 2 trigger the collapse?

The report's sixth recommendation. The report's recipe (coupled decay) and the same with decoupled
decay train once per seed to the last step; the checkpoint at the stage boundary T/2 is kept. From
it every arm continues to T on the same batches:

    stage 1 continued    learning rate held at its value at the end of stage 1, decay of stage 1
    stage 2              learning rate and decay of stage 2
    stage-2 LR only      learning rate of stage 2, decay of stage 1
    stage-2 decay only   learning rate held, decay of stage 2
    stage 2, Adam reset  stage 2 with both moments of Adam and its bias correction from 0

All arms run the program of the run that was not stopped, with other numbers as its data, so arm
"stage 2" must repeat that run bit by bit; the command fails where it does not. The log of an arm
begins with the rows of stage 1. n seeds give a sign-flip p of 2^(1-n) at best: 6 seeds for
p < 0.05; the headline takes 10. Checkpoints are written at the boundary and at the end; those of
the runs that were not stopped stay in the workdir.

Expected: no. Coupled decay collapses in stage 1, and goes on without a transition; decoupled, stage
2 lowers the loss, since its learning rate falls.

    python -m experiments.fork_transition --preset quick
    python -m experiments.fork_transition --preset report --seeds 0-9 --set run.steps=10000 \
        --set run.eval_every=50 --set data.corpus=text:books/*.txt
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import charts, checkpoint, config, log, run, train
from bitnet_jax.config import Config, Hyper, UserError
from experiments import common, compare, page, results, stats, sweep

NAME = "fork_transition"
QUICK = (*common.SMALL, "run.eval_every=15")  # divides T/2: one length of chunk to compile
KINDS = {"coupled": "report", "decoupled": "report_decoupled"}
UNFORKED = "not stopped"
CONTINUED, FULL, RESET = "stage 1 continued", "stage 2", "stage 2, Adam reset"
LR_ONLY, DECAY_ONLY = "stage-2 LR only", "stage-2 decay only"
FORKS = (FULL, CONTINUED, LR_ONLY, DECAY_ONLY, RESET)
LOSS, MI = "eval/loss", "collapse/mutual_information"
BOUNDARY_KEYS = (LOSS, "collapse/entropy", MI, "collapse/logit_std", "collapse/unique_tokens")


def numbers(fork: str, hyper: Hyper) -> Hyper:
    """Hyper-parameters of an arm; they differ from the recipe's in stage 2 only."""
    held = {"lr_stage2_start": hyper.lr_stage1_end, "lr_final": hyper.lr_stage1_end}
    same = {
        f"{kind}_2": getattr(hyper, f"{kind}_1") for kind in ("coupled", "decoupled", "unscaled")
    }
    changed = {CONTINUED: held | same, LR_ONLY: same, DECAY_ONLY: held}
    return hyper.replace(**changed.get(fork, {}))


def at_boundary(workdir: Path, index: int) -> dict[str, float]:
    """The evaluation of a replicate at the last step of stage 1."""
    saved, _ = config.from_json(json.loads((workdir / "config.json").read_text()))
    for row in log.read_rows(workdir / "metrics.jsonl"):
        if (row["step"], row["kind"], row["replicate"]) == (saved.run.boundary, "eval", index):
            return {key: float(f"{row[key]:.5g}") for key in BOUNDARY_KEYS}
    raise UserError(f"{workdir}: no evaluation at step {saved.run.boundary}")


@functools.cache
def fingerprints(workdir: Path) -> list[dict[str, str]]:
    """Per replicate, hashes of the numbers logged in stage 2 and of the state at the last step."""
    saved, members = config.from_json(json.loads((workdir / "config.json").read_text()))
    one = jax.eval_shape(lambda: train.init_state(saved, members[0].hyper, 0))
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(members), *x.shape), x.dtype), one)
    leaves = jax.tree.leaves(checkpoint.restore(workdir, saved.run.steps, stacked))
    logged = [
        row for row in log.read_rows(workdir / "metrics.jsonl") if row["step"] > saved.run.boundary
    ]
    out = []
    for i in range(len(members)):
        mine = [row for row in logged if row["replicate"] == i]
        state = hashlib.sha256(b"".join(np.asarray(leaf[i]).tobytes() for leaf in leaves))
        rows = hashlib.sha256(json.dumps(mine, sort_keys=True).encode())
        out.append({"rows": rows.hexdigest()[:16], "state": state.hexdigest()[:16]})
    return out


def details(workdir: Path, cfg: Config, index: int) -> dict:
    """Fields of a row of a run whose last checkpoint is still there."""
    return {
        "boundary": at_boundary(workdir, index),
        "fingerprint": fingerprints(workdir)[index],
    }


def train_fork(request: common.Request, source: Path, fork: str) -> list[dict]:
    """Continue all replicates of `source` from its boundary as one arm; rows as of a sweep.

    Raises UserError when the checkpoint of the boundary is not there.
    """
    saved, members = config.from_json(json.loads((source / "config.json").read_text()))
    step = saved.run.boundary
    replicates = [
        dataclasses.replace(
            rep, name=rep.name.replace(UNFORKED, fork), hyper=numbers(fork, rep.hyper)
        )
        for rep in members
    ]
    workdir = request.workdir / config.run_id(NAME, saved, replicates)
    finished = workdir / "rows.json"
    if not finished.exists():
        print(f"{NAME}: {', '.join(dict.fromkeys(rep.name for rep in replicates))}")
        if step not in checkpoint.kept_steps(source):
            raise UserError(
                f"{source}: no checkpoint of the stage boundary (step {step}); remove this folder "
                "to train it again"
            )
        begin_log(workdir, source, step)
        forked = dataclasses.replace(
            saved.run, init=f"fork:{source}@{step}", reset_optimizer=fork == RESET
        )
        cfg = dataclasses.replace(saved, run=forked)
        run.run(cfg, replicates, workdir, resume=True)
        rows = [
            results.summarise(workdir, i) | {"preset": request.preset} | details(workdir, cfg, i)
            for i in range(len(replicates))
        ]
        log.write_json(finished, rows)
        shutil.rmtree(workdir / "checkpoints")
    return json.loads(finished.read_text())


def begin_log(workdir: Path, source: Path, step: int) -> None:
    """Start a fork's metrics.jsonl with the rows of its source up to `step`."""
    path = workdir / "metrics.jsonl"
    if path.exists():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    rows = [row for row in log.read_rows(source / "metrics.jsonl") if row["step"] <= step]
    draft = workdir / "metrics.jsonl.tmp"
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(draft, path)


def differing(rows: list[dict]) -> list[str]:
    """Arms and seeds whose restored stage 2 is not bit-identical to the run that was not stopped.

    Rows of other arms are ignored. Raises KeyError for a restored run without its counterpart.
    """
    prints = {(row["arm"], row["seed"]): row["fingerprint"] for row in rows}
    return [
        f"{kind}, seed {seed}"
        for kind in KINDS
        for arm, seed in prints
        if arm == f"{kind} {FULL}" and prints[arm, seed] != prints[f"{kind} {UNFORKED}", seed]
    ]


def boundary_values(rows: list[dict], kind: str, key: str) -> dict[int, float]:
    """A number of each seed at the boundary."""
    return {r["seed"]: r["boundary"][key] for r in rows if r["arm"] == f"{kind} {UNFORKED}"}


def analyse(rows: list[dict]) -> page.Study:
    """Effects of the transition and of its parts, paired within seeds."""
    n, wrong = compare.n_seeds(rows), differing(rows)
    n_checked = sum(row["arm"].endswith(UNFORKED) for row in rows)
    shown = [row for row in rows if not row["arm"].endswith(UNFORKED)]
    before = stats.paired(*(boundary_values(rows, kind, LOSS) for kind in KINDS))
    alone = compare.difference(rows, *(f"{kind} {CONTINUED}" for kind in KINDS), LOSS)
    effects = {
        kind: {
            fork: compare.difference(rows, f"{kind} {fork}", f"{kind} {CONTINUED}", LOSS)
            for fork in FORKS
            if fork != CONTINUED
        }
        for kind in KINDS
    }
    parts = "; ".join(
        f"{kind}: " + ", ".join(f"{fork} {stats.effect_text(d)}" for fork, d in arms.items())
        for kind, arms in effects.items()
    )
    identical = f"{n_checked - len(wrong)} of {n_checked}"
    result = (
        f"held-out loss at T against stage 1 continued, {parts}; coupled against decoupled at the "
        f"boundary {stats.effect_text(before)}, at T with stage 1 continued "
        f"{stats.effect_text(alone)}; restored run bit-identical to the one not stopped: "
        f"{identical}"
    )
    against = [(f"{k} {f}", f"{k} {c}") for c in (CONTINUED, FULL) for k in KINDS for f in FORKS]
    return page.Study(
        arms=f"{', '.join(FORKS)}, each with coupled and decoupled decay",
        n=n,
        result=result,
        conclusion=_conclusion(rows, {kind: arms[FULL] for kind, arms in effects.items()}, before),
        tables=[
            boundary_table(rows),
            compare.arm_table(shown),
            *(
                compare.difference_table(
                    shown,
                    [(a, b) for a, b in against if a != b and b.endswith(f" {control}")],
                    f"Against {control}",
                )
                for control in (CONTINUED, FULL)
            ),
            test_table(shown),
        ],
        figures=[(caption, charts.panels_svg(drawn)) for caption, drawn in panels(shown)],
    )


def excess(rows: list[dict], arm: str) -> stats.Interval:
    """Held-out loss of an arm at T above the unigram's, in nats; below zero it learned more."""
    unigram = rows[0]["references"]["unigram"]["loss"]
    return stats.interval(loss - unigram for loss in compare.values(rows, arm, LOSS).values())


def judge(with_: stats.Interval, without: stats.Interval) -> str:
    """Whether the transition is what collapses a recipe, from `excess` with stage 2 and without."""
    told = f"{with_.text('+.2f')} with it, {without.text('+.2f')} without"
    if with_.low > 0 and without.low > 0:
        return f"above the unigram's loss with the transition or not, so it is no trigger ({told})"
    if with_.low > 0 and without.high < 0:
        return f"above the unigram's loss only with the transition, which triggers it ({told})"
    if with_.high < 0 and without.low > 0:
        return f"above the unigram's loss only without the transition, which ends it ({told})"
    if with_.high < 0 and without.high < 0:
        return f"below the unigram's loss with the transition or not: no collapse ({told})"
    return f"loss above the unigram's cannot be judged with n={with_.n} ({told})"


def _conclusion(rows, transition, before):
    above = {k: [excess(rows, f"{k} {fork}") for fork in (FULL, CONTINUED)] for k in KINDS}
    healthy, _ = above["decoupled"]
    if healthy.high < 0:
        told = [f"{kind}: {judge(*above[kind])}" for kind in KINDS]
    else:
        told = [
            "a collapse cannot be told from a young model, since the decoupled recipe is not below "
            f"the unigram's loss either ({healthy.text('+.2f')} above, n={healthy.n})"
        ]
    told += [
        f"effect of the transition on the {kind} recipe's loss: {stats.effect_text(effect)}"
        for kind, effect in transition.items()
    ]
    told.append(f"of coupling, before the transition: {stats.effect_text(before)}")
    return "; ".join(told)


def boundary_table(rows: list[dict]) -> page.Table:
    """Where the forks start."""
    keys = [m for m in compare.METRICS if m[0] in BOUNDARY_KEYS]
    lines = [
        [kind, *(stats.interval(boundary_values(rows, kind, k).values()).text(s)
                 for k, _, s, _ in keys)]
        for kind in KINDS
    ]  # fmt: skip
    gaps = (
        stats.paired(*(boundary_values(rows, kind, k) for kind in KINDS)).text("+" + s)
        for k, _, s, _ in keys
    )
    lines.append(["coupled - decoupled", *gaps])
    note = (
        f"Mean [95 % t interval] over n = {compare.n_seeds(rows)} seeds; the unigram's held-out "
        f"loss is {rows[0]['references']['unigram']['loss']:.3f}."
    )
    title = f"At the stage boundary, step {rows[0]['steps'] // 2}"
    return page.Table(title, ["recipe", *(m[1] for m in keys)], lines, note)


def test_table(rows: list[dict]) -> page.Table:
    """Sign-flip tests of the transition: two recipes, loss and mutual information."""
    n, tests = compare.n_seeds(rows), []
    for kind in KINDS:
        for key, name in ((LOSS, "held-out loss"), (MI, "context MI")):
            a, b = (compare.values(rows, f"{kind} {fork}", key) for fork in (FULL, CONTINUED))
            d = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
            tests.append((f"{kind}, {name}", stats.sign_flip_p(d) if n > 1 else 1.0))
    adjusted = stats.holm([p for _, p in tests])
    lines = [[name, f"{p:.3g}", f"{q:.3g}"] for (name, p), q in zip(tests, adjusted, strict=True)]
    note = (
        f"Two-sided; the smallest p that n = {n} seeds can give is {min(1.0, 2.0 ** (1 - n)):.3g}."
    )
    title = f"{FULL} against {CONTINUED}: exact sign-flip tests"
    return page.Table(title, ["", "p", "p after Holm"], lines, note)


def panels(rows: list[dict]) -> list[tuple[str, list[charts.Panel]]]:
    """Held-out loss and mutual information of all arms of a recipe against the step."""
    reference, boundary = rows[0]["references"], rows[0]["steps"] // 2
    lines = tuple((name, reference[name]["loss"]) for name in ("uniform", "unigram", "bigram"))
    out = []
    for kind in KINDS:
        members = [row for row in rows if row["arm"].startswith(f"{kind} ")]

        def panel(key, title, marks, members=members):
            series = [
                charts.Series(r["arm"].partition(" ")[2], r["curve"]["step"], r["curve"][key])
                for r in members
            ]
            return charts.Panel(series, title, "nats per token", boundary, marks)

        drawn = [
            panel(LOSS, f"Held-out loss, {kind}", lines),
            panel(MI, f"Context mutual information, {kind}", ()),
        ]
        out.append((f"One line per seed; arms part at the boundary, {kind} decay.", drawn))
    return out


def body(request: common.Request) -> None:
    steps = request.cfg.run.steps
    saved = {"save_every": steps // 2, "checkpoint_every": steps}  # the boundary and the end
    unforked = [sweep.Arm(f"{k} {UNFORKED}", recipe, run=saved) for k, recipe in KINDS.items()]
    rows = sweep.train_arms(NAME, request, unforked, extra=details, keep_checkpoints=True)
    sources = dict.fromkeys(request.workdir / row["id"].rpartition("/")[0] for row in rows)
    for fork in FORKS:
        for source in sources:
            rows += train_fork(request, source, fork)
        if wrong := differing(rows):
            raise run.TrainingFailed(
                f"the run restored at the boundary differs from the one not stopped: {wrong[0]}"
            )
    common.conclude(NAME, __doc__, request.workdir, rows, analyse)


if __name__ == "__main__":
    common.main(__doc__, NAME, "quick", body, seeds="0-2", quick=QUICK, sweep=True)
