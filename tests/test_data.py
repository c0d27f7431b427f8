"""Corpora become the same tokens however they are stored; batches are a function of the step."""

import errno
import gzip
import lzma
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tfds_toy

from bitnet_jax import corpus, data, tokenizer
from bitnet_jax.config import DataConfig, UserError

LINES = "".join(f"Line {i}: Zoë counts {i * i} sheep,\n  then   sleeps.\r\n\n" for i in range(200))
CFG = DataConfig(tokenizer="bpe:300", seq_len=4, batch_size=3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
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


# Windows and batches


def test_windows_need_the_token_after_them():
    assert [data.n_windows(n, 4) for n in (1, 4, 5, 8, 9)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_shuffled_takes_each_window_once_per_epoch(n):
    """Also where a batch straddles epochs, or is larger than several of them."""
    drawn = np.concatenate([data.window_ids(CFG, n, 5, step) for step in range(n)])
    epochs = drawn.reshape(3, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs.tolist())
    assert n < 7 or (epochs[0] != epochs[1]).any()


def test_shuffled_is_a_function_of_seed_and_step():
    first = data.window_ids(CFG, 50, 5, 12)
    data.window_ids(CFG, 50, 6, 3)
    data._epoch_order.cache_clear()
    np.testing.assert_array_equal(data.window_ids(CFG, 50, 5, 12), first)
    assert (data.window_ids(CFG, 50, 6, 12) != first).any()
    assert (data.window_ids(CFG, 50, 5, 13) != first).any()
    assert first.dtype == np.int32


def test_sequential_is_corpus_order_and_wraps():
    cfg = replace(CFG, order="sequential")
    drawn = [data.window_ids(cfg, 7, 5, step).tolist() for step in range(3)]
    assert drawn == [[0, 1, 2], [3, 4, 5], [6, 0, 1]]


def test_gather_gives_the_same_windows_in_numpy_and_jax():
    tokens_N = np.arange(21, dtype=np.uint16) + 100
    ids = np.array([[0, 3], [4, 1]], np.int32)
    windows = data.gather(tokens_N, ids, 4)
    assert windows[0].tolist() == [[100, 101, 102, 103, 104], [112, 113, 114, 115, 116]]
    on_device = jax.jit(data.gather, static_argnums=2)(jnp.array(tokens_N), jnp.array(ids), 4)
    np.testing.assert_array_equal(windows, on_device)
    assert windows.dtype == on_device.dtype == np.int32


def test_gather_reaches_past_two_to_the_31():
    class Positions:
        """Tokens that stand at their own position."""

        def __getitem__(self, index):
            return index // 4096

    assert data.gather(Positions(), np.array([2**20], np.int32), 4096)[0, 0] == 2**20


@pytest.mark.parametrize("xp", [np, jnp])
def test_weights_skip_end_of_text_and_the_last_position(xp):
    windows = xp.array([[9, 1, 9, 2, 3], [1, 2, 3, 4, 9]])
    full = data.score_weights(windows, 9, True)
    assert full.tolist() == [[1, 0, 1, 1], [1, 1, 1, 0]]
    assert full.dtype == np.float32
    assert data.score_weights(windows, 9, False).tolist() == [[1, 0, 1, 0], [1, 1, 1, 0]]


def test_eval_blocks_are_distinct_and_evenly_spaced():
    blocks = data.eval_blocks(CFG, np.arange(4 * 12 + 1, dtype=np.uint16))
    assert blocks.shape == (2, 3, 5)
    assert blocks[..., 0].ravel().tolist() == [0, 8, 16, 24, 32, 40]


def test_eval_blocks_refuse_a_short_split():
    with pytest.raises(UserError, match=r"5 windows of 4 tokens.* needs 6"):
        data.eval_blocks(CFG, np.zeros(21, np.uint16))


def test_first_batch_is_the_batch_of_step_0():
    tokens_N = np.arange(41, dtype=np.uint16)
    ids = data.window_ids(CFG, 10, 3, 0)
    np.testing.assert_array_equal(data.first_batch(CFG, tokens_N, 3)[:, 0], ids * 4)


# Token files


@pytest.mark.parametrize("piece_chars", [1, 7, 100])
def test_pieces_encode_to_the_tokens_of_the_whole(monkeypatch, piece_chars):
    monkeypatch.setattr(data, "PIECE_CHARS", piece_chars)
    bpe = tokenizer.load_tokenizer("bpe:400", "key", lambda: iter([LINES]))
    whole = LINES + "don't\n\n\t x \u00a0\nend\u2003\n 's\x1c\ny  "
    pieces = list(data.cut_pieces(whole[i : i + 50] for i in range(0, len(whole), 50)))
    assert "".join(pieces) == whole
    assert len(pieces) > 20
    np.testing.assert_array_equal(
        np.concatenate(bpe.encode_batch(pieces)), bpe.encode_batch([whole])[0]
    )


def test_documents_end_in_end_of_text_and_are_counted(tmp_path, text, monkeypatch):
    monkeypatch.setattr(data, "PIECE_CHARS", 50)
    monkeypatch.setattr(data, "BATCH_CHARS", 300)
    (tmp_path / "text" / "b.txt").write_text("Second file.")
    (tmp_path / "held.txt").write_text("Held out words.\n")
    loaded = data.load(replace(text, validation=f"text:{tmp_path}/held.txt"))
    ends = np.flatnonzero(loaded.train_N == loaded.tokenizer.end_of_text)
    assert len(ends) == 2
    assert loaded.tokenizer.decode(loaded.train_N[: ends[0]]) == LINES
    assert loaded.tokenizer.decode(loaded.train_N[ends[0] + 1 : -1]) == "Second file."
    counts = loaded.identity["train"]
    assert counts["documents"] == 2
    assert counts["tokens"] == len(loaded.train_N)
    assert counts["bytes"] == len(LINES.encode()) + 12
    assert loaded.identity["validation"]["bytes"] == 16
    assert loaded.train_N.dtype == np.uint16


def test_held_out_tail_starts_at_a_line_and_nothing_is_lost(tmp_path, text):
    (tmp_path / "text" / "b.txt").write_bytes(LINES.encode())
    for holdout in (0.05, 0.5, 0.7):
        loaded = data.load(replace(text, holdout=holdout))
        parts = [loaded.tokenizer.decode(t) for t in (loaded.train_N, loaded.validation_N)]
        train, validation = (part.replace(tokenizer.END_OF_TEXT, "") for part in parts)
        assert train + validation == LINES * 2
        assert train.endswith("\n")
        assert abs(len(validation) / len(LINES * 2) - holdout) < 0.01


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
    assert new_files(replace(text, seq_len=8, seed=1)) == 0
    (tmp_path / "text" / "a.txt").write_bytes(LINES.encode().replace(b"Line 7:", b"Line 8:"))
    assert new_files(text) == 2


@pytest.mark.parametrize("damage", ["truncate", "empty", "header", "lengthen"])
def test_a_damaged_token_file_is_made_again(text, cache, damage):
    first = np.array(data.load(text).train_N)
    for path in cache.glob("tokens-*.npy"):
        content = path.read_bytes()
        if damage == "lengthen":
            np.save(path, np.append(np.load(path), 0))
        else:
            cut = {"truncate": content[:-1], "empty": b"", "header": b"x" + content[1:]}
            path.write_bytes(cut[damage])
    np.testing.assert_array_equal(data.load(text).train_N, first)


def test_a_full_disk_names_the_folder_and_leaves_no_half_file(text, cache, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert f"{cache}: No space left on device" in error_of(text)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_an_unusable_cache_folder_is_named(tmp_path, text, monkeypatch):
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "text" / "a.txt" / "cache"))
    assert "a.txt/cache" in error_of(text)


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
    assert not list(cache.glob("*.tmp"))


# Corpora


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_text_is_the_same_text(tmp_path, text, suffix, compress, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 101)  # cuts characters of several bytes
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / f"a.txt{suffix}").write_bytes(compress(LINES.encode()))
    packed = data.load(replace(text, corpus=f"text:{tmp_path}/packed/*"))
    plain = data.load(text)
    np.testing.assert_array_equal(packed.train_N, plain.train_N)
    np.testing.assert_array_equal(packed.validation_N, plain.validation_N)


def test_bad_text_is_named_in_one_line(tmp_path, text, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 5)
    whole = LINES.encode()
    bad = {
        "latin.txt": "abcdéf".encode("latin-1"),
        "torn.txt": b"abcd \xc3",
        "empty.txt": b"",
        "short.txt.gz": gzip.compress(whole)[:-20],
        "not.txt.gz": whole,
        "not.txt.xz": whole,
    }
    found = {}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        found[name] = error_of(replace(text, validation=f"text:{tmp_path}/{name}"))
        assert f"{tmp_path}/{name}: " in found[name]
    assert "not UTF-8 at byte 4" in found["latin.txt"]
    assert "not UTF-8 at byte 5" in found["torn.txt"]
    assert "empty file" in found["empty.txt"]
    assert all("cannot be read" in found[name] for name in bad if name.endswith(("gz", "xz")))


def test_patterns_without_files_are_refused(tmp_path, text):
    assert "nothing*: matches no file" in error_of(
        replace(text, corpus=f"text:{tmp_path}/nothing*")
    )
    assert "is a folder" in error_of(replace(text, corpus=f"text:{tmp_path}/text"))
    assert "use text:GLOB" in error_of(replace(text, validation="validation"))


def test_splits_shorter_than_a_window_are_named(tmp_path, text):
    (tmp_path / "held.txt").write_text("x")
    message = error_of(replace(text, validation=f"text:{tmp_path}/held.txt"))
    assert "split validation has 2 tokens, fewer than the 5 of one window" in message
    (tmp_path / "text" / "a.txt").write_text("no line break in here")
    assert "split validation has 0 tokens" in error_of(text)


def test_stdlib_splits_are_disjoint_and_hold_no_tests(monkeypatch):
    found = []
    split_of = corpus._file_split
    monkeypatch.setattr(corpus, "_file_split", lambda files: found.append(files) or split_of(files))
    assert corpus.open_corpus(DataConfig())[0] == corpus.open_corpus(DataConfig())[0]
    train, validation, *_ = map(set, found)
    assert not train & validation
    assert 0.02 < len(validation) / len(train | validation) < 0.1
    assert "json/decoder.py" in train | validation
    folders = {part for name in train | validation for part in name.split("/")}
    assert not folders & {"test", "tests", "idle_test", "site-packages"}


def test_stdlib_is_tokenised_by_default(monkeypatch):
    files = {"json/__init__.py", "json/decoder.py", "json/encoder.py", "json/tool.py", "abc.py"}
    monkeypatch.setattr(corpus, "_is_library_text", lambda name, path: name in files)
    loaded = data.load(DataConfig(tokenizer="bpe:300", holdout=0.5))
    documents = [loaded.identity[split]["documents"] for split in ("train", "validation")]
    assert sum(documents) == 5 and min(documents) > 0


@pytest.fixture
def toy():
    return replace(CFG, corpus="tfds:toy_text/full")


def test_a_tensorflow_dataset_reads_like_text(toy):
    loaded = data.load(toy)
    for tokens_N, texts in (
        (loaded.train_N, tfds_toy.TRAIN),
        (loaded.validation_N, tfds_toy.VALIDATION),
    ):
        found = loaded.tokenizer.decode(tokens_N).split(tokenizer.END_OF_TEXT)
        assert sorted(found) == sorted(["", *texts])
    assert loaded.identity["train"]["documents"] == 40


def test_a_tensorflow_dataset_without_validation_holds_out_its_tail(toy, tmp_path):
    bare = replace(toy, corpus="tfds:toy_text/bare", holdout=0.25)
    loaded = data.load(bare)
    documents = [loaded.identity[split]["documents"] for split in ("train", "validation")]
    assert documents == [30, 10]
    (tmp_path / "held.txt").write_bytes(LINES.encode())
    loaded = data.load(replace(bare, validation=f"text:{tmp_path}/held.txt"))
    assert loaded.identity["train"]["documents"] == 40
    assert loaded.identity["validation"]["bytes"] == len(LINES.encode())


def test_mistakes_about_a_tensorflow_dataset_say_what_there_is(toy):
    assert "has number, text" in error_of(replace(toy, feature="body"))
    assert "data.feature=number: not text" in error_of(replace(toy, feature="number"))
    assert "has splits train, validation" in error_of(replace(toy, validation="dev"))
    assert "nosuch not found" in error_of(replace(toy, corpus="tfds:nosuch"))
