"""The ranking of causes follows from the numbers of an audit, and tells one story."""

import numpy as np
import pytest

from bitnet_jax import causes, signatures


@pytest.fixture(scope="module")
def healthy():
    """Numbers of a healthy run of 200 steps of the reduced quick preset."""
    m = {"loss": 5.905, "entropy": 5.951, "overconfidence": -0.046, "mutual_information": 0.496}
    m |= {"unigram_loss": 6.486, "minus_unigram": -0.581, "minus_unigram_se": 0.02}
    m |= {"scale": 1.01, "scale_gain": 0.0003, "earlier_tokens": 0.126, "future_leak": 0.0}
    m |= {"nonfinite": 0.0, "dead_matrices": 0.0, "zero_rate": 0.33, "zero_rate_most": 0.4}
    m |= {"ste_weight": 0.0, "ste_activation": 0.0, "repeated_text": 0.05, "repeated_documents": 0}
    m |= {
        "unused_vocabulary": 0.3,
        "unused_mass": 1e-4,
        "sum_lr": 0.165,
        "planned_lr": 0.165,
        "clip_factor": 0.8,
    }
    m |= {"repeated": 0.0, "padding_scored": 0.0, "codes_changed": 0.177, "start_latent": 0.041}
    m |= {"offset": 1, "offset_error": 2e-6, "loss_error": 2e-6, "start_gain": 0.998}
    m |= {"overfit_loss": 0.18, "overfit_steps": 25, "overfit_limit": 2.0}
    for group, moved, update in (("matrix", 0.375, 0.007), ("head", 0.92, 0.008)):
        m |= {f"moved_{group}": moved, f"update_{group}": update, f"norm_{group}": 1.1}
        m |= {f"decay_factor_{group}": 0.9924, f"decay_spread_{group}": 3e-7}
        m |= {f"decay_unscaled_{group}": 0.0, f"decay_share_{group}": 0.015}
        m |= {f"zeros_{group}": 0.0, f"below_eps_{group}": 0.0}
    return m


# A model on which the loss stays above the unigram's and the context is not used.
STUCK = {
    "loss": 6.9,
    "minus_unigram": 0.42,
    "mutual_information": 0.02,
    "earlier_tokens": 0.001,
}
CHANGED = {
    "weights are not finite": {"nonfinite": 0.01},
    "repeated batches": {"repeated": 0.97, "overconfidence": 2.1},
    "shifted labels": {"offset": 2, "offset_error": 1e-6, "loss_error": 0.8},
    "padding is scored": {"padding_scored": 0.5},
    "repeated text": {"repeated_text": 0.9, "overconfidence": 2.0},
    "probability on unused tokens": {"unused_mass": 0.4, "mutual_information": 0.07},
    "later tokens are seen": {"future_leak": 0.2},
    "another loss": {"loss_error": 0.1},
    "no straight-through gradient": {"ste_weight": 3.0},
    "dead ternary matrices": {"dead_matrices": 0.5, "zero_rate_most": 1.0},
    "logits scaled down": {"start_gain": 128**-0.5, "scale_gain": 0.4, "scale": 3.0},
    "decay through Adam": {"decay_share_matrix": 0.54, "decay_spread_head": 0.4, "scale_gain": 1},
    "decay not scaled by the learning rate": {
        "decay_share_matrix": 0.9,
        "decay_unscaled_matrix": 0.99,
    },
    "output matrix not updated": {"update_head": 0.0},
    "weights not updated": {"update_matrix": 0.0},
    "latent weights out of reach": {"start_latent": 0.8, "codes_changed": 0.01},
    "learning rate too small": {"planned_lr": 1.65e-3, "sum_lr": 1.65e-3},
    "stifling clip": {"clip_factor": 1e-4, "below_eps_matrix": 0.9},
    "updates below Adam's eps": {"below_eps_matrix": 0.9},
    "no gradient for the ternary weights": {"zeros_matrix": 1.0},
    "learning rate too high": {"overconfidence": 3.0},
    "logits too small": {"scale_gain": 1.5, "scale": 6.0},
    "context ignored": {},
    "only the last token used": {"mutual_information": 0.3},
    "cannot overfit one batch": {"overfit_loss": 4.0, "earlier_tokens": 0.2},
}


def test_every_cause_has_a_signature_here():
    assert list(CHANGED) == list(dict.fromkeys(CHANGED))
    assert set(CHANGED) == {cause.name for cause in signatures.CAUSES}


@pytest.mark.parametrize("cause", CHANGED)
def test_each_cause_follows_from_its_own_signature(healthy, cause):
    ranked = causes.rank(healthy | STUCK | CHANGED[cause])
    assert ranked[0].name == cause
    assert all(0 < finding.score <= 1 for finding in ranked)


def test_every_name_that_a_cause_explains_is_a_cause():
    names = {cause.name for cause in signatures.CAUSES}
    assert len(names) == len(signatures.CAUSES)
    assert all(set(cause.explains) <= names - {cause.name} for cause in signatures.CAUSES)


def test_a_model_that_has_learned_has_no_cause_and_neither_has_a_young_one(healthy):
    assert causes.rank(healthy) == []
    young = {"sum_lr": 0.01, "minus_unigram": 0.8, "scale_gain": 0.6, "scale": 2.0}
    assert causes.rank(healthy | young | {"mutual_information": 0.01}) == []


@pytest.mark.parametrize(
    "harmless",
    [
        {"planned_lr": 1e-4, "sum_lr": 1e-4},  # an imported model that is trained on a little
        {"decay_share_matrix": 0.02, "decay_spread_matrix": 0.4},  # coupled 1e-4
        {"decay_share_matrix": 0.39, "decay_spread_matrix": 0.4},  # coupled 1e-2, learned
        {"offset": 2, "offset_error": 0.1, "loss_error": 0.113},  # a regularised loss
        {"offset": 2, "offset_error": 1e-3, "loss_error": 0.05},  # near by chance, all alike
        {"start_gain": 0.1},
        {"overfit_loss": 3.0},
        {"unused_vocabulary": 0.97, "repeated_text": 0.5},
    ],
    ids=str,
)
def test_what_has_no_effect_is_no_cause(healthy, harmless):
    assert causes.rank(healthy | harmless) == []


def test_targets_that_give_the_loss_itself_need_no_margin(healthy):
    """A model that ignores its context tells offsets apart by the ends of its windows alone."""
    blind = {"offset": 2, "offset_error": 1e-6, "loss_error": 0.03}
    assert causes.rank(healthy | STUCK | blind)[0].name == "shifted labels"


def test_the_score_of_coupled_decay_grows_with_its_share_of_the_update(healthy):
    def score(share):
        changed = {"decay_spread_matrix": 0.4, "decay_share_matrix": share}
        return causes.supported(healthy | STUCK | changed).get("decay through Adam", 0.0)

    scores = [score(share) for share in (0.0, 0.05, 0.15, 0.26, 0.47, 0.54)]
    assert scores == sorted(scores) and scores[1] == 0 < scores[2] < scores[3] < scores[4] == 1


def test_a_symptom_is_listed_alone_but_not_beside_its_cause(healthy):
    stuck = healthy | STUCK | {"overfit_loss": 4.0}
    assert [f.name for f in causes.rank(stuck)] == ["context ignored", "cannot overfit one batch"]
    (frozen,) = causes.rank(stuck | {"update_head": 0.0})
    assert frozen.name == "output matrix not updated"
    assert set(frozen.explains) == {"context ignored", "cannot overfit one batch"}


def test_contradictory_symptoms_never_appear_together(healthy):
    """Earlier tokens are used or ignored, logits too small or too large: not both."""
    pairs = [
        {"context ignored", "only the last token used"},
        {"learning rate too high", "logits too small"},
        {"learning rate too high", "learning rate too small"},
    ]
    rng = np.random.default_rng(0)
    ranges = {
        "mutual_information": (0, 0.6),
        "earlier_tokens": (0, 0.05),
        "overconfidence": (-3, 3),
        "scale_gain": (0, 2),
        "planned_lr": (0, 0.2),
        "minus_unigram": (-1, 2),
    }
    for _ in range(500):
        m = healthy | {key: rng.uniform(*bounds) for key, bounds in ranges.items()}
        # Logits that are too large are overconfident, and their best scale is below 1.
        m["scale"] = 0.5 if m["overconfidence"] > 0 else 2.0
        names = {finding.name for finding in causes.rank(m)}
        assert not any(pair <= names for pair in pairs)


def test_missing_numbers_leave_out_their_causes_alone(healthy):
    """A Hugging Face folder: no optimiser and no start."""
    stripped = {
        key: x
        for key, x in healthy.items()
        if not key.startswith(("decay_", "update_", "moved_", "norm_", "zeros_", "below_"))
        and key not in ("sum_lr", "planned_lr", "start_gain", "start_latent", "offset", "repeated")
    }
    assert causes.rank(stripped) == []
    names = [finding.name for finding in causes.rank(stripped | STUCK | {"future_leak": 1.0})]
    assert names == ["later tokens are seen"]
    assert [f.name for f in causes.rank({"nonfinite": 0.5})] == ["weights are not finite"]


def test_lines_number_the_causes_and_say_when_there_is_none(healthy):
    m = healthy | STUCK | {"repeated": 1.0, "vocabulary": 1}
    first, *_, last = causes.render(m, causes.rank(m))
    assert first.startswith("1. repeated batches (1.00): ") and last.startswith("next: ")
    assert causes.render(healthy, [])[0].startswith("no cause found")
