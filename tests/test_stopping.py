"""Signals undo what was begun, wherever they come, and are collected where a run saves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_jax import stopping

ROOT = Path(__file__).parents[1]
PLACES = {
    "a block": "kill()",
    "a destructor": "type('Gone', (), {'__del__': lambda self: kill()})()",
    "an import": "sys.meta_path.insert(0, Finder()); import no_such_module",
    "the undoing": "undoing.append(True)",
}
SCRIPT = """
import os, sys
from pathlib import Path
from bitnet_jax import stopping

def kill():
    os.kill(os.getpid(), int(sys.argv[1]))

class Finder:
    def find_spec(self, *_):
        kill()

def undo(name):
    Path(name).unlink(missing_ok=True)
    if undoing and name == "inner":
        undoing.pop()
        kill()

undoing = []
os.chdir(sys.argv[2])
stopping.exit_on_signals(lambda signum: 128 + signum)
for name in ("outer", "inner"):
    Path(name).touch()
with stopping.undone(lambda: undo("outer")), stopping.undone(lambda: undo("inner")):
    PLACE
    if not undoing:
        Path("went on").touch()
Path("went on").touch()
"""


@pytest.mark.parametrize("signum", stopping.SIGNALS)
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_undoes_what_was_begun_and_ends_the_process(tmp_path, place, signum):
    code = SCRIPT.replace("PLACE", PLACES[place])
    command = [sys.executable, "-c", code, str(int(signum)), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + signum, "")
    assert not any(tmp_path.iterdir())


def test_an_error_undoes_what_was_begun_innermost_first():
    undone = []
    outer, inner = (lambda: undone.append("outer")), (lambda: undone.append("inner"))
    with pytest.raises(ValueError), stopping.undone(outer), stopping.undone(inner):
        raise ValueError
    assert undone == ["inner", "outer"]


def test_a_collected_signal_waits_and_the_next_one_kills():
    before = [signal.getsignal(signum) for signum in stopping.SIGNALS]
    with stopping.collected() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert {signal.getsignal(signum) for signum in stopping.SIGNALS} == {signal.SIG_DFL}
    assert [signal.getsignal(signum) for signum in stopping.SIGNALS] == before


def test_a_raised_signal_says_which_it_is():
    with pytest.raises(stopping.Stopped) as caught, stopping.raised():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.signum == signal.SIGTERM
