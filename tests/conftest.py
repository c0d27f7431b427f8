"""Eight virtual CPU devices, fast compiles, and a corpus small enough for tests."""

import dataclasses

import jax
import pytest

from bitnet_jax import presets

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    """Tokens and tokenizers of all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(tmp_path, cache_folder, monkeypatch):
    """The tiny preset on a small text file of its own."""
    monkeypatch.setenv("BITNET_JAX_CACHE", str(cache_folder))
    return tiny_config(tmp_path)


def tiny_config(folder):
    """The tiny preset on a text file that is written to `folder`."""
    text = "\n".join(
        f"the {n} cats sat on the {n % 7} mats, and {n * n} dogs ran." for n in range(3000)
    )
    (folder / "corpus.txt").write_text(text)
    cfg = presets.preset("tiny")
    data = dataclasses.replace(cfg.data, corpus=f"text:{folder / 'corpus.txt'}")
    return dataclasses.replace(cfg, data=data)
