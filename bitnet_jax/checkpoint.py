"""Checkpoints (orbax): the state of all replicates and the resolved configuration, per step.

They are in the workdir, or where `run.checkpoints` says: in another folder, or in a bucket. All
else of a run, which is locked, appended to and replaced, needs a local workdir.

Kept: the last two, the last step of stage 1, and at most `run.keep` more, evenly spaced.
"""

import contextlib
import json
import zlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from bitnet_jax import hosts, log
from bitnet_jax.config import RunConfig
from bitnet_jax.fields import UserError

MANIFEST = "manifest.json"  # checksums of a checkpoint's files, written last


def is_remote(place) -> bool:
    """Whether a path or its text names a bucket."""
    return "://" in str(place)


def place(workdir) -> epath.Path:
    """The folder of a run's checkpoints: inside the workdir, else as its config.json says.

    A bucket's folder is its own place, whatever workdir it belongs to. Raises UserError where the
    libraries of a bucket are not installed.
    """
    if is_remote(workdir):
        return _usable(str(workdir))
    inside, settings = Path(workdir).absolute() / "checkpoints", Path(workdir) / "config.json"
    if inside.exists() or not settings.exists():
        return epath.Path(inside)
    run = log.read_json(settings).get("run")
    elsewhere = run.get("checkpoints") if isinstance(run, dict) else None
    return _usable(elsewhere or str(inside))


def _usable(text: str) -> epath.Path:
    folder = epath.Path(text)
    if is_remote(text):
        try:
            folder.exists()
        except ImportError as error:
            raise UserError(
                f"{text}: needs two libraries: pip install gcsfs google-cloud-storage"
            ) from error
        except Exception as error:  # of whatever library talks to the bucket
            raise UserError(f"{text}: cannot be read: {error}") from error
    return folder


def open_manager(workdir: Path, run: RunConfig) -> ocp.CheckpointManager:
    """Open a run's checkpoints for writing with the keeping rule of the module docstring.

    Steps whose save was cut off are removed, so that they can be written again. Raises UserError
    when a new run is told to write where another has.
    """
    folder, begun = place(workdir), (Path(workdir) / "config.json").exists()
    if run.checkpoints is not None and not begun:
        folder = _usable(run.checkpoints)
        if ocp.utils.checkpoint_steps(folder):
            raise UserError(f"run.checkpoints={run.checkpoints}: holds checkpoints of another run")
    if hosts.is_first():
        for step in set(ocp.utils.checkpoint_steps(folder)) - set(_complete(folder)):
            (folder / str(step)).rmtree()
    hosts.wait("checkpoints are tidied")
    policy = keep.AnyPreservationPolicy(
        [
            keep.LatestN(2),
            keep.EveryNSteps(steps_between(run)),
            keep.CustomSteps([run.boundary]),
        ]
    )
    # Synchronous: on CPU an asynchronous save reads the buffers that the next chunk overwrites.
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(folder, options=options)


def steps_between(run: RunConfig) -> int:
    """Steps between checkpoints that are kept for good: a multiple of `run.checkpoint_every`."""
    if not run.keep:
        return run.steps + 1  # none
    return run.checkpoint_every * max(1, -(-(run.steps // run.checkpoint_every) // run.keep))


def steps_at_end(run: RunConfig) -> list[int]:
    """The steps that are left once a run has ended, ascending; while it saves, one more is there.

    At most `run.keep` + 3.
    """
    every = steps_between(run)
    before = max(n for n in (run.boundary, *_multiples_before(run)) if n < run.steps)
    return sorted({*range(every, run.steps + 1, every), run.boundary, before, run.steps})


def _multiples_before(run: RunConfig) -> list[int]:
    """The last regular saves before the last step; 0: none."""
    return [(run.steps - 1) // n * n for n in (run.save_every, run.checkpoint_every)]


def save(manager: ocp.CheckpointManager, step: int, state, config: dict) -> None:
    """Write one step: `state` ([R, ...] leaves) and the resolved configuration.

    Raises UserError when the disk is full.
    """
    folder = epath.Path(manager.directory) / str(step)
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(config))
    try:
        manager.save(step, args=args)
        manager.wait_until_finished()
    except ValueError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # how tensorstore names a full disk
            raise
        raise UserError(f"{folder}: not saved, the disk is full; free space and resume") from error
    hosts.wait(f"step {step} is saved")
    if hosts.is_first():
        temporary = folder / f"{MANIFEST}.tmp"  # a half-written manifest would count
        temporary.write_text(json.dumps(_checksums(folder)))
        temporary.replace(folder / MANIFEST)
    hosts.wait(f"step {step} counts")


def kept_steps(workdir) -> list[int]:
    """Steps that can be restored, ascending; saves that were cut off do not count."""
    return _complete(place(workdir))


def _complete(folder: epath.Path) -> list[int]:
    steps = ocp.utils.checkpoint_steps(folder)
    return sorted(step for step in steps if (folder / str(step) / MANIFEST).exists())


def load_config(workdir, step: int) -> dict:
    """The resolved configuration that was saved with a step."""
    handler = ocp.JsonCheckpointHandler()
    with _reading(workdir, step, "config") as folder, ocp.Checkpointer(handler) as reader:
        return reader.restore(folder / "config")


def restore(workdir: Path, step: int, abstract_state):
    """Restore a step into the shapes, types and shardings of `abstract_state`.

    Leaves without a sharding come to the first device, wherever they were saved.

    Raises UserError when the step is missing, damaged, or of another shape.
    """
    with _reading(workdir, step) as folder, ocp.StandardCheckpointer() as reader:
        saved = _shapes(reader.metadata(folder / "state").item_metadata.tree)
        wanted = _shapes(ocp.utils.serialize_tree(abstract_state, keep_empty_nodes=True))
        for name in sorted(saved | wanted):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"{folder}: checkpoint of another shape: {name} is {saved.get(name)} there "
                    f"and {wanted.get(name)} in this configuration"
                )
        return reader.restore(folder / "state", jax.tree.map(_placed, abstract_state))


def restore_replicate(workdir: Path, step: int, index: int, abstract_state):
    """One replicate without its leading axis, in NumPy; `abstract_state` is that of one replicate.

    Raises UserError as `restore` does, and when the checkpoint has no such replicate.
    """
    n_rep = len(load_config(workdir, step)["replicates"])
    if not 0 <= index < n_rep:
        raise UserError(f"{workdir}: no replicate {index}; the checkpoint has 0 to {n_rep - 1}")
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((n_rep, *x.shape), x.dtype), abstract_state
    )
    return jax.tree.map(lambda x: np.asarray(x)[index], restore(workdir, step, stacked))


def _checksums(folder: epath.Path, part: str = "") -> dict[str, int]:
    """CRC-32 of the files by name; in a bucket, which checks what it reads, their lengths."""
    if is_remote(folder):
        return {name: (folder / name).stat().length for name in _files(folder, part)}
    return {name: zlib.crc32((folder / name).read_bytes()) for name in _files(folder, part)}


def _files(folder: epath.Path, part: str) -> list[str]:
    """Names of the files below a part of a checkpoint, but for the manifest; ascending.

    One folder after another: `epath`'s own walk loses gs:// on the way.
    """
    names, left = [], [part]
    while left:
        inside = left.pop()
        for path in (folder / inside if inside else folder).iterdir():
            name = f"{inside}/{path.name}" if inside else path.name
            if path.is_dir():
                left.append(name)
            elif path.name not in ("", MANIFEST):
                names.append(name)
    return sorted(names)


@contextlib.contextmanager
def _reading(workdir: Path, step: int, part: str = ""):
    """Yield the folder of a step once its files, or those of a part, have been checked.

    orbax meets damaged files deep inside its coroutines and says so on many lines, hence the check
    before it reads.
    """
    if step not in (steps := kept_steps(workdir)):
        raise UserError(f"{workdir}: no checkpoint of step {step}; there: {steps}")
    folder = place(workdir) / str(step)
    remedy = "remove this folder to go on from an earlier step"
    try:
        written, checksums = json.loads((folder / MANIFEST).read_text()), _checksums(folder, part)
        if not isinstance(written, dict):
            raise ValueError(f"not an object but {type(written).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}: damaged checkpoint: {MANIFEST}; {remedy}") from error
    written = {name: crc32 for name, crc32 in written.items() if name.startswith(part)}
    for name in sorted(written | checksums):
        if written.get(name) != checksums.get(name):
            raise UserError(f"{folder}: damaged checkpoint: {name} is not as written; {remedy}")
    yield folder


def _placed(x):
    """A leaf whose sharding orbax need not take from the checkpoint."""
    if getattr(x, "sharding", None) is not None:
        return x
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape) for path, x in leaves
    }
