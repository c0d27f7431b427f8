"""How a regulariser is judged: cure, mask, cosmetics or harm, from intervals over seeds."""

import math

import numpy as np
import pytest

from bitnet_jax import presets
from bitnet_jax.config import Hyper
from bitnet_jax.loss import REGULARISERS
from experiments import common
from experiments import sweep_regularisers as sweep
from experiments.stats import Interval

UP, DOWN, NONE = Interval(1, 0.5, 1.5, 3), Interval(-1, -1.5, -0.5, 3), Interval(0, -1, 1, 3)
COLLAPSED, HEALTHY = Interval(1.0, 0.9, 1.1, 3), Interval(-0.5, -0.6, -0.4, 3)
AT_UNIGRAM, JUST_BELOW = Interval(0.02, 0.01, 0.03, 3), Interval(-0.1, -0.11, -0.09, 3)
LITTLE = Interval(0.06, 0.055, 0.065, 3)
LEARNED, BLIND = Interval(0.5, 0.4, 0.6, 3), Interval(0.004, 0.003, 0.005, 3)


def judged(loss, mi, unique, repeats=NONE, *, excess=HEALTHY, control=HEALTHY, own_mi=LEARNED):
    return sweep.judge(
        *(loss, mi, unique, repeats),
        excess=excess,
        control_excess=control,
        healthy_excess=HEALTHY,
        own_mi=own_mi,
        healthy_mi=LEARNED,
    )


@pytest.mark.parametrize(
    ("changes", "about", "expected"),
    [
        ((DOWN, UP, UP), {"control": COLLAPSED}, "cures"),
        ((DOWN, UP, DOWN), {"control": COLLAPSED}, "cures"),  # the tokens do not matter
        ((DOWN, UP, UP), {"control": COLLAPSED, "excess": AT_UNIGRAM}, "helps, not a cure"),
        ((DOWN, NONE, NONE), {"control": COLLAPSED, "excess": AT_UNIGRAM}, "masks"),
        ((DOWN, UP, UP), {"control": COLLAPSED, "own_mi": BLIND}, "masks"),
        ((DOWN, UP, UP), {"control": COLLAPSED, "excess": AT_UNIGRAM, "own_mi": BLIND}, "masks"),
        # Given the unigram, a little context is learned before the decay stops it.
        ((DOWN, UP, UP), {"control": COLLAPSED, "excess": JUST_BELOW, "own_mi": LITTLE}, "masks"),
        ((DOWN, UP, UP), {"control": COLLAPSED, "excess": JUST_BELOW}, "helps, not a cure"),
        ((DOWN, NONE, UP), {"control": COLLAPSED, "excess": COLLAPSED}, "helps, not a cure"),
        ((DOWN, NONE, UP), {}, "helps"),
        ((DOWN, DOWN, UP), {}, "mixed"),
        ((DOWN, NONE, UP, UP), {}, "mixed"),
        ((NONE, NONE, NONE, DOWN), {}, "helps"),
        ((UP, UP, UP), {}, "cosmetic"),
        ((NONE, UP, UP, DOWN), {"control": COLLAPSED}, "cosmetic"),
        ((UP, UP, NONE), {}, "hurts"),
        ((NONE, NONE, NONE, UP), {}, "hurts"),
        ((NONE, NONE, DOWN), {}, "no effect seen (n=3)"),
        ((NONE, UP, NONE, None), {}, "no effect seen (n=3)"),
    ],
)
def test_judgement(changes, about, expected):
    assert judged(*changes, **about) == expected


def test_one_seed_shows_nothing():
    """However large a difference is: its interval is infinite."""
    one = Interval(-9.0, -math.inf, math.inf, 1)
    about = {"excess": one, "control": Interval(5.0, -math.inf, math.inf, 1), "own_mi": one}
    assert judged(one, one, one, one, **about) == "no effect seen (n=1)"


# Final loss, mutual information, distinct tokens and greedy repeats; the unigram has loss 6.
COUPLED, DECOUPLED = (7.5, 0.002, 3, 0.9), (5.0, 0.5, 40, 0.5)
SEEDS = range(3)


def row(arm, seed, numbers, decoded):
    """A row whose numbers differ a little between seeds."""
    shift = 1 + 1e-3 * np.random.default_rng(seed).normal()
    noise = 1 + 1e-4 * np.random.default_rng([seed, *arm.encode()]).normal(size=4)
    loss, mi, unique, repeats = (float(x) for x in np.array(numbers) * shift * noise)
    final = {
        "eval/loss": loss,
        "collapse/entropy": 6.0,
        "collapse/mutual_information": mi,
        "collapse/logit_std": 1.0,
        "collapse/unique_tokens": unique,
        "collapse/verdict": "healthy",
    }
    grams = {n: {"loss": x, "entropy": x, "distinct": 1} for n, x in
             {"uniform": 7.6, "unigram": 6.0, "bigram": 4.5}.items()}  # fmt: skip
    return {
        "arm": arm,
        "seed": seed,
        "steps": 40,
        "final": final | ({"decode/greedy_rep_4": repeats} if decoded else {}),
        "references": grams | {"targets": {"distinct": 99}, "tracked_positions": 128},
        "curve": {"step": [0, 20, 40], "eval/loss": [7.6, 7.0, loss]},
    }


def rows(changed=None, seeds=SEEDS, decoded=True):
    """All arms, of which those in `changed` differ from their recipe's control."""
    out = []
    for arm in (a.name for a in sweep.ARMS):
        base = COUPLED if arm.startswith("coupled") else DECOUPLED
        numbers = (changed or {}).get(arm, base)
        out += [row(arm, seed, numbers, decoded) for seed in seeds]
    return out


CHANGED = {
    "coupled unigram_bias": (6.02, 0.003, 1, 0.9),
    "coupled frequency_penalty": (7.6, 0.01, 30, 0.9),
    "coupled label_smoothing": (7.3, 0.003, 3, 0.9),
    "decoupled unlikelihood": (4.9, 0.5, 41, 0.2),
    "decoupled coverage": (5.3, 0.5, 20, 0.5),
}


def test_rows_are_judged_within_their_recipe():
    found = sweep.judgements(rows(CHANGED))
    assert len(found) == 16
    assert found["coupled unigram_bias"] == "masks"
    assert found["coupled frequency_penalty"] == "cosmetic"
    assert found["coupled label_smoothing"] == "helps, not a cure"
    assert found["decoupled unlikelihood"] == "helps"
    assert found["decoupled coverage"] == "hurts"


def test_a_young_healthy_recipe_leaves_prevention_unjudged():
    """Neither recipe below the unigram: nothing tells a collapse from too few steps."""
    young = {"decoupled none": (8.3, 0.1, 7, 0.5)}
    told = sweep.analyse(rows(CHANGED | young)).conclusion
    assert told.startswith("the decoupled recipe alone is not shown to end below the unigram's")
    assert "cannot be told from a young model" in told and "prevents" not in told


def test_the_conclusion_names_what_masks_and_that_nothing_cures():
    study = sweep.analyse(rows(CHANGED))
    assert study.n == 3
    assert study.conclusion.startswith("no regulariser prevents the collapse (8 tried, n=3)")
    assert "unigram_bias masks it: word frequencies given" in study.conclusion
    assert "cosmetic: frequency_penalty" in study.conclusion
    assert "on the healthy recipe unlikelihood lowers the loss (Holm)" in study.conclusion
    assert "unigram_bias -1.48" in study.result
    first = study.tables[0]
    assert [line[0] for line in first.rows][::7] == ["label_smoothing 0.1", "unigram_bias"]
    assert all(len(line) == len(first.columns) for line in first.rows)
    assert len(study.figures) == 2 and all("<svg" in svg for _, svg in study.figures)


def test_a_cure_is_reported_as_one():
    study = sweep.analyse(rows({"coupled entropy_bonus": DECOUPLED}))
    assert study.conclusion.startswith("prevented by entropy_bonus")


def test_a_control_that_does_not_collapse_cannot_be_cured():
    same = {a.name: DECOUPLED for a in sweep.ARMS} | {"coupled coverage": (4.5, 0.6, 50, 0.4)}
    study = sweep.analyse(rows(same))
    assert "prevention cannot be judged" in study.conclusion
    assert "prevented by" not in study.conclusion


def test_one_seed_without_decoded_text_is_analysed_and_shows_nothing():
    study = sweep.analyse(rows(CHANGED, seeds=[0], decoded=False))
    cells = {cell for line in study.tables[0].rows for cell in line[1:]}
    assert cells == {"no effect seen (n=1)", "one seed"}
    assert "greedy repeats" not in study.tables[1].columns
    assert "prevention cannot be judged" in study.conclusion


def test_p_values_are_adjusted_over_both_recipes():
    """The smallest of 16 is multiplied by 16, and none is lowered."""
    adjusted = sweep.holm_p(rows(CHANGED))
    assert len(adjusted) == 16 and max(adjusted.values()) <= 1
    assert adjusted["coupled unigram_bias"] < 0.01 < adjusted["coupled coverage"]
    assert sweep.holm_p(rows(seeds=[0])) == {}


def test_arms_are_the_regularisers_of_the_package_and_the_bias_on_both_recipes():
    names = {"none", "unigram_bias", *REGULARISERS}
    assert [a.name for a in sweep.ARMS] == list(dict.fromkeys(a.name for a in sweep.ARMS))
    for kind in ("coupled", "decoupled"):
        assert {a.name.split()[1] for a in sweep.ARMS if a.name.startswith(f"{kind} ")} == names
    assert all(weight > 0 and hasattr(Hyper(), name) for name, weight in sweep.WEIGHTS.items())


def test_quick_is_the_reports_model_at_a_small_size():
    request = common.parse("doc", sweep.NAME, "quick", [], quick=sweep.QUICK)
    assert request.cfg.model.layout == "report" and request.cfg.model.d_model == 128
    assert request.cfg.run.save_every == request.cfg.run.steps <= presets.preset("report").run.steps
