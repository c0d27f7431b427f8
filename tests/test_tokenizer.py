"""Byte-level tokenizers lose nothing, count bytes, and are found again."""

import json

import huggingface_hub
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from bitnet_jax import tokenizer
from bitnet_jax.config import UserError

TEXT = "Zoë said 「日本」 🙂,\r\n\tand then:   x = 'don't'  \n\n"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "cache"))


def train(vocab_size=300, corpus_key="key", documents=(TEXT * 20,)):
    return tokenizer.load_tokenizer(f"bpe:{vocab_size}", corpus_key, lambda: iter(documents))


def write_gpt2(folder, merges=(("h", "e"), ("he", "y"))):
    """A GPT-2 tokenizer of 256 bytes, the merges and end of text."""
    folder.mkdir()
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate([*tokens, tokenizer.END_OF_TEXT])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return vocab


def test_bpe_round_trip_is_exact_for_any_unicode():
    bpe = train(documents=["plain ascii only"])
    texts = [TEXT, "", "\x00\x1f\u2028"]
    ids = bpe.encode_batch(texts)
    assert [bpe.decode(ids_n) for ids_n in ids] == texts
    assert {ids_n.dtype for ids_n in ids} == {np.dtype(np.int32)}


def test_bpe_has_the_vocabulary_asked_for_or_less_on_a_small_corpus():
    assert train(290).vocab_size == 290
    assert train(4096, documents=["ab ab"]).vocab_size == 256 + 1 + 1 + 1  # ab and " ab"


def test_token_bytes_add_up_to_the_utf8_length():
    bpe = train()
    assert bpe.token_bytes_V[bpe.end_of_text] == 0
    assert bpe.token_bytes_V[bpe.encode_batch([TEXT])[0]].sum() == len(TEXT.encode())


def test_text_that_spells_end_of_text_stays_text():
    bpe = train()
    ids = bpe.encode_batch(["a <|endoftext|> b"])[0]
    assert bpe.end_of_text not in ids
    assert bpe.decode(ids) == "a <|endoftext|> b"


def test_bpe_is_trained_once_per_corpus_key_and_size():
    first = train()

    def never():
        raise AssertionError("trained again")

    again = tokenizer.load_tokenizer("bpe:300", "key", never)
    assert (again.key, again.vocab_size) == (first.key, first.vocab_size)
    assert train(corpus_key="other", documents=["another text " * 9]).key != first.key


def test_only_the_first_train_chars_are_learnt_from(monkeypatch):
    monkeypatch.setattr(tokenizer, "TRAIN_CHARS", 6)
    bpe = train(documents=["ababab", "cdcdcd" * 100])
    assert len(bpe.encode_batch(["cd"])[0]) == 2
    assert len(bpe.encode_batch(["ab"])[0]) == 1


def test_gpt2_folder_is_read_with_its_merges(tmp_path):
    vocab = write_gpt2(tmp_path / "gpt2")
    gpt2 = tokenizer.load_tokenizer(f"gpt2:{tmp_path / 'gpt2'}", "unused", None)
    assert gpt2.encode_batch(["hey he"])[0].tolist() == [vocab[t] for t in ("hey", "Ġ", "he")]
    assert (gpt2.vocab_size, gpt2.end_of_text) == (259, 258)
    assert gpt2.token_bytes_V[[vocab["hey"], 258]].tolist() == [3, 0]


def test_key_follows_the_content_not_the_folder(tmp_path):
    write_gpt2(tmp_path / "a")
    write_gpt2(tmp_path / "b")
    write_gpt2(tmp_path / "c", merges=(("h", "e"), ("he", "x")))
    a, b, c = (tokenizer.load_tokenizer(f"gpt2:{tmp_path / n}", "", None).key for n in "abc")
    assert a == b != c


def test_gpt2_folder_without_its_files_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*vocab\.json and merges\.txt"):
        tokenizer.load_tokenizer(f"gpt2:{tmp_path / 'nowhere'}", "", None)
    write_gpt2(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"no merges\.txt in"):
        tokenizer.load_tokenizer(f"gpt2:{tmp_path / 'gpt2'}", "", None)


def test_gpt2_folder_with_an_empty_vocabulary_is_refused(tmp_path):
    write_gpt2(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "vocab.json").write_text("{}")
    (tmp_path / "gpt2" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="more than 256"):
        tokenizer.load_tokenizer(f"gpt2:{tmp_path / 'gpt2'}", "", None)


def test_gpt2_without_a_network_says_what_to_do(monkeypatch):
    def offline(repository, name):
        raise FileNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError, match=r"use gpt2:FOLDER .* vocab\.json and merges\.txt"):
        tokenizer.load_tokenizer("gpt2", "", None)


def test_gpt2_comes_from_the_hub_cache_without_a_download(tmp_path, monkeypatch):
    write_gpt2(tmp_path / "hub")
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda _, name: str(tmp_path / "hub" / name)
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    assert tokenizer.load_tokenizer("gpt2", "", None).vocab_size == 259


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"file/cache: .*BITNET_JAX_CACHE"):
        train()
