"""Rows of a toy experiment, as questions and their frame read them."""

import copy
import dataclasses
import json

from bitnet_jax import presets
from bitnet_jax.metrics import LOSS

REFERENCES = {
    "targets": {"distinct": 9},
    "uniform": {"loss": 6.0, "entropy": 6.0, "distinct": 1},
    "unigram": {"loss": 4.0, "entropy": 4.0, "distinct": 1},
    "bigram": {"loss": 3.0, "entropy": 3.0, "distinct": 5},
    "text_sha256": "ab" * 32,
}


def make_rows(losses, *, steps=20, context=0.5, extra=(), **fields) -> list[dict]:
    """Rows by arm from {arm: losses by seed}; `fields` are `section__field=value` of the config."""
    cfg, _ = presets.override(
        presets.preset("tiny"),
        [f"{path.replace('__', '.')}={value}" for path, value in fields.items()],
    )
    config = json.loads(json.dumps(dataclasses.asdict(cfg)))
    config["run"]["steps"], config["model"]["vocab_size"] = steps, 300  # as resolved
    return [
        {
            "id": f"toy-{arm}/{seed}",
            "arm": arm,
            "seed": seed,
            "command": "python -m experiments.toy",
            "config": copy.deepcopy(config) | {"hyper": {}},
            "base": {},
            "references": REFERENCES,
            "final": {LOSS: loss, "collapse/mutual_information": context,
                      "collapse/verdict": "healthy"},
            "curve": {"step": [0, steps], LOSS: [6.0, loss]},
            "extra": {"severe": 1, "evaluations": 4, **dict(extra)},
            "preset": "tiny",
            "seconds": 60.0,
            "device": "1 x cpu",
            "cores": 2,
            "commit": "c" * 40,
            "versions": {"jax": "0"},
        }
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]  # fmt: skip
