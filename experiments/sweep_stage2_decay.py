"""Does more weight decay in stage 2 prevent the collapse?

The second recommendation of the troubleshooting report, as it was made and as a diagnosis: stage-2
decay from 0 to 0.5, coupled into Adam as in the report's code, and decoupled (AdamW). Stage 1 has
decay 0.1 of the same kind in every arm, so that arms of one kind differ from step T/2 on.

    python -m experiments.sweep_stage2_decay           # 10 min on 2 cores

Goes when a study of the amount of coupled decay varies it by stage.
"""

import itertools

from bitnet_jax.metrics import DISTINCT, LOSS, MUTUAL_INFORMATION
from experiments.lab.arms import Arm
from experiments.lab.claims import Claim
from experiments.lab.experiment import experiment
from experiments.lab.stats import cured, difference
from experiments.lab.studies import QUICK_BEFORE as QUICK
from experiments.lab.studies import SMALL

DECAYS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
KINDS = ("coupled", "decoupled")
ARMS = tuple(
    Arm(f"{kind} {decay:g}", kind, **{f"{kind}_2": decay}) for kind in KINDS for decay in DECAYS
)
PAIRS = [(f"{kind} {x:g}", f"{kind} 0.05") for kind in KINDS for x in DECAYS if x != 0.05]


def ended_by_none(df) -> bool:
    """Whether no coupled arm has learned where the same decay, decoupled, has in every seed."""
    return not any(cured(df, f"coupled {x:g}", f"decoupled {x:g}").any() for x in DECAYS)


def rising(df, kind: str) -> bool:
    """Whether each larger decay gives a higher loss than the one before it."""
    names = [f"{kind} {decay:g}" for decay in DECAYS]
    return all(difference(df, more, less).above for less, more in itertools.pairwise(names))


CLAIMS = (
    Claim(
        "none",
        "no stage-2 decay, 0 included, has ended the coupled collapse by when AdamW has learned",
        ended_by_none,
        QUICK,
    ),
    Claim(
        "harm",
        "coupled, each larger stage-2 decay from 0 to 0.5 ends at a higher loss",
        lambda df: rising(df, "coupled"),
        QUICK,
    ),
    Claim(
        "decoupled",
        "decoupled, stage-2 decay from 0 to 0.5 moves the loss by less than 0.05 nats",
        lambda df: all(
            difference(df, a, b).within(-0.05, 0.05) for a, b in PAIRS[len(PAIRS) // 2 :]
        ),
        QUICK,
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
