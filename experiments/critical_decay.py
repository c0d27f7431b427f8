"""When does decay inside Adam collapse a language model, and can that be predicted?

Coupled decay (torch's `Adam(weight_decay=)`) of `decay` in stage 1 and half of it in stage 2 on all
parameters, as in the report's recipe; all else at one point of a star about V = 2048, d = 64, 128
tokens a batch. Every point is a grid of decays times seeds, trained as replicates of one program.
Measured at each point:

- onset edge: the decay at which half of the seeds reach half of the first logit spread in stage 1;
- outcome edge: the decay at which half of the seeds have not learned at the last step;
- blind edge: the decay at which the mean loss is midway between the unigram's and ln V;
- the step of half the spread;
- depth: loss at the end, rows of the output matrix that are alive, and their share of the text.

Predicted before training: `bitnet_jax.forecast`, of which one number is fitted, on three points.
`lab.edges` has the definitions and the tolerances that count as right. PROSPECTS and all points of
the star but SEEN were predicted, and the predictions committed, before they were run.

    python -m experiments.critical_decay --set data.corpus=text:books.validation.txt.xz
    python -m experiments.critical_decay --predict ...   # predict, and run nothing

Goes when the law is tested at full size.
"""

import functools
import sys

from bitnet_jax import log
from experiments.lab import arms, edges, lean, rows
from experiments.lab.arms import Arm, Request
from experiments.lab.claims import Claim
from experiments.lab.experiment import experiment
from experiments.lab.studies import STAR_BOOKS, STAR_PYTHON, STAR_SIZE

PREDICTED = rows.FOLDER / "critical_decay_predicted.json"
DECAYS = tuple(round(10 ** (k / 2), 6) for k in range(-8, 1))  # 1e-4 .. 1, two a decade
# Name of a point: what it changes (fields, numbers), index of its least decay in DECAYS, how many.
STAR = {
    "centre": ({}, {}, 2, 7),
    "V 512": ({"data.tokenizer": "bpe:512"}, {}, 2, 7),
    "V 8192": ({"data.tokenizer": "bpe:8192"}, {}, 2, 5),
    "d 32": ({"model.d_model": 32, "model.d_ff": 64}, {}, 3, 5),
    "d 128": ({"model.d_model": 128, "model.d_ff": 256}, {}, 3, 5),
    "32 tokens": ({"data.batch_size": 1}, {}, 3, 5),
    "512 tokens": ({"data.batch_size": 16}, {}, 3, 5),
    "clip 0.1": ({"optim.clip_norm": 0.1}, {}, 1, 5),
    "clip 10": ({"optim.clip_norm": 10.0}, {}, 3, 5),
    "beta2 0.999": ({"optim.beta2": 0.999}, {}, 3, 5),
    "eps 1e-4": ({"optim.eps": 1e-4}, {}, 3, 5),
    "warm-up 240": ({}, {"warmup_steps": 240.0}, 3, 5),
    "T 2000": ({"run.steps": 2000}, {}, 3, 5),
    "full precision": ({}, {"weight_quant": 0.0, "act_quant": 0.0}, 3, 5),
    "matrices only": ({}, {"decay_rest": 0.0}, 4, 5),
    "b158 tied": ({"model.layout": "b158", "model.tied_embedding": True}, {}, 3, 5),
    "32 tokens at 512": ({"data.tokenizer": "bpe:512", "data.batch_size": 1}, {}, 3, 5),
    "512 tokens at 512": ({"data.tokenizer": "bpe:512", "data.batch_size": 16}, {}, 3, 5),
    "512 tokens at 8192": ({"data.tokenizer": "bpe:8192", "data.batch_size": 16}, {}, 2, 5),
}
STDLIB = {"data.corpus": "stdlib"}
CONSTANT = {"lr_stage1_end": 1.5e-3, "lr_stage2_start": 1.5e-3, "lr_final": 1.5e-3}


def prospect(
    tokenizer: str, width: int, *parts: dict, first: int = 4, last: int = 6, **numbers
) -> tuple:
    """A point of the decays DECAYS[first .. last]."""
    fields = {"data.tokenizer": tokenizer, "model.d_model": width, "model.d_ff": 2 * width}
    for part in ({"run.steps": 400}, *parts):
        fields |= part
    return fields, numbers, first, last - first + 1


# Never run before their predictions were committed (results/critical_decay_predicted.json).
PROSPECTS = {
    "P1 Python": prospect("bpe:700", 48, STDLIB, last=7),
    "P2 Python, wider": prospect("bpe:1000", 80, STDLIB),
    "P3 books": prospect("bpe:1024", 72),
    "P4 books, few tokens": prospect("bpe:300", 64, first=3, last=7),
    "P5 Python, b158": prospect(
        "bpe:1024", 64, STDLIB, {"model.layout": "b158", "model.tied_embedding": True}, first=3
    ),
    "P6 books, clip 0.3": prospect(
        "bpe:1024", 64, {"optim.clip_norm": 0.3, "data.batch_size": 2}, first=3, last=5
    ),
    "P7 Python, beta2 0.99, rate 3e-3": prospect(
        "bpe:700", 64, STDLIB, {"optim.beta2": 0.99}, lr_peak=3e-3
    ),
    "P8 books, short warm-up": prospect("bpe:700", 64, first=3, last=7, warmup_steps=10.0),
    "P9 Python, 4 layers": prospect("bpe:512", 48, STDLIB, {"model.n_layers": 4}),
    "P10 books, rate 7e-4": prospect(
        "bpe:1500", 32, first=3, last=5, lr_peak=7e-4, lr_stage1_end=5e-4, lr_stage2_start=5e-4
    ),
    "P11 Python, 256 tokens": prospect("bpe:300", 32, STDLIB, {"data.batch_size": 8}, last=7),
    "P12 books, full precision": prospect("bpe:700", 64, last=7, weight_quant=0.0, act_quant=0.0),
    "P13 books, constant rate": prospect("bpe:700", 48, first=3, last=7, **CONSTANT),
}
POINTS = STAR | PROSPECTS
SEEN = ("centre", "V 512", "clip 0.1", "32 tokens", "512 tokens at 512")
BEFOREHAND = {name: point for name, point in POINTS.items() if name not in SEEN}


def decays(point: str) -> tuple[float, ...]:
    """The decays of a point; of those of seven 0, too: what a run does without any."""
    _, _, first, many = POINTS[point]
    return (0.0,) * (many == 7) + DECAYS[first : first + many]


def arms_of(point: str) -> list[Arm]:
    fields, numbers, _, _ = POINTS[point]
    return [
        Arm(f"{point} | {decay:g}", fields=fields, coupled_1=decay, coupled_2=decay / 2, **numbers)
        for decay in decays(point)
    ]


ARMS = tuple(arm for point in POINTS for arm in arms_of(point))


def train(request: Request, arms_: list[Arm], measure=None, predicting=False) -> list[dict]:
    """Rows of the chosen arms, written point by point; a point whose rows are there is not run.

    `predicting` runs none, but writes what is predicted of them, and ends the process.
    """
    del measure
    wanted, all_rows = arms.chosen(request, arms_), []
    for point in dict.fromkeys(edges.split(arm.name)[0] for arm in wanted):
        mine = [arm for arm in wanted if edges.split(arm.name)[0] == point]
        if predicting:
            keep(point, edges.predict(request, mine))
        for group in [] if predicting else arms.groups(request, mine):
            of_group = written_rows(request, group)
            if len(of_group) < len(group.replicates):
                print(f"{point}: {len(group.replicates)} replicates", flush=True)
                of_group = lean.train_rows(group, request.preset)
                rows.append(request.name, of_group)
                print(f"{point}: {of_group[0]['seconds'] * len(of_group):.0f} s", flush=True)
            all_rows += of_group
    if predicting:
        sys.exit(0)
    return all_rows


def keep(point: str, predicted: dict) -> None:
    """Write down what is predicted of a point, before it is run."""
    known = log.read_json(PREDICTED) if PREDICTED.exists() else {}
    log.write_json(PREDICTED, known | {point: predicted})


def written_rows(request: Request, group: arms.Group) -> list[dict]:
    """Rows of a group that are written already."""
    wanted = {(rep.name, rep.seed) for rep in group.replicates}
    known = log.read_rows(rows.FOLDER / f"{request.name}.jsonl")
    return [row for row in known if (row["arm"], row["seed"]) in wanted]


def points(df, among) -> dict[str, tuple[dict, dict]]:
    """What is predicted and what was measured of the points that have both."""
    return edges.points(df, among, log.read_json(PREDICTED))


def right(kind: str, least: float, text: str, *told_of) -> Claim:
    """A claim: of a kind's predictions that were made beforehand, at least a share is right."""

    def test(df) -> bool:
        return edges.share(points(df, BEFOREHAND), kind) >= least

    return Claim(kind, f"predicted beforehand{text}", test, *told_of)


BOTH = (STAR_BOOKS, STAR_PYTHON)
CLAIMS = (
    right("onset", 0.9, ", nothing fitted: nine of ten onset edges, within a factor of 2", *BOTH),
    right("half_step", 1.0, ", nothing fitted: the step of half the logit spread, to 10 %", *BOTH),
    right("verdict", 0.8, ": four of five verdicts, or more, away from the predicted edge", *BOTH),
    right(
        "outcome",
        2 / 3,
        ", nothing fitted: two of three outcome edges, within a factor of 2",
        STAR_BOOKS,
    ),
    Claim(
        "constant",
        "one measured edge for all points: far fewer onset edges right, hardly fewer outcome edges",
        lambda df: edges.gains_at_onset_alone(points(df, BEFOREHAND)),
        *BOTH,
    ),
)


def show(df, exhibits) -> None:
    for title, among in (("Star", STAR), ("Prospective test", PROSPECTS)):
        if pairs := points(df, among):
            exhibits.grid(title, *edges.table(pairs))


if __name__ == "__main__":
    predicting = "--predict" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--predict"]
    train = functools.partial(train, predicting=predicting)
    experiment(__doc__, ARMS, None, CLAIMS, show, quick=STAR_SIZE, train=train)
