"""What SIGINT and SIGTERM do: end a process with nothing half made, or wait until all is saved.

A handler that raises is not enough: the interpreter drops what is raised in a destructor, and
libraries drop what is raised in their callbacks.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_undo: list[Callable[[], object]] = []  # of the blocks that the process is in, outermost first


class Stopped(KeyboardInterrupt):
    """A signal, where it may be raised."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


@contextlib.contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` when the block ends, also by a signal that ends the process.

    It may be called twice, the second time within the first.
    """
    _undo.append(undo)
    try:
        yield
    finally:
        undo()
        _undo.remove(undo)


def exit_on_signals(tell: Callable[[int], int]) -> None:
    """From here on a signal ends the process at once with the status that `tell(signum)` returns.

    Before, what blocks of `undone` have begun is undone. A second signal kills.
    """

    def stop(signum, frame):
        default()
        for undo in reversed(_undo):
            undo()
        os._exit(tell(signum))

    _handle(stop)


def default() -> None:
    """A signal kills, from here on."""
    _handle(signal.SIG_DFL)


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """Collect signals in a list instead of dying; the second one kills."""
    received: list[int] = []

    def note(signum, frame):
        received.append(signum)
        default()

    with _handled(note):
        yield received


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raise Stopped at a signal: where nothing is lost if that is dropped. The second one kills."""

    def stop(signum, frame):
        default()
        raise Stopped(signum)

    with _handled(stop):
        yield


@contextlib.contextmanager
def _handled(handler) -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        _handle(handler)
        yield
    finally:
        for signum, known in before.items():
            signal.signal(signum, known)


def _handle(handler) -> None:
    for signum in SIGNALS:
        signal.signal(signum, handler)
