"""Decoding through the cache equals full forward passes; sampling follows its definition."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import config, generate, hf, presets
from bitnet_jax.cli import generate as command
from bitnet_jax.fields import UserError
from bitnet_jax.generate import Sampling
from bitnet_jax.model import Transformer, empty_cache, pack_params
from bitnet_jax.tokenizer import Tokenizer, load_tokenizer

V, N_NEW = 61, 6
LENGTHS_B = np.array([5, 2, 4], np.int32)
NEVER = V  # an end of text that no model gives
SHAPES = {
    "b158, tied": {"layout": "b158", "n_layers": 1},
    "b158, untied, grouped queries, bias": {
        "layout": "b158",
        "n_layers": 1,
        "n_kv_heads": 1,
        "tied_embedding": False,
        "output_bias": True,
    },
    "report, untied": {"layout": "report", "n_layers": 1, "tied_embedding": False},
    "report, tied, grouped queries, bias": {
        "layout": "report",
        "n_kv_heads": 1,
        "output_bias": True,
    },
}


def random_model(**shape):
    """Two replicates with random weights that are large enough for their argmax to vary."""
    cfg = presets.preset("tiny")
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=V, **shape))
    hyper = jax.tree.map(lambda x: jnp.full(2, x, jnp.float32), config.Hyper())
    init = Transformer(cfg.model).init
    tokens_BL = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), tokens_BL, config.Hyper())["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=(2, *x.shape)).astype(np.float32), shapes)
    return cfg, params, hyper, rng.integers(0, V, (3, 5)).astype(np.int32)


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    return random_model(**SHAPES[request.param])


@pytest.fixture(scope="module")
def simple():
    """One small model for claims that do not depend on the layout."""
    cfg, params, hyper, prompts_BP = random_model(n_layers=1, layout="report")
    return cfg, params, hyper.replace(logit_scale=jnp.full(2, 0.3)), prompts_BP


def run(model, n_new=N_NEW, lengths_B=LENGTHS_B, seed=0, end_of_text=NEVER, **sampling):
    cfg, params, hyper, prompts_BP = model
    rest = {"sampling": Sampling(**sampling), "seed": seed, "end_of_text": end_of_text}
    return np.asarray(generate.generate(cfg, params, hyper, prompts_BP, lengths_B, n_new, **rest))


def forward(cfg):
    return jax.jit(lambda p, h, x: Transformer(cfg.model).apply({"params": p}, x, h))


def test_greedy_is_the_argmax_of_full_forward_passes(model):
    """Of prompts of unequal length in one batch, each on its own and without padding."""
    cfg, params, hyper, prompts_BP = model
    full = forward(cfg)
    new_RBN = run(model)
    assert new_RBN.dtype == np.int32 and new_RBN.shape == (2, 3, N_NEW)
    for i in range(2):
        replicate_params, h = jax.tree.map(lambda x, i=i: x[i], (params, hyper))
        for b, length in enumerate(LENGTHS_B):
            whole = np.zeros(5 + N_NEW, np.int32)  # causal: what follows a position has no say
            whole[:length] = prompts_BP[b, :length]
            for n in range(length, length + N_NEW):
                whole[n] = np.asarray(full(replicate_params, h, whole[None]))[0, n - 1].argmax()
            assert new_RBN[i, b].tolist() == whole[length : length + N_NEW].tolist()
    assert len(np.unique(new_RBN)) > 5


def test_logits_through_the_cache_equal_the_full_pass(model):
    """Of a prefill, of single tokens after it, and of rows that stand at different positions."""
    cfg, params, hyper, _ = model
    replicate_params, h = jax.tree.map(lambda x: x[0], (params, hyper))
    tokens_BL = np.random.default_rng(1).integers(0, V, (2, 9)).astype(np.int32)
    expected_BLV = np.asarray(forward(cfg)(replicate_params, h, tokens_BL))

    @jax.jit
    def cached(cache, tokens_BL, position_BL):
        variables = {"params": replicate_params, "cache": cache}
        return Transformer(cfg.model).apply(variables, tokens_BL, h, position_BL, mutable="cache")

    cache = empty_cache(cfg.model, 2, 12)
    logits_BLV, filled = cached(cache, tokens_BL[:, :5], np.arange(5)[None])
    np.testing.assert_allclose(logits_BLV, expected_BLV[:, :5], rtol=1e-4, atol=1e-4)
    start_B, rows = np.array([5, 2]), np.arange(2)
    for i in range(4):
        at = start_B + i
        logits_BLV, filled = cached(filled["cache"], tokens_BL[rows, at][:, None], at[:, None])
        np.testing.assert_allclose(logits_BLV[:, 0], expected_BLV[rows, at], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
def test_neither_padding_nor_other_prompts_have_influence(simple, sampling):
    cfg, params, hyper, prompts_BP = simple
    others = (prompts_BP + 7) % V
    others[1, :2] = prompts_BP[1, :2]
    wide = np.pad(others, ((0, 0), (0, 3)), constant_values=9)
    together, beside = run(simple, **sampling), run((cfg, params, hyper, wide), **sampling)
    assert (beside[:, 1] == together[:, 1]).all() and (beside[:, 0] != together[:, 0]).any()


def test_replicates_do_not_influence_each_other(simple):
    cfg, params, hyper, prompts_BP = simple
    together = run(simple)
    swapped = jax.tree.map(lambda x: x[::-1], params)
    assert (run((cfg, swapped, hyper, prompts_BP)) == together[::-1]).all()
    assert (together[0] != together[1]).any()


def test_a_seed_decides_the_text_and_rows_and_replicates_draw_apart(simple):
    cfg, params, hyper, prompts_BP = simple
    same = (
        cfg,
        jax.tree.map(lambda x: np.stack([x[0], x[0]]), params),
        hyper,
        np.repeat(prompts_BP[:1], 3, axis=0),
    )
    first = run(same, lengths_B=np.full(3, 5), temperature=1.0)
    assert (run(same, lengths_B=np.full(3, 5), temperature=1.0) == first).all()
    assert (run(same, lengths_B=np.full(3, 5), temperature=1.0, seed=1) != first).any()
    assert len(np.unique(first.reshape(6, -1), axis=0)) == 6


def test_decoding_in_pieces_equals_decoding_at_once(simple):
    cfg, params, hyper, prompts_BP = simple
    sampling = Sampling(temperature=1.0, repetition_penalty=1.5)
    state = generate.begin(cfg, params, hyper, prompts_BP, LENGTHS_B, N_NEW, 0)
    pieces = []
    for n in (1, 3, 2):
        state, tokens_RBN = generate.extend(cfg, params, hyper, state, n, sampling, NEVER)
        pieces.append(tokens_RBN)
    at_once = run(simple, temperature=1.0, repetition_penalty=1.5)
    assert (np.concatenate(pieces, axis=-1) == at_once).all()


def test_nothing_but_end_of_text_follows_an_end_of_text(simple):
    """A prompt that ends with one goes on: documents start so."""
    free = run(simple)
    end = int(free[0, 0, 2])
    stopped = run(simple, end_of_text=end)
    first = free[0, 0].tolist().index(end)
    assert stopped[0, 0].tolist() == free[0, 0, :first].tolist() + [end] * (N_NEW - first)
    last = int(simple[3][0, 4])
    assert (run(simple, end_of_text=last)[:, 0] != last).any()


def draws(logits_V, n=20_000, seen_V=None, **sampling):
    """Frequencies of `n` choices from the same logits."""
    logits_V = jnp.asarray(logits_V, jnp.float32)
    seen = jnp.zeros(len(logits_V), bool) if seen_V is None else jnp.asarray(seen_V)
    tokens_B = jax.jit(generate.choose)(
        jnp.tile(logits_V, (n, 1)),
        jnp.tile(seen, (n, 1)),
        jax.random.split(jax.random.key(0), n),
        Sampling(**sampling),
    )
    return np.bincount(tokens_B, minlength=len(logits_V)) / n


PROBS = np.array([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"temperature": 1.0}, PROBS),
        ({"temperature": 0.5}, PROBS**2 / (PROBS**2).sum()),
        ({"temperature": 1.0, "top_k": 2}, np.array([0, 4, 0, 3]) / 7),
        ({"temperature": 1.0, "top_p": 0.8}, np.array([0, 4, 2, 3]) / 9),
        ({"temperature": 1.0, "top_p": 0.01}, np.array([0, 1, 0, 0])),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, np.array([0, 4, 0, 3]) / 7),
        ({"temperature": 0.0}, np.array([0, 1, 0, 0])),
    ],
    ids=str,
)
def test_draws_follow_the_tempered_and_cut_distribution(sampling, expected):
    """The nucleus is taken from what top-k left: of 4, 3, 2 ninths the first two reach 0.7."""
    frequencies = draws(np.log(PROBS), **sampling)
    assert np.abs(frequencies - expected).max() < 0.02 and (frequencies[expected == 0] == 0).all()


def test_a_repetition_penalty_lowers_logits_of_either_sign():
    """Divided when positive, multiplied when negative: a seen token never becomes likelier."""
    assert draws([2.0, 1.5, -9.0], 1, [True, False, False]).tolist() == [1, 0, 0]
    penalised = {"repetition_penalty": 2.0}
    assert draws([2.0, 1.5, -9.0], 1, [True, False, False], **penalised).tolist() == [0, 1, 0]
    assert draws([-2.0, -3.0, -9.0], 1, [True, False, False], **penalised).tolist() == [0, 1, 0]


def test_the_penalty_counts_the_prompt_and_the_continuation_but_not_padding(simple):
    cfg, params, hyper, prompts_BP = simple
    new_RBN = run(simple, repetition_penalty=1e6)
    for new_BN in new_RBN:
        for prompt, length, row in zip(prompts_BP, LENGTHS_B, new_BN, strict=True):
            assert len({*prompt[:length], *row}) == len({*prompt[:length]}) + len(row)
    first = run(simple)[:, 1, 0]
    padded = prompts_BP.copy()
    padded[1, 2:] = first[0]
    penalised = run((cfg, params, hyper, padded), repetition_penalty=1e6)[:, 1, 0]
    assert penalised[0] == first[0]


def test_packed_weights_write_the_same_text(model):
    """Of several replicates and prompts of unequal length."""
    cfg, params, hyper, prompts_BP = model
    packed = replace(cfg, model=replace(cfg.model, weight_format="packed"))
    packed_model = packed, pack_params(params, cfg.model, hyper), hyper, prompts_BP
    assert (run(packed_model) == run(model)).all()


def test_a_sampled_continuation_stops_at_its_end_of_text_and_others_go_on(simple):
    """Each row on its own: an end in one changes no token of another."""
    free = run(simple, temperature=1.0)
    end = int(free[0, 0, 1])
    stopped = run(simple, temperature=1.0, end_of_text=end)
    for before, after in zip(free.reshape(-1, N_NEW), stopped.reshape(-1, N_NEW), strict=True):
        n = before.tolist().index(end) if end in before else N_NEW
        assert after.tolist() == before[:n].tolist() + [end] * (N_NEW - n)


def test_any_of_several_ends_of_text_ends_a_continuation(simple):
    free = run(simple, temperature=1.0)
    ends = np.array([NEVER, free[0, 0, 1], free[1, 2, 0]])
    stopped = run(simple, temperature=1.0, end_of_text=ends)
    for before, after in zip(free.reshape(-1, N_NEW), stopped.reshape(-1, N_NEW), strict=True):
        n = len(generate.until_end(before, ends))
        assert after[: n + 1].tolist() == before[: n + 1].tolist()
        assert (after[n + 1 :] == NEVER).all()
    assert len(generate.until_end(free[0, 0], ends)) <= 1


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    """A tokenizer whose tokens are single bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITNET_JAX_CACHE", str(tmp_path_factory.mktemp("bytes")))
        return load_tokenizer("bpe:257", "none", lambda: iter(["a"]))


def pieces(tokenizer: Tokenizer, ids, n):
    """What a stream shows after each `n` tokens."""
    return [command.finished_text(tokenizer, ids[:i]) for i in range(n, len(ids) + n, n)]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_stream_never_shows_half_a_character_nor_takes_text_back(bytewise, n):
    """Characters of 2, 3 and 4 bytes, cut at every place by chunks of `n` single bytes."""
    text = "na\u00efve \u732b \U0001f408\u200d\u2b1b e\u0301"
    ids = bytewise.encode_batch([text])[0]
    assert len(ids) == len(text.encode())
    shown = pieces(bytewise, ids, n)
    assert shown[-1] == text and not any("\ufffd" in part for part in shown)
    assert all(text.startswith(part) for part in shown) and shown == sorted(shown, key=len)


def test_bytes_that_are_no_character_are_shown_once_text_follows(bytewise):
    ids = [*bytewise.encode_batch(["a"])[0], *bytewise.encode_batch(["\u732b"])[0][:2]]
    assert command.finished_text(bytewise, ids) == "a"
    after = command.finished_text(bytewise, [*ids, *bytewise.encode_batch(["b"])[0]])
    assert after[0] == "a" and after[-1] == "b" and set(after[1:-1]) == {"\ufffd"}


def test_a_prompt_may_fill_the_context_and_its_continuation_pass_it(bytewise):
    prompts_BP, lengths_B = command.encode(bytewise, ["abcd", "ab"], 100, context=4)
    assert prompts_BP.shape == (2, 4) and lengths_B.tolist() == [4, 2]
    with pytest.raises(UserError, match=r"abcde'\.\.\.: 5 tokens, but the model's context"):
        command.encode(bytewise, ["ab", "abcde"], 1, context=4)


def test_a_hugging_face_folder_writes_the_same_text_packed_or_not(bytewise, tmp_path, capsys):
    """Speed goes to standard error, so that standard output is the same."""
    cfg, params, _, _ = random_model(n_layers=1)
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=257))
    replicate_params = jax.tree.map(lambda x: x[0], params)
    replicate_params["embed"]["embedding"] = (
        np.random.default_rng(2).normal(size=(257, 32)).astype(np.float32)
    )
    for name, packed in {"latents": False, "codes": True}.items():
        hf.export(tmp_path / name, cfg, replicate_params, config.Hyper(), bytewise, packed=packed)
    texts = []
    for folder, flags in (("latents", []), ("latents", ["--packed"]), ("codes", [])):
        argv = [str(tmp_path / folder), "--prompt", "a", "--tokens", "20", *flags]
        command.main(argv)
        printed = capsys.readouterr()
        assert printed.out.startswith("a") and printed.err.endswith("\n[20 tokens]\n")
        texts.append(printed.out)
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 20


def letters(text):
    return np.array([[ord(c) for c in text]])


END = ord("$")


def test_degeneration_of_a_cycle_by_hand():
    """`abcd` five times: 4 distinct of 20 tokens, and 4 distinct of 17 four-grams."""
    stats = generate.degeneration(letters("abcd" * 5), END)
    assert stats == {
        "unique": 4,
        "distinct_1": 4 / 20,
        "distinct_2": 4 / 19,
        "distinct_3": 4 / 18,
        "distinct_4": 4 / 17,
        "rep_4": 1 - 4 / 17,
        "loop": 1,
        "loop_period": 4,
    }


def test_degeneration_of_text_without_repetition_is_none():
    stats = generate.degeneration(letters("abcdefghij"), END)
    assert stats["unique"] == 10 and stats["rep_4"] == stats["loop"] == 0
    assert stats["distinct_1"] == stats["distinct_4"] == 1 and stats["loop_period"] is None


def test_degeneration_averages_continuations_and_stops_at_their_end_of_text():
    """Three letters and the end, then a loop of period 1 that lasts."""
    tokens = np.concatenate([letters("abc$$$$$$$"), letters("xyzaaaaaaa")])
    stats = generate.degeneration(tokens, END)
    assert stats["unique"] == (3 + 4) / 2 and stats["distinct_1"] == (1 + 0.4) / 2
    assert stats["distinct_4"] == (1 + 4 / 7) / 2  # three tokens have no four-grams to repeat
    assert stats["loop"] == 0.5 and stats["loop_period"] == 1


@pytest.mark.parametrize(
    ("text", "period"),
    [
        ("abcd" * 5, 4),
        ("qrs" + "abcd" * 5, 4),  # what came before the loop does not matter
        ("abcd" * 5 + "q", None),  # it has ended
        ("abcd" * 4 + "bcd", None),  # 15 of the last 16 equal the one four before
        ("aaaaa", 1),
        ("aaaa", None),
        ("ab" * 10, 2),  # the smallest, not 4
        ("", None),
    ],
)
def test_a_loop_repeats_over_four_periods_to_the_end(text, period):
    assert generate.loop_period([ord(c) for c in text]) == period
