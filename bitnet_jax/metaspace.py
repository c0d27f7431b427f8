"""Tokenizers of SentencePiece's kind, as a tokenizer.json has those of Llama 2, TinyLlama, Mistral.

`▁` stands for a space, one is put before a text, and a character without a token is its bytes.
"""

import re
from collections.abc import Container, Iterator

SPACE = "▁"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def parts(tree) -> Iterator[dict]:
    """A normaliser, pre-tokenizer or decoder, and the parts of a sequence of them."""
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from parts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from parts(value)


def is_one(tree: dict) -> bool:
    """Whether a tokenizer.json is of this kind."""
    model = tree.get("model")
    if not isinstance(model, dict) or model.get("byte_fallback") is not True:
        return False
    around = [*parts(tree.get("normalizer")), *parts(tree.get("pre_tokenizer"))]
    spaced = any(SPACE in (part.get("content"), part.get("replacement")) for part in around)
    return spaced and model.get("type") in ("BPE", "Unigram")


def doubles(tree: dict) -> bool:
    """Whether the space before a text is put before one that begins with a space, too."""
    return any(part.get("type") == "Prepend" for part in parts(tree.get("normalizer")))


def n_bytes(token: str) -> int:
    """Bytes of text that an ordinary token stands for."""
    return 1 if BYTE.fullmatch(token) else len(token.replace(SPACE, " ").encode())


def missing_merge(model: dict, special: Container[str]) -> str | None:
    """A split of a token, unless it is special, that a BPE's merges lack; or a token whose merges
    are not in one place.

    llama.cpp merges whatever makes a token, the token of the highest score first: as the BPE does
    when its merges are all splits of each token, one token after the other, as they are when they
    come from a SentencePiece model. None where they are.
    """
    vocab, ranks = model["vocab"], {}
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, []).append((rank, left))
    for token in vocab:
        merges = ranks.get(token, [])
        lefts = {left for _, left in merges}
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left not in lefts and left in vocab and right in vocab and token not in special:
                return f"{left} {right}"
        if merges and merges[-1][0] - merges[0][0] >= len(merges):
            return token
    return None


def scores(model: dict) -> dict[str, float]:
    """Of every token that merges make, minus the place of its first merge."""
    token_scores = {}
    for rank, pair in enumerate(model["merges"]):
        token = pair.replace(" ", "") if isinstance(pair, str) else "".join(pair)
        token_scores.setdefault(token, -float(rank))
    return token_scores
