"""The architecture sweep changes one thing at a time, and its sentences follow from the rows."""

import dataclasses
import itertools

import pytest

from bitnet_jax import presets
from experiments import sweep_architectures as study

REFERENCES = {
    "tracked_positions": 1024,
    "targets": {"distinct": 394},
    "uniform": {"loss": 7.62, "entropy": 7.62, "distinct": 1},
    "unigram": {"loss": 6.49, "entropy": 6.33, "distinct": 1},
    "bigram": {"loss": 4.39, "entropy": 4.09, "distinct": 185},
}
LEARNED, COLLAPSED, MASKED = (5.5, 0.6), (7.2, 0.002), (6.3, 0.01)  # loss, mutual information
TINY = presets.preset("tiny")


def rows(coupled=COLLAPSED, decoupled=LEARNED, **special):
    """Rows of three seeds; `special` maps an arm, with _ for space, to its numbers."""
    out = []
    for arm, seed in itertools.product(study.arms(TINY), range(3)):
        usual = coupled if arm.name.startswith("coupled") else decoupled
        loss, context = special.get(arm.name.replace(" ", "_").replace("-", "_"), usual)
        final = {
            "eval/loss": loss + 0.01 * seed,
            "collapse/mutual_information": context,
            "collapse/entropy": 7.0,
            "collapse/logit_std": 1.0,
            "collapse/unique_tokens": 30,
            "collapse/verdict": "healthy",
        }
        out.append({"arm": arm.name, "seed": seed, "final": final, "references": REFERENCES})
    return out


@pytest.mark.parametrize("name", [c for c in study.changes(TINY) if c != study.BASE])
def test_every_change_makes_a_valid_model_of_one_changed_factor(name):
    hyper, model = study.changes(TINY)[name]
    changed = dataclasses.replace(TINY.model, **model)
    assert hyper or changed != TINY.model
    factors = {"d_ff": "d_model", "act_quant": "weight_quant"}  # move together
    moved = {factors.get(k, k) for k in (*hyper, *model)}
    assert len(moved) == (2 if name == "tied embedding" else 1)
    for recipe in study.KINDS.values():
        made = presets.RECIPES[recipe](TINY.run.steps).replace(**hyper)
        presets.check_hyper(TINY.run, made)


def test_both_recipes_have_every_change_and_names_do_not_repeat():
    names = [arm.name for arm in study.arms(TINY)]
    assert len(set(names)) == len(names) == 2 * len(study.changes(TINY)) == 24


def test_quick_holds_what_all_sweeps_share():
    assert set(study.common.SMALL) <= set(study.QUICK)


def test_no_architecture_is_credited_where_only_decoupling_helps():
    told = study.analyse(rows()).conclusion
    assert "none of 11 changes of the architecture ends the collapse" in told
    assert "decoupling lowers it in 12 of 12 architectures" in told
    assert "-1.70 [-1.70, -1.70] (n=3)" in told
    assert "decoupled, every architecture learns" in told


def test_an_architecture_that_ends_the_collapse_is_named():
    told = study.analyse(rows(coupled_full_precision=LEARNED)).conclusion
    assert "the collapse is ended by full precision (n=3)" in told
    assert "full precision ends +0.00 [+0.00, +0.00] from the decoupled base" in told
    assert "none of" not in told


def test_a_low_loss_without_context_is_called_masked():
    found = study.analyse(rows(coupled_logits_x_16=MASKED))
    assert "none of 11 changes" in found.conclusion
    assert "logits x 16 only masks it" in found.conclusion
    assert next(r for r in found.tables[0].rows if r[0] == "logits x 16")[-2] == "masked"


def test_one_seed_above_the_unigram_makes_the_outcome_mixed():
    several = rows(coupled_full_precision=LEARNED)
    next(r for r in several if r["arm"] == "coupled full precision")["final"]["eval/loss"] = 7.0
    assert study.outcome(several, "coupled full precision") == "mixed"
    assert "seeds differ for full precision" in study.analyse(several).conclusion


def test_a_base_that_does_not_collapse_is_said_so():
    told = study.analyse(rows(coupled=LEARNED)).conclusion
    assert "the coupled base does not collapse here" in told
    assert "no effect seen" in told


def test_a_change_that_breaks_the_healthy_recipe_is_named():
    told = study.analyse(rows(decoupled_coverage_loss=COLLAPSED)).conclusion
    assert "decoupled, all learn but coverage loss" in told


def test_full_precision_gap_is_ternary_minus_none_in_the_healthy_recipe():
    result = study.analyse(rows(decoupled_full_precision=(5.3, 0.6))).result
    assert "+0.200 [+0.200, +0.200] (n=3)" in result


def test_figures_show_both_recipes_beside_the_reference_predictors():
    loss, context = (svg for _, svg in study.analyse(rows()).figures)
    for word in ("unigram", "bigram", "coupled", "decoupled", *study.changes(TINY)):
        assert f">{word}<" in loss
    assert ">context-blind<" in context
