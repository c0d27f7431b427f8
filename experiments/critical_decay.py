"""When does decay inside Adam collapse a language model, and can that be told beforehand?

Coupled decay (torch's `Adam(weight_decay=)`) of `decay` in stage 1 and half of it in stage 2 on all
parameters, as in the report's recipe; all else at one point of a star about V = 2048, d = 64, 128
tokens a batch. Every point is a grid of decays times seeds, trained as replicates of one program.
Measured at each point:

- onset edge: the decay at which half of the seeds reach half of the first logit spread in stage 1;
- outcome edge: the decay at which half of the seeds have not learned at the last step;
- blind edge: the decay at which the mean loss is midway between the unigram's and ln V;
- the step of half the spread;
- depth: loss and entropy of the large block at the end, rows of the output matrix that are alive
  (norm above a tenth of the mean initial one), and the share of the text that their tokens make.

Predicted before training: `bitnet_jax.shrink`. A prediction is right when an edge is within a
factor of 2, a step of half the spread within 10 %, a collapsed state's loss within 0.3 nats, and a
verdict (learned in most seeds or not) the same; `lab.edges` has the definitions.

    python -m experiments.critical_decay --set data.corpus=text:books.validation.txt.xz
"""

from bitnet_jax import log
from experiments.lab import arms, lean, rows
from experiments.lab.arms import Arm, Request
from experiments.lab.claims import Claim
from experiments.lab.experiment import experiment

NAME = "critical_decay"
SIZE = (
    *("model.layout=report", "model.tied_embedding=false", "model.rope_theta=10000"),
    *("model.d_model=64", "model.n_layers=2", "model.d_ff=128", "data.tokenizer=bpe:2048"),
    *("data.seq_len=32", "data.batch_size=4", "data.eval_batches=4"),
    *("run.steps=600", "run.eval_every=10"),
)

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


def decays(point: str) -> tuple[float, ...]:
    """The decays of a point; of those of seven 0, too: what a run does without any."""
    _, _, first, many = STAR[point]
    return (0.0,) * (many == 7) + DECAYS[first : first + many]


def arms_of(point: str) -> list[Arm]:
    fields, numbers, _, _ = STAR[point]
    return [
        Arm(f"{point} | {decay:g}", fields=fields, coupled_1=decay, coupled_2=decay / 2, **numbers)
        for decay in decays(point)
    ]


ARMS = tuple(arm for point in STAR for arm in arms_of(point))


def train(request: Request, arms_: list[Arm], measure=None) -> list[dict]:
    """Rows of the chosen arms, written point by point; a point whose rows are there is not run."""
    del measure
    wanted, made = arms.chosen(request, arms_), []
    for point in dict.fromkeys(arm.name.partition(" | ")[0] for arm in wanted):
        mine = [arm for arm in wanted if arm.name.partition(" | ")[0] == point]
        for group in arms.groups(request, mine):
            found = there(request, group)
            if len(found) < len(group.replicates):
                print(f"{point}: {len(group.replicates)} replicates", flush=True)
                found = lean.train_rows(group, request.preset)
                rows.append(request.name, found)
                print(f"{point}: {found[0]['seconds'] * len(found):.0f} s", flush=True)
            made += found
    return made


def there(request: Request, group: arms.Group) -> list[dict]:
    """Rows of a group that are written already."""
    wanted = {(rep.name, rep.seed) for rep in group.replicates}
    known = log.read_rows(rows.FOLDER / f"{request.name}.jsonl")
    return [row for row in known if (row["arm"], row["seed"]) in wanted]


CLAIMS: tuple[Claim, ...] = ()


def show(df, exhibits) -> None:
    del df, exhibits


if __name__ == "__main__":
    experiment(__doc__, ARMS, None, CLAIMS, show, quick=SIZE, train=train)
