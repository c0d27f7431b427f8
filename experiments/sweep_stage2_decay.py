"""Does more weight decay in stage 2 prevent the collapse?

The second recommendation of the troubleshooting report, as it was made and as a diagnosis: stage-2
decay from 0 to 0.5, coupled into Adam as in the report's code, and decoupled (AdamW). Stage 1 has
decay 0.1 of the same kind in every arm, so that arms of one kind differ from step T/2 on.

    python -m experiments.sweep_stage2_decay --preset report --seeds 0-4 \
        --set data.tokenizer=bpe:2048 --set model.vocab_size=none --set model.d_model=64 \
        --set model.n_layers=2 --set model.d_ff=128 --set run.steps=3000 \
        --set run.eval_every=250 --set run.save_every=1000 \
        --set data.corpus=text:books.train.txt.xz --set data.validation=text:books.validation.txt.xz

Goes when a study of the amount of coupled decay varies it by stage.
"""

from bitnet_jax.metrics import DISTINCT, LOSS, MUTUAL_INFORMATION
from experiments.lab.arms import Arm
from experiments.lab.claims import Claim
from experiments.lab.experiment import experiment
from experiments.lab.stats import cured, difference, each, of
from experiments.lab.studies import BOOKS, SMALL

DECAYS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
KINDS = ("coupled", "decoupled")
ARMS = tuple(
    Arm(f"{kind} {decay:g}", kind, **{f"{kind}_2": decay}) for kind in KINDS for decay in DECAYS
)
PAIRS = [(f"{kind} {x:g}", f"{kind} 0.05") for kind in KINDS for x in DECAYS if x != 0.05]


def healed(df, decays: tuple[float, ...]) -> list[bool]:
    """Which coupled runs of these decays have learned where the same, decoupled, has in all."""
    return [x for d in decays for x in cured(df, f"coupled {d:g}", f"decoupled {d:g}")]


def without_logits(df, decay: float) -> bool:
    """Whether the loss of every coupled run is that of the uniform distribution."""
    arm = f"coupled {decay:g}"
    return bool((abs(each(df, arm, LOSS) - of(df, arm)["uniform"]) < 0.001).all())


CLAIMS = (
    Claim(
        "none",
        "no coupled stage-2 decay of 0.05 to 0.5 has ended the collapse by when AdamW has learned",
        lambda df: not any(healed(df, DECAYS[1:])),
        BOOKS,
    ),
    Claim(
        "zero",
        "a stage 2 without decay ends it in every seed, at a loss 0.3 nats or more above AdamW's",
        lambda df: all(healed(df, (0.0,))) and difference(df, "coupled 0", "decoupled 0").low > 0.3,
        BOOKS,
    ),
    Claim(
        "harm",
        "coupled stage-2 decay of 0.1 to 0.5 takes the logits away: the loss is ln V",
        lambda df: all(without_logits(df, x) for x in DECAYS[2:]),
        BOOKS,
    ),
    Claim(
        "decoupled",
        "decoupled, stage-2 decay from 0 to 0.5 moves the loss by less than 0.05 nats",
        lambda df: all(
            difference(df, a, b).within(-0.05, 0.05) for a, b in PAIRS[len(PAIRS) // 2 :]
        ),
        BOOKS,
    ),
)


def show(df, exhibits) -> None:
    exhibits.differences(
        df,
        [*PAIRS, ("decoupled 0.05", "coupled 0.05")],
        (LOSS, MUTUAL_INFORMATION, DISTINCT),
        "Against the report's stage-2 decay of 0.05",
    )
    exhibits.table(df)
    exhibits.dots(df)
    for kind in KINDS:
        exhibits.curves(df[df["arm"].str.startswith(kind)], title=f"Held-out loss, {kind}")


if __name__ == "__main__":
    experiment(__doc__, ARMS, None, CLAIMS, show, quick=SMALL)
