"""Is it the coupling of weight decay into Adam that collapses the report's run?

Trains the report's model twice on the same batches in one program: with its optimiser (torch's Adam
with weight_decay: L2 in the gradient, 0.1 then 0.05), and with the same numbers decoupled (AdamW).
Also checks the explanation of the report's "981,223 weights outside [-1, 1]": weights that receive
no gradient but the decay follow a scalar Adam recursion, which predicts how many stay above 1.1.

Expected at 1000 steps: coupled ends near uniform (entropy above 9.5) with single-digit distinct
predictions; decoupled learns (loss below 6.6). Prediction for |w| > 1.1: 979,330.
One seed took 13 minutes, two 20, on 2 busy CPU cores. Any English text and the GPT-2 vocabulary
will do:

    python -m experiments.coupled_decay --set data.corpus=text:books.train.txt.xz \
        --set data.validation=text:books.validation.txt.xz --set data.tokenizer=gpt2
"""

import math

import jax
import numpy as np

from bitnet_jax import charts, config, optim, program, run
from experiments import common, results

NAME = "coupled_decay"
THRESHOLD = 1.1  # the report counted weights above it


def predicted_count(cfg: config.Config, hyper: config.Hyper, n_weights: int) -> float:
    """How many of `n_weights` drawn from N(0, 1) the scalar recursion leaves above THRESHOLD."""
    start = np.linspace(THRESHOLD, 6, 50_001)
    end = optim.starved_weight(start, cfg.optim, cfg.run, hyper)
    return n_weights * math.erfc(np.interp(THRESHOLD, end, start) / math.sqrt(2))


def count_large(request: common.Request, index: int) -> dict:
    """Weights above THRESHOLD in the last checkpoint, over all parameters and in the embedding."""
    steps = request.cfg.run.steps
    saved, replicate, state = program.load_replicate(request.workdir, steps, index)
    params, hyper = state.params, replicate.hyper
    large = jax.tree.map(lambda w: int((np.abs(w) > THRESHOLD).sum()), params)
    embedding = params["embed"]["embedding"]
    return {
        "all": sum(jax.tree.leaves(large)),
        "embedding": large["embed"]["embedding"],
        "predicted": predicted_count(saved, hyper, embedding.size) if hyper.coupled_1 else None,
    }


def body(request: common.Request) -> None:
    run.run(request.cfg, request.replicates, request.workdir, resume=True)
    rows = [
        results.summarise(request.workdir, i) | {"above_1.1": count_large(request, i)}
        for i in range(len(request.replicates))
    ]
    results.append(NAME, rows)
    print(table(rows))
    if request.preset == "report":
        print(f"figure: {figure(results.load(NAME))}")


def table(rows: list[dict]) -> str:
    """One line per replicate, the reference predictors below."""
    lines = [
        "recipe            seed  unique st.1/st.2/final (min)  train loss min/mean/final  "
        "held-out  entropy  logit std  |w|>1.1 (predicted)"
    ]
    for row in rows:
        loss, final, count = row["train_loss"], row["final"], row["above_1.1"]
        predicted = f" ({count['predicted']:,.0f})" if count["predicted"] else ""
        lines.append(
            f"{row['arm']:17} {row['seed']:4}  {row['unique_stage1']:6.1f} / "
            f"{row['unique_stage2']:5.1f} / {final['collapse/unique_tokens']:3} "
            f"({row['unique_min_after_100']})    {loss['min']:6.2f} / {loss['mean']:5.2f} / "
            f"{loss['final']:5.2f}      {final['eval/loss']:8.3f}  "
            f"{final['collapse/entropy']:7.2f}  {final['collapse/logit_std']:9.2f}  "
            f"{count['all']:,}{predicted}"
        )
    reference = rows[0]["references"]
    for name in ("uniform", "unigram", "bigram"):
        r = reference[name]
        lines.append(
            f"{name:17}       distinct {r['distinct']:3}  held-out loss {r['loss']:.3f}  "
            f"entropy {r['entropy']:.2f}"
        )
    n = reference["tracked_positions"]
    lines.append(f"the text          distinct {reference['targets']['distinct']} in {n} positions")
    return "\n".join(lines)


def figure(rows: list[dict]):
    """Distinct predictions and held-out loss of every arm, as an SVG file."""
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
    return charts.save_figure(results.FOLDER / f"{NAME}.svg", [unique, loss])


if __name__ == "__main__":
    common.main(__doc__, NAME, "report", body)
