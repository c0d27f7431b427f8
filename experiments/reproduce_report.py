"""Does the report's recipe, to the letter, give the report's numbers?

Its model, data order, optimiser and tracking (every 5 steps, on the first training batch) at 1000,
10000 and 20000 steps, n seeds. Shown: its Section 5 tables and milestones with ours beside them,
and the ledger of its numeric claims, each recomputed. A claim is "reproduced" when the reported
number lies within the 95 % prediction interval for one more run of ours.

`--preset quick` is a smaller model on shuffled text at 200, 2000 and 4000 steps: the pattern can
agree with the report, its numbers cannot. `--lengths 1` trains the shortest run only; rows of
several commands are analysed together by `make report`.

    python -m experiments.reproduce_report --preset quick
    python -m experiments.reproduce_report --preset report --seeds 0-4 --set data.tokenizer=gpt2 \
        --set data.corpus=text:books.train.txt.xz --set data.validation=text:books.validation.txt.xz
"""

import functools
import json
from pathlib import Path

import numpy as np

from bitnet_jax import charts, log, shrink
from bitnet_jax.config import Config, Hyper, RunConfig, UserError
from experiments import common, compare, ledger, page, stats, sweep, trajectory
from experiments.weight_bounds import count_large

NAME = "reproduce_report"
QUICK = (  # shuffled: in order, 200 steps of a standard library see the modules with a and b
    *common.SMALL,
    "data.track=first_batch",
    "data.score_last=false",
    "run.steps=200",
    "run.eval_every=10",
)
LENGTHS = "1,10,20"  # in multiples of run.steps: 1000, 10000 and 20000 at full size
PARTIAL = 2260  # where the logs of the report's longer runs end: 452 evaluations, every 5 steps


def arms(request: common.Request) -> list[sweep.Arm]:
    """The report's recipe at each length; raises UserError as `check_tracking` does."""
    check_tracking(request.cfg)
    base = request.cfg.run.steps
    return [
        sweep.Arm(f"{k * base} steps", "report", run={"steps": k * base}) for k in request.lengths
    ]


def check_tracking(cfg: Config) -> None:
    """Raise UserError unless the evaluations track the first training batch, as the report's do."""
    if cfg.data.track != "first_batch":
        raise UserError(
            f"data.track={cfg.data.track}: the report tracks its first training batch; use "
            "first_batch"
        )


def numbers(base: int, workdir: Path, cfg: Config, index: int) -> dict:
    """What the report tells of a run, for one replicate of a study whose shortest has `base`.

    `transit` is the first step below the unigram's loss, and `severe_after_transit` counts the
    evaluations with fewer than 3 distinct predictions after it.
    """
    path, run = trajectory.read(workdir, index), cfg.run
    rows = [r for r in log.read_rows(workdir / "metrics.jsonl") if r["replicate"] == index]
    losses = [r["train/loss"] for r in rows if r["kind"] == "train"]
    first = next(r for r in rows if r["kind"] == "eval" and r["step"] == 0)
    late = [r for r in rows if r["kind"] == "eval" and r["step"] > run.steps * 0.3]
    saved = json.loads((workdir / "config.json").read_text())
    summary = json.loads((workdir / "summary.json").read_text())
    transit = trajectory.transit(path, saved["references"]["unigram"]["loss"])
    after = path.steps > (run.steps if transit is None else transit)
    episodes = trajectory.episodes(path)
    cut = path.steps <= PARTIAL
    severe = trajectory.severe_rate(path, run)
    found = {
        "evaluations": len(path.steps),
        "unique_min": int(path.unique.min()),
        "unique_max": int(path.unique.max()),
        "unique_mean": float(path.unique.mean()),
        "unique_stage1": trajectory.stage_average(path, run, 1),
        "unique_stage2": trajectory.stage_average(path, run, 2),
        "unique_final": int(path.unique[-1]),
        "severe_share": severe.count / severe.n,
        "first_severe": trajectory.first_severe(path),
        "first_complete": trajectory.first_complete(path),
        "transit": transit,
        "severe_after_transit": int((path.unique[after] < trajectory.SEVERE).sum()),
        "recoveries": sum(e.recovery is not None for e in episodes),
        "count_recoveries": sum(e.count_only is not None for e in episodes),
        "loss_min": min(losses),
        "loss_max": max(losses),
        "loss_mean": sum(losses) / len(losses),
        "loss_final": losses[-1],
        "partial_unique_mean": float(path.unique[cut].mean()),
        "partial_severe_share": float((path.unique[cut] < trajectory.SEVERE).mean()),
        "partial_loss_mean": float(np.mean(losses[: int(cut.sum())])),
        "start_loss": first["track/loss"],
        "start_entropy": first["track/entropy"],
        "start_logit_std": first["collapse/logit_std"],
        "late_entropy": sum(r["track/entropy"] for r in late) / len(late),
        "late_logit_std": sum(r["collapse/logit_std"] for r in late) / len(late),
    }
    rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in found.items()}
    rounded["milestones"] = milestones(base, run, rows)
    sample = summary["replicates"][index]["continuations"][0]
    large = count_large(workdir, cfg, index)
    return {"base": base, "numbers": rounded, "sample": sample} | large


def milestones(base: int, run: RunConfig, rows: list[dict]) -> dict[str, dict]:
    """Evaluations at the report's milestones of this length, keyed by the report's step.

    In a study whose shortest run has `base` steps instead of 1000 they are at the same share of the
    run, and each is the nearest evaluation after step 0.
    """
    length = run.steps * ledger.FULL[0] // base
    evals = {row["step"]: row for row in rows if row["kind"] == "eval"}
    found = {}
    for told in ledger.MILESTONES.get(length, ()):
        every = run.eval_every
        step = min(max(every, round(told * run.steps / length / every) * every), run.steps)
        at = evals[step]
        found[str(told)] = {
            "step": step,
            "unique": at["collapse/unique_tokens"],
            "loss": float(f"{at['eval/loss']:.5g}"),
            "logit_std": float(f"{at['collapse/logit_std']:.3g}"),
        }
    return found


def analyse(rows: list[dict]) -> page.Study:
    """Section 5 beside ours, the milestones, and the ledger."""
    runs = by_length(rows)
    n = compare.n_seeds(rows)
    entries = ledger.recompute(runs)
    statuses = [entry.status.partition(":")[0] for entry in entries]
    counts = {s: statuses.count(s) for s in dict.fromkeys(statuses)}
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    unigram = rows[0]["references"]["unigram"]["loss"]
    there = [run for run in runs if run]
    final = [stats.interval(r["final"]["eval/loss"] for r in run) for run in there]
    collapsed = sum(r["final"]["eval/loss"] > unigram for r in rows)
    lengths = ", ".join(f"{run[0]['steps']} steps (n={len(run)})" for run in there)
    result = (
        f"held-out loss after {lengths}: {', '.join(f.text() for f in final)} (unigram "
        f"{unigram:.2f}); ledger: {told}"
    )
    conclusion = (
        f"{collapsed} of {len(rows)} runs of the report's recipe end above the unigram's loss "
        f"({unigram:.2f}): {', '.join(f.text() for f in final)} after {lengths}; of the "
        f"report's {len(entries)} numeric claims: {told}"
    )
    recoveries = [e for e in entries if e.claim.startswith(ledger.RECOVERY)]
    if recoveries and all(e.status.startswith(ledger.EXPLAINED) for e in recoveries):
        conclusion += (
            '; the longer runs\' "recovery" at step 1000 counts near ties of logits that are gone ('
            f"{'; '.join(e.recomputed for e in recoveries)})"
        )
    return page.Study(
        arms=f"the report's recipe for {lengths}",
        n=n,
        result=result,
        conclusion=conclusion,
        tables=[
            section5(runs),
            milestone_table(runs),
            theory(runs),
            ledger.table(entries),
            compare.arm_table(rows),
        ],
        figures=[(
            "Distinct predictions, loss and entropy against the share of the run that is done.",
            charts.panels_svg([panel]),
        ) for panel in panels(runs)],
    )  # fmt: skip


def by_length(rows: list[dict]) -> list[list[dict]]:
    """The rows of each of the three lengths, shortest first; empty where there are none."""
    base = rows[0]["base"]
    return [[r for r in rows if r["steps"] == int(k) * base] for k in LENGTHS.split(",")]


def section5(runs: list[list[dict]]) -> page.Table:
    """The report's Section 5, with ours beside it."""
    lines = []
    for key, label, spec, reported in ledger.SECTION5:
        cells = []
        for run, value in zip(runs, reported, strict=True):
            numbers = [r["numbers"][key] for r in run]
            cells += [value, stats.interval(numbers).text(spec) if run else "not run"]
        lines.append([label, *cells])
    columns = [""]
    for length, run in zip(ledger.FULL, runs, strict=True):
        ours = f"ours, {run[0]['steps']} (n={len(run)})" if run else "ours"
        columns += [f"report, {length}", ours]
    note = (
        "Ours: mean [95 % t interval] over seeds of the whole log. The report's logs of its longer "
        "runs hold 452 evaluations, which at its 5 steps each end at step 2260; rows named first "
        "452 average ours up to there."
    )
    return page.Table("The report's Section 5", columns, lines, note)


def milestone_table(runs: list[list[dict]]) -> page.Table:
    """The report's counts along each run, and our count, loss and spread of the logits there."""
    lines = []
    for length, run in zip(ledger.FULL, runs, strict=True):
        for told, reported in ledger.MILESTONES[length].items() if run else ():
            at = [row["numbers"]["milestones"][str(told)] for row in run]
            cells = [
                stats.interval(m[key] for m in at).text(spec)
                for key, spec in (("unique", ".0f"), ("loss", ".2f"), ("logit_std", ".4f"))
            ]
            lines.append([f"{run[0]['steps']}", str(at[0]["step"]), str(reported), *cells])
    reference = next(run for run in runs if run)[0]["references"]
    note = (
        f"Ours: mean [95 % t interval] over seeds. The uniform predictor's loss is ln V = "
        f"{reference['uniform']['loss']:.2f}: where ours is there and the logits have no spread, "
        "the count is that of near ties, and says nothing about what the model knows."
    )
    columns = ["run of", "step", "the report: distinct", "distinct", "held-out loss",
               "spread of the logits"]  # fmt: skip
    return page.Table("Milestones", columns, lines, note)


def theory(runs: list[list[dict]]) -> page.Table:
    """What `bitnet_jax.shrink` predicts of each length, and what was measured."""
    lines = []
    for run in filter(None, runs):
        first = run[0]
        cfg, hyper = RunConfig(first["steps"]), Hyper(**first["hyper"])
        step = shrink.half_spread_step(cfg, hyper, first["model"]["d_model"] ** -0.5)
        curves = [(np.array(r["curve"]["step"]), r["curve"]["collapse/logit_std"]) for r in run]
        halved = [trajectory.half_step(steps, np.array(std) / std[0]) for steps, std in curves]
        there = [x for x in halved if x is not None]
        told = stats.interval(there).text(".0f") if there else "never"
        if step is not None and curves[0][0][1] > step / 3:
            told = "points too far apart"
        lines.append([
            f"{first['steps']} steps", "never" if step is None else f"{step:.0f}", told,
            f"{first['above_1.1']['predicted']:,.0f}",
            stats.interval(r["above_1.1"]["embedding"] for r in run).text(",.0f"),
        ])  # fmt: skip
    columns = ["", "logit spread halved at step, predicted", "measured", "embedding |w| > 1.1, "
               "predicted", "measured"]  # fmt: skip
    note = (
        "Predictions have no free parameter: experiments.shrink_law. Measured steps are "
        "interpolated between the points of the curves in the rows."
    )
    return page.Table("Theory", columns, lines, note)


def panels(runs: list[list[dict]]) -> list[charts.Panel]:
    """Curves of every seed; the lengths share an axis of percent."""
    reference = next(run for run in runs if run)[0]["references"]
    out = []
    for key, title, ylabel, lines in (
        ("collapse/unique_tokens", "Distinct predictions", "tokens",
         [("text", reference["targets"]["distinct"])]),
        ("eval/loss", "Held-out loss", "nats per token",
         [(k, reference[k]["loss"]) for k in ("uniform", "unigram")]),
        ("collapse/entropy", "Entropy", "nats", [("uniform", reference["uniform"]["entropy"])]),
    ):  # fmt: skip
        series = [
            charts.Series(
                r["arm"], [100 * s / r["steps"] for s in r["curve"]["step"]], r["curve"][key]
            )
            for run in runs
            for r in run
        ]
        out.append(charts.Panel(series, title, ylabel, 50, tuple(lines), xlabel="% of the run"))
    return out


def body(request: common.Request) -> None:
    extra = functools.partial(numbers, request.cfg.run.steps)
    rows = sweep.train_arms(NAME, request, arms(request), extra=extra)
    common.conclude(NAME, __doc__, request.workdir, rows, analyse)


if __name__ == "__main__":
    common.main(__doc__, NAME, "quick", body, seeds="0-2", quick=QUICK, sweep=True,
                lengths=LENGTHS)  # fmt: skip
