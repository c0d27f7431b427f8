"""What do a run's weights, predictions and trajectory look like?

Takes a finished or unfinished workdir, and prints, writes as analyse.json and as a page there:

weights      per tensor: how many |w| are above 1, above 1.1 and above the scale mean|w|; values of
             the forward pass that are no quantised code; zero rate, codes that flipped since the
             checkpoint before, latent std, scale, SQNR
predictions  on the held-out block: the most predicted and the most frequent tokens with their
             shares, and the divergence of the mean prediction from the text
trajectory   first severe and first complete collapse, recoveries, milestones, averages by stage

    python -m experiments.analyse runs/NAME-HASH
    python -m experiments.analyse runs/NAME-HASH@500:0 --milestones 100,500
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import charts, checkpoint, data, log, program, reference, train
from bitnet_jax.config import Config, Hyper, Replicate, UserError
from bitnet_jax.model import Transformer
from bitnet_jax.tokenizer import Tokenizer
from experiments import common, page, trajectory, weight_bounds

TOP = 10  # tokens shown of each list


def weights(
    workdir: Path, index: int, cfg: Config, replicate: Replicate, state: train.TrainState
) -> dict:
    """Numbers of every parameter by path at a kept step, and totals over all of them.

    The flip rate is against the kept step before, and absent at the first. Raises UserError.
    """
    step = int(state.step)
    earlier = [kept for kept in checkpoint.kept_steps(workdir) if kept < step]
    before = program.load_replicate(workdir, earlier[-1], index)[2].params if earlier else None
    strength = weight_bounds.strength_at(replicate.hyper, step)
    found = weight_bounds.all_sums(state.params, cfg, strength, before)
    kinds = weight_bounds.by_kind(found)
    total = {
        key: sum(int(sums.get(key, 0)) for sums in kinds.values())
        for key in ("size", "above_1", "above_1.1", "outside")
    }
    quantised = [k for k in kinds if k not in weight_bounds.FULL_PRECISION]
    return {
        "previous_step": earlier[-1] if earlier else None,
        "quantisation_strength": strength,
        "tensors": {name: weight_bounds.numbers(sums) for name, (_, sums) in found.items()},
        "total": total,
        "quantised_above_1.1": sum(kinds[kind]["above_1.1"] for kind in quantised),
    }


def shares(
    cfg: Config, params, hyper: Hyper, blocks_NBL: np.ndarray, end_of_text: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Argmax, mean prediction and next tokens of held-out windows: shares over V, each [V].

    Over the scored positions, those whose next token is not end of text. `hyper` is that of the
    step (`train.at_step`).
    """
    model, vocab = Transformer(cfg.model), cfg.model.vocab_size

    @jax.jit
    def sums(windows_BL):
        z_NV = model.apply({"params": params}, windows_BL[:, :-1], hyper).reshape(-1, vocab)
        w_N = data.score_weights(windows_BL, end_of_text, True).reshape(-1)
        zeros_V = jnp.zeros(vocab)
        counts = [zeros_V.at[i].add(w_N) for i in (z_NV.argmax(-1), windows_BL[:, 1:].reshape(-1))]
        return counts[0], w_N @ jax.nn.softmax(z_NV), counts[1]

    with jax.default_matmul_precision("float32"):
        parts = [jax.device_get(sums(block)) for block in blocks_NBL]
    totals = [np.sum(np.array(part, np.float64), axis=0) for part in zip(*parts, strict=True)]
    return tuple(total / total.sum() for total in totals)


def divergence(p_V: np.ndarray, q_V: np.ndarray) -> float:
    """KL(p || q) in nats; terms with p = 0 are 0."""
    some = p_V > 0
    return float(np.sum(p_V[some] * np.log(p_V[some] / np.maximum(q_V[some], 1e-30))))


def predictions(workdir: Path, cfg: Config, replicate: Replicate, state: train.TrainState) -> dict:
    """Predicted against true token frequencies of the held-out block at a kept step.

    Raises UserError when the corpus is not the one of the run any more.
    """
    tokens = data.load(cfg.data)
    if json.loads((workdir / "config.json").read_text())["corpus"] != tokens.identity:
        raise UserError(f"{workdir}: data.corpus={cfg.data.corpus} has changed since the run")
    blocks_NBL = data.eval_blocks(cfg.data, tokens.validation_N)
    now = train.at_step(replicate.hyper, state.step)
    argmax_V, mean_V, text_V = shares(
        cfg, state.params, now, blocks_NBL, tokens.tokenizer.end_of_text
    )
    unigram_V = reference.unigram_probs(tokens.train_N, cfg.model.vocab_size)
    return {
        "positions": int(np.prod(blocks_NBL[..., 1:].shape)),
        "distinct_predicted": int((argmax_V > 0).sum()),
        "distinct_in_text": int((text_V > 0).sum()),
        "kl_text_to_mean": divergence(text_V, mean_V),
        "kl_unigram_to_mean": divergence(unigram_V, mean_V),
        "most_predicted": top_tokens(tokens.tokenizer, argmax_V, argmax_V, mean_V, text_V),
        "most_frequent": top_tokens(tokens.tokenizer, text_V, argmax_V, mean_V, text_V),
    }


def top_tokens(tokenizer: Tokenizer, order_V, argmax_V, mean_V, text_V) -> list[dict]:
    """The TOP tokens by `order_V` that occur in it, with their text and shares."""
    ids = [int(i) for i in np.argsort(-order_V, kind="stable")[:TOP] if order_V[i] > 0]
    return [
        {
            "id": i,
            "token": tokenizer.decode([i]),
            "share_of_argmax": float(argmax_V[i]),
            "mean_probability": float(mean_V[i]),
            "share_of_text": float(text_V[i]),
        }
        for i in ids
    ]


def course(workdir: Path, index: int, milestones: list[int]) -> dict:
    """The trajectory of a replicate from its log; an average that is refused says why.

    Raises UserError for a milestone without evaluation.
    """
    run, path = trajectory.read_run(workdir), trajectory.read(workdir, index)
    first = {"severe": trajectory.first_severe(path), "complete": trajectory.first_complete(path)}
    averages, rates = {}, {}
    for name, stage in (("run", None), ("stage 1", 1), ("stage 2", 2)):
        try:
            averages[name] = trajectory.stage_average(path, run, stage)
            rates[name] = dataclasses.asdict(trajectory.severe_rate(path, run, stage))
        except UserError as refusal:
            averages[name] = rates[name] = f"refused: {refusal}"
    return {
        "steps": run.steps,
        "boundary": run.boundary,
        "evaluations": len(set(path.steps.tolist()) & set(trajectory.planned(run))),
        "planned_evaluations": len(trajectory.planned(run)),
        "first": first,
        "episodes": [dataclasses.asdict(e) for e in trajectory.episodes(path)],
        "milestones": trajectory.milestones(path, milestones or standard_milestones(path)),
        "average_unique": averages,
        "severe_rate": rates,
        "step": path.steps.tolist(),
        "unique": path.unique.tolist(),
        "loss": path.loss.tolist(),
    }


def standard_milestones(path: trajectory.Trajectory) -> list[int]:
    """The report's milestones that this log has, and its last step."""
    report = {5, 50, 100, 130, 140, 500, 600, 700, 1000, 1500, 2000, 5000, 10000, 20000}
    return sorted(report & set(path.steps.tolist()) | {int(path.steps[-1])})


def weight_table(found: dict, step: int) -> page.Table:
    """One line per tensor."""
    columns = (
        ("above_1", "|w| > 1", ",d"),
        ("above_1.1", "|w| > 1.1", ",d"),
        ("above_scale", "|w| > mean|w|", ".1%"),
        ("outside", "outside the codes", ",d"),
        ("zero_rate", "zeros", ".1%"),
        ("flip_rate", "flips", ".2%"),
        ("std", "std", ".3g"),
        ("scale", "mean|w|", ".3g"),
        ("sqnr", "SQNR, dB", ".2f"),
    )

    def line(name, numbers):
        return [name, *(f"{numbers[k]:{spec}}" if k in numbers else "" for k, _, spec in columns)]

    lines = [line(name, numbers) for name, numbers in found["tensors"].items()]
    lines.append(line("all", found["total"]))
    previous = found["previous_step"]
    flips = f"codes that changed since step {previous}" if previous else "no checkpoint before"
    note = (
        "Embedding, head and norms are never quantised. Outside the codes: values of the forward "
        f"pass that are no code times the scale (strength {found['quantisation_strength']:g}); "
        f"the latents are not clipped. Flips: {flips}."
    )
    return page.Table(f"Weights at step {step}", ["tensor", *(c[1] for c in columns)], lines, note)


def token_table(title: str, listed: list[dict], note: str = "") -> page.Table:
    """Tokens with their shares."""
    keys = ("share_of_argmax", "mean_probability", "share_of_text")
    lines = [[repr(t["token"]).replace(" ", "␣"), *(f"{t[k]:.2%}" for k in keys)] for t in listed]
    return page.Table(
        title, ["token", "of predictions", "mean probability", "of text"], lines, note
    )


def course_table(found: dict) -> page.Table:
    """Collapses, recoveries, milestones and averages."""

    def at(step):
        return "never" if step is None else f"step {step} ({step / found['steps']:.0%})"

    lines = [
        ["first severe collapse (fewer than 3 distinct)", at(found["first"]["severe"])],
        ["first complete collapse (1 distinct)", at(found["first"]["complete"])],
    ]
    for number, e in enumerate(found["episodes"], 1):
        told = "no recovery" if e["recovery"] is None else f"recovered at step {e['recovery']}"
        if e["count_only"] is not None:
            told += f" (the count alone, with a higher loss, at step {e['count_only']})"
        lines.append([f"episode {number}, from step {e['start']}", told])
    for step, unique in found["milestones"].items():
        lines.append([f"distinct at step {step}", str(unique)])
    for name, average in found["average_unique"].items():
        rate = found["severe_rate"][name]
        told = average
        if not isinstance(average, str):
            told = (
                f"{average:.1f}; severe {rate['count']}/{rate['n']}, Wilson {span(rate['wilson'])}"
            )
            if rate["bootstrap"]:
                told += f", blocks of {trajectory.BLOCK} {span(rate['bootstrap'])}"
        lines.append([f"average distinct, {name}", told])
    note = (
        f"{found['evaluations']} of {found['planned_evaluations']} planned evaluations after step "
        "0. A recovery is at least 10 distinct predictions in 3 evaluations with a loss no higher "
        "than at the collapse. Intervals are about one run, not about seeds."
    )
    return page.Table("Trajectory", ["", "value"], lines, note)


def span(pair) -> str:
    """`[22.7%, 35.1%]`."""
    return f"[{pair[0]:.1%}, {pair[1]:.1%}]"


def study(found: dict, references: dict) -> page.Study:
    """Tables, figures and one line about one replicate."""
    w, p, t = found["weights"], found["predictions"], found["trajectory"]
    severe, complete = t["first"]["severe"], t["first"]["complete"]
    recovered = sum(e["recovery"] is not None for e in t["episodes"])
    told = "no severe collapse of the count"
    if severe is not None:
        told = f"count severe from step {severe}"
        told += f", complete at step {complete}" if complete is not None else ", never complete"
        told += f", {recovered} of {len(t['episodes'])} episodes recovered"
    result = (
        f"{w['total']['above_1.1']:,} of {w['total']['size']:,} weights above 1.1, "
        f"{w['quantised_above_1.1']:,} of them quantised; KL(text || mean prediction) "
        f"{p['kl_text_to_mean']:.3f} nats"
    )
    conclusion = (
        f"{w['total']['outside']:,} values outside the quantised codes; distinct predictions of "
        f"{p['positions']:,}: {p['distinct_predicted']} (the text {p['distinct_in_text']}), the "
        f"most frequent {p['most_predicted'][0]['share_of_argmax']:.0%}; {told}"
    )
    lines = (
        ("text", references["targets"]["distinct"]),
        ("bigram", references["bigram"]["distinct"]),
    )
    losses = tuple((k, references[k]["loss"]) for k in ("uniform", "unigram", "bigram"))
    panels = [
        charts.Panel([charts.Series(found["name"], t["step"], t[key])], title, ylabel,
                     t["boundary"], reference_lines)
        for key, title, ylabel, reference_lines in (
            ("unique", "Distinct predictions", "tokens", lines),
            ("loss", "Held-out loss", "nats per token", losses),
        )
    ]  # fmt: skip
    note = (
        f"Of {p['positions']:,} held-out positions. KL of the mean prediction from the held-out "
        f"text {p['kl_text_to_mean']:.3f}, from the training text's unigram "
        f"{p['kl_unigram_to_mean']:.3f} nats."
    )
    return page.Study(
        arms=found["name"],
        n=1,
        result=result,
        conclusion=conclusion,
        tables=[
            weight_table(w, found["step"]),
            token_table("Most predicted tokens", p["most_predicted"]),
            token_table("Most frequent tokens of the text", p["most_frequent"], note),
            course_table(t),
        ],
        figures=[("", charts.panels_svg([panel])) for panel in panels],
    )


def analyse(place: str, milestones: list[int]) -> Path:
    """Analyse WORKDIR[@STEP[:REPLICATE]] (all replicates by default); returns the page's path."""
    workdir, step, index = program.checkpoint_place(place)
    saved = json.loads((workdir / "config.json").read_text())
    found = []
    for i in range(len(saved["replicates"])) if index is None else [index]:
        cfg, replicate, state = program.load_replicate(workdir, step, i)
        found.append(
            {"replicate": i, "name": replicate.name, "seed": replicate.seed, "step": step}
            | {"trajectory": course(workdir, i, milestones)}
            | {"weights": weights(workdir, i, cfg, replicate, state)}
            | {"predictions": predictions(workdir, cfg, replicate, state)}
        )
    log.write_json(workdir / "analyse.json", found)
    studies = {
        f"{f['name']}, seed {f['seed']}, replicate {f['replicate']}, step {f['step']}": study(
            f, saved["references"]
        )
        for f in found
    }
    for label, one in studies.items():
        print(page.console(label, one) + "\n")
    made = saved["provenance"]
    made["versions"] = {k: made["versions"][k] for k in ("python", "jax", "flax", "optax")}
    return page.write(workdir / "analyse.html", "analyse", __doc__, studies, [made] * len(found))


def main(argv: list[str]) -> None:
    """Parse the command line; raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.analyse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("place", metavar="WORKDIR[@STEP[:REPLICATE]]")
    parser.add_argument("--milestones", default="", help="steps whose counts to show: 100,500,1000")
    args = parser.parse_args(argv)
    steps = [part.strip() for part in args.milestones.split(",") if part.strip()]
    if not all(step.isdecimal() for step in steps):
        raise UserError(f"--milestones {args.milestones}: use steps such as 100,500,1000")
    print(f"page: {analyse(args.place, [int(step) for step in steps])}")


if __name__ == "__main__":
    common.guard(lambda: main(sys.argv[1:]))
