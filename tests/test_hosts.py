"""Two processes on this machine train as one would, stop together, and go on bit for bit."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import conftest
import jax
import numpy as np
import pytest

from bitnet_jax import checkpoint, hosts, restore
from bitnet_jax.fields import UserError

SECONDS = 240  # of patience with a process


def start(folder, workdir, n_processes, *arguments):
    """The processes of a run of 60 steps on four devices in all."""
    (folder / "corpus.txt").exists() or conftest.tiny_config(folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bitnet_jax", "train", "--preset", "tiny"]
    command += ["--set", f"data.corpus=text:{folder / 'corpus.txt'}", "--workdir", str(workdir)]
    for name, value in (("steps", 60), ("eval_every", 10), ("save_every", 10)):
        command += ["--set", f"run.{name}={value}"]
    environment = os.environ | {
        "BITNET_JAX_CACHE": str(folder / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),  # which a kill may leave damaged
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(4 // n_processes),
    }
    processes = []
    for i in range(n_processes):
        several = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(n_processes),
            "JAX_PROCESS_ID": str(i),
        }
        processes.append(
            subprocess.Popen(
                [*command, *arguments],
                env=environment | (several if n_processes > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def end(processes):
    """(exit status, stdout, stderr) of each."""
    outputs = [process.communicate(timeout=SECONDS) for process in processes]
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def wait_for_step(workdir, step, process):
    """Until a checkpoint of that step or a later one counts."""
    until = time.monotonic() + SECONDS
    while not any(kept >= step for kept in checkpoint.kept_steps(workdir)):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def undisturbed(folder):
    """The workdir of a run of two processes, and what each of them printed."""
    ended = end(start(folder, folder / "two", 2))
    assert [status for status, _, _ in ended] == [0, 0], ended
    return folder / "two", ended


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_devices(folder, undisturbed):
    workdir, ((_, shown, _), (_, silent, _)) = undisturbed
    assert "report.html" in shown and "seed 0" not in silent  # the first alone speaks
    [(status, _, errors)] = end(start(folder, folder / "one", 1))
    assert status == 0, errors
    pairs = list(zip(rows(workdir), rows(folder / "one"), strict=True))
    assert pairs[-1][0]["step"] == 60
    for row, expected in (pair for pair in pairs if pair[0]["step"] <= 20):
        assert {k: v for k, v in row.items() if not isinstance(v, float)} == {
            k: v for k, v in expected.items() if not isinstance(v, float)
        }
        for key in ("train/loss", "eval/loss", "held_out/loss"):
            if key in expected:
                assert row[key] == pytest.approx(expected[key], rel=1e-6)


@pytest.mark.slow
def test_stopped_and_killed_processes_go_on_bit_for_bit(folder, undisturbed):
    """Kill -9 of one ends the other; a signal to one stops both at one step, saved."""
    workdir = folder / "stopped"
    first, second = start(folder, workdir, 2)
    wait_for_step(workdir, 10, first)
    second.kill()
    (status, _, errors), _ = end([first, second])
    assert status not in (0, None) and errors
    first, second = start(folder, workdir, 2, "--resume")
    wait_for_step(workdir, checkpoint.kept_steps(workdir)[-1] + 10, first)
    second.send_signal(signal.SIGTERM)
    ended = end([first, second])
    assert [status for status, _, _ in ended] == [143, 143], ended
    ended = end(start(folder, workdir, 2, "--resume"))
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert rows(workdir) == rows(undisturbed[0])
    _, _, state = restore.load_replicates(workdir, 60)  # on one process with other devices
    _, _, expected = restore.load_replicates(undisturbed[0], 60)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_COORDINATOR_ADDRESS": "localhost:1"},
        {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
        {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "x", "JAX_PROCESS_ID": "0"},
    ],
)
def test_an_environment_that_does_not_say_who_takes_part_is_refused(monkeypatch, environment):
    for name in (*hosts.OURS, *hosts.SIZES, "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError):
        hosts.initialize()
