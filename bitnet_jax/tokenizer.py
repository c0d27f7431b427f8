"""Byte-level BPE tokenizers: GPT-2's, a Hugging Face folder's, or one trained on the corpus."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import huggingface_hub
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bitnet_jax.config import UserError

END_OF_TEXT = "<|endoftext|>"
GPT2_FILES = ("vocab.json", "merges.txt")
HF_FILES = ("tokenizer.json", "tokenizer_config.json")
TRAIN_CHARS = 32_000_000  # a BPE is trained on at most this much text from the start of the corpus


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE: every character of a token in its vocabulary stands for one byte."""

    name: str  # as configured, "bpe:4096"
    key: str  # hex digest of vocabulary and merges
    vocab_size: int
    end_of_text: int
    token_bytes_V: np.ndarray  # int32: bytes of text a token stands for, 0 for special tokens
    backend: tokenizers.Tokenizer = field(repr=False, compare=False)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """int32 token ids of each text; no special tokens, even where a text spells one out."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids) -> str:
        """Text of token ids; bytes that are not UTF-8 become replacement characters."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(
    spec: str, corpus_key: str, train_documents: Callable[[], Iterator[str]]
) -> Tokenizer:
    """Load `bpe:N`, `gpt2`, `gpt2:FOLDER` or `hf:FOLDER`.

    `bpe:N` is trained on `train_documents()` unless the cache holds the one of this `corpus_key`;
    a small corpus may yield fewer than N tokens. Raises UserError when a tokenizer cannot be had or
    the cache folder cannot be written.
    """
    kind, _, argument = spec.partition(":")
    if kind == "hf":
        return load_folder(Path(argument))
    if kind == "bpe":
        backend = _cached_bpe(int(argument), corpus_key, train_documents)
    else:
        backend = _gpt2(argument)
    return _wrap(spec, backend, END_OF_TEXT)


def load_folder(folder: Path) -> Tokenizer:
    """The byte-level BPE of a Hugging Face folder; its end of text is that folder's `eos_token`.

    Raises UserError when the folder has no such tokenizer.
    """
    texts = {}
    for name in HF_FILES:
        path = folder.expanduser() / name
        if not path.is_file():
            raise UserError(
                f"{folder}: tokenizer missing: no {name}; the folder must hold "
                + " and ".join(HF_FILES)
            )
        texts[name] = path.read_text(encoding="utf-8")
    try:
        model, told = (json.loads(texts[name]) for name in HF_FILES)
    except ValueError as error:
        raise UserError(f"{folder}: damaged tokenizer, not JSON: {error}") from error
    if model.get("model", {}).get("type") != "BPE" or '"ByteLevel"' not in texts[HF_FILES[0]]:
        raise UserError(f"{folder}: {HF_FILES[0]} is not a byte-level BPE; only those can be used")
    backend = tokenizers.Tokenizer.from_str(texts[HF_FILES[0]])
    backend.no_truncation()
    backend.no_padding()
    end = told.get("eos_token")
    end = end["content"] if isinstance(end, dict) else end
    if end is None or backend.token_to_id(end) is None:
        raise UserError(f"{folder}: eos_token={end} of {HF_FILES[1]} is not in the vocabulary")
    return _wrap(f"hf:{folder}", backend, end)


def _wrap(name: str, backend: tokenizers.Tokenizer, end_of_text: str) -> Tokenizer:
    # Text that spells out "<|endoftext|>" is text: only data.py marks the end of a document.
    backend.encode_special_tokens = True
    vocab = backend.get_vocab(with_added_tokens=True)
    special = {token.content for token in backend.get_added_tokens_decoder().values()}
    token_bytes_V = np.zeros(max(vocab.values()) + 1, np.int32)
    for token, i in vocab.items():
        token_bytes_V[i] = 0 if token in special else len(token)
    merges = json.loads(backend.to_str())["model"]["merges"]
    content = json.dumps([sorted(vocab.items()), merges])
    return Tokenizer(
        name=name,
        key=hashlib.sha256(content.encode()).hexdigest()[:16],
        vocab_size=len(token_bytes_V),
        end_of_text=vocab[end_of_text],
        token_bytes_V=token_bytes_V,
        backend=backend,
    )


def cache_dir() -> Path:
    """Where tokenizers and token files are kept: $BITNET_JAX_CACHE or ~/.cache/bitnet_jax."""
    return Path(os.environ.get("BITNET_JAX_CACHE") or "~/.cache/bitnet_jax").expanduser()


def cache_lock(path: Path) -> contextlib.AbstractContextManager:
    """Acquire the lock of a cache file, making its folder; use as a context manager."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(f"{path}.lock").acquire()
    except OSError as error:
        raise _unwritable(path.parent, error) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of `path` when the block ends well.

    Raises UserError naming the folder when it cannot be written (full disk, no permission).
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"cache folder {folder}: {error.strerror or error}; "
        "set BITNET_JAX_CACHE to a folder with space that can be written"
    )


def _cached_bpe(vocab_size, corpus_key, train_documents) -> tokenizers.Tokenizer:
    key = hashlib.sha256(f"{corpus_key} {vocab_size} {TRAIN_CHARS}".encode()).hexdigest()[:16]
    path = cache_dir() / f"bpe-{vocab_size}-{key}.json"
    if not path.exists():
        with cache_lock(path):
            if not path.exists():
                backend = _train_bpe(vocab_size, train_documents)
                with replacing(path) as temporary:
                    temporary.write_text(backend.to_str(), encoding="utf-8")
    return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))


def _train_bpe(vocab_size, train_documents) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_first_chars(train_documents(), TRAIN_CHARS), trainer)
    return backend


def _first_chars(texts: Iterator[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def _gpt2(folder: str) -> tokenizers.Tokenizer:
    path = Path(folder).expanduser() if folder else _hub_folder()
    for name in GPT2_FILES:
        if not (path / name).is_file():
            raise UserError(
                f"data.tokenizer=gpt2:{folder}: no {name} in {path}; the folder must hold "
                "vocab.json and merges.txt"
            )
    # Importing transformers takes seconds, which runs with a trained BPE need not wait for.
    from transformers import GPT2TokenizerFast

    loaded = GPT2TokenizerFast.from_pretrained(path)
    if len(loaded) <= 256:
        raise UserError(
            f"data.tokenizer=gpt2:{folder}: vocab.json and merges.txt in {path} give "
            f"{len(loaded)} tokens; a byte-level BPE has more than 256"
        )
    return loaded.backend_tokenizer


def _hub_folder() -> Path:
    """Folder with GPT-2's two files, from the hub's cache or the network.

    The files are fetched one by one because from_pretrained("gpt2") without a network retries each
    of a dozen files for minutes and then returns an empty tokenizer.
    """
    try:
        paths = [
            huggingface_hub.try_to_load_from_cache("gpt2", name)
            or huggingface_hub.hf_hub_download("gpt2", name)
            for name in GPT2_FILES
        ]
    except OSError as error:
        raise UserError(
            "data.tokenizer=gpt2: not in the hub cache and no download "
            f"({type(error).__name__}); use gpt2:FOLDER with a folder that holds GPT-2's "
            "vocab.json and merges.txt"
        ) from error
    return Path(paths[0]).parent
