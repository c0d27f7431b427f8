"""What a model's weights and predictions look like, the worst thing first.

weights      per tensor: how many |w| are above 1, above 1.1 and above the scale mean|w|; values of
             the forward pass that are no ternary code; zero rate, codes that flipped since the
             checkpoint before, latent std, scale, SQNR
predictions  over the large held-out block: the most predicted and the most frequent tokens with
             their shares, and the divergence of the mean prediction from the text
course       of a run's log: evaluations with fewer than 3 distinct predictions
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import audit, checkpoint, metrics, optim, quant, restore, signatures, verdict
from bitnet_jax.subject import TEXT, Subject, fixed, logits, open_source, weight_faults

TOP = 10  # tokens shown of each list
THRESHOLD = 1.1  # the troubleshooting report counted weights above it
MOSTLY_ZERO, ONE_TOKEN = 0.9, 0.5  # share of a matrix's codes, of the predictions


# ------------------------------------------------------------------------------------- weights


def tensor_sums(w, ternary: bool = False, strength: float = 1.0, before=None) -> dict:
    """Counts and sums over one tensor; those of several tensors add.

    `strength` is the quantisation strength of the forward pass of a ternary tensor, `before` the
    same tensor at an earlier step. `outside` counts values of the forward pass that are no code
    times the scale.
    """
    w = np.asarray(w, np.float32)
    size, magnitude = np.abs(w), np.abs(w).mean(dtype=np.float64)
    sums = {
        "size": w.size,
        "above_1": int((size > 1).sum()),
        "above_1.1": int((size > THRESHOLD).sum()),
        "above_scale": int((size > magnitude).sum()),
        "sum": float(w.sum(dtype=np.float64)),
        "magnitude": float(magnitude * w.size),
        "squares": float(np.square(w, dtype=np.float64).sum()),
    }
    if not ternary:
        return sums
    scale = quant.weight_scale(jnp.asarray(w))
    codes = np.asarray(quant.weight_codes(w, scale))
    used = np.asarray(quant.quantize_weight(w, strength, jnp.float32) * scale)
    off_code = (np.abs(np.rint(used)) > 1) | (np.abs(used - np.rint(used)) > 1e-3)
    sums |= {
        "outside": int(off_code.sum()),
        "zeros": int((codes == 0).sum()),
        "error": float(np.square(w - codes / np.float32(scale), dtype=np.float64).sum()),
    }
    if before is not None:
        was = quant.weight_codes(before, quant.weight_scale(jnp.asarray(before)))
        sums["flips"] = int((np.asarray(was) != codes).sum())
    return sums


def packed_sums(packed) -> dict:
    """What is left of `tensor_sums` where only ternary codes are stored."""
    codes = quant.unpack_ternary(jnp.asarray(packed))
    return {"size": codes.size, "outside": 0, "zeros": int(jnp.sum(codes == 0))}


def numbers(sums: dict) -> dict:
    """Flat numbers of `tensor_sums`: counts as they are, shares of the size, std, scale, dB.

    `scale` is mean|w|; `sqnr` = 10 log10(sum w^2 / sum (w - dequantised w)^2).
    """
    n = sums["size"]
    out = {key: sums[key] for key in ("size", "above_1", "above_1.1", "outside") if key in sums}
    if "squares" in sums:
        mean = sums["sum"] / n
        out |= {
            "above_scale": sums["above_scale"] / n,
            "std": math.sqrt(max(sums["squares"] / n - mean**2, 0)),
            "scale": sums["magnitude"] / n,
        }
    if "zeros" in sums:
        out["zero_rate"] = sums["zeros"] / n
    if "error" in sums:
        out["sqnr"] = 10 * math.log10(max(sums["squares"] / max(sums["error"], 1e-30), 1e-30))
    if "flips" in sums:
        out["flip_rate"] = sums["flips"] / n
    return out


def add(parts: list[dict]) -> dict:
    """Sums over several tensors of one kind."""
    return {key: sum(part[key] for part in parts) for key in parts[0]}


def kind_of(path: str) -> str:
    """`embedding`, `head`, `norm`, `bias`, or the projection that a ternary matrix is."""
    if path.startswith("block_") and path.endswith(("/kernel", "/packed")):
        return path.split("/")[-2]
    return {"embed": "embedding", "head": "head", "output_bias": "bias"}.get(
        path.split("/")[0], "norm"
    )


FULL_PRECISION = ("embedding", "head", "norm", "bias")


def all_sums(params, strength: float, before=None) -> dict[str, tuple[str, dict]]:
    """Kind and sums of every parameter by path; `before` are the parameters of an earlier step."""
    leaves = jax.tree.leaves_with_path(params)
    earlier = jax.tree.leaves(before) if before is not None else [None] * len(leaves)
    sums = {}
    for (path, w), was in zip(leaves, earlier, strict=True):
        name = optim.path_name(path)
        kind = kind_of(name)
        if name.endswith("/packed"):
            sums[name] = (kind, packed_sums(w))
        elif not (name.startswith("block_") and name.endswith("/scale") and np.ndim(w) == 0):
            sums[name] = (kind, tensor_sums(w, kind not in FULL_PRECISION, strength, was))
    return sums


def by_kind(tensors: dict[str, tuple[str, dict]]) -> dict[str, dict]:
    """Sums of the tensors of each kind."""
    kinds: dict[str, list[dict]] = {}
    for kind, sums in tensors.values():
        kinds.setdefault(kind, []).append(sums)
    return {kind: add(parts) for kind, parts in kinds.items()}


def weights(params, strength: float, before=None) -> dict:
    """Numbers of every tensor by path, totals, and the faults that `weight_faults` names."""
    sums = all_sums(params, strength, before)
    kinds = by_kind(sums)
    keys = ("size", "above_1", "above_1.1", "outside")
    return {
        "quantisation_strength": strength,
        "tensors": {name: numbers(tensor) for name, (_, tensor) in sums.items()},
        "matrices": sum(kind not in FULL_PRECISION for kind, _ in sums.values()),
        "total": {key: sum(int(total.get(key, 0)) for total in kinds.values()) for key in keys},
        "quantised_above_1.1": sum(
            int(total.get("above_1.1", 0)) for kind, total in kinds.items()
            if kind not in FULL_PRECISION
        ),
        "faults": weight_faults(params),
    }  # fmt: skip


# --------------------------------------------------------------------------------- predictions


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(cfg, seams, params, hyper, inputs, targets, weights):
    vocab = cfg.model.vocab_size
    z_NV = logits(cfg, seams, params, hyper, inputs).reshape(-1, vocab)
    w_N, zeros_V = weights.reshape(-1), jnp.zeros(vocab)
    counts = [zeros_V.at[i].add(w_N) for i in (z_NV.argmax(-1), targets.reshape(-1))]
    return counts[0], w_N @ jax.nn.softmax(z_NV), counts[1]


def shares(s: Subject) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Argmax, mean prediction and next tokens of the large held-out block, each shares over V,
    over the scored positions."""
    large = s.program.evals.large
    parts = [
        jax.device_get(_sums(*fixed(s.program), s.params, s.hyper, *block))
        for block in zip(large.inputs, large.targets, large.weights, strict=True)
    ]
    totals = [np.sum(np.array(part, np.float64), axis=0) for part in zip(*parts, strict=True)]
    return tuple(total / max(total.sum(), 1) for total in totals)


def divergence(p_V: np.ndarray, q_V: np.ndarray) -> float:
    """KL(p || q) in nats; terms with p = 0 are 0."""
    some = p_V > 0
    return float(np.sum(p_V[some] * np.log(p_V[some] / np.maximum(q_V[some], 1e-30))))


def top_tokens(tokenizer, order_V, argmax_V, mean_V, text_V) -> list[dict]:
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


def predictions(s: Subject) -> dict:
    """Predicted against true token frequencies of the held-out block, and whether it learned."""
    argmax_V, mean_V, text_V = shares(s)
    unigram_V, tokenizer = np.asarray(s.program.evals.unigram_V), s.program.tokens.tokenizer
    measured = audit.predictions(s)
    return {
        "positions": int(np.sum(s.program.evals.large.weights)),
        "learned": bool(signatures.learned(measured)),
        "loss": measured["loss"],
        "future_leak": audit.causality(s)["future_leak"],
        "minus_unigram": measured["minus_unigram"],
        "minus_unigram_se": measured["minus_unigram_se"],
        "mutual_information": measured["mutual_information"],
        "distinct_predicted": int((argmax_V > 0).sum()),
        "distinct_in_text": int((text_V > 0).sum()),
        "kl_text_to_mean": divergence(text_V, mean_V),
        "kl_unigram_to_mean": divergence(unigram_V, mean_V),
        "most_predicted": top_tokens(tokenizer, argmax_V, argmax_V, mean_V, text_V),
        "most_frequent": top_tokens(tokenizer, text_V, argmax_V, mean_V, text_V),
    }


def course(rows: Sequence[dict]) -> dict | None:
    """Evaluations after step 0 of one replicate, oldest first: how many are severe, the first
    severe and the first complete one; None without any."""
    after = [row for row in rows if row["step"]]
    severe = [row["step"] for row in after if verdict.severe(row)]
    complete = [row["step"] for row in after if row[metrics.DISTINCT] == 1]
    if not after:
        return None
    return {
        "evaluations": len(after),
        "severe": len(severe),
        "first_severe": severe[0] if severe else None,
        "first_complete": complete[0] if complete else None,
    }


# ------------------------------------------------------------------------------------ together


def finite(weights: dict) -> bool:
    """Whether all values are finite, so that the model predicts something."""
    return "values that are not finite" not in weights["faults"]


def observations(inspected: dict) -> list[str]:
    """What is wrong with the weights and predictions, the worst first."""
    w, p = inspected["weights"], inspected["predictions"]
    mostly_zero = [
        name for name, t in w["tensors"].items() if 1 > t.get("zero_rate", 0) > MOSTLY_ZERO
    ]
    seen = [f"{fault} in {_some(names, w['matrices'])}" for fault, names in w["faults"].items()]
    if not finite(w):
        return seen
    if p is not None and p["future_leak"] > verdict.LEAK:
        leak = f"{p['future_leak']:.2g} of their spread"
        seen.insert(0, f"later tokens move earlier logits by {leak}: the loss says nothing")
    if w["total"]["outside"] and w["quantisation_strength"] == 1:
        seen.append(f"{w['total']['outside']:,} values of the forward pass are no ternary code")
    if p is not None and not p["learned"]:
        top = p["most_predicted"][0]
        if top["share_of_argmax"] > ONE_TOKEN:
            share = f"{top['share_of_argmax']:.0%}"
            seen.append(f"{top['token']!r} is predicted at {share} of positions")
        where = "above" if p["minus_unigram"] > 0 else "below"
        seen.append(
            f"not learned: loss {p['loss']:.2f} is {abs(p['minus_unigram']):.2f} {where} the "
            f"unigram's (standard error {p['minus_unigram_se']:.2f}), mutual information "
            f"{p['mutual_information']:.3f}"
        )
    if mostly_zero:
        seen.append(f"over {MOSTLY_ZERO:.0%} zeros in {_some(mostly_zero, w['matrices'])}")
    return seen


def _some(names: list[str], matrices: int) -> str:
    """The first of the names, after how many of the ternary matrices they are where all are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    layers = all(name.startswith("block_") and "norm" not in name for name in names)
    counted = f"{len(names)} of {matrices} ternary matrices: " if layers else ""
    return counted + ", ".join(names[:3]) + more


def _earlier(source: str, s: Subject) -> tuple[dict | None, int | None]:
    """Parameters and step of the kept checkpoint before a run's step, None where there is none."""
    if s.state is None:
        return None, None
    workdir, _, index = restore.checkpoint_place(source)
    earlier = [kept for kept in checkpoint.kept_steps(workdir) if kept < s.step]
    if not earlier:
        return None, None
    return restore.load_replicate(workdir, earlier[-1], index or 0)[2].params, earlier[-1]


def inspect(source: str, text: str | None = None, rows: Sequence[dict] = ()) -> dict:
    """Weights, predictions and course of a SOURCE, and `observations`; raises UserError.

    `rows` are the evaluations of the replicate from its log, oldest first. `left_out` says why
    there are no predictions where there is no text.
    """
    s = open_source(source, text)
    before, earlier = _earlier(source, s)
    replicate = s.program.replicates[0]
    inspected = {"source": source, "name": replicate.name, "seed": replicate.seed, "step": s.step}
    inspected |= {"weights": weights(s.params, float(s.hyper.weight_quant), before)}
    inspected |= {"predictions": None, "left_out": s.lacks((TEXT,))}
    if finite(inspected["weights"]) and not inspected["left_out"]:
        with jax.set_mesh(s.program.mesh), jax.default_matmul_precision("float32"):
            inspected["predictions"] = predictions(s)
    inspected |= {"previous_step": earlier, "course": course(rows)}
    return inspected | {"observations": observations(inspected)}


COLUMNS = (
    ("above_1", "|w|>1", ",d"),
    ("above_1.1", "|w|>1.1", ",d"),
    ("above_scale", "|w|>mean", ".0%"),
    ("outside", "off code", ",d"),
    ("zero_rate", "zeros", ".0%"),
    ("flip_rate", "flips", ".1%"),
    ("std", "std", ".3g"),
    ("scale", "mean|w|", ".3g"),
    ("sqnr", "SQNR dB", ".1f"),
)


def terminal_lines(inspected: dict) -> list[str]:
    """The worst first, then tensors, tokens and course."""
    sound = " in the weights" if inspected["left_out"] else "; the model has learned"
    seen = inspected["observations"] or [f"nothing wrong seen{sound}"]
    where = f"{inspected['name']} seed {inspected['seed']}, step {inspected['step']}"
    return [
        f"{where}: {seen[0]}",
        *(f"also: {text}" for text in seen[1:]),
        "",
        *_tensor_lines(inspected["weights"]["tensors"]),
        *(["", *_prediction_lines(inspected["predictions"])] if inspected["predictions"] else []),
        *(
            ["", f"left out, without {inspected['left_out']}: predictions"]
            if inspected["left_out"]
            else []
        ),
        *(_course_lines(inspected["course"]) if inspected["course"] else []),
    ]


def _tensor_lines(tensors: dict) -> list[str]:
    width = max(map(len, tensors))
    head = f"{'tensor':{width}}" + "".join(f"{title:>9}" for _, title, _ in COLUMNS)
    return [head] + [
        f"{name:{width}}"
        + "".join(f"{format(t[key], spec) if key in t else '':>9}" for key, _, spec in COLUMNS)
        for name, t in tensors.items()
    ]


def _prediction_lines(p: dict) -> list[str]:
    shown = [
        f"{p['distinct_predicted']} distinct predictions at {p['positions']:,} positions, the text "
        f"has {p['distinct_in_text']}; KL(text || mean prediction) {p['kl_text_to_mean']:.3f}"
    ]
    for key in ("most_predicted", "most_frequent"):
        shown.append(f"{key.replace('_', ' ')}: token, of predictions, probability, of text")
        shown += [
            f"  {t['token']!r:16} {t['share_of_argmax']:7.2%} {t['mean_probability']:7.2%} "
            f"{t['share_of_text']:7.2%}"
            for t in p[key]
        ]
    return shown


def _course_lines(c: dict) -> list[str]:
    first = f", first at step {c['first_severe']}" if c["severe"] else ""
    return [f"severe (fewer than {verdict.SEVERE} distinct): {c['severe']} of {c['evaluations']} "
            f"evaluations{first}"]  # fmt: skip
