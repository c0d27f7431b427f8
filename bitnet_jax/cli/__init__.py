"""The commands: each is flags, one call, and what is printed.

Nothing here imports jax before it is needed, so that help and mistakes are quick.
"""

import importlib
import sys

from bitnet_jax.cli import flags
from bitnet_jax.fields import nearest

COMMANDS = {
    "train": "train replicates side by side, and write a page of what happened",
    "plan": "say what a run will need on a TPU, on GPUs or here, and whether it fits",
    "check": "test quantisers, model, loss and optimiser before training",
    "predict": "say before training whether weight decay inside Adam will collapse a run",
    "triage": "say what is wrong with a checkpoint, most likely cause first",
    "inspect": "show what a run's weights and predictions look like",
    "generate": "continue prompts",
    "convert": "write a model for transformers, or check a folder of theirs",
}


def main(argv: list[str] | None = None) -> None:
    """Run the command that the arguments (those of the process by default) name, and exit."""
    flags.guard(lambda: _command(sys.argv[1:] if argv is None else argv))


def _command(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        hint = nearest(argv[0], COMMANDS)
        return flags.fail(f"error: unknown command {argv[0]!r}{hint}; see bitnet --help", 2)
    module = importlib.import_module(f"bitnet_jax.cli.{argv[0]}")
    return module.main(argv[1:])


def _usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return f"usage: bitnet COMMAND ...\n\n{commands}\n\nbitnet COMMAND --help tells more."
