"""Seeded changes to what a user writes end in success or in one line, never in a traceback.

BITNET_FUZZ=N makes N cases of each kind. Folders of transformers have theirs in test_hf_config.py.
"""

import argparse
import copy
import json
import math
import os
import random
from dataclasses import fields

import pytest
from test_hf_config import ODD, mutate

from bitnet_jax import config, config_file, presets, tokenizer
from bitnet_jax.cli import flags, generate
from bitnet_jax.config import SECTIONS
from bitnet_jax.fields import UserError

CASES = int(os.environ.get("BITNET_FUZZ", "400"))
NAMES = [f"{name}.{field.name}" for name, kind in SECTIONS.items() for field in fields(kind)] + [
    f"hyper.{name}" for name in config.HYPER_FIELDS
]
VALUES = (*ODD, "inf", "-inf", "nan", "1e39", "9" * 5000, "coupled,coupled", "coupled", "true")
VALUES += ("bpe:300", "bpe:" + "9" * 30, "text:", "tfds:", "hf:", "gpt2:/dev/null", "fork:", "-0.0")
VALUES += ("1", "2", "4", "8", "0.5", "1e-3", "b158", "report", "bfloat16", "sequential", "none")
PROMPT = ("a", " ", "\n", "\x1b[31m", "\x00", "\u202e", "\ud800", "\U0001f600", "<|endoftext|>")


def outcomes(cases, attempt) -> list[int]:
    """How many cases went well, and how many ended in one line."""
    counts = [0, 0]
    for case in cases:
        try:
            attempt(case)
            counts[0] += 1
        except UserError as error:
            counts[1] += 1
            assert str(error).isprintable() and len(str(error)) < 800, case
    return counts


def all_finite(tree) -> bool:
    if isinstance(tree, dict | list):
        return all(map(all_finite, tree.values() if isinstance(tree, dict) else tree))
    return not isinstance(tree, float) or math.isfinite(tree)


def test_any_assignments_make_a_configuration_or_one_line():
    rng = random.Random(1)

    def case():
        pairs = [(rng.choice(NAMES), rng.choice(VALUES)) for _ in range(rng.randint(1, 3))]
        words = [f"{name}={value}" for name, value in pairs]
        if rng.random() < 0.1:
            words.append("".join(rng.choices("=.,:\u00e9 modeldata", k=8)))
        return words

    def attempt(words):
        args = argparse.Namespace(
            **{"preset": "tiny", "config": None, "assignments": words, "seeds": None},
            **{"default_seeds": "0-1", "workdir": None, "resume": False, "dry_run": True},
            verbose=False,
        )
        request = flags.resolve(args, "train")
        tree = config_file.to_json(request.cfg, request.replicates)
        assert all_finite(tree), words
        assert config_file.from_json(json.loads(json.dumps(tree)))[0] == request.cfg

    went_well, refused = outcomes((case() for _ in range(CASES)), attempt)
    assert min(went_well, refused) > CASES / 40  # about CASES / 18 are accepted


def test_any_config_json_is_read_or_one_line():
    rng = random.Random(2)
    cfg = presets.preset("tiny")
    tree = config_file.to_json(cfg, presets.make_replicates(cfg, [0], {}))

    def changed():
        new = mutate(rng, tree)
        if rng.random() < 0.4:
            new = copy.deepcopy(tree)
            new["replicates"][0] = mutate(rng, new["replicates"][0])
        return new

    def attempt(new):
        assert all_finite(config_file.to_json(*config_file.from_json(new, "config.json"))), new

    _, refused = outcomes((changed() for _ in range(CASES)), attempt)
    assert refused > CASES / 20


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITNET_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tokenizer.load_tokenizer("bpe:300", "fuzz", lambda: iter(["a cat and a dog " * 50]))


def test_any_prompts_are_encoded_or_one_line(bpe):
    rng = random.Random(3)

    def attempt(prompts):
        tokens_BP, lengths_B = generate.encode(bpe, prompts, 4, 64, rng.random() < 0.3)
        assert tokens_BP.shape == (len(prompts), max(lengths_B)) and tokens_BP.max() < 300

    def prompts():
        parts = (rng.choices(PROMPT, k=rng.randint(0, 40)) for _ in range(rng.randint(1, 3)))
        return ["".join(part) for part in parts]

    assert min(outcomes((prompts() for _ in range(CASES)), attempt)) > CASES / 20
