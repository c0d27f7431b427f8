"""Claims: findings in plain words, each beside a test on the rows of one study."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from experiments.lab.stats import NotEnough, compared, seeds
from experiments.lab.studies import Study

LONGEST = 120  # characters of a claim
HOLDS, FAILS, UNDECIDED = "holds", "DOES NOT HOLD", "not enough rows"


@dataclass(frozen=True, init=False)
class Claim:
    """A finding: what it is called, its text, a test of the rows of one study, where it is told.

    The test returns whether the text is true, or raises NotEnough.
    """

    name: str
    text: str
    test: Callable[[pd.DataFrame], bool]
    studies: tuple[Study, ...]

    def __init__(self, name: str, text: str, test: Callable, *studies: Study):
        if len(text) > LONGEST:
            raise ValueError(f"claim {name}: {len(text)} characters, {LONGEST} at most: {text}")
        for key, value in (("name", name), ("text", text), ("test", test), ("studies", studies)):
            object.__setattr__(self, key, value)


@dataclass(frozen=True)
class Finding:
    """What the rows of one study say about a claim, and by how many seeds per arm."""

    claim: Claim
    study: Study
    status: str
    seeds: int
    why: str = ""

    @property
    def is_stated(self) -> bool:
        return self.study in self.claim.studies


def judge(claim: Claim, study: Study, df: pd.DataFrame) -> Finding:
    """Test a claim on the rows of a study; a length of few seeds is shown, and decides nothing."""
    df = compared(df)
    n = seeds(df)
    try:
        return Finding(claim, study, HOLDS if claim.test(df) else FAILS, n)
    except NotEnough as error:
        return Finding(claim, study, UNDECIDED, n, str(error))
