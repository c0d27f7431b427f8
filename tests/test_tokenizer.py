"""Byte-level tokenizers lose nothing, count bytes, and are what their folders say."""

import json
import sys

import hf_models
import huggingface_hub
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from bitnet_jax import tokenizer, tokens
from bitnet_jax.fields import UserError

TEXT = "Zoë said 「日本」 🙂,\r\n\tand then:   x = 'don't'  \n\n"
BEGIN, EOT, EOM = 290, 291, 292  # special tokens of `llama3_like`
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "cache"))


def train(vocab_size=300, corpus_key="key", documents=(TEXT * 20,)):
    return tokenizer.load_tokenizer(f"bpe:{vocab_size}", corpus_key, lambda: iter(documents))


def load(spec):
    return tokenizer.load_tokenizer(spec, "unused", None)


def error_of(spec):
    with pytest.raises(UserError) as caught:
        load(spec)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def write_gpt2(folder, merges=(("h", "e"), ("he", "y"))):
    """A GPT-2 tokenizer of 256 bytes, the merges and end of text."""
    folder.mkdir()
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate([*tokens, tokenizer.END_OF_TEXT])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merge_lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(merge_lines) + "\n", encoding="utf-8")
    return vocab


def llama3_like(template="<|begin_of_text|> $A"):
    """A byte-level BPE with a template, special tokens, and added tokens that are text."""
    backend = Tokenizer.from_str(train(290).backend.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>"])
    backend.add_tokens([AddedToken("    ", normalized=False), AddedToken("ö", normalized=False)])
    if template:
        special = [(t, backend.token_to_id(t)) for t in template.split() if t != "$A"]
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
    return backend


def write_folder(folder, backend, settings=(), **files):
    """A Hugging Face folder of a tokenizer; `files` are further JSON files by stem."""
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"} | dict(settings)
    for stem, tree in ({"tokenizer_config": settings} | files).items():
        (folder / f"{stem}.json").write_text(json.dumps(tree))
    return f"hf:{folder}"


# Trained on the corpus


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


def test_a_bpe_has_no_template():
    bpe = train()
    assert (bpe.begin, bpe.close, bpe.ends) == ((), (bpe.end_of_text,), (bpe.end_of_text,))
    np.testing.assert_array_equal(bpe.encode_prompt(TEXT), bpe.encode_batch([TEXT])[0])


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


def test_only_so_many_bytes_of_different_words_are_learnt_from(monkeypatch):
    monkeypatch.setattr(tokenizer, "TRAIN_WORD_BYTES", 10)
    texts = ["ab cd ab", "ab cd " * 50, "\u65e5\u672c", "never"]
    assert list(tokenizer._training_part(iter(texts))) == texts[:3]


def test_long_runs_are_learnt_from_in_parts_and_nothing_is_lost():
    texts = [f"word {'x' * 1000} word{' ' * 700}{chr(10) * BEGIN}end.", "short and\n\nplain "]
    parts = list(tokenizer._training_part(iter(texts)))
    assert "".join(parts) == "".join(texts) and parts[-1] == texts[1]
    assert max(map(len, parts)) <= 256


# GPT-2's


def test_gpt2_folder_is_read_with_its_merges(tmp_path):
    vocab = write_gpt2(tmp_path / "gpt2")
    gpt2 = load(f"gpt2:{tmp_path / 'gpt2'}")
    assert gpt2.encode_batch(["hey he"])[0].tolist() == [vocab[t] for t in ("hey", "Ġ", "he")]
    assert (gpt2.vocab_size, gpt2.end_of_text) == (259, 258)
    assert gpt2.token_bytes_V[[vocab["hey"], 258]].tolist() == [3, 0]


def test_gpt2_folder_is_the_tokenizer_of_transformers(tmp_path):
    from transformers import AutoTokenizer, GPT2TokenizerFast

    write_gpt2(tmp_path / "gpt2")
    ours = load(f"gpt2:{tmp_path / 'gpt2'}")
    theirs = GPT2TokenizerFast.from_pretrained(tmp_path / "gpt2")
    assert ours.encode_batch([TEXT])[0].tolist() == theirs(TEXT)["input_ids"]
    theirs.save_pretrained(tmp_path / "saved")  # tokenizer.json and no vocab.json
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_text(ours.backend.to_str())
    for name in ("saved", "bare"):
        again = load(f"gpt2:{tmp_path / name}")
        assert (again.vocab_size, again.end_of_text, again.begin) == (259, 258, ())
        assert again.encode_batch([TEXT])[0].tolist() == theirs(TEXT)["input_ids"]
    ours.save(tmp_path / "ours")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "ours")(TEXT)["input_ids"]
        == (theirs(TEXT)["input_ids"])
    )


def test_key_follows_the_content_not_the_folder(tmp_path):
    write_gpt2(tmp_path / "a")
    write_gpt2(tmp_path / "b")
    write_gpt2(tmp_path / "c", merges=(("h", "e"), ("he", "x")))
    a, b, c = (load(f"gpt2:{tmp_path / n}").key for n in "abc")
    assert a == b != c


def test_gpt2_folder_without_its_files_is_named(tmp_path):
    assert "vocab.json and merges.txt" in error_of(f"gpt2:{tmp_path / 'nowhere'}")
    write_gpt2(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "merges.txt").unlink()
    assert "must hold vocab.json and merges.txt, or tokenizer.json" in error_of(
        f"gpt2:{tmp_path / 'gpt2'}"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [("vocab.json", "{}"), ("vocab.json", "[1"), ("merges.txt", "x y\n"), ("vocab.json", "null")],
)
def test_gpt2_folder_with_damaged_files_is_refused(tmp_path, name, content):
    write_gpt2(tmp_path / "gpt2")
    (tmp_path / "gpt2" / name).write_text(content)
    assert "gpt2" in error_of(f"gpt2:{tmp_path / 'gpt2'}")


def test_gpt2_without_a_network_is_one_attempt(monkeypatch):
    def offline(request, timeout):
        asked.append(request.full_url)
        raise OSError("no route")

    asked = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    message = error_of("gpt2")
    assert "needs a download, and there is no network" in message and "gpt2:FOLDER" in message
    assert len(asked) == 1


def test_gpt2_comes_from_the_hub_cache_without_a_download(tmp_path, monkeypatch):
    write_gpt2(tmp_path / "hub")
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda _, name: str(tmp_path / "hub" / name)
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    assert load("gpt2").vocab_size == 259


# Hugging Face folders


def test_a_folder_encodes_as_its_own_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    spec = write_folder(
        tmp_path / "hf",
        llama3_like(),
        generation_config={"eos_token_id": [EOT, EOM]},
    )
    ours, theirs = load(spec), AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (TEXT, "", "    schön  o\u0308\n\n"):
        assert (
            ours.encode_prompt(text).tolist()
            == theirs(text, split_special_tokens=True)["input_ids"]
        )
    chat = "<|begin_of_text|>user<|eot_id|> hi"
    assert (
        ours.encode_prompt(chat, special=True).tolist()
        == (theirs(chat, add_special_tokens=False)["input_ids"])
    )
    assert (
        ours.encode_prompt("hi<|eot_id|>", special=True).tolist()
        == (theirs("hi<|eot_id|>")["input_ids"])
    )
    assert not set(ours.encode_prompt(chat)[1:]) & {BEGIN, EOT}  # special only when asked
    assert ours.begin == (BEGIN,) and ours.close == (ours.end_of_text,) == (EOT,)
    assert ours.ends == (EOT, EOM)


def test_special_tokens_are_text_again_after_a_prompt_that_spells_them(tmp_path):
    ours = load(write_folder(tmp_path / "hf", llama3_like()))
    assert EOT in ours.encode_prompt("hi<|eot_id|>", special=True)
    assert EOT not in ours.encode_batch(["hi<|eot_id|>"])[0]


def test_bytes_follow_the_special_flag(tmp_path):
    backend = llama3_like()
    ours = load(write_folder(tmp_path / "hf", backend))
    ids = [backend.token_to_id(t) for t in ("    ", "ö", "<|eom_id|>", "<|eot_id|>", "a")]
    assert ours.token_bytes_V[ids].tolist() == [4, 2, 0, 0, 1]
    text = "schön\n    indented"
    assert ours.token_bytes_V[ours.encode_batch([text])[0]].sum() == len(text.encode())


@pytest.mark.parametrize("template", ["ö $A", "$A ö"])
def test_what_a_template_puts_around_a_text_stands_for_no_bytes(tmp_path, template):
    backend = llama3_like(template)
    ours = load(write_folder(tmp_path / "hf", backend))
    assert ours.token_bytes_V[backend.token_to_id("ö")] == 0


@pytest.mark.parametrize(
    ("template", "settings", "begin", "close"),
    [
        (None, {}, (), (EOT,)),
        ("<|begin_of_text|> $A <|eot_id|>", {}, (BEGIN,), (EOT,)),
        ("$A <|eom_id|>", {}, (), (EOM, EOT)),
        (None, {"add_bos_token": True}, (), (EOT,)),
        ("<|begin_of_text|> $A", {"add_bos_token": False}, (BEGIN,), (EOT,)),
    ],
)
def test_templates_are_those_of_transformers(tmp_path, template, settings, begin, close):
    from transformers import AutoTokenizer

    ours = load(write_folder(tmp_path / "hf", llama3_like(template), settings))
    assert (ours.begin, ours.close) == (begin, close)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")("hi there")["input_ids"]
    document = [*begin, *ours.encode_batch(["hi there"])[0], *close]
    assert theirs in (document, document[:-1])  # they may leave out the end of text


def test_a_named_token_that_is_plain_vocabulary_becomes_special(tmp_path):
    backend = llama3_like(None)
    tree = json.loads(backend.to_str())
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] != "<|endoftext|>"]
    plain = Tokenizer.from_str(json.dumps(tree))
    ours = load(write_folder(tmp_path / "hf", plain, {"eos_token": "<|endoftext|>"}))
    assert ours.end_of_text == plain.token_to_id("<|endoftext|>")
    assert ours.token_bytes_V[ours.end_of_text] == 0


def test_the_end_of_text_is_found_where_it_is_said(tmp_path):
    for i, (settings, files, end) in enumerate(
        [
            ({"eos_token": {"content": "<|eom_id|>"}}, {}, EOM),
            ({"eos_token": None}, {"special_tokens_map": {"eos_token": "<|eom_id|>"}}, EOM),
            ({"eos_token": None}, {"generation_config": {"eos_token_id": EOM}}, EOM),
            ({"eos_token": None}, {"config": {"eos_token_id": [EOM, EOT]}}, EOM),
        ]
    ):
        ours = load(write_folder(tmp_path / str(i), llama3_like(), settings, **files))
        assert ours.end_of_text == ours.ends[0] == end


def test_tokenizers_that_end_documents_otherwise_have_different_keys(tmp_path):
    ends = ("<|eot_id|>", "<|eom_id|>")
    ours = [load(write_folder(tmp_path / e[2:5], llama3_like(), {"eos_token": e})) for e in ends]
    assert ours[0].end_of_text != ours[1].end_of_text and ours[0].key != ours[1].key


def test_what_is_saved_is_the_same_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    first = load(
        write_folder(tmp_path / "hf", llama3_like(), generation_config={"eos_token_id": [EOT, EOM]})
    )
    for i, ours in enumerate((first, train())):
        ours.save(tmp_path / f"saved{i}")
        again = load(f"hf:{tmp_path / f'saved{i}'}")
        for name in ("key", "vocab_size", "end_of_text", "ends", "begin", "close"):
            assert getattr(again, name) == getattr(ours, name)
        np.testing.assert_array_equal(again.token_bytes_V, ours.token_bytes_V)
        theirs = AutoTokenizer.from_pretrained(tmp_path / f"saved{i}")
        assert theirs(TEXT)["input_ids"] == ours.encode_prompt(TEXT).tolist()
        assert theirs.eos_token_id == ours.end_of_text and len(theirs) == ours.vocab_size


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "null"),
        ("tokenizer.json", '{"model": [1]}'),
        ("tokenizer.json", '{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}}'),
        ("tokenizer.json", '{"model": {"type": "WordPiece"}}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "byte_fallback": true}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"eos_token": "<|nothing|>"}'),
        ("tokenizer_config.json", "\x00"),
        ("special_tokens_map.json", '"x"'),
        ("generation_config.json", '{"eos_token_id": "5"}'),
        ("generation_config.json", '{"eos_token_id": [1, 99999999999999999999]}'),
        ("generation_config.json", '{"eos_token_id": [-1]}'),
        ("config.json", '{"eos_token_id": true}'),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path, name, content):
    spec = write_folder(tmp_path / "hf", llama3_like())
    (tmp_path / "hf" / name).write_text(content)
    assert str(tmp_path / "hf") in error_of(spec)


def test_a_file_replaced_by_a_folder_is_one_line(tmp_path):
    spec = write_folder(tmp_path / "hf", llama3_like())
    (tmp_path / "hf" / "special_tokens_map.json").mkdir()
    assert "special_tokens_map.json" in error_of(spec)


def test_a_folder_of_another_form_is_pointed_to(tmp_path):
    write_gpt2(tmp_path / "gpt2")
    assert f"use gpt2:{tmp_path / 'gpt2'}" in error_of(f"hf:{tmp_path / 'gpt2'}")
    backend = Tokenizer(models.Unigram([("a", 0.0)], None))
    spec = write_folder(tmp_path / "unigram", backend)
    assert "Unigram" in error_of(spec)


def test_prompts_that_are_not_unicode_are_refused():
    with pytest.raises(UserError, match="not UTF-8"):
        train().encode_prompt("a\udc80b")


def test_reading_a_gpt2_folder_does_not_import_transformers(tmp_path):
    """It takes seconds, which every start would wait for."""
    import subprocess
    from pathlib import Path

    write_gpt2(tmp_path / "gpt2")
    code = (
        "import sys\n"
        "from bitnet_jax import tokenizer\n"
        f"tokenizer.load_tokenizer('gpt2:{tmp_path}/gpt2', '', None)\n"
        "sys.exit('transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    assert run.returncode == 0


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"file/cache: .*BITNET_JAX_CACHE"):
        train()


# SentencePiece


@pytest.mark.parametrize("way", ["prepend", "metaspace"])
def test_a_sentencepiece_tokenizer_loses_nothing_and_counts_bytes(tmp_path, way):
    spm = hf_models.save_sentencepiece_like(tmp_path / "hf", way=way)
    assert (spm.begin, spm.close, spm.end_of_text) == ((1,), (2,), 2)
    for text in (TEXT, "the cat", "\x00\x1f\u2028", "they\n\n  say"):
        ids = spm.encode_batch([text])[0]
        assert spm.decode(ids) == " " + text  # the space before a text
        assert spm.token_bytes_V[ids].sum() == 1 + len(text.encode())
    assert spm.token_bytes_V[[0, 1, 2, 3 + 10]].tolist() == [0, 0, 0, 1]
    assert spm.decode(spm.encode_batch(["the cat"])[0][1:]).startswith(" cat")


@pytest.mark.parametrize("way", ["prepend", "metaspace"])
def test_stretches_of_a_document_have_the_tokens_of_the_whole(tmp_path, way, monkeypatch):
    spm = hf_models.save_sentencepiece_like(tmp_path / "hf", way=way)
    monkeypatch.setattr(tokens, "PIECE_CHARS", 20)
    monkeypatch.setattr(tokens, "MOST_CHARS", 40)
    text = hf_models.WORDS
    pieces = [piece for piece, _ in tokens.pieces([(text, True)], spm)]
    assert len(pieces) > 3 and "".join(pieces) == text
    rows = spm.encode_batch(pieces, [True] + [False] * (len(pieces) - 1))
    np.testing.assert_array_equal(np.concatenate(rows), spm.encode_batch([text])[0])


def test_a_folder_with_tokenizer_model_alone_is_told_how_to_go_on(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert "save_pretrained(FOLDER)" in error_of(f"hf:{tmp_path}")


def test_a_sentencepiece_model_that_drops_unknown_characters_is_refused(tmp_path):
    backend = hf_models.sentencepiece_like()
    tree = json.loads(backend.to_str())
    tree["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert "with byte fallback" in error_of(f"hf:{tmp_path}")
