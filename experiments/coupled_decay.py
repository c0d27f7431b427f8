"""Is it the coupling of weight decay into Adam that collapses the report's run?

Trains the report's model twice on the same batches in one program: with its optimiser (torch's Adam
with weight_decay: L2 in the gradient, 0.1 then 0.05), and with the same numbers decoupled (AdamW).
Also checks the explanation of the report's "981,223 weights outside [-1, 1]": weights that receive
no gradient but the decay follow a scalar Adam recursion, which predicts how many stay above 1.1.

Expected at 1000 steps: coupled ends near uniform (entropy above 9.5) with single-digit distinct
predictions; decoupled learns. Prediction for |w| > 1.1: 979,330. Any English text and the GPT-2
vocabulary will do:

    python -m experiments.coupled_decay --set data.corpus=text:books.train.txt.xz \
        --set data.validation=text:books.validation.txt.xz --set data.tokenizer=gpt2
"""

from pathlib import Path

import jax
import numpy as np

from bitnet_jax import charts, config, shrink
from experiments import common, compare, page, stats, sweep

NAME = "coupled_decay"
COUPLED, DECOUPLED = "report", "report_decoupled"
ARMS = [sweep.Arm(COUPLED, COUPLED), sweep.Arm(DECOUPLED, DECOUPLED)]
THRESHOLD = 1.1  # the report counted weights above it


def count_large(workdir: Path, cfg: config.Config, index: int) -> dict:
    """Weights above THRESHOLD in the last checkpoint, over all parameters and in the embedding."""
    saved, replicate, state = sweep.load_replicate(workdir, cfg.run.steps, index)
    large = jax.tree.map(lambda w: int((np.abs(w) > THRESHOLD).sum()), state.params)
    embedding, hyper = state.params["embed"]["embedding"], replicate.hyper
    counts = {
        "all": sum(jax.tree.leaves(large)),
        "embedding": large["embed"]["embedding"],
        "predicted": shrink.count_above(THRESHOLD, embedding.size, saved.optim, saved.run, hyper)
        if hyper.coupled_1
        else None,
    }
    return {"above_1.1": counts}


def analyse(rows: list[dict]) -> page.Study:
    """Paired effect of decoupling, and the predicted against the measured count of weights."""
    n = compare.n_seeds(rows)
    loss = compare.difference(rows, DECOUPLED, COUPLED, "eval/loss")
    entropy = compare.difference(rows, DECOUPLED, COUPLED, "collapse/entropy")
    coupled = [row for row in rows if row["arm"] == COUPLED]
    predicted = coupled[0]["above_1.1"]["predicted"]
    counted = [row["above_1.1"]["all"] for row in coupled]
    off = max(abs(count / predicted - 1) for count in counted)
    unigram = rows[0]["references"]["unigram"]["loss"]
    held_out = {
        arm: stats.interval(compare.values(rows, arm, "eval/loss").values())
        for arm in (COUPLED, DECOUPLED)
    }
    result = (
        f"held-out loss: coupled {held_out[COUPLED].text()}, decoupled "
        f"{held_out[DECOUPLED].text()}, unigram {unigram:.2f}; decoupling changes the loss by "
        f"{stats.effect_text(loss)} and the entropy by {stats.effect_text(entropy)}; weights above "
        f"{THRESHOLD}: {', '.join(f'{c:,}' for c in counted)}, predicted {predicted:,.0f}"
    )
    ended = sum(loss < unigram for loss in compare.values(rows, DECOUPLED, "eval/loss").values())
    conclusion = (
        f"with the same amount of decay, decoupling it brings {ended} of {n} seeds below the "
        f"unigram's loss ({stats.effect_text(loss)} nats); the count of large weights follows the "
        f"scalar recursion within {off:.2%}"
    )
    return page.Study(
        arms="report (coupled 0.1, 0.05), report_decoupled (the same, decoupled)",
        n=n,
        result=result,
        conclusion=conclusion,
        tables=[
            compare.arm_table(rows),
            compare.difference_table(rows, [(DECOUPLED, COUPLED)], "The effect of decoupling"),
            seed_table(rows),
        ],
        figures=[("One line per seed.", charts.panels_svg(readme_panels(rows)))],
    )


def seed_table(rows: list[dict]) -> page.Table:
    """The report's own numbers, seed by seed."""
    columns = ["replicate", "distinct, stage 1", "stage 2", "last", "fewest after step 100",
               "training loss, min", "mean", "last", "above 1.1", "predicted"]  # fmt: skip
    lines = []
    for row in rows:
        loss, final, count = row["train_loss"], row["final"], row["above_1.1"]
        predicted = f"{count['predicted']:,.0f}" if count["predicted"] else ""
        lines.append(
            [f"{row['arm']} {row['seed']}", f"{row['unique_stage1']:.1f}",
             f"{row['unique_stage2']:.1f}", str(final["collapse/unique_tokens"]),
             str(row["unique_min_after_100"]), f"{loss['min']:.2f}", f"{loss['mean']:.2f}",
             f"{loss['final']:.2f}", f"{count['all']:,}", predicted]
        )  # fmt: skip
    return page.Table("Seed by seed, in the report's numbers", columns, lines)


def readme_panels(rows: list[dict]) -> list[charts.Panel]:
    """Distinct predictions and held-out loss of every arm: the picture of the README."""
    reference = rows[0]["references"]

    def panel(key, title, ylabel, lines):
        curves = [charts.Series(r["arm"], r["curve"]["step"], r["curve"][key]) for r in rows]
        return charts.Panel(curves, title, ylabel, rows[0]["steps"] // 2, lines)

    unique = panel(
        "collapse/unique_tokens",
        f"Distinct predictions of {reference['tracked_positions']}",
        "tokens",
        (("text", reference["targets"]["distinct"]), ("bigram", reference["bigram"]["distinct"])),
    )
    loss = panel(
        "eval/loss",
        "Held-out loss",
        "nats per token",
        tuple((name, reference[name]["loss"]) for name in ("uniform", "unigram", "bigram")),
    )
    return [unique, loss]


def body(request: common.Request) -> None:
    rows = sweep.train_arms(NAME, request, ARMS, extra=count_large)
    common.conclude(NAME, __doc__, request.workdir, rows, analyse)


if __name__ == "__main__":
    common.main(__doc__, NAME, "report", body, quick=common.SMALL, sweep=True)
