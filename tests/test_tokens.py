"""A corpus becomes the same tokens however it is cut, and its token file is verified."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitnet_jax import corpus, data, tokenizer, tokens
from bitnet_jax.config import DataConfig
from bitnet_jax.fields import UserError

LINES = "".join(f"Line {i}: Zoë counts {i * i} sheep,\n  then   sleeps.\r\n\n" for i in range(200))
CFG = DataConfig(tokenizer="bpe:300", seq_len=4, batch_size=3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path):
    """A folder with one corpus file, and the configuration that reads it."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(LINES.encode())
    return replace(CFG, corpus=f"text:{tmp_path}/text/*")


def forbid_encoding(monkeypatch):
    def encode_batch(self, texts):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokenizer.Tokenizer, "encode_batch", encode_batch)


def error_of(cfg):
    with pytest.raises(UserError) as caught:
        data.load(cfg)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Pieces


def stream(text, block):
    blocks = [text[i : i + block] for i in range(0, len(text), block)]
    return zip(blocks, [False] * (len(blocks) - 1) + [True], strict=True)


SHAPES = {
    "mixed": LINES + "don't\n\n\t x \u00a0\nend\u2003\n 's\x1c\ny  ",
    "spaces at line ends": "some words  \n and more' re \t\n" * 90,
    "one line": "It isn't one-line 23 km (maybe), we'll 'see'. " * 60,
    "CR only": "first line,\rsecond's line.\r\r" * 90,
    "Chinese": "\u65e5\u672c\u8a9e\u3001\u4e2d\u6587\uff08\u6587\uff09\u3002" * 200,
    "code": "def f(x_1):\n\tif x['a']>0 : return{'b':\"c\"}\n" * 60,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("least", [1, 7, 100])
def test_pieces_encode_to_the_tokens_of_the_whole(monkeypatch, shape, least):
    monkeypatch.setattr(tokens, "PIECE_CHARS", least)
    monkeypatch.setattr(tokens, "MOST_CHARS", least + 40)
    bpe = tokenizer.load_tokenizer("bpe:400", "key", lambda: iter([LINES]))
    whole = SHAPES[shape]
    cut = list(tokens.pieces(stream(whole, 50), bpe))
    assert "".join(text for text, _ in cut) == whole
    assert [ends for _, ends in cut] == [False] * (len(cut) - 1) + [True]
    assert len(cut) > 6 and max(len(text) for text, _ in cut) <= least + 40
    np.testing.assert_array_equal(
        np.concatenate(bpe.encode_batch([text for text, _ in cut])), bpe.encode_batch([whole])[0]
    )


def test_pieces_do_not_depend_on_blocks(monkeypatch):
    monkeypatch.setattr(tokens, "PIECE_CHARS", 9)
    monkeypatch.setattr(tokens, "MOST_CHARS", 21)
    for whole in (LINES[:3000], "x" * 1000, " " * 1000):
        cuts = [list(tokens.pieces(stream(whole, block))) for block in (1, 13, 5000)]
        assert cuts[0] == cuts[1] == cuts[2]
        assert max(len(text) for text, _ in cuts[0]) <= 21


def test_a_forced_cut_changes_tokens_there_alone(monkeypatch):
    monkeypatch.setattr(tokens, "PIECE_CHARS", 50)
    monkeypatch.setattr(tokens, "MOST_CHARS", 60)
    bpe = tokenizer.load_tokenizer("bpe:270", "key", lambda: iter(["abcabc abcabc"] * 9))
    cut = list(tokens.pieces(stream("abc" * 100, 1000)))
    assert {len(text) for text, _ in cut} == {60}
    ids = np.concatenate(bpe.encode_batch([text for text, _ in cut]))
    whole = bpe.encode_batch(["abc" * 100])[0]
    assert bpe.decode(ids) == "abc" * 100
    assert abs(len(ids) - len(whole)) <= len(cut)


def test_a_tokenizer_that_puts_a_space_before_a_text_is_cut_at_spaces(monkeypatch):
    monkeypatch.setattr(tokens, "PIECE_CHARS", 10)
    bpe = tokenizer.load_tokenizer("bpe:300", "key", lambda: iter([LINES]))
    state = bpe.backend.to_str().replace('"add_prefix_space":false', '"add_prefix_space":true')
    spaced = replace(bpe, backend=tokenizer.tokenizers.Tokenizer.from_str(state))
    assert spaced.prefix_space and not bpe.prefix_space
    monkeypatch.setattr(tokens, "MOST_CHARS", 90)
    cut = [text for text, _ in tokens.pieces(stream(LINES, 50), spaced)]
    assert len(cut) > 9
    np.testing.assert_array_equal(
        np.concatenate(spaced.encode_batch(cut)), spaced.encode_batch([LINES])[0]
    )


# Token files


def test_documents_end_in_end_of_text_and_are_counted(tmp_path, text, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE_CHARS", 50)
    monkeypatch.setattr(tokens, "MOST_CHARS", 90)
    monkeypatch.setattr(tokens, "BATCH_BYTES", 300)
    (tmp_path / "text" / "b.txt").write_text("Second file.")
    (tmp_path / "text" / "c.txt").write_text("Third<|endoftext|>\nFourth.")
    (tmp_path / "held.txt").write_text("Held out words.\n")
    loaded = data.load(replace(text, validation=f"text:{tmp_path}/held.txt"))
    ends = np.flatnonzero(loaded.train_N == loaded.tokenizer.end_of_text)
    parts = np.split(loaded.train_N, ends + 1)
    documents = [loaded.tokenizer.decode(part[:-1]) for part in parts[:-1]]
    assert documents == [LINES, "Second file.", "Third", "Fourth."] and not len(parts[-1])
    counts = loaded.identity["train"]
    assert counts["documents"] == 4
    assert counts["tokens"] == len(loaded.train_N)
    assert counts["bytes"] == len(LINES.encode()) + 12 + 5 + 7
    assert counts["bytes"] == loaded.tokenizer.token_bytes_V[loaded.train_N].sum()
    assert loaded.identity["validation"]["bytes"] == 16
    assert loaded.train_N.dtype == np.uint16


def test_a_template_stands_around_every_document(tmp_path, text, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE_CHARS", 3)
    monkeypatch.setattr(tokens, "MOST_CHARS", 9)
    bpe = tokenizer.load_tokenizer("bpe:300", "key", lambda: iter([LINES]))
    templated = replace(bpe, begin=(7, 8), close=(9, bpe.end_of_text))
    held = corpus.Split(
        "sha", lambda: iter([("one two ", False), ("three four", True), ("x", True)])
    )
    tokens_N, counts = tokens.cached_tokens("train", held, templated)
    text_ids = bpe.encode_batch(["one two three four", "x"])
    wanted = [[7, 8, *ids, 9, bpe.end_of_text] for ids in text_ids]
    assert tokens_N.tolist() == np.concatenate(wanted).tolist()
    assert counts["tokens"] == len(tokens_N) and counts["documents"] == 2


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.int32)])
def test_the_largest_token_fits_its_file(text, vocab_size, dtype):
    small = tokenizer.load_tokenizer("bpe:300", "key", lambda: iter([LINES]))
    last = vocab_size - 1
    large = replace(small, key=str(vocab_size), vocab_size=vocab_size, close=(last,))
    _, splits = corpus.open_corpus(text)
    tokens_N, _ = tokens.cached_tokens("train", splits["train"], large)
    assert tokens_N.dtype == dtype and tokens_N[-1] == last


def test_loading_again_reads_the_cache(text, monkeypatch):
    first = data.load(text)
    forbid_encoding(monkeypatch)
    again = data.load(text)
    assert again.identity == first.identity
    np.testing.assert_array_equal(again.train_N, first.train_N)


def test_any_change_makes_new_token_files(tmp_path, text, cache):
    def new_files(cfg):
        before = set(cache.glob("tokens-*.npy"))
        data.load(cfg)
        return len(set(cache.glob("tokens-*.npy")) - before)

    assert [new_files(text), new_files(text)] == [2, 0]
    assert new_files(replace(text, tokenizer="bpe:310")) == 2
    assert new_files(replace(text, holdout=0.1)) == 2
    assert new_files(replace(text, separator="sheep")) == 2
    assert new_files(replace(text, seq_len=8)) == 0
    (tmp_path / "text" / "a.txt").write_bytes(LINES.encode().replace(b"Line 7:", b"Line 8:"))
    assert new_files(text) == 2


def damaged(content, how):
    middle = len(content) // 2
    return {
        "flip": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
        "truncate": content[:-1],
        "empty": b"",
        "header": b"x" + content[1:],
        "lengthen": content + b"\0\0",
    }[how]


@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "header", "lengthen"])
@pytest.mark.parametrize("kind", ["tokens-*.npy", "tokens-*.json", "bpe-*.json"])
def test_a_damaged_cache_file_is_named_and_made_again(text, cache, capsys, kind, how):
    first = data.load(text)
    first_N = np.array(first.train_N)
    paths = list(cache.glob(kind))
    for path in paths:
        path.write_bytes(damaged(path.read_bytes(), how))
    capsys.readouterr()
    again = data.load(text)
    np.testing.assert_array_equal(again.train_N, first_N)
    assert again.identity == first.identity and again.tokenizer.key == first.tokenizer.key
    errors = capsys.readouterr().err
    assert paths and all(f"{path.with_suffix('')}" in errors for path in paths)
    data.load(text)
    assert "damaged" not in capsys.readouterr().err


def test_token_files_of_other_splits_are_not_taken(text, cache):
    first = data.load(text)
    train_N, validation_N = np.array(first.train_N), np.array(first.validation_N)
    path, other = sorted(cache.glob("tokens-*.npy"))
    for a, b in ((path, other), (path.with_suffix(".json"), other.with_suffix(".json"))):
        a_content, b_content = a.read_bytes(), b.read_bytes()
        a.write_bytes(b_content)
        b.write_bytes(a_content)
    again = data.load(text)
    np.testing.assert_array_equal(again.train_N, train_N)
    np.testing.assert_array_equal(again.validation_N, validation_N)


def test_a_folder_in_the_place_of_a_cache_file_is_one_line(text, cache):
    data.load(text)
    path = next(cache.glob("tokens-*.npy"))
    path.unlink()
    path.mkdir()
    assert str(cache) in error_of(text) and path.name in error_of(text)


def test_an_unusable_cache_folder_is_named(tmp_path, text, monkeypatch):
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "text" / "a.txt" / "cache"))
    assert "a.txt/cache" in error_of(text)


def test_tokens_past_two_to_the_31_are_mapped(cache):
    """A sparse file: the header is right and the far end can be read."""
    cache.mkdir()
    n = 2**31 + 10
    with open(cache / "far.npy", "w+b") as file:
        tokens._write_header(file, np.dtype(np.uint16), n)
        start = file.tell()
        file.seek(start + 2 * (n - 1))
        file.write(np.uint16(77).tobytes())
        file.seek(0)
        tokens_N = tokens._map(file)
        assert len(tokens_N) == n and tokens_N[-1] == 77
        windows = data.Windows(tokens_N, 8, 0, True, True)
        last = len(windows) - 1
        batch = windows.cut(np.array([last], np.int32))
        assert last * 8 > 2**31 - 16 and batch.targets[0, -1] == tokens_N[last * 8 + 8]


def test_two_processes_do_the_work_once(text, cache):
    code = (
        "from bitnet_jax import config, data\n"
        f"cfg = config.DataConfig(corpus={text.corpus!r}, tokenizer='bpe:300', seq_len=4)\n"
        "print(data.load(cfg).train_N.sum())"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert sum("tokenizing train" in err for _, err in outputs) == 1
    assert not [name for name in os.listdir(cache) if name.endswith(".tmp")]


# Splits


def test_the_splits_together_are_the_corpus(tmp_path, text):
    (tmp_path / "text" / "b.txt").write_bytes(LINES.encode())
    for holdout in (0.05, 0.5, 0.7):
        loaded = data.load(replace(text, holdout=holdout))
        parts = [loaded.tokenizer.decode(t) for t in (loaded.train_N, loaded.validation_N)]
        train, validation = (part.replace(tokenizer.END_OF_TEXT, "") for part in parts)
        assert train + validation == LINES * 2
        assert train.endswith("\n")
        assert holdout / 2 <= len(validation) / len(LINES * 2) <= holdout


def test_stdlib_is_tokenised_by_default(monkeypatch):
    files = {"json/__init__.py", "json/decoder.py", "json/encoder.py", "json/tool.py", "abc.py"}
    monkeypatch.setattr(corpus, "_is_library_text", lambda name, path: name in files)
    loaded = data.load(DataConfig(tokenizer="bpe:300", holdout=0.5))
    documents = [loaded.identity[split]["documents"] for split in ("train", "validation")]
    assert sum(documents) == 5 and min(documents) > 0


def test_splits_shorter_than_a_window_are_named(tmp_path, text):
    (tmp_path / "held.txt").write_text("x")
    message = error_of(replace(text, validation=f"text:{tmp_path}/held.txt"))
    assert "split validation has 2 tokens" in message
    assert "data.validation" in message and "data.holdout" in message
    (tmp_path / "text" / "a.txt").write_text("x")
    assert "split train has 0 tokens" in error_of(text)


def test_stripped_lines_are_encoded_one_by_one_with_nothing_between(text):
    """No line break, no mark of an end, no word across two lines; in blocks of any size."""
    by_line = data.load(replace(text, stripped_lines=True))
    text_lines = [line.strip() for line in LINES.splitlines() if line.strip()]
    encoded = np.concatenate(by_line.tokenizer.encode_batch(text_lines))
    both = np.concatenate([by_line.train_N, by_line.validation_N])
    assert both.tolist() == encoded.tolist()
    assert by_line.tokenizer.end_of_text not in both
    cuts = [list(tokens.stripped_lines(stream(LINES, block))) for block in (1, 13, 5000)]
    assert cuts[0] == cuts[1] == cuts[2] == [(line, False) for line in text_lines]
