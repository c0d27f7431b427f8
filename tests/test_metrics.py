"""One list of metrics describes every number that a run writes."""

import pytest

from bitnet_jax import metrics
from bitnet_jax.metrics import METRICS, metric


def test_a_key_is_described_once():
    assert len(metrics._LIST) == len(METRICS)


@pytest.mark.parametrize("entry", METRICS.values(), ids=list(METRICS))
def test_a_metric_can_be_shown(entry):
    """Its format takes a float, a table has room for its title, and its meaning ends."""
    assert f"{0.5:{entry.format}}"
    assert len(entry.title) <= 26
    assert entry.meaning.endswith(".")
    assert entry.better in (-1, 0, 1)
    assert entry.reference in (None, "loss", "entropy", "distinct")


def test_a_member_of_a_family_carries_its_own_name():
    head = metric("decay/norm_ratio_head")
    assert (head.key, head.title) == ("decay/norm_ratio_head", "weight norm: head")
    assert (head.unit, head.meaning) == (METRICS[metrics.NORM_RATIO].unit, head.meaning)
    assert metric(metrics.GREEDY_REP_4) is METRICS[metrics.GREEDY_REP_4]
    assert metric("decode/greedy_distinct_2").title == "greedy: distinct 2"


def test_a_lower_loss_is_better_and_more_information_too():
    """Differences of losses and a distance are losses; standard errors and entropies neither."""
    better = {key: entry.better for key, entry in METRICS.items() if entry.better}
    information = (metrics.MUTUAL_INFORMATION, metrics.HELD_OUT_MUTUAL_INFORMATION)
    losses = (metrics.LOSS, metrics.HELD_OUT_LOSS, metrics.TRACK_LOSS, metrics.TRAIN_LOSS)
    differences = (metrics.MINUS_UNIGRAM, metrics.MINUS_BIGRAM)
    lower = (*losses, *differences, metrics.BITS_PER_BYTE, metrics.UNIGRAM_KL, metrics.FUTURE_LEAK)
    assert better == dict.fromkeys(lower, -1) | dict.fromkeys(information, 1)


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(KeyError, match=r"eval/los.*eval/loss\?"):
        metric("eval/los")
    with pytest.raises(KeyError):
        metric("nothing like it")


def test_every_constant_names_a_metric():
    keys = {v for k, v in vars(metrics).items() if k.isupper() and isinstance(v, str) and "/" in v}
    assert keys <= METRICS.keys()
    assert len(keys) > 30
