"""The folder of a run: who holds it, whether a run that goes on there is the same, what it is."""

import contextlib
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from bitnet_jax import config, config_file, hosts, log, optim, stopping
from bitnet_jax.fields import UserError, shown
from bitnet_jax.program import Program

LOCK = ".lock"


@contextlib.contextmanager
def occupied(workdir: Path, resume: bool) -> Iterator[None]:
    """Hold a workdir, which is created if need be; raises UserError when it cannot be used.

    A folder that was created for a run that did not begin, its config.json not written, is removed.
    Of several processes the first does all this.
    """
    if not hosts.is_first():
        hosts.agree(None)
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_held(workdir, resume))
            error = None
        except UserError as raised:
            error = raised
        hosts.agree(error)
        yield


@contextlib.contextmanager
def _held(workdir: Path, resume: bool) -> Iterator[None]:
    created, locks = [path for path in (workdir, *workdir.parents) if not path.exists()], []

    def release():
        if locks and created and not (workdir / "config.json").exists():
            shutil.rmtree(workdir, ignore_errors=True)
        elif locks:
            (workdir / LOCK).unlink(missing_ok=True)
        while locks:
            os.close(locks.pop())
        for folder in created:
            with contextlib.suppress(OSError):  # it was not made, it has begun, or is in use
                folder.rmdir()

    with stopping.undone(release):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            locks.append(_lock(workdir))
        except OSError as error:
            raise UserError(f"{workdir}: cannot be used as workdir: {error.strerror}") from error
        if not resume and any(path.name != LOCK for path in workdir.iterdir()):
            raise UserError(
                f"{workdir}: not empty; add --resume to go on, or give another --workdir"
            )
        yield


def _lock(workdir: Path) -> int:
    """Lock a workdir until the returned file is closed, or the process ends in any way."""
    path = workdir / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note = os.pread(file, 1 << 12, 0).decode("utf-8", "replace")
            os.close(file)
            raise UserError(f"{workdir}: in use by {note or 'another process'}") from None
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            break
        os.close(file)  # of a process that has just removed it
    note = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T %z')}"
    os.ftruncate(file, 0)
    os.pwrite(file, note.encode(), 0)
    return file


def check_same(workdir: Path, settings: dict, corpus: dict) -> None:
    """Raise UserError naming the first setting in which a resumed run differs from its workdir."""
    path = workdir / "config.json"
    if not path.exists():
        return
    tree = log.read_sealed(path)
    saved = config_file.to_json(*config_file.from_json(tree, str(path)))
    if differs := first_difference(_by_importance(saved), _by_importance(settings)):
        name, was, now = differs
        changed = f"{workdir}: was started with {name}={shown(was)}, not {shown(now)}"
        if name.startswith(("model.", "--seeds")) and name not in config.BOOKKEEPING:
            raise UserError(f"{changed}; give another --workdir")
        wanted = {name.rpartition("].")[2]: now}
        if (workdir / "summary.json").exists():
            wanted = {"run.steps": 2 * saved["run"]["steps"]} | wanted
        raise UserError(
            f"{changed}; to go on from it with other numbers: {fork_command(workdir, wanted)}"
        )
    if tree.get("corpus") != corpus:
        raise UserError(f"{workdir}: data.corpus={corpus['source']} has changed since the start")


def _by_importance(settings: dict) -> dict:
    """The same with the seeds before the numbers of replicates."""
    seeds = ",".join(dict.fromkeys(str(rep["seed"]) for rep in settings["replicates"]))
    sections = {name: settings[name] for name in config.SECTIONS}
    return sections | {"--seeds": seeds, "replicates": settings["replicates"]}


def first_difference(a, b, path: str = "") -> tuple[str, object, object] | None:
    """Dotted path and both values of the first leaf in which two trees of JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        pairs = [(f"{path}.{key}" if path else key, a[key], b[key]) for key in a]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(f"{path}[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b else (path, a, b)
    differences = (first_difference(x, y, name) for name, x, y in pairs)
    return next((difference for difference in differences if difference), None)


def fork_command(workdir: Path, wanted: dict) -> str:
    """The command that goes on from the last checkpoint of a run, in a workdir of its own.

    `wanted` are the fields that change.
    """
    changes = {"run.init": f"fork:{workdir}"} | wanted
    sets = [
        f"--set {name}={','.join(value) if isinstance(value, list) else value}"
        for name, value in changes.items()
    ]
    start = f"bitnet train --config {workdir}/config.json"
    return " ".join([start, *sets, f"--workdir {workdir}-2"])


def describe(program: Program, settings: dict) -> dict:
    """Content of config.json, which goes with every checkpoint, too."""
    abstract_params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), program.abstract_state.params
    )
    return settings | {
        "provenance": log.provenance(),
        "products": program.seams.products,
        "corpus": program.tokens.identity,
        "references": program.references,
        "n_params": sum(x.size for x in jax.tree.leaves(abstract_params)),
        "decay_table": optim.decay_table(abstract_params),
    }


def write_config(program: Program, described: dict, workdir: Path) -> None:
    """Write config.json and the tokenizer, unless a run was begun here, and say what is trained."""
    device, tokens = jax.devices()[0].device_kind, len(program.tokens.train_N)
    print(
        f"{len(program.replicates)} replicates of {described['n_params']:,} parameters on "
        f"{program.mesh.size} x {device}; {tokens:,} training tokens; {workdir}"
    )
    if hosts.is_first() and not (workdir / "config.json").exists():
        program.tokens.tokenizer.save(workdir / "tokenizer")
        log.write_sealed(workdir / "config.json", described)
