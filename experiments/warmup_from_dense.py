"""Does a quantisation warm-up help a dense model that becomes ternary?

From every seed a dense model (the b158 layout without quantisation) trains for T steps and leaves
as a Hugging Face folder of master weights. From there, with a new optimiser and the same schedule
and batches, it trains for T steps more:

    no warm-up          ternary weights and int8 activations from the first step
    warm-up over T/10   both strengths grow as min(step / (T/10), 1): over 1000 steps for T = 10,000
    warm-up over T/2    the same over T/2
    still dense         neither, which is what becoming ternary costs

Beside it, `from scratch` is ternary for T steps from random weights: what the dense start is worth
to a given number of ternary steps. n seeds; differences are within seeds.

Expected: at these lengths next to nothing at T. The full quantisation of dense weights raises the
loss for some tens of steps, which a warm-up spares, and which training makes up for.

    python -m experiments.warmup_from_dense --preset quick
    python -m experiments.warmup_from_dense --preset b158 --set run.steps=10000 --seeds 0-9 \
        --set data.corpus=text:books/*.txt
"""

import dataclasses
from pathlib import Path

from bitnet_jax import charts, data, hf, program
from bitnet_jax.config import Hyper
from experiments import common, compare, page, stats, sweep

NAME = "warmup_from_dense"
QUICK = (*common.SIZE, "run.eval_every=15")
DENSE, SCRATCH, ABRUPT, CEILING = "dense", "from scratch", "no warm-up", "still dense"
WARMUPS = {"warm-up over T/10": 10, "warm-up over T/2": 2}
OFF = {"weight_quant": 0.0, "act_quant": 0.0}
LOSS = "eval/loss"


def continuations(steps: int, folder: Path) -> list[sweep.Arm]:
    """The arms that start from a folder."""
    numbers = {
        ABRUPT: {},
        **{name: {"quant_warmup_steps": float(steps // k)} for name, k in WARMUPS.items()},
        CEILING: OFF,
    }
    start = {"init": f"hf:{folder}"}
    return [sweep.Arm(name, "b158", hyper, run=start) for name, hyper in numbers.items()]


def export(request: common.Request, row: dict) -> Path:
    """The folder with the last weights of a dense row's replicate, written unless it is there."""
    name, _, index = row["id"].rpartition("/")
    folder = request.workdir / f"{name}-{index}-hf"
    if not folder.exists():
        cfg, _, state = program.load_replicate(request.workdir / name, row["steps"], int(index))
        # As master weights of a BitNet, which the dense ones are from now on: hence Hyper().
        hf.export(folder, cfg, state.params, Hyper(), data.load(cfg.data).tokenizer)
    return folder


def dense_loss(rows: list[dict]) -> dict[int, float]:
    """Held-out loss of each seed's dense model after its T steps."""
    return compare.values(rows, DENSE, LOSS)


def worst_after(rows: list[dict], arm: str, start: dict[int, float]) -> stats.Interval:
    """How far an arm's held-out loss rises above its dense start at most, over seeds."""
    peaks = {row["seed"]: max(row["curve"][LOSS]) for row in rows if row["arm"] == arm}
    return stats.interval(peaks[seed] - start[seed] for seed in peaks)


def analyse(rows: list[dict]) -> page.Study:
    """Effect of each warm-up at the last step, of the dense start, and the rise after it."""
    n, start = compare.n_seeds(rows), dense_loss(rows)
    effects = {name: compare.difference(rows, name, ABRUPT, LOSS) for name in WARMUPS}
    rises = {name: worst_after(rows, name, start) for name in (ABRUPT, *WARMUPS)}
    gain = compare.difference(rows, ABRUPT, SCRATCH, LOSS)
    cost = compare.difference(rows, ABRUPT, CEILING, LOSS)
    told = ", ".join(f"{name} {stats.effect_text(d, '+.3f')}" for name, d in effects.items())
    shown = [row for row in rows if row["arm"] != DENSE]
    pairs = [
        *((name, ABRUPT) for name in WARMUPS),
        *((name, SCRATCH) for name in (ABRUPT, *WARMUPS)),
        *((name, CEILING) for name in (ABRUPT, *WARMUPS)),
    ]
    return page.Study(
        arms=f"{ABRUPT}, {', '.join(WARMUPS)} and {CEILING} from a dense model; {SCRATCH}",
        n=n,
        result=(
            f"held-out loss at T against {ABRUPT}: {told}; largest rise above the dense model's: "
            + ", ".join(f"{name} {rise.text('+.2f')}" for name, rise in rises.items())
            + f"; {ABRUPT} against {SCRATCH} {stats.effect_text(gain)}, against {CEILING} "
            + stats.effect_text(cost)
        ),
        conclusion=_conclusion(effects, gain, cost),
        tables=[
            compare.arm_table(rows),
            compare.difference_table(shown, pairs, "Differences at the last step"),
        ],
        figures=[("One line per seed; all but one arm start from dense weights.", drawn(shown))],
    )


def _conclusion(effects, gain, cost) -> str:
    told = [
        f"{name}{' helps' if d.high < 0 else ' hurts' if d.low > 0 else ''}: "
        + stats.effect_text(d, "+.3f")
        for name, d in effects.items()
    ]
    return (
        f"{'; '.join(told)}; the dense start is worth {stats.effect_text(gain)} against as many "
        f"ternary steps from scratch, and becoming ternary costs {stats.effect_text(cost)}"
    )


def drawn(rows: list[dict]) -> str:
    """Held-out loss against the step after the start."""
    reference = rows[0]["references"]
    lines = tuple((name, reference[name]["loss"]) for name in ("unigram", "bigram"))
    series = [charts.Series(r["arm"], r["curve"]["step"], r["curve"][LOSS]) for r in rows]
    title = "Held-out loss after the start"
    return charts.panels_svg(
        [charts.Panel(series, title, "nats per token", rows[0]["steps"] // 2, lines)]
    )


def body(request: common.Request) -> None:
    first = [sweep.Arm(DENSE, "b158", OFF), sweep.Arm(SCRATCH, "b158")]
    rows = sweep.train_arms(NAME, request, first, keep_checkpoints=True)
    for row in [row for row in rows if row["arm"] == DENSE]:
        arms = continuations(request.cfg.run.steps, export(request, row))
        one = dataclasses.replace(request, seeds=[row["seed"]])
        rows += sweep.train_arms(NAME, one, arms)
    common.conclude(NAME, __doc__, request.workdir, rows, analyse)


if __name__ == "__main__":
    common.main(__doc__, NAME, "quick", body, seeds="0-2", quick=QUICK, sweep=True)
