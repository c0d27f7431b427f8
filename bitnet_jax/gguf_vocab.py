"""The tokenizer in a GGUF file: a byte-level BPE cut into words as llama.cpp can, or SentencePiece.

Source: llama.cpp of 2026-10 `src/llama-vocab.cpp`. The writers of its library are not used: its
LlamaHfVocab gives every token one score, which makes other tokens of a text.
"""

import json

import gguf

from bitnet_jax import metaspace
from bitnet_jax.config import ModelConfig
from bitnet_jax.fields import UserError, shown
from bitnet_jax.tokenizer import Tokenizer

LLAMA_3 = (  # the words of its tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NO_SCORE = -1000.0  # of a token that no merge makes, below or beside those that one does
KNOWN = "known are byte-level BPEs as those of GPT-2, Llama 3 and SmolLM, and SentencePiece's BPE"


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Keys of the tokenizer; rows of the embedding without a token are unused ones.

    Raises UserError unless llama.cpp gives texts the same tokens, but for one: where Metaspace puts
    no space before a text that begins with one, llama.cpp does.
    """
    tree = json.loads(tokenizer.backend.to_str())
    spaced = metaspace.is_one(tree)
    if wrong := _fault(tree, tokenizer, model):
        raise UserError(
            f"cannot be exported: tokenizer {shown(tokenizer.name)} ({tokenizer.vocab_size:,} "
            f"tokens) {wrong}; {KNOWN}"
        )
    texts = [tokenizer.backend.id_to_token(i) for i in range(tokenizer.vocab_size)]
    texts += [None] * (model.vocab_size - tokenizer.vocab_size)
    writer.add_tokenizer_model("llama" if spaced else "gpt2")
    writer.add_tokenizer_pre("default" if spaced else _cut(tree))
    writer.add_token_list([f"[PAD{i}]" if text is None else text for i, text in enumerate(texts)])
    writer.add_token_types(_types(texts, tokenizer, tree))
    if spaced:
        scores = metaspace.scores(tree["model"])
        lowest = min(NO_SCORE, -len(tree["model"]["merges"]) - 1.0)
        writer.add_token_scores([scores.get(text, lowest) for text in texts])
        writer.add_add_space_prefix(True)
    else:
        pairs = tree["model"]["merges"]
        writer.add_token_merges([x if isinstance(x, str) else " ".join(x) for x in pairs])
    end, *more = tokenizer.ends
    writer.add_bos_token_id(tokenizer.begin[0] if tokenizer.begin else end)
    writer.add_eos_token_id(end)
    for add, i in zip((writer.add_eot_token_id, writer.add_eom_token_id), more, strict=False):
        add(i)
    writer.add_add_bos_token(bool(tokenizer.begin))
    writer.add_add_eos_token(False)


def _types(texts: list[str | None], tokenizer: Tokenizer, tree: dict) -> list[gguf.TokenType]:
    """Of every row: what kind of token it is."""
    added = tokenizer.backend.get_added_tokens_decoder()
    bytewise, unknown = metaspace.is_one(tree), tree["model"].get("unk_token")
    types = []
    for i, text in enumerate(texts):
        kind = gguf.TokenType.NORMAL if text is not None else gguf.TokenType.UNUSED
        if bytewise and text is not None and metaspace.BYTE.fullmatch(text):
            kind = gguf.TokenType.BYTE
        if i in added:
            kind = gguf.TokenType.USER_DEFINED
        if i in {*tokenizer.ends, *tokenizer.begin} or (i in added and added[i].special):
            kind = gguf.TokenType.CONTROL
        if bytewise and text == unknown:
            kind = gguf.TokenType.UNKNOWN
        types.append(kind)
    return types


def _fault(tree: dict, tokenizer: Tokenizer, model: ModelConfig) -> str | None:
    """Why llama.cpp would not give texts the same tokens."""
    if tokenizer.vocab_size > model.vocab_size:
        return f"has more than {model.vocab_size}"
    if len(tokenizer.begin) > 1:
        return f"begins a text with {len(tokenizer.begin)} tokens, not one"
    if len(tokenizer.ends) > 3:
        return f"has {len(tokenizer.ends)} tokens that end a text, not three"
    if not metaspace.is_one(tree):
        cut = _cut(tree)
        return None if cut else "cuts text into words in a way that is not known in llama.cpp"
    if tree["model"]["type"] != "BPE":
        return f"is SentencePiece's {tree['model']['type']}"
    added = tokenizer.backend.get_added_tokens_decoder()
    lacking = metaspace.missing_merge(tree["model"], {token.content for token in added.values()})
    return lacking and f"merges in another way than SentencePiece's BPE, at {shown(lacking)!r}"


def _cut(tree: dict) -> str | None:
    """llama.cpp's name of the way in which a tokenizer.json cuts text into words, or None."""
    split = tree["pre_tokenizer"] or {}
    parts = split["pretokenizers"] if split.get("type") == "Sequence" else [split]
    kinds, first, last = [part.get("type") for part in parts], parts[0], parts[-1]
    whole_words, gpt2 = bool(tree["model"].get("ignore_merges")), last.get("use_regex", True)
    if tree["normalizer"] or kinds[-1] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if kinds[:-1] == [] and gpt2 and not whole_words:
        return "gpt-2"
    if kinds[:-1] == ["Digits"] and first["individual_digits"] and gpt2 and not whole_words:
        return "smollm"
    if kinds[:-1] == ["Split"] and first["pattern"] == {"Regex": LLAMA_3} and whole_words:
        isolated = first["behavior"] == "Isolated" and not first["invert"] and not gpt2
        return "llama-bpe" if isolated else None
    return None
