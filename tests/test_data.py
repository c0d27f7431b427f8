"""Batches are complete, and a function of the seed and the step; windows are the split's own."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import data
from bitnet_jax.config import DataConfig
from bitnet_jax.fields import UserError

CFG = DataConfig(tokenizer="bpe:300", seq_len=4, batch_size=3)
END = 9


def windows(tokens_N, score_last=True, score_end=True):
    return data.Windows(np.asarray(tokens_N), 4, END, score_last, score_end)


def batch_ids(cfg, n, seed, step):
    return data.window_ids(cfg, n, seed, step, step + 1)[0]


# Order


def test_windows_need_the_token_after_them():
    assert [data.n_windows(n, 4) for n in (1, 4, 5, 8, 9)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_shuffled_takes_each_window_once_per_epoch(n):
    """Also where a batch straddles epochs, or is larger than several of them."""
    epochs = data.window_ids(CFG, n, 5, 0, n).reshape(3, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs.tolist())
    assert n < 7 or (epochs[0] != epochs[1]).any()


def test_shuffled_is_a_function_of_seed_and_step():
    ids = data.window_ids(CFG, 50, 5, 10, 20)
    assert ids.shape == (10, 3) and ids.dtype == np.int32
    np.testing.assert_array_equal(batch_ids(CFG, 50, 5, 12), ids[2])
    assert (batch_ids(CFG, 50, 6, 12) != ids[2]).any()
    assert (ids[3] != ids[2]).any()


def test_sequential_is_corpus_order_from_the_place_of_the_seed_and_wraps():
    cfg = replace(CFG, order="sequential")
    assert data.window_ids(cfg, 7, 0, 0, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 0, 1]]
    assert data.window_ids(cfg, 80, 3, 0, 1).tolist() == [[30, 31, 32]]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permuted_is_a_permutation_for_every_size(n):
    assert sorted(data.permuted(np.arange(n), n, (1, 2)).tolist()) == list(range(n))


def test_permuted_is_spread_and_needs_no_table():
    n = 2**40 + 12345
    places = data.permuted(np.arange(20_000), n, (7, 0)).astype(float) / n
    histogram = np.histogram(places, 10, (0, 1))[0]
    assert abs(histogram - 2000).max() < 250  # 6 standard deviations
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.04


# Batches


def test_a_batch_is_inputs_and_the_tokens_after_them():
    batch = windows(np.arange(21) + 100).cut(np.array([[0, 3], [4, 1]], np.int32))
    assert batch.inputs[0].tolist() == [[100, 101, 102, 103], [112, 113, 114, 115]]
    np.testing.assert_array_equal(batch.targets, batch.inputs + 1)
    assert batch.inputs.dtype == batch.targets.dtype == np.int32
    assert batch.weights.dtype == np.float32 and batch.weights.shape == (2, 2, 4)


def test_cutting_on_the_device_gives_the_same_batch():
    tokens_N = (np.arange(41) % 11).astype(np.uint16)
    ids = np.array([[0, 3], [4, 9]], np.int32)
    split = windows(tokens_N, score_last=False, score_end=False)
    on_device = jax.jit(split.cut)(jnp.array(ids), jnp.array(tokens_N))
    jax.tree.map(np.testing.assert_array_equal, split.cut(ids), on_device)


def test_cutting_reaches_past_two_to_the_31():
    class Positions:
        """Tokens that stand at their own position."""

        def __getitem__(self, index):
            return index // 4096

    split = data.Windows(Positions(), 4096, END, True, True)
    assert split.cut(np.array([2**20], np.int32)).inputs[0, 0] == 2**20


@pytest.mark.parametrize(
    ("score_last", "score_end", "weights"),
    [
        (True, True, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (True, False, [[1, 0, 1, 1], [1, 1, 1, 0]]),
        (False, True, [[1, 1, 1, 0], [1, 1, 1, 0]]),
        (False, False, [[1, 0, 1, 0], [1, 1, 1, 0]]),
    ],
)
def test_weights_follow_the_two_fields(score_last, score_end, weights):
    tokens_N = [9, 1, END, 2, 1, 2, 3, 4, END]
    batch = windows(tokens_N, score_last, score_end).cut(np.arange(2))
    assert batch.weights.tolist() == weights


def test_each_split_is_cut_from_its_own_tokens():
    tokens = SimpleNamespace(
        train_N=np.arange(20),
        validation_N=np.arange(100, 120),
        train_scored_N=None,
        validation_scored_N=None,
        tokenizer=SimpleNamespace(end_of_text=END),
    )
    cfg = replace(CFG, score_last=False, score_end=False)
    train, held_out = data.train_windows(cfg, tokens), data.held_out_windows(cfg, tokens)
    assert train.tokens_N is tokens.train_N and held_out.tokens_N is tokens.validation_N
    assert (train.score_last, held_out.score_last) == (False, True)
    assert train.score_end is held_out.score_end is False
    assert train.end_of_text == held_out.end_of_text == END


# Blocks of held-out windows


def test_the_small_block_is_distinct_and_evenly_spaced():
    block = data.small_block(CFG, windows(np.arange(4 * 12 + 1)))
    assert block.inputs.shape == (2, 3, 4)
    assert block.inputs[..., 0].ravel().tolist() == [0, 8, 16, 24, 32, 40]


def test_the_small_block_refuses_a_short_split():
    with pytest.raises(UserError, match=r"5 windows of 4 tokens.* needs 6"):
        data.small_block(CFG, windows(np.zeros(21)))


def test_the_large_block_is_as_large_as_asked_or_all_there_is():
    split = windows(np.arange(4 * 60 + 1))
    block = data.large_block(replace(CFG, held_out_positions=100), split)
    assert block.targets.shape == (9, 3, 4)  # 108 positions
    assert len(np.unique(block.inputs[..., 0])) == 27
    everything = data.large_block(replace(CFG, held_out_positions=10_000), split)
    assert everything.inputs[..., 0].ravel().tolist() == list(range(0, 240, 4))
    with pytest.raises(UserError, match=r"2 windows .*data\.holdout"):
        data.large_block(CFG, windows(np.zeros(9)))
