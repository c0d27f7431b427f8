"""Tokenizers: GPT-2's, a Hugging Face folder's, or a byte-level BPE trained on the corpus."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bitnet_jax import cache, metaspace
from bitnet_jax.fields import UserError, shown

END_OF_TEXT = "<|endoftext|>"
GPT2_FILES = ("vocab.json", "merges.txt")
HF_FILES = ("tokenizer.json", "tokenizer_config.json")
SENTENCEPIECE = "tokenizer.model"
SPECIAL_FILE = "special_tokens_map.json"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
BYTES = frozenset(pre_tokenizers.ByteLevel.alphabet())  # each character stands for one byte
# A BPE is trained on the start of the corpus: at most this much text, and as many different words
# as have this many bytes together (the trainer holds 130 times as much memory).
TRAIN_CHARS = 32_000_000
TRAIN_WORD_BYTES = 2_000_000
WORD = re.compile(r"\w+|[^\w\s]+")
LONG_SPACE = re.compile(r"\s{256}")
LONG = re.compile(r"(\S{256}|\s{256})")


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE or one of `metaspace`, and what it puts around a text."""

    name: str  # as configured, "bpe:4096"
    key: str  # hex digest of all that decides which tokens a document has
    vocab_size: int
    end_of_text: int  # stands after every document
    ends: tuple[int, ...]  # tokens that end a generated text, end_of_text first
    begin: tuple[int, ...]  # tokens before a document or a prompt, as its template says
    close: tuple[int, ...]  # tokens after a document, end_of_text last
    token_bytes_V: np.ndarray  # int32: bytes of text a token stands for, 0 for special tokens
    lead: tuple[int, ...]  # a token without text, before those whose space a decoder would drop
    backend: tokenizers.Tokenizer = field(repr=False, compare=False)

    def encode_batch(self, texts: list[str], starts: list[bool] | None = None) -> list[np.ndarray]:
        """int32 token ids of each text, or stretch of one, without `begin` and `close`.

        `starts` says which begin a text: all, unless given. A text that spells out a special token
        is text.
        """
        if starts and self.doubles_space:  # it puts there the space that a stretch begins with
            pairs = zip(texts, starts, strict=True)
            texts = [text if starts else text.removeprefix(" ") for text, starts in pairs]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_prompt(self, text: str, special: bool = False) -> np.ndarray:
        """int32 token ids of the start of a document: `begin`, and the text.

        With `special`, special tokens that the text spells out are those tokens, and `begin` is not
        put before a text that starts with it. Raises UserError for text that is not Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"prompt {shown(text)}: not UTF-8") from error
        self.backend.encode_special_tokens = not special
        ids = self.backend.encode(text, add_special_tokens=False).ids
        self.backend.encode_special_tokens = True
        begun = special and tuple(ids[: len(self.begin)]) == self.begin
        return np.array([*(() if begun else self.begin), *ids], np.int32)

    def decode(self, ids) -> str:
        """Text of token ids that follow others; bytes that are not UTF-8 become U+FFFD."""
        ids = [*self.lead, *(int(i) for i in ids)]
        return self.backend.decode(ids, skip_special_tokens=False)

    @property
    def prefix_space(self) -> bool:
        """Whether a text gets a space before its first word."""
        tree = json.loads(self.backend.to_str())
        parts = metaspace.parts(tree["pre_tokenizer"])
        return any(part.get("add_prefix_space") for part in parts) or metaspace.is_one(tree)

    @functools.cached_property
    def doubles_space(self) -> bool:
        """Whether it gets one, too, where it begins with a space."""
        return metaspace.doubles(json.loads(self.backend.to_str()))

    def files(self) -> dict[str, dict]:
        """JSON files by name, from which transformers and `load_folder` make this tokenizer."""
        end = self.backend.id_to_token(self.end_of_text)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.backend.id_to_token(self.begin[0]) if self.begin else end,
            "eos_token": end,
            "clean_up_tokenization_spaces": False,
        }
        files = {"tokenizer.json": json.loads(self.backend.to_str())}
        files["tokenizer_config.json"] = settings
        if len(self.ends) > 1:
            files["generation_config.json"] = {"eos_token_id": list(self.ends)}
        return files

    def save(self, folder: Path) -> None:
        """Write `files` into a folder, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, tree in self.files().items():
            text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")


def load_tokenizer(
    spec: str, corpus_key: str, train_texts: Callable[[], Iterator[str]]
) -> Tokenizer:
    """Load `bpe:N`, `gpt2`, `gpt2:FOLDER` or `hf:FOLDER`.

    `bpe:N` is trained on `train_texts()` unless the cache holds the one of this `corpus_key`;
    a small corpus may yield fewer than N tokens. Raises UserError when a tokenizer cannot be had or
    the cache folder cannot be written.
    """
    kind, _, argument = spec.partition(":")
    if kind == "hf":
        return load_folder(Path(argument))
    if kind == "bpe":
        return _wrap(spec, _cached_bpe(int(argument), corpus_key, train_texts), END_OF_TEXT)
    folder = Path(argument).expanduser() if argument else _hub_folder()
    if all((folder / name).is_file() for name in HF_FILES):
        return load_folder(folder, spec)
    return _wrap(spec, _gpt2(spec, folder), END_OF_TEXT)


def load_folder(folder: Path, name: str | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, with what that folder says about it.

    The template of tokenizer.json gives `begin` and `close` (transformers 5 ignores add_bos_token
    and add_eos_token beside it), `eos_token` the end of text, and generation_config.json further
    tokens that end a text. Raises UserError when the folder has no such tokenizer.
    """
    folder = Path(folder).expanduser()
    for file in HF_FILES:
        if not (folder / file).is_file():
            form = f"; use gpt2:{folder}" if _is_gpt2(folder) else ""
            if (folder / SENTENCEPIECE).is_file():
                form = (
                    f", which transformers writes from {SENTENCEPIECE}: "
                    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
                )
            raise UserError(
                f"{folder}: tokenizer missing: no {file}; the folder must hold "
                f"{' and '.join(HF_FILES)}{form}"
            )
    backend = _backend(folder)
    settings = [_read_json(folder, name) for name in ("tokenizer_config.json", SPECIAL_FILE)]
    named = {
        key: next(filter(None, (_content(tree.get(key)) for tree in settings)), None)
        for key in SPECIAL
    }
    plain = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    for token in dict.fromkeys(named.values()):
        if token is not None and token not in plain and backend.token_to_id(token) is not None:
            backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False)])
    ids = _end_ids(folder, backend)
    end = named["eos_token"]
    if end is None and ids:
        end = backend.id_to_token(ids[0])
    if end is None or backend.token_to_id(end) is None:
        raise UserError(f"{folder}: eos_token={shown(end)} is not in the vocabulary")
    return _wrap(name or f"hf:{folder}", backend, end, ids)


def _backend(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of tokenizer.json; UserError unless every text is tokens and back."""
    tree = _read_json(folder, "tokenizer.json")
    kind = _part(tree, "model").get("type")
    bytewise = any(
        part.get("type") == "ByteLevel"
        for name in ("pre_tokenizer", "normalizer")
        for part in metaspace.parts(tree.get(name))
    )
    if not (kind == "BPE" and bytewise) and not metaspace.is_one(tree):
        form = "a BPE of characters" if kind == "BPE" else f"of type {shown(kind)}"
        raise UserError(
            f"{folder}: tokenizer.json is not a byte-level BPE, nor of SentencePiece with byte "
            f"fallback, but {form}; only those can be used"
        )
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(tree))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{folder}: damaged tokenizer: {shown(str(error))}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(folder: Path, name: str) -> dict:
    """A JSON object; empty when there is no such file. Raises UserError when it is damaged."""
    try:
        tree = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: damaged tokenizer: {name}: {shown(reason)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{folder}: damaged tokenizer: {name}: not a JSON object")
    return tree


def _part(tree: dict, name: str) -> dict:
    part = tree.get(name)
    return part if isinstance(part, dict) else {}


def _content(token) -> str | None:
    """Text of a special token as the configuration files write them: a string or an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _end_ids(folder: Path, backend) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json: one or several."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder, name).get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            known = backend.get_vocab(with_added_tokens=True).values()
            if not all(type(i) is int for i in ids) or not set(known).issuperset(ids):
                raise UserError(f"{folder}: {name}: eos_token_id={shown(ids)}: not token ids")
            return ids
    return []


def _wrap(name: str, backend: tokenizers.Tokenizer, end: str, ends=()) -> Tokenizer:
    # Text that spells out "<|endoftext|>" is text: only documents end in it.
    backend.encode_special_tokens = True
    end_of_text = backend.token_to_id(end)
    begin, close = _around(backend)
    close = close if close[-1:] == (end_of_text,) else (*close, end_of_text)
    vocab, added = backend.get_vocab(with_added_tokens=True), backend.get_added_tokens_decoder()
    token_bytes_V = np.zeros(max(vocab.values()) + 1, np.int32)
    spaced = metaspace.is_one(json.loads(backend.to_str()))
    for token, i in vocab.items():
        if spaced and i not in added:
            token_bytes_V[i] = metaspace.n_bytes(token)
        elif i not in added:
            token_bytes_V[i] = len(token) if BYTES.issuperset(token) else len(token.encode())
        elif not added[i].special:
            token_bytes_V[i] = len(token.encode())
    token_bytes_V[[*begin, *close]] = 0
    ends = tuple(dict.fromkeys([end_of_text, *ends]))
    content = f"{backend.to_str()} {end_of_text}" + f" {ends}" * (len(ends) > 1)
    return Tokenizer(
        name=name,
        key=hashlib.sha256(content.encode()).hexdigest()[:16],
        vocab_size=len(token_bytes_V),
        end_of_text=end_of_text,
        ends=ends,
        begin=begin,
        close=close,
        token_bytes_V=token_bytes_V,
        lead=(vocab[metaspace.SPACE],) if spaced and metaspace.SPACE in vocab else (),
        backend=backend,
    )


def _around(backend) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that the template puts before and after a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return tuple(full[:start]), tuple(full[start + len(bare) :])


def _cached_bpe(vocab_size, corpus_key, train_texts) -> tokenizers.Tokenizer:
    rule = f"{corpus_key} {vocab_size} {TRAIN_CHARS} {TRAIN_WORD_BYTES}"
    key = hashlib.sha256(rule.encode()).hexdigest()[:16]
    path = cache.folder() / f"bpe-{vocab_size}-{key}.json"
    return cache.cached(
        path,
        lambda: tokenizers.Tokenizer.from_str(cache.read_json(path)),
        lambda: cache.write_json(path, _train_bpe(vocab_size, train_texts).to_str()),
    )


def _train_bpe(vocab_size, train_texts) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_training_part(train_texts()), trainer)
    return backend


def _training_part(texts: Iterator[str]) -> Iterator[str]:
    """Texts up to the two limits; runs without or of white space are cut every 256 characters.

    The trainer takes time that grows with the square of the length of a word.
    """
    chars, word_bytes, seen = TRAIN_CHARS, TRAIN_WORD_BYTES, set()
    for text in texts:
        text = text[:chars]
        stretches = set(text.split())
        if LONG_SPACE.search(text) or max(map(len, stretches), default=0) > 256:
            yield from filter(None, LONG.split(text))
        else:
            yield text
        new = {stretch for stretch in stretches if hash(stretch) not in seen}
        words = {word for word in WORD.findall(" ".join(new)) if hash(word) not in seen}
        seen.update(map(hash, new | words))
        chars -= len(text)
        word_bytes -= sum(len(word.encode()) for word in words)
        if chars <= 0 or word_bytes <= 0:
            return


def _is_gpt2(folder: Path) -> bool:
    return all((folder / name).is_file() for name in GPT2_FILES)


def _gpt2(spec: str, folder: Path) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer from its two files, or from tokenizer.json alone."""
    if (folder / "tokenizer.json").is_file():
        backend = _backend(folder)
        if backend.token_to_id(END_OF_TEXT) is None:
            raise UserError(
                f"data.tokenizer={shown(spec, 200)}: {END_OF_TEXT} is not in the vocabulary of "
                f"{folder}/tokenizer.json"
            )
        return backend
    if not _is_gpt2(folder):
        raise UserError(
            f"data.tokenizer={shown(spec, 200)}: {folder} must hold {' and '.join(GPT2_FILES)}, or "
            "tokenizer.json"
        )
    try:
        backend = tokenizers.Tokenizer(
            models.BPE.from_file(*(str(folder / name) for name in GPT2_FILES))
        )
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"data.tokenizer={shown(spec, 200)}: {shown(str(error))}") from error
    if backend.get_vocab_size() < 256:
        raise UserError(
            f"data.tokenizer={shown(spec, 200)}: {' and '.join(GPT2_FILES)} give "
            f"{backend.get_vocab_size()} tokens; a byte-level BPE has 256 and more"
        )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return backend


def _hub_folder() -> Path:
    """Folder with GPT-2's two files, from the hub's cache or the network."""
    instead = "use gpt2:FOLDER with a folder that holds vocab.json and merges.txt"
    try:
        for name in GPT2_FILES:
            path = huggingface_hub.try_to_load_from_cache("gpt2", name)
            if not isinstance(path, str):
                url = huggingface_hub.hf_hub_url("gpt2", name)
                cache.require_network("data.tokenizer=gpt2", url, instead)
                path = huggingface_hub.hf_hub_download("gpt2", name)
    except OSError as error:
        raise UserError(
            f"data.tokenizer=gpt2: no download ({type(error).__name__}); {instead}"
        ) from error
    return Path(path).parent
