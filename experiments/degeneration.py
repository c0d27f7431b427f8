"""Does greedy decoding repeat because the model collapsed, or because greedy decoding repeats?

The report reads few distinct tokens as collapse. Models of the three recipes continue the same 32
held-out beginnings of 16 tokens by 64: greedily, sampled at temperature 1, and sampled from the
nucleus (top-p 0.9). Beside these free-running numbers stand those of the text's own continuations
and the teacher-forced ones. seq-rep-4: share of a continuation's 4-grams that are repeats.

    python -m experiments.degeneration --seeds 0-4     # 9 min on 1 core

Goes when a study of larger models compares their text with the data's.
"""

import jax
import numpy as np

from bitnet_jax import charts, config, generate, train
from bitnet_jax.generate import Sampling
from experiments.lab.arms import Arm
from experiments.lab.claims import Claim
from experiments.lab.exhibits import signed, triple
from experiments.lab.experiment import experiment
from experiments.lab.stats import difference, ended, interval, mean, values
from experiments.lab.studies import QUICK, SMALL

COUPLED, DECOUPLED, PUBLISHED = "coupled", "decoupled", "published"
ARMS = tuple(Arm(name, name) for name in (COUPLED, DECOUPLED, PUBLISHED))
N_PROMPTS, N_PROMPT, N_NEW = 32, 16, 64
WAYS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=1.0),
    "nucleus": Sampling(temperature=1.0, top_p=0.9),
}
NUMBERS = (
    ("unique", "distinct tokens", ".1f"),
    ("distinct_1", "distinct-1", ".2f"),
    ("rep_4", "seq-rep-4", ".2f"),
    ("loop", "end in a loop", ".2f"),
)


def measure(run) -> dict[str, list]:
    """`decoding`: numbers of `generate.degeneration` by way of decoding, and of the text."""
    held_out_N, end = run.tokens.validation_N, run.tokens.tokenizer.end_of_text
    starts_B = np.linspace(0, max(0, len(held_out_N) - N_PROMPT - N_NEW), N_PROMPTS).astype(int)
    windows_BL = starts_B[:, None] + np.arange(N_PROMPT + N_NEW)
    tokens_BL = held_out_N.take(windows_BL, mode="wrap").astype(np.int32)
    prompts_BP, text_BN = tokens_BL[:, :N_PROMPT], tokens_BL[:, N_PROMPT:]
    hyper = jax.vmap(train.at_step)(config.stack_hypers(run.replicates), run.states.step)
    given = (run.cfg, run.states.params, hyper, prompts_BP, np.full(N_PROMPTS, N_PROMPT), N_NEW)
    found_RBN = {
        way: jax.device_get(generate.generate(*given, sampling=sampling, seed=0, end_of_text=end))
        for way, sampling in WAYS.items()
    }
    text = rounded(generate.degeneration(text_BN, end))
    return {
        "decoding": [
            {way: rounded(generate.degeneration(x_RBN[i], end)) for way, x_RBN in found_RBN.items()}
            | {"text": text}
            for i in range(len(run.replicates))
        ]
    }


def rounded(numbers: dict) -> dict:
    return {k: v if v is None else float(f"{v:.5g}") for k, v in numbers.items()}


def column(way: str, key: str = "rep_4") -> str:
    return f"decoding/{way}/{key}"


def excess(df, arm: str, way: str, key: str = "rep_4"):
    """A number of an arm's continuations less the text's."""
    return interval(values(df, arm, column(way, key)) - values(df, arm, column("text", key)))


def learned_repeat(df) -> bool:
    healthy = (DECOUPLED, PUBLISHED)
    return all(ended(df, x).all() and excess(df, x, "greedy").within(0.4, 1) for x in healthy)


CLAIMS = (
    Claim(
        "greedy",
        "decoded greedily, models that have learned repeat: seq-rep-4 is 0.4 above the text's",
        learned_repeat,
        QUICK,
    ),
    Claim(
        "sampled",
        "sampled at temperature 1, no recipe repeats more 4-grams than the text, collapsed or not",
        lambda df: all(excess(df, arm.name, "sampled").below for arm in ARMS),
        QUICK,
    ),
    Claim(
        "collapsed",
        "the collapsed recipe repeats still more when decoded greedily, by 0.1 or more",
        lambda df: all(
            difference(df, COUPLED, other, column("greedy")).within(0.1, 1)
            for other in (DECOUPLED, PUBLISHED)
        ),
        QUICK,
    ),
)


def show(df, exhibits) -> None:
    arms = list(dict.fromkeys(df["arm"]))
    exhibits.table(df, title="Teacher-forced, at the last step")
    table_rows, differences, dots = [], [], []
    for arm in arms:
        for way in WAYS:
            cells = [mean(df, arm, column(way, key)).text(spec) for key, _, spec in NUMBERS]
            table_rows.append([f"{arm}, {way}", *cells])
            more = [signed(excess(df, arm, way, key), spec) for key, _, spec in NUMBERS]
            differences.append([f"{arm}, {way}", *more])
        dots.append((arm, {way: triple(mean(df, arm, column(way))) for way in WAYS}))
    text = {key: df[column("text", key)].iloc[0] for key, _, _ in NUMBERS}
    table_rows.append(["the text", *(f"{text[key]:{spec}}" for key, _, spec in NUMBERS)])
    heads = ["recipe and decoding", *(title for _, title, _ in NUMBERS)]
    note = (
        f"{N_PROMPTS} beginnings of {N_PROMPT} tokens, {N_NEW} new tokens each (fewer before an end"
        " of text); mean [95 % t interval] over seeds. A loop repeats its last p tokens over at "
        "least 4p tokens to the end."
    )
    exhibits.grid("Free-running", heads, table_rows, note)
    exhibits.grid("Less the text's own", heads, differences)
    svg = charts.dot_plot(
        dots,
        title="Repetition of continuations",
        xlabel="seq-rep-4",
        references=[("text", text["rep_4"])],
    )
    exhibits.drawing(svg, "Mean and 95 % interval over seeds.")


if __name__ == "__main__":
    quick = (*SMALL, "run.steps=1000", "run.eval_every=50", "run.save_every=1000")
    experiment(__doc__, ARMS, measure, CLAIMS, show, quick=quick)
