"""How can entropy be near its maximum while only a few tokens are predicted?

The report's third recommendation and its "entropy/concentration paradox": the distribution of the
logits along the report's run (decay coupled into Adam) and along the same run with decoupled decay.
At every kept checkpoint, over the held-out positions: percentiles of the logits centred over the
vocabulary, signs of several modes, the share of their variance that no context changes, the gap of
the two largest, ties, and softmax in float32 and in bfloat16 against float64.

Two explanations compete. Numerics: softmax in few bits would show as ties, sums that are not 1, or
an entropy that float64 does not confirm. Small logits: V logits of standard deviation s around a
common mean give an entropy of about ln V - s^2 / 2 whatever the argmax is, and the argmax is the
same wherever the context moves the logits by less than the distance of the two largest.

Expected: coupled, s shrinks until ln V - s^2 / 2 is ln V; a few frequent tokens stand out to the
right and take the entropy a little below; the context moves the logits by less than those tokens
are apart, decoupled by more. float32 agrees with float64 to 1e-6.

    python -m experiments.logit_distribution --preset quick
    python -m experiments.logit_distribution --preset report --set run.checkpoint_every=100 \
        --set data.corpus=text:books/*.txt
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import charts, checkpoint, data, program, train
from bitnet_jax.config import Config
from bitnet_jax.model import Transformer
from experiments import common, compare, logits, page, stats, sweep

NAME = "logit_distribution"
QUICK = (*common.SMALL, "run.checkpoint_every=50")
COUPLED, DECOUPLED = "report", "report_decoupled"
ARMS = [sweep.Arm(name, name) for name in (COUPLED, DECOUPLED)]
NUMERICS = 1e-5  # errors of probabilities and nats below this explain no argmax and no entropy
FEW_NATS = 0.1  # the approximation describes the entropy if it is as near
HIGH = 0.9  # share of ln V from which an entropy is near its maximum
COLUMNS = (
    ("entropy", "entropy", ".3f"),
    ("gaussian_entropy", "ln V - s^2/2", ".3f"),
    ("std", "s", ".3f"),
    ("distinct", "distinct", ".0f"),
    ("mode_share", "most frequent", ".2f"),
    ("gap", "top-2 gap", ".4f"),
    ("context_std", "by context", ".3f"),
    ("shared", "shared direction", ".3f"),
    ("bimodality", "bimodality", ".2f"),
    ("skewness", "skewness", ".2f"),
)
SOFTMAX = (
    ("tied", "tied at the top", ".4f"),
    ("argmax_changed", "argmax changed", ".4f"),
    ("prediction_changed", "changed after softmax", ".4f"),
    ("sum_error", "|sum q - 1|", ".1e"),
    ("entropy_error", "error of entropy", ".1e"),
    ("kl", "KL from exact", ".1e"),
)


def measure(workdir: Path, cfg: Config, index: int) -> dict:
    """Numbers of `logits.describe` at initialisation and at every kept checkpoint."""
    windows_NBL = data.eval_blocks(cfg.data, data.load(cfg.data).validation_N)
    steps = checkpoint.kept_steps(workdir)
    saved, replicate, _ = program.load_replicate(workdir, steps[-1], index)
    states = {0: train.init_state(saved, replicate.hyper, replicate.seed)}
    found = []
    for step in (0, *steps):
        state = states.get(step) or program.load_replicate(workdir, step, index)[2]
        hyper = train.at_step(replicate.hyper, state.step)
        blocks = [forward(saved.model, state.params, hyper, w[:, :-1]) for w in windows_NBL]
        z_NV = np.concatenate([np.asarray(b).reshape(-1, b.shape[-1]) for b in blocks])
        found.append(logits.describe(z_NV))
    numbers = {k: [float(f"{f[k]:.5g}") for f in found] for k in found[0]}
    return {"logits": {"step": [0, *steps]} | numbers}


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, hyper, tokens_BL):
    """Float32 logits [B, L, V], without the reduced precision that accelerators default to."""
    with jax.default_matmul_precision("float32"):
        return Transformer(model).apply({"params": params}, tokens_BL, hyper)


def last(rows: list[dict], arm: str, key: str) -> dict[int, float]:
    """The number at the last step by seed."""
    return {row["seed"]: row["logits"][key][-1] for row in rows if row["arm"] == arm}


def analyse(rows: list[dict]) -> page.Study:
    """What the logits of both arms look like at the end, and what explains the paradox."""
    names = list(compare.by_arm(rows))
    return page.Study(
        arms="decay coupled and decoupled; every kept checkpoint",
        n=compare.n_seeds(rows),
        result="; ".join(
            [
                *(_numbers(rows, name) for name in names),
                _on_modes(rows),
                f"coupled, {_on_context(rows, COUPLED)}; decoupled, {_on_context(rows, DECOUPLED)}",
            ]
        ),
        conclusion=_conclusion(rows),
        tables=[_last_table(rows, names), _softmax_table(rows, names), _step_table(rows, names)],
        figures=figures(rows, names),
    )


def _mean(rows, arm, key):
    return stats.interval(last(rows, arm, key).values())


def _distance(rows, arm) -> stats.Interval:
    """Entropy minus its Gaussian approximation, paired."""
    return stats.paired(last(rows, arm, "entropy"), last(rows, arm, "gaussian_entropy"))


def _numbers(rows, arm) -> str:
    return (
        f"{arm}: entropy {_mean(rows, arm, 'entropy').text('.3f')}, ln V - s^2/2 "
        f"{_mean(rows, arm, 'gaussian_entropy').text('.3f')} (difference "
        f"{_distance(rows, arm).text('+.3f')}), s {_mean(rows, arm, 'std').text('.3f')}, "
        f"{_mean(rows, arm, 'distinct').mean:.0f} distinct, top-2 gap "
        f"{_mean(rows, arm, 'gap').text('.4f')}, "
        f"{_mean(rows, arm, 'float32/tied').mean:.1%} tied"
    )


def _conclusion(rows) -> str:
    reference, n = rows[0]["references"], compare.n_seeds(rows)
    top = reference["uniform"]["entropy"]
    entropy, distinct = _mean(rows, COUPLED, "entropy"), _mean(rows, COUPLED, "distinct")
    few = distinct.mean < reference["bigram"]["distinct"] / 2
    paradox = entropy.mean > HIGH * top and few
    worst = numerical_error(rows)
    told = [
        f"{'the paradox is there' if paradox else 'no paradox'} at step {rows[0]['steps']} (n={n}):"
        f" entropy {entropy.text()} of at most {top:.2f}, {distinct.mean:.0f} distinct predictions "
        f"of {reference['tracked_positions']} (text {reference['targets']['distinct']}, bigram "
        f"{reference['bigram']['distinct']}, unigram 1)",
        _on_spread(rows, top),
        f"softmax in float32 differs from float64 by {worst:.0e} at most: numerics "
        f"{'do not explain' if worst < NUMERICS else 'may explain part of'} it",
    ]
    return "; ".join(told)


def _on_spread(rows, top) -> str:
    """Whether ln V - s^2/2 describes the entropy of the coupled arm."""
    distance, gaussian = _distance(rows, COUPLED), _mean(rows, COUPLED, "gaussian_entropy")
    bounds = (distance.low, distance.high) if distance.n > 1 else (distance.mean,)
    off = f"ln V - s^2/2 = {gaussian.text()}, the entropy is {distance.text('+.3f')} from it"
    spread = f"the spread of the logits, s = {_mean(rows, COUPLED, 'std').text()},"
    if max(map(abs, bounds)) < FEW_NATS:
        return f"{spread} accounts for the entropy: {off}"
    if gaussian.mean > HIGH * top:
        return f"{spread} alone puts it near the maximum: {off}"
    return f"{spread} does not account for the entropy: {off}"


def _on_modes(rows) -> str:
    coefficient = _mean(rows, COUPLED, "bimodality")
    if coefficient.mean <= logits.MODES:
        return f"no sign of several modes (bimodality {coefficient.text()}, limit 0.56)"
    p95, largest = (_mean(rows, COUPLED, key).mean for key in ("p95", "p100"))
    return (
        f"bimodality {coefficient.text()} is above 0.56 at skewness "
        f"{_mean(rows, COUPLED, 'skewness').text('.1f')}: a narrow bulk (p95 {p95:.2f}) and few "
        f"logits far above it (largest {largest:.2f})"
    )


def _on_context(rows, arm) -> str:
    """How far the context moves logits beside the gap at the top, and who is predicted."""
    moved, gap, mode = (_mean(rows, arm, key) for key in ("context_std", "gap", "mode_share"))
    difference = stats.paired(last(rows, arm, "context_std"), last(rows, arm, "gap"))
    if difference.n == 1 or difference.effect:
        beside = "less than" if difference.mean < 0 else "more than"
    else:
        beside = f"no difference seen (n={difference.n}) from"
    return (
        f"the context moves a logit by {moved.text()}, {beside} the {gap.text()} between the top "
        f"two, and {mode.mean:.0%} of positions predict the same token"
    )


def numerical_error(rows: list[dict]) -> float:
    """Largest error of float32 softmax over seeds, arms and steps: of a sum or an entropy."""
    return max(
        max(row["logits"][f"float32/{key}"])
        for row in rows
        for key in ("sum_error", "entropy_error")
    )


def _last_table(rows, names) -> page.Table:
    lines = [
        [name, *(_mean(rows, name, key).text(spec) for key, _, spec in COLUMNS)] for name in names
    ]
    reference = rows[0]["references"]
    for name in ("bigram", "unigram", "uniform"):
        r = reference[name]
        known = {"entropy": f"{r['entropy']:.3f}", "distinct": str(r["distinct"])}
        lines.append([f"{name} predictor", *(known.get(key, "") for key, _, _ in COLUMNS)])
    known = {"distinct": str(reference["targets"]["distinct"])}
    lines.append(["the text", *(known.get(key, "") for key, _, _ in COLUMNS)])
    note = (
        f"Mean [95 % t interval] over n = {compare.n_seeds(rows)} seeds. s: standard deviation of "
        "the logits over the vocabulary. Shared direction: the share of their variance that is the "
        "same at every position. Bimodality above 0.56 suggests several modes, or one that is "
        "strongly skewed; a normal distribution has 0.33."
    )
    return page.Table("Logits at the last step", ["arm", *(c[1] for c in COLUMNS)], lines, note)


def _softmax_table(rows, names) -> page.Table:
    lines = []
    for name in names:
        for dtype in ("float32", "bfloat16"):
            cells = [
                f"{max(last(rows, name, f'{dtype}/{key}').values()):{spec}}"
                for key, _, spec in SOFTMAX
            ]
            lines.append([f"{name}, {dtype}", *cells])
    note = (
        "The largest over seeds. Shares of positions, then errors against softmax in float64 of "
        "the same float32 logits; nats but for the sum. Training and evaluation use float32."
    )
    columns = ["logits and softmax in", *(c[1] for c in SOFTMAX)]
    return page.Table("Is softmax accurate?", columns, lines, note)


def _step_table(rows, names) -> page.Table:
    keys = [f"p{p}" for p in logits.PERCENTILES]
    lines = []
    for name in names:
        curves = _curves(rows, name)
        for i, step in enumerate(curves["step"]):
            # + 0 turns -0.00 into 0.00
            cells = [f"{round(curves[key][i], 2) + 0:.2f}" for key in (*keys, "entropy")]
            lines.append([f"{name}, step {step}", *cells, f"{curves['distinct'][i]:.0f}"])
    columns = ["", *keys[:-1], "largest", "entropy", "distinct"]
    note = "Percentiles of the logits, centred over the vocabulary; means over seeds."
    return page.Table("Percentiles of the logits", columns, lines, note)


def _curves(rows, arm) -> dict[str, list]:
    """Means over the seeds of an arm."""
    members = [row["logits"] for row in rows if row["arm"] == arm]
    means = {k: np.mean([m[k] for m in members], axis=0).tolist() for k in members[0]}
    return means | {"step": members[0]["step"]}


def figures(rows: list[dict], names: list[str]) -> list[tuple[str, str]]:
    """Percentiles against the step, and entropy beside its approximation and the distinct count."""
    boundary, reference = rows[0]["steps"] // 2, rows[0]["references"]
    curves = {name: _curves(rows, name) for name in names}
    fans = [
        (name, c["step"], {p: c[f"p{p}"] for p in logits.PERCENTILES}) for name, c in curves.items()
    ]
    fan = charts.fan_chart(fans, ylabel="centred logit", boundary=boundary)
    lines = []
    for name, c in curves.items():
        lines.append(charts.Series(name, c["step"], c["entropy"]))
        lines.append(charts.Series(f"{name}: ln V - s²/2", c["step"], c["gaussian_entropy"]))
    heights = [
        ("ln V", reference["uniform"]["entropy"]),
        ("bigram", reference["bigram"]["entropy"]),
    ]
    entropy = charts.Panel(lines, "Entropy", "nats", boundary, tuple(heights))
    counts = [charts.Series(name, c["step"], c["distinct"]) for name, c in curves.items()]
    heights = (
        ("text", reference["targets"]["distinct"]),
        ("bigram", reference["bigram"]["distinct"]),
    )
    title = f"Distinct predictions of {reference['tracked_positions']}"
    distinct = charts.Panel(counts, title, "tokens", boundary, heights)
    return [
        ("Entropy, and what the logits' spread alone gives.", charts.panels_svg([entropy])),
        ("High for noise, low while word frequencies are learned.", charts.panels_svg([distinct])),
        (
            "Percentiles of the logits over positions and vocabulary, centred; means over seeds.",
            fan,
        ),
    ]


def body(request: common.Request) -> None:
    # The references count the distinct tokens of the tracked positions: those that are measured.
    held_out = dataclasses.replace(request.cfg.data, track="validation")
    request = dataclasses.replace(request, cfg=dataclasses.replace(request.cfg, data=held_out))
    rows = sweep.train_arms(NAME, request, ARMS, extra=measure)
    common.conclude(NAME, __doc__, request.workdir, rows, analyse)


if __name__ == "__main__":
    common.main(__doc__, NAME, "quick", body, seeds="0-2", quick=QUICK, sweep=True)
