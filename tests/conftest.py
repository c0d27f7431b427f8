"""Eight virtual CPU devices, compiled programs that tests share, and a corpus small enough."""

import dataclasses
import signal
import warnings
from pathlib import Path

import jax
import pytest

from bitnet_jax import cache, presets
from bitnet_jax.cli import flags, main

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
# Many tests build the same programs, in several processes.
COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_compilation_cache_max_size", 1 << 30)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_configure(config):
    """What a killed run left half written fails no test of the next."""
    if not hasattr(config, "workerinput"):
        showwarning = warnings.showwarning
        cache.heal_compiled(COMPILED)
        warnings.showwarning = showwarning


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


@pytest.fixture
def bitnet(monkeypatch, capfd):
    """Call `bitnet ARGUMENTS` in this process; returns status and both outputs."""
    monkeypatch.setenv("XLA_FLAGS", flags.DETERMINISTIC)  # prepare() would leave it behind
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "none")  # and set its own
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def bitnet(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
        return stop.value.code, *capfd.readouterr()

    yield bitnet
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
