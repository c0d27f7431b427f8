"""Why do 981,223 weights lie outside [-1, 1] although the model is ternary?

The report's first recommendation: weight distributions before and after quantisation, per layer
and over training. Counts |w| > 1 and |w| > 1.1 (what the report's tool counted, over every weight
of the model), |w| above the layer's scale mean|w|, and values of the forward pass that are none of
-1, 0, 1 times the scale. Three recipes train the report's layout, whose embedding starts N(0, 1).

Beside the count stands what the optimiser leaves of N(0, 1) entries that get no gradient but the
decay: with Adam's coupled decay they move towards 0 by about the learning rate per step.

Expected: no value outside the codes; no ternary latent above 1.1; what is counted are entries of
the embedding, about as many as that recursion predicts (979,330 for the report's 1000 steps).

    python -m experiments.weight_bounds --preset quick
    python -m experiments.weight_bounds --preset report --set data.corpus=text:books/*.txt
"""

import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import charts, checkpoint, optim, program, quant, shrink, train
from bitnet_jax.config import Config, Hyper, Replicate
from experiments import common, compare, page, stats, sweep

NAME = "weight_bounds"
QUICK = (*common.SMALL, "run.checkpoint_every=50", "run.save_every=50")
RECIPES = ("report", "report_decoupled", "b158")
ARMS = [sweep.Arm(recipe, recipe) for recipe in RECIPES]
THRESHOLD = 1.1  # the report counted weights above it
INIT_STD = {"report": 1.0, "b158": 0.02}  # of the embedding, by layout
FULL_PRECISION = ("embedding", "head", "norm", "bias")
BIN, BINS = 0.25, 10  # of |w| / mean|w|, the last one open; a ternary code changes at 0.5


def tensor_sums(w, fmt: str | None = None, strength: float = 1.0, before=None) -> dict:
    """Counts and sums over one tensor; those of several tensors add.

    `fmt` is the weight format of a quantised tensor, None for one in full precision; `strength` the
    quantisation strength of the forward pass; `before` the same tensor at an earlier step.
    `outside` counts values of the forward pass that are no code times the scale.
    """
    w = np.asarray(w, np.float32)
    size, magnitude = np.abs(w), np.abs(w).mean(dtype=np.float64)
    bins = np.minimum(size / max(magnitude, 1e-30) / BIN, BINS - 1).astype(int)
    out = {
        "size": w.size,
        "above_1": int((size > 1).sum()),
        "above_1.1": int((size > THRESHOLD).sum()),
        "above_scale": int((size > magnitude).sum()),
        "sum": float(w.sum(dtype=np.float64)),
        "magnitude": float(magnitude * w.size),
        "squares": float(np.square(w, dtype=np.float64).sum()),
        "histogram": np.bincount(bins.ravel(), minlength=BINS),
    }
    if fmt is None:
        return out
    largest = quant.LARGEST_CODE[fmt]
    scale = quant.weight_scale(jnp.asarray(w), largest)
    codes = np.asarray(quant.weight_codes(w, scale, largest))
    used = np.asarray(quant.quantize_weight(w, strength, jnp.float32, largest) * scale)
    off_code = (np.abs(np.rint(used)) > largest) | (np.abs(used - np.rint(used)) > 1e-3)
    out |= {
        "outside": int(off_code.sum()),
        "zeros": int((codes == 0).sum()),
        "error": float(np.square(w - codes / np.float32(scale), dtype=np.float64).sum()),
    }
    if before is not None:
        was = quant.weight_codes(before, quant.weight_scale(jnp.asarray(before), largest), largest)
        out["flips"] = int((np.asarray(was) != codes).sum())
    return out


def numbers(sums: dict) -> dict:
    """Flat numbers of `tensor_sums`: counts as they are, shares of the size, std, scale, dB.

    `scale` is mean|w|; `sqnr` = 10 log10(sum w^2 / sum (w - dequantised w)^2).
    """
    n = sums["size"]
    mean = sums["sum"] / n
    out = {key: sums[key] for key in ("size", "above_1", "above_1.1")}
    out |= {
        "above_scale": sums["above_scale"] / n,
        "std": math.sqrt(max(sums["squares"] / n - mean**2, 0)),
        "scale": sums["magnitude"] / n,
    }
    if "outside" in sums:
        out |= {"outside": sums["outside"], "zero_rate": sums["zeros"] / n}
        ratio = sums["squares"] / max(sums["error"], 1e-30)
        out["sqnr"] = 10 * math.log10(max(ratio, 1e-30))
    if "flips" in sums:
        out["flip_rate"] = sums["flips"] / n
    return out


def add(parts: list[dict]) -> dict:
    """Sums over several tensors of one kind."""
    return {key: sum(part[key] for part in parts) for key in parts[0]}


def kind_of(path: str, group: str) -> str:
    """`embedding`, `head`, `norm`, `bias`, or the projection that a quantised matrix is."""
    return path.split("/")[-2] if group == "matrix" else group


def all_sums(params, cfg: Config, strength: float, before=None) -> dict[str, tuple[str, dict]]:
    """Kind and sums of every parameter by path; `before` are the parameters of an earlier step."""
    groups = jax.tree.leaves(optim.param_groups(params))
    earlier = jax.tree.leaves(before) if before is not None else [None] * len(groups)
    out = {}
    for (path, w), group, was in zip(
        jax.tree.leaves_with_path(params), groups, earlier, strict=True
    ):
        name = optim.path_name(path)
        fmt = cfg.model.weight_format if group == "matrix" else None
        out[name] = (kind_of(name, group), tensor_sums(w, fmt, strength, was))
    return out


def by_kind(tensors: dict[str, tuple[str, dict]]) -> dict[str, dict]:
    """Sums of the tensors of each kind."""
    kinds: dict[str, list[dict]] = {}
    for kind, sums in tensors.values():
        kinds.setdefault(kind, []).append(sums)
    return {kind: add(parts) for kind, parts in kinds.items()}


def strength_at(hyper: Hyper, step: int) -> float:
    """Weight quantisation strength that the forward pass uses after `step` updates."""
    return float(train.at_step(hyper, step).weight_quant)


def kept_params(workdir: Path, index: int) -> Iterator[tuple[int, Config, Replicate, dict]]:
    """Step, configuration, identity and parameters: at initialisation, then of kept checkpoints."""
    for i, step in enumerate(checkpoint.kept_steps(workdir)):
        cfg, replicate, state = program.load_replicate(workdir, step, index)
        if i == 0 and cfg.run.init is None:
            start = jax.jit(lambda: train.init_state(cfg, replicate.hyper, replicate.seed))  # noqa: B023
            yield 0, cfg, replicate, jax.device_get(start().params)
        yield step, cfg, replicate, jax.device_get(state.params)


def without_gradient(cfg: Config, hyper: Hyper, start: np.ndarray) -> np.ndarray:
    """Embedding entries [T + 1, N] over a run in which they get decay but never a gradient.

    `start` [N]. It is the run's own optimiser on zero gradients; for coupled decay alone the
    recursion of `shrink.starved_weight`.
    """
    params = {
        "embed": {"embedding": jnp.asarray(start, jnp.float32)},
    } | ({} if cfg.model.tied_embedding else {"head": {"kernel": jnp.zeros(())}})
    tx = optim.make_optimizer(cfg.optim, cfg.run, hyper, optim.param_groups(params))
    zeros = jax.tree.map(jnp.zeros_like, params)

    def update(carry, _):
        params, state = carry
        updates, state = tx.update(zeros, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), params["embed"]["embedding"]

    _, path = jax.lax.scan(update, (params, tx.init(params)), length=cfg.run.steps)
    return np.concatenate([np.asarray(start)[None], np.asarray(path)])


def predicted_counts(cfg: Config, hyper: Hyper, size: int, steps: list[int]) -> list[float]:
    """How many of `size` normal entries without gradient are above THRESHOLD after each step."""
    start = np.linspace(THRESHOLD, 6, 491)
    path = without_gradient(cfg, hyper, start)
    deviation = INIT_STD[cfg.model.layout] * math.sqrt(2)
    return [size * math.erfc(np.interp(THRESHOLD, path[s], start) / deviation) for s in steps]


def count_large(workdir: Path, cfg: Config, index: int) -> dict:
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


COUNTS = ("above_1", "above_1.1", "outside")
SHARES = ("above_scale", "zero_rate", "flip_rate", "sqnr")
LATENT = ("above_scale", "std", "scale")
QUANTISED = (*LATENT, "zero_rate", "sqnr")
LAYER_KEYS = ("zero_rate", "std", "scale", "sqnr")


def extra(workdir: Path, cfg: Config, index: int) -> dict:
    """Weights of a finished replicate at initialisation and at every kept step.

    `counts` and `ternary` hold a list over steps, `first_last` those of the first and last step.
    """
    history, before = {}, None
    for step, saved, replicate, params in kept_params(workdir, index):
        strength = strength_at(replicate.hyper, step)
        tensors = all_sums(params, saved, strength, before)
        history[step], before = by_kind(tensors), params
    steps = list(history)
    kinds = list(history[steps[0]])
    ternary = [kind for kind in kinds if kind not in FULL_PRECISION]
    groups = {k: [k] for k in kinds if k in FULL_PRECISION} | {"ternary": ternary}
    told = {
        name: [numbers(add([history[step][kind] for kind in members])) for step in steps]
        for name, members in groups.items()
    }
    counts = {
        name: {key: [t[key] for t in list_] for key in COUNTS if key in list_[0]}
        for name, list_ in told.items()
    }
    shares = {key: [short(t[key]) for t in told["ternary"] if key in t] for key in SHARES}
    first_last = {}
    for kind in kinds:
        ends = [history[steps[0]][kind], history[steps[-1]][kind]]
        keys = LATENT if kind in FULL_PRECISION else QUANTISED
        if kind not in ("norm", "bias"):
            first_last[kind] = {key: [short(numbers(e)[key]) for e in ends] for key in keys}
            first_last[kind]["histogram"] = [per_mille(e["histogram"]) for e in ends]
    layers = {
        name: [short(numbers(sums)[key]) for key in LAYER_KEYS]
        for name, (kind, sums) in tensors.items()
        if kind not in FULL_PRECISION
    }
    size = history[steps[-1]]["embedding"]["size"]
    predicted = [round(x) for x in predicted_counts(saved, replicate.hyper, size, steps)]
    return {
        "weights": {
            "step": steps,
            "embedding_size": size,
            "counts": counts,
            "predicted": predicted,
            "ternary": shares,
            "first_last": first_last,
            "layers": layers,
        }
    }


def short(x: float) -> float:
    """Three significant digits."""
    return float(f"{x:.3g}")


def per_mille(counts) -> list[int]:
    """Counts as whole thousandths of their sum."""
    return [round(1000 * int(c) / int(counts.sum())) for c in counts]


def counted(row: dict, group: str | None = None, key: str = "above_1.1", at: int = -1) -> int:
    """Weights of one group (None: of all) that a row counts at its `at`-th step."""
    counts = row["weights"]["counts"]
    return sum(counts[g][key][at] for g in ([group] if group else counts))


def counted_ever(rows: list[dict], key: str) -> int:
    """Ternary matrices' counts summed over all steps and rows."""
    return sum(sum(row["weights"]["counts"]["ternary"][key]) for row in rows)


def analyse(rows: list[dict]) -> page.Study:
    """Which weights the report's count holds, whether any leaves the codes, and the prediction."""
    n, arms = compare.n_seeds(rows), compare.by_arm(rows)
    steps = rows[0]["weights"]["step"]
    outside, ternary = counted_ever(rows, "outside"), counted_ever(rows, "above_1.1")
    shown = [r for r in rows if r["hyper"]["coupled_1"] > 0] or rows
    name = shown[0]["arm"]
    count = stats.interval(counted(r) for r in shown)
    embedding = stats.interval(counted(r, "embedding") for r in shown)
    share = embedding.mean / count.mean if count.mean else 0.0
    predicted = shown[0]["weights"]["predicted"][-1]
    holds = (
        f"of {count.text(',.0f')} weights above {THRESHOLD:g} in {name} at step {steps[-1]}, "
        f"{share:.1%} are entries of the embedding"
    )
    latents = f"{ternary:,}" if ternary else "none"
    off = "nothing is predicted above it"
    if predicted:
        error = stats.interval(counted(r, "embedding") / predicted - 1 for r in shown)
        off = f"the embedding's count differs from the {predicted:,} that decay alone predicts by "
        off += f"{error.text('+.1%')} (n={error.n})"
    zeros = {
        arm: stats.interval(r["weights"]["ternary"]["zero_rate"][-1] for r in members)
        for arm, members in arms.items()
    }
    told = ", ".join(f"{arm} {rate.text('.1%')}" for arm, rate in zeros.items())
    result = (
        f"{holds}; ternary latents above it, at {len(steps)} steps of all arms: {latents}; values "
        f"of the forward pass outside the codes: {outside:,}; {off}; zero "
        f"codes at the end: {told}"
    )
    bound = f"{outside:,} values of the forward pass lie"
    if not outside:
        bound = "no value of the forward pass lies"
    conclusion = (
        f"{bound} outside the quantised codes; {holds} and "
        f"{'some' if ternary else 'none'} a ternary latent; {off}"
    )
    return page.Study(
        arms=f"recipes {', '.join(arms)}",
        n=n,
        result=result,
        conclusion=conclusion,
        tables=[
            count_table(rows),
            time_table(rows),
            kind_table(rows),
            layer_table(shown),
            compare.arm_table(rows),
        ],
        figures=figures(rows, shown),
    )


def count_table(rows: list[dict]) -> page.Table:
    """Counts above THRESHOLD by arm and step."""
    lines = []
    for arm, members in compare.by_arm(rows).items():
        weights = members[0]["weights"]
        rest = [group for group in weights["counts"] if group not in ("embedding", "ternary")]
        for i, step in enumerate(weights["step"]):
            embedding = [counted(r, "embedding", at=i) for r in members]
            parts = [
                [counted(r, at=i) for r in members],
                embedding,
                [sum(counted(r, group, at=i) for group in rest) for r in members],
                [counted(r, "ternary", at=i) for r in members],
            ]
            told = [f"{p[0]:,}" if len(set(p)) == 1 else stats.interval(p).text(",.0f")
                    for p in parts]  # fmt: skip
            predicted = weights["predicted"][i]
            off = f"{np.mean(embedding) / predicted - 1:+.1%}" if predicted else ""
            lines.append([f"{arm}, step {step}", *told, f"{predicted:,}", off])
    note = (
        f"Mean [95 % t interval] over n = {compare.n_seeds(rows)} seeds. Predicted: of the "
        f"{rows[0]['weights']['embedding_size']:,} entries of the embedding if none got a "
        "gradient; off: the embedding's count against it."
    )
    columns = ["recipe, step", "all", "embedding", "head, norms", "ternary", "predicted", "off"]
    return page.Table(f"Weights with |w| > {THRESHOLD:g}", columns, lines, note)


HEADINGS = {
    "above_scale": ("|w| > mean|w|", ".1%"),
    "zero_rate": ("zeros", ".1%"),
    "flip_rate": ("flips", ".2%"),
    "std": ("std", ".3g"),
    "scale": ("mean|w|", ".3g"),
    "sqnr": ("SQNR, dB", ".2f"),
}


def time_table(rows: list[dict]) -> page.Table:
    """All ternary matrices together, by arm and step: means over seeds."""
    lines = []
    for arm, members in compare.by_arm(rows).items():
        for i, step in enumerate(members[0]["weights"]["step"]):
            told = [f"{np.mean([counted(r, 'ternary', k, i) for r in members]):,.0f}"
                    for k in ("above_1", "outside")]  # fmt: skip
            for key in SHARES:
                series = [r["weights"]["ternary"][key] for r in members]
                late = i - (len(members[0]["weights"]["step"]) - len(series[0]))
                mean = np.mean([s[late] for s in series]) if late >= 0 else None
                told.append("" if mean is None else f"{mean:{HEADINGS[key][1]}}")
            lines.append([f"{arm}, step {step}", *told])
    note = (
        "Outside: values of the forward pass that are no code times the scale. |w| > mean|w|: "
        "latents beyond the dequantised value, 42 % of a normal and half of a uniform "
        "distribution; nothing clips them. Flips: codes changed since the step above."
    )
    columns = ["recipe, step", "|w| > 1", "outside", *(HEADINGS[key][0] for key in SHARES)]
    return page.Table("Ternary matrices before and after quantisation", columns, lines, note)


def kind_table(rows: list[dict]) -> page.Table:
    """Matrices by kind, at the first and the last step: means over seeds."""
    lines = []
    for arm, members in compare.by_arm(rows).items():
        weights = members[0]["weights"]
        for kind, found in weights["first_last"].items():
            for i in (0, -1):
                told = []
                for key in QUANTISED:
                    values = [r["weights"]["first_last"][kind].get(key) for r in members]
                    mean = np.mean([v[i] for v in values]) if key in found else None
                    told.append("" if mean is None else f"{mean:{HEADINGS[key][1]}}")
                lines.append([f"{arm}, {kind}, step {weights['step'][i]}", *told])
    note = (
        "Embedding and head are never quantised. SQNR of a normal distribution 5.79 dB, of a "
        "uniform one 8.06 dB. The quantiser's scale is at least 1e-5: latents below half of that "
        "are zeros."
    )
    columns = ["recipe, matrices, step", *(HEADINGS[key][0] for key in QUANTISED)]
    return page.Table("By kind of matrix", columns, lines, note)


def layer_table(rows: list[dict]) -> page.Table:
    """Quantised matrices of one arm by layer at the last step: means over seeds."""
    lines = []
    for name in rows[0]["weights"]["layers"]:
        means = np.mean([r["weights"]["layers"][name] for r in rows], axis=0)
        pairs = zip(LAYER_KEYS, means, strict=True)
        lines.append([name, *(f"{x:{HEADINGS[key][1]}}" for key, x in pairs)])
    title = f"By layer, {rows[0]['arm']}, step {rows[0]['weights']['step'][-1]}"
    return page.Table(title, ["matrix", *(HEADINGS[key][0] for key in LAYER_KEYS)], lines)


def figures(rows: list[dict], shown: list[dict]) -> list[tuple[str, str]]:
    """Counts against the step beside the prediction, and distributions of one arm."""
    out = []
    for arm, members in compare.by_arm(rows).items():
        weights = members[0]["weights"]
        series = [
            charts.Series("measured", w["step"], w["counts"]["embedding"]["above_1.1"])
            for w in (r["weights"] for r in members)
        ]
        series.append(charts.Series("decay alone", weights["step"], weights["predicted"]))
        panel = charts.Panel(series, arm, f"|w| > {THRESHOLD:g}", members[0]["steps"] // 2)
        caption = (
            f"Embedding entries above {THRESHOLD:g}, {arm}: one line per seed, and what decay "
            "alone leaves of entries without gradient."
        )
        out.append((caption, charts.panels_svg([panel])))
    weights = shown[0]["weights"]
    for kind, found in weights["first_last"].items():
        quantised = "sqnr" in found

        def mean(key, kind=kind):
            return np.mean([r["weights"]["first_last"][kind][key] for r in shown], axis=0)

        zeros = mean("zero_rate") if quantised else None
        told = "before (wide) and after quantisation (narrow)" if quantised else "never quantised"
        caption = f"{kind}, {told}: shares of the weights, means over seeds; the last bin is open."
        steps = (weights["step"][0], weights["step"][-1])
        title = f"{kind}, {shown[0]['arm']}"
        out.append((caption, histogram_svg(title, steps, mean("histogram") / 1000, zeros)))
    return out


def histogram_svg(title: str, steps, shares, zeros=None) -> str:
    """Bars of |w| / mean|w| at two steps: `shares` [2, BINS], and `zeros` [2] of ternary codes."""
    colors, left, base, unit, tall = ("#56b4e9", "#d55e00"), 14, 212, 136, 150
    groups = [(BIN * (np.arange(BINS) + 0.5), shares, 0.9 * BIN, 0.5)]
    if zeros is not None:
        codes = np.stack([zeros, 1 - np.asarray(zeros)], axis=1)
        groups.append((np.array([0.04, 1.0]), codes, 0.08, 1.0))
    top = max(float(np.max(values)) for _, values, _, _ in groups)
    parts = []
    for centres, values, wide, opacity in groups:
        for j, color in enumerate(colors):
            for centre, value in zip(centres, values[j], strict=True):
                x, h = left + unit * (centre - wide / 2 + j * wide / 2), tall * value / top
                parts.append(
                    f'<rect x="{x:.1f}" y="{base - h:.1f}" width="{unit * wide / 2:.1f}" '
                    f'height="{h:.1f}" fill="{color}" fill-opacity="{opacity}"/>'
                )

    def text(x, y, content, color=charts.MUTED, more=""):
        parts.append(f'<text x="{x}" y="{y}" fill="{color}" font-size="11" {more}>{content}</text>')

    text(8, 16, title, charts.INK, 'font-weight="bold"')
    for j, color in enumerate(colors):
        text(8 + 80 * j, 36, f"■ step {steps[j]}", color)
    text(366, 36, f"highest: {top:.0%}", more='text-anchor="end"')
    for x in (0, 0.5, 1, 1.5, 2, 2.5):
        text(left + unit * x, base + 16, f"{x:g}", more='text-anchor="middle"')
    text(left + unit * 1.25, base + 33, "|w| / mean|w|", more='text-anchor="middle"')
    parts.append(f'<path d="M{left} {base}h340" stroke="{charts.MUTED}"/>')
    return (
        f'<svg role="img" aria-label="{title}" viewBox="0 0 374 250" '
        f'font-family="{charts.FONTS}">{"".join(parts)}</svg>'
    )


def body(request: common.Request) -> None:
    rows = sweep.train_arms(NAME, request, ARMS, extra=extra)
    common.conclude(NAME, __doc__, request.workdir, rows, analyse)


if __name__ == "__main__":
    common.main(__doc__, NAME, "quick", body, seeds="0-2", quick=QUICK, sweep=True)
