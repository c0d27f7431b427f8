"""Every form of file gives its documents, and two splits that lose nothing and share nothing."""

import bz2
import gzip
import json
import lzma
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tfds_toy

from bitnet_jax import corpus, documents
from bitnet_jax.config import DataConfig
from bitnet_jax.fields import UserError

STORIES = [f"Story {i}: Zoë 日本\n has {i * i} sheep.\n" for i in range(40)]
SEPARATOR = "<|endoftext|>"


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def joined(stream):
    """The documents of a stream, whole."""
    whole, rest = [], ""
    for text, ends in stream:
        rest += text
        if ends:
            whole.append(rest)
            rest = ""
    assert rest == ""
    return whole


def read(path, separator=SEPARATOR, field="text"):
    return joined(documents.read(path, separator, field))


def split_texts(cfg):
    return {name: joined(split.read()) for name, split in corpus.open_corpus(cfg)[1].items()}


def error_of(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


# Files


def split_all(text, separator, block):
    blocks = (text[i : i + block] for i in range(0, len(text), block))
    return joined(documents.split(blocks, separator))


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
def test_documents_between_separators_do_not_depend_on_blocks(block):
    text = "a b\n\n<|endoftext|>\r\nc\n<d<|endoftext|><|endoftext|>\n\n<|endoftext|> e\n"
    assert split_all(text, SEPARATOR, block) == ["a b", "c\n<d", " e\n"]
    assert split_all(text, None, block) == [text]
    assert split_all("a\n\nb\n\n\n\nc\n", "\n\n", block) == ["a", "b", "c\n"]
    long = f"x{chr(10) * 30}{SEPARATOR}{chr(10) * 30}y"
    assert split_all(long, SEPARATOR, block) == ["x" + "\n" * 22, "y"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_hold_the_same_documents(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 11)  # cuts characters of several bytes
    packed = COMPRESS[suffix]
    text, jsonl = tmp_path / f"a.txt{suffix}", tmp_path / f"a.jsonl{suffix}"
    text.write_bytes(packed(SEPARATOR.join(STORIES).encode()))
    rows = [json.dumps({"id": i, "text": story}) for i, story in enumerate(STORIES)]
    jsonl.write_bytes(packed("\n".join([*rows[:5], "", *rows[5:]]).encode()))
    assert read(text) == [story.rstrip("\n") for story in STORIES[:-1]] + STORIES[-1:]
    assert read(text, separator=None) == [SEPARATOR.join(STORIES)]
    assert read(jsonl) == STORIES


def test_a_parquet_file_is_a_document_a_row(tmp_path):
    for i, kind in enumerate([pyarrow.string(), pyarrow.large_string(), pyarrow.binary()]):
        column = pyarrow.array([*STORIES, None, ""], kind)
        table = pyarrow.table({"n": list(range(len(STORIES) + 2)), "body": column})
        pyarrow.parquet.write_table(table, tmp_path / f"{i}.parquet", row_group_size=7)
        assert read(tmp_path / f"{i}.parquet", field="body") == STORIES


@pytest.mark.parametrize("break_", ["\n", "\r\n", "\r", ""])
def test_a_byte_order_mark_is_dropped_and_line_breaks_are_kept(tmp_path, break_):
    text = break_.join(["eins", "zwei", ""])
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(tmp_path / "a.txt") == [text]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": text}).encode())
    assert read(tmp_path / "a.jsonl") == [text]


def test_text_that_is_not_utf8_is_named_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 5)
    for name, content, place in (
        ("latin.txt", "abcdéf".encode("latin-1"), "byte 4"),
        ("torn.txt", b"abcd \xc3", "byte 5"),
        ("marked.txt", b"\xef\xbb\xbfab\xff", "byte 5"),
        ("wide.txt", "ab".encode("utf-16"), "byte 0 (UTF-16)"),
        ("lines.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "byte 24"),
    ):
        (tmp_path / name).write_bytes(content)
        assert error_of(read, tmp_path / name) == f"{tmp_path / name}: not UTF-8 at {place}"


def test_damaged_files_are_named(tmp_path):
    whole = ("".join(STORIES) * 100).encode()
    bad = {f"short{suffix}": pack(whole)[:-20] for suffix, pack in COMPRESS.items() if suffix}
    bad |= {f"not{suffix}": whole for suffix in COMPRESS if suffix}
    bad |= {"a.parquet": whole, "b.parquet.gz": gzip.compress(b"")}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in error_of(read, tmp_path / name)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"txt": "a", "n": 1}', r"it has txt, n; did you mean txt\?"),
        ("{}", "no field"),
        ('{"text": ["a"]}', "not text but"),
        ('{"text": null}', "not text but None"),
        (r'{"text": "\ud800"}', "surrogate"),
        ('["text"]', "not a JSON object"),
        ('{"text": "a"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("x" * 5000, r"\(5000 characters\)"),
    ],
)
def test_a_line_without_its_text_is_named(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\n\n' + line)
    with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{expected}"):
        read(path)


def test_a_parquet_file_without_its_text_is_named(tmp_path):
    table = pyarrow.table({"body": ["a"], "n": [1], "bytes": [b"\xff"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for field, expected in (
        ("bod", "it has body, n, bytes; did you mean body?"),
        ("n", "not text but int64"),
        ("bytes", "row 1"),
    ):
        message = error_of(read, tmp_path / "a.parquet", SEPARATOR, field)
        assert message.startswith(f"{tmp_path}/a.parquet: ") and expected in message


# text:GLOB


def text(folder, **more):
    return DataConfig(corpus=f"text:{folder}/*", **more)


def test_a_glob_takes_any_mix_of_forms(tmp_path):
    (tmp_path / "a.txt").write_text(f"one{SEPARATOR}two")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": "four"}')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["five"]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt.xz").write_bytes(lzma.compress(b"six"))
    held_out = tmp_path / "held" / "out.txt"
    held_out.parent.mkdir()
    held_out.write_text("seven")
    texts = split_texts(text(tmp_path, validation=f"text:{held_out}"))
    assert texts["train"] == ["one", "two", "three", "four", "five", "six"]
    assert texts["validation"] == ["seven"]


def test_empty_files_are_counted_once_and_skipped(tmp_path, capsys):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"Story {i}." if i % 5 else "")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(b""))
    texts = split_texts(text(tmp_path, holdout=0.25))
    assert texts["train"] + texts["validation"] == [f"Story {i}." for i in range(20) if i % 5]
    assert [x for x in capsys.readouterr().err.splitlines() if "6 of 22 files" in x]


def test_files_that_are_all_empty_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    assert "all empty" in error_of(corpus.open_corpus, text(tmp_path))


def test_the_held_out_part_starts_with_a_document_where_one_starts_there(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": s}) for s in STORIES))
    total = sum(map(len, STORIES))
    for holdout in (0.05, 0.1, 0.5, 0.9):
        texts = split_texts(text(tmp_path, holdout=holdout))
        assert texts["train"] + texts["validation"] == STORIES
        assert holdout / 2 <= sum(map(len, texts["validation"])) / total <= holdout + 1e-9


@pytest.mark.parametrize(
    ("word", "between", "cut_after"),
    [("Zoë sat", "\n", "\n"), ("a\n", "\r\n", "\n"), ("CR only", "\r", "\r"), ("one", " ", " ")],
)
def test_one_document_is_cut_after_white_space(tmp_path, monkeypatch, word, between, cut_after):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 64)
    whole = between.join([word] * 200)
    (tmp_path / "a.txt").write_bytes(whole.encode())
    for holdout in (0.05, 0.5):
        texts = split_texts(text(tmp_path, holdout=holdout))
        train, validation = ("".join(texts[name]) for name in ("train", "validation"))
        assert train + validation == whole and train.endswith(cut_after)
        assert abs(len(validation) / len(whole) - holdout) < 0.01


def test_text_without_white_space_is_cut_at_a_character(tmp_path):
    whole = "日本語の文章、" * 100
    (tmp_path / "a.txt").write_text(whole, encoding="utf-8")
    texts = split_texts(text(tmp_path, holdout=0.1))
    assert [len(part) for parts in texts.values() for part in parts] == [630, 70]
    assert "".join(texts["train"] + texts["validation"]) == whole


def test_digests_follow_names_contents_and_how_they_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("one two three")

    def digests(**more):
        sha256, splits = corpus.open_corpus(text(tmp_path, **more))
        return sha256, splits["train"].sha256, splits["validation"].sha256

    first = digests()
    assert digests() == first and len(set(first)) == 3
    others = [digests(holdout=0.5), digests(separator=None), digests(feature="body")]
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    others.append(digests())
    (tmp_path / "b.txt").write_text("one two threE")
    others.append(digests())
    assert not {x for row in others for x in row[1:]} & set(first)
    assert len({row[1] for row in others}) == len(others)


def test_patterns_without_files_are_refused(tmp_path):
    (tmp_path / "text").mkdir()
    assert "nothing*: matches no file" in error_of(
        corpus.open_corpus, DataConfig(corpus=f"text:{tmp_path}/nothing*")
    )
    assert "is a folder" in error_of(corpus.open_corpus, DataConfig(corpus=f"text:{tmp_path}/text"))
    for broken in ("text:\0*", "text:a\nb", "text:" + "x" * 9000):
        assert "matches no file" in error_of(corpus.open_corpus, DataConfig(corpus=broken))
    assert "data.validation=dev: use text:GLOB" in error_of(
        corpus.open_corpus, DataConfig(validation="dev")
    )


# stdlib


def test_stdlib_splits_are_disjoint_and_hold_no_tests(monkeypatch):
    split_files = []
    make = corpus._files
    monkeypatch.setattr(
        corpus, "_files", lambda files, cfg: split_files.append(files) or make(files, cfg)
    )
    assert corpus.open_corpus(DataConfig())[0] == corpus.open_corpus(DataConfig())[0]
    train, validation, *_ = map(set, split_files)
    assert not train & validation
    assert 0.02 < len(validation) / len(train | validation) < 0.1
    assert "json/decoder.py" in train | validation
    folders = {part for name in train | validation for part in name.split("/")}
    assert not folders & {"test", "tests", "idle_test", "site-packages"}


# TensorFlow datasets


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return DataConfig(corpus="tfds:toy_text/full")


def test_a_tensorflow_dataset_is_a_document_an_example(toy):
    texts = split_texts(toy)
    assert sorted(texts["train"]) == sorted(tfds_toy.TRAIN)
    assert sorted(texts["validation"]) == sorted(tfds_toy.VALIDATION)


def test_a_tensorflow_dataset_without_validation_holds_out_its_tail(toy, tmp_path):
    bare = replace(toy, corpus="tfds:toy_text/bare", holdout=0.25)
    assert [len(part) for part in split_texts(bare).values()] == [30, 10]
    (tmp_path / "held.txt").write_text("held out")
    texts = split_texts(replace(bare, validation=f"text:{tmp_path}/held.txt"))
    assert [len(part) for part in texts.values()] == [40, 1]


def test_mistakes_about_a_tensorflow_dataset_say_what_there_is(toy):
    def error(**changed):
        return error_of(corpus.open_corpus, replace(toy, **changed))

    assert "has number, text" in error(feature="body")
    assert "data.feature=number: not text" in error(feature="number")
    assert "has splits train, validation" in error(validation="dev")
    assert "nosuch" in error(corpus="tfds:nosuch")


def test_a_dataset_that_needs_a_download_tries_once(toy, monkeypatch):
    import tensorflow_datasets as tfds

    def offline(request, timeout):
        asked.append((request.full_url, timeout))
        raise OSError("no route")

    asked = []
    monkeypatch.setattr("urllib.request.urlopen", offline)
    url = tfds.builder_cls("lm1b").url_infos
    message = error_of(corpus.open_corpus, replace(toy, corpus="tfds:lm1b"))
    assert "needs a download, and there is no network" in message
    assert [asked_url for asked_url, _ in asked] == list(url)[:1]
    assert asked[0][1] <= np.float64(10)


@pytest.mark.parametrize(("text", "empty"), [("", True), ("\ufeff", True), ("\ufeffa", False)])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_is_empty_that_holds_no_text(tmp_path, suffix, text, empty):
    path = tmp_path / f"a.txt{suffix}"
    content = text.encode()
    path.write_bytes(gzip.compress(content) if suffix else content)
    assert documents.is_empty(path) == empty
