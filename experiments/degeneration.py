"""Does greedy decoding repeat because the model collapsed, or because greedy decoding repeats?

The report reads few distinct tokens as collapse. Its coupled recipe, the same recipe decoupled and
the published one are trained side by side. Then each model continues the same 32 held-out
beginnings by 64 tokens: greedily, sampled (temperature 1) and sampled from the nucleus (top-p 0.9).
Beside these free-running numbers stand the teacher-forced ones and those of the text itself.

Expected: greedy decoding repeats in every arm, healthy or not, far more than the text; sampling
from a healthy model repeats about as little as the text. So repetition in greedy text does not
show a collapse; the held-out loss against the unigram's and the context's information do.

    python -m experiments.degeneration --preset quick
    python -m experiments.degeneration --preset report --set data.corpus=text:books/*.txt
"""

import functools
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import charts, data, generate, program
from bitnet_jax.config import Config
from bitnet_jax.generate import Sampling
from experiments import common, compare, page, stats, sweep

NAME = "degeneration"
ARMS = [sweep.Arm(name, name) for name in ("report", "report_decoupled", "b158")]
N_PROMPTS, N_PROMPT, N_NEW = 32, 16, 64
WAYS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=1.0),
    "nucleus": Sampling(temperature=1.0, top_p=0.9),
}
METRICS = (
    ("unique", "distinct tokens", ".1f"),
    ("distinct_1", "distinct-1", ".2f"),
    ("distinct_4", "distinct-4", ".2f"),
    ("rep_4", "seq-rep-4", ".2f"),
    ("loop", "end in a loop", ".2f"),
)
held_out = functools.cache(data.load)


def decode(workdir: Path, cfg: Config, index: int) -> dict:
    """Further fields of a row: `decoding`, by way and for the text, of the last checkpoint."""
    folder, step, _ = program.checkpoint_place(str(workdir))
    cfg, replicate, state = program.load_replicate(folder, step, index)
    tokens = held_out(cfg.data)
    end, validation_N = tokens.tokenizer.end_of_text, tokens.validation_N
    starts_B = np.linspace(0, max(0, len(validation_N) - N_PROMPT - N_NEW), N_PROMPTS).astype(int)
    windows_BL = starts_B[:, None] + np.arange(N_PROMPT + N_NEW)
    tokens_BL = validation_N.take(windows_BL, mode="wrap").astype(np.int32)
    params, hyper = jax.tree.map(lambda x: np.asarray(x)[None], (state.params, replicate.hyper))
    hyper = jax.tree.map(np.float32, hyper)
    lengths_B = np.full(N_PROMPTS, N_PROMPT)
    found = {"text": tokens_BL[:, N_PROMPT:]}
    for name, sampling in WAYS.items():
        found[name] = generate.generate(
            *(cfg, params, hyper, tokens_BL[:, :N_PROMPT], lengths_B, N_NEW),
            **{"sampling": sampling, "seed": np.uint32(replicate.seed), "end_of_text": end},
        )[0]
    return {"decoding": {k: _rounded(generate.degeneration(v, end)) for k, v in found.items()}}


def _rounded(numbers):
    return {k: v if v is None else float(f"{v:.5g}") for k, v in numbers.items()}


def analyse(rows: list[dict]) -> page.Study:
    """Repetition by arm and way of decoding, against the text's and against the arm's loss."""
    n, arms = compare.n_seeds(rows), compare.by_arm(rows)
    unigram = rows[0]["references"]["unigram"]["loss"]
    losses = {arm: stats.interval(compare.values(rows, arm, "eval/loss").values()) for arm in arms}
    told = [
        f"{arm} (loss {losses[arm].text()}) {_told(members, 'greedy')} and "
        f"{_told(members, 'sampled')}"
        for arm, members in arms.items()
    ]
    result = f"seq-rep-4 of {N_NEW} new tokens, greedy and sampled: {'; '.join(told)}"
    result += f"; the text {text_value(rows, 'rep_4'):.2f}; unigram loss {unigram:.2f}"
    sentences = [_healthy(arms, losses, unigram), _collapsed(arms, losses, unigram)]
    return page.Study(
        arms=f"{', '.join(arms)}; greedy, temperature 1, top-p 0.9; {N_PROMPTS} prompts",
        n=n,
        result=result,
        conclusion="; ".join(sentences),
        tables=[
            compare.arm_table(rows, "Teacher-forced, at the last step"),
            free_table(rows),
            difference_table(rows),
        ],
        figures=[figure(rows)],
    )


def value(row: dict, way: str, key: str) -> float:
    return row["decoding"][way][key]


def text_value(rows: list[dict], key: str) -> float:
    """The text's own number: the same for all rows."""
    return value(rows[0], "text", key)


def interval(members: list[dict], way: str, key: str) -> stats.Interval:
    """Over the seeds of an arm."""
    return stats.interval(value(row, way, key) for row in members)


def excess(members: list[dict], way: str, key: str = "rep_4") -> stats.Interval:
    """A number of the continuations - that of the text, over the seeds of an arm."""
    return stats.interval(value(row, way, key) - value(row, "text", key) for row in members)


def _told(members, way):
    return interval(members, way, "rep_4").text()


def _healthy(arms, losses, unigram) -> str:
    """What arms do that are better than word frequencies: the claim about healthy models."""
    healthy = [arm for arm in arms if losses[arm].high < unigram]
    if not healthy:
        return "no arm's held-out loss lies below the unigram's, so none shows a healthy model"
    greedy = {arm: excess(arms[arm], "greedy") for arm in healthy}
    repeats = [arm for arm in healthy if greedy[arm].low > 0]
    if len(repeats) == len(healthy):
        claim = "a healthy small model repeats when decoded greedily"
    elif repeats:
        claim = f"greedily, {' and '.join(repeats)} repeat though healthy, others are not seen to"
    else:
        claim = "no healthy model is seen to repeat more than the text when decoded greedily"
    parts = [
        f"{arm}, below the unigram's loss: seq-rep-4 above the text's by "
        f"{stats.effect_text(greedy[arm])}, when sampled by "
        f"{stats.effect_text(excess(arms[arm], 'sampled'))}"
        for arm in healthy
    ]
    return f"{claim} ({'; '.join(parts)})"


def _collapsed(arms, losses, unigram) -> str:
    """Whether greedy repetition tells arms apart that the loss tells apart."""
    collapsed = [arm for arm in arms if losses[arm].low > unigram]
    healthy = [arm for arm in arms if losses[arm].high < unigram]
    if not collapsed or not healthy:
        return "the arms do not lie on both sides of the unigram's loss, so nothing is compared"
    parts = []
    for bad in collapsed:
        for good in healthy:
            d = difference(arms, bad, good, "greedy", "rep_4")
            does = "differs from" if d.effect else "does not tell it from"
            parts.append(
                f"{bad}, above it, {does} {good} in greedy seq-rep-4: {stats.effect_text(d)}"
            )
    return "; ".join(parts)


def difference(arms: dict, arm: str, control: str, way: str, key: str) -> stats.Interval:
    """Paired difference arm - control."""
    numbers = ({row["seed"]: value(row, way, key) for row in arms[a]} for a in (arm, control))
    return stats.paired(*numbers)


def free_table(rows: list[dict]) -> page.Table:
    """Free-running numbers of every arm and way, and the text's."""
    lines = []
    for arm, members in compare.by_arm(rows).items():
        for way in WAYS:
            told = [interval(members, way, key).text(spec) for key, _, spec in METRICS]
            periods = [value(row, way, "loop_period") for row in members]
            found = [p for p in periods if p is not None]
            lines.append([f"{arm}, {way}", *told, f"{np.median(found):g}" if found else "none"])
    told = [f"{text_value(rows, key):{spec}}" for key, _, spec in METRICS]
    lines.append(["the text", *told, f"{text_value(rows, 'loop_period') or 'none'}"])
    note = (
        f"{N_PROMPTS} held-out beginnings of {N_PROMPT} tokens, {N_NEW} new tokens each (fewer "
        f"before an end of text); mean [95 % t interval] over n = {compare.n_seeds(rows)} seeds. "
        "seq-rep-4: share of 4-grams that are repeats. A loop repeats its last p tokens over at "
        "least 4p tokens to the end; period: the median."
    )
    return page.Table("Free-running", ["", *(m[1] for m in METRICS), "period"], lines, note)


def difference_table(rows: list[dict]) -> page.Table:
    """Every arm's excess over the text."""
    lines = [
        [
            f"{arm}, {way} - text",
            *(stats.effect_text(excess(members, way, key), "+" + spec) for key, _, spec in METRICS),
        ]
        for arm, members in compare.by_arm(rows).items()
        for way in WAYS
    ]
    note = "Every seed continues the same beginnings; 95 % t intervals over seeds."
    return page.Table("Against the text itself", ["", *(m[1] for m in METRICS)], lines, note)


def figure(rows: list[dict]) -> tuple[str, str]:
    """seq-rep-4 by arm and way; the text's as a line."""
    dots = []
    for arm, members in compare.by_arm(rows).items():
        found = {way: interval(members, way, "rep_4") for way in WAYS}
        dots.append((arm, {way: (i.mean, i.low, i.high) for way, i in found.items()}))
    svg = charts.dot_plot(
        dots,
        title="Repetition of continuations",
        xlabel="seq-rep-4",
        references=[("text", text_value(rows, "rep_4"))],
    )
    return "Mean and 95 % interval over seeds; dashed: the text's own continuations.", svg


def body(request: common.Request) -> None:
    rows = sweep.train_arms(NAME, request, ARMS, extra=decode)
    common.conclude(NAME, __doc__, request.workdir, rows, analyse)


if __name__ == "__main__":
    common.main(__doc__, NAME, "quick", body, seeds="0-2", quick=common.SMALL, sweep=True)
