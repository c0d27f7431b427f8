"""A cache file is whole, what was written, and made once, whoever else is starting."""

import errno
import http.server
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from bitnet_jax import cache
from bitnet_jax.fields import UserError


def test_a_new_file_takes_the_place_of_a_link_and_follows_none(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    path = tmp_path / "cache" / "file"
    path.parent.mkdir()
    path.symlink_to(victim)
    with cache.replacing(path) as file:
        file.write(b"new")
    assert (path.read_bytes(), path.is_symlink()) == (b"new", False)
    assert victim.read_text() == "untouched"


def test_drafts_have_names_that_differ_and_vanish_with_a_failure(tmp_path):
    names = set()
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), cache.replacing(tmp_path / "file"):
            names |= set(os.listdir(tmp_path))
            raise ZeroDivisionError
    assert len(names) == 3 and not os.listdir(tmp_path)


def test_a_draft_that_exists_already_is_never_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.secrets, "token_hex", lambda n: "guessed")
    target = tmp_path / "target"
    (tmp_path / ".file.guessed.tmp").symlink_to(target)
    with pytest.raises(UserError), cache.replacing(tmp_path / "file"):
        pass
    assert not target.exists()


def test_the_lock_removes_drafts_of_killed_processes_of_its_own_file_only(tmp_path):
    for name in (".file.12ab.tmp", ".file2.12ab.tmp", "file"):
        (tmp_path / name).write_text("")
    with cache.lock(tmp_path / "file"):
        assert {".file2.12ab.tmp", "file"} == {n for n in os.listdir(tmp_path) if "lock" not in n}


def test_a_checksum_sees_every_bit_and_the_length(monkeypatch):
    monkeypatch.setattr(cache, "BLOCK_BYTES", 4)
    content = bytes(range(11))

    def flipped(i):
        return bytes(b ^ (1 << (i % 8)) * (n == i // 8) for n, b in enumerate(content))

    others = [flipped(i) for i in range(88)] + [content[:n] for n in range(11)] + [content + b"\0"]
    sums = {cache.checksum(io.BytesIO(x)) for x in [content, *others]}
    assert len(sums) == 1 + len(others)
    read = io.BytesIO(content)
    read.seek(3)
    assert cache.checksum(read) == cache.checksum(io.BytesIO(content))


def build(path, content, counter):
    def write():
        counter.append(1)
        cache.write_json(path, content)

    return write


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "other", "null", "bare"])
def test_a_damaged_file_is_named_and_made_again(tmp_path, capsys, damage):
    path, counter = tmp_path / "a.json", []
    load = lambda: cache.read_json(path)  # noqa: E731
    assert cache.cached(path, load, build(path, [1, "é"], counter)) == [1, "é"]
    whole = path.read_bytes()
    cache.write_json(tmp_path / "b.json", [2])
    path.write_bytes(
        {
            "flip": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
            "truncate": whole[:-3],
            "empty": b"",
            "other": (tmp_path / "b.json").read_bytes(),
            "null": b"null",
            "bare": b'{"sha256": 3, "content": []}',
        }[damage]
    )
    capsys.readouterr()
    assert cache.cached(path, load, build(path, [1, "é"], counter)) == [1, "é"]
    assert cache.cached(path, load, build(path, [1, "é"], counter)) == [1, "é"]
    assert len(counter) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and str(path) in errors[0]


def test_every_flipped_bit_of_a_sealed_file_is_found(tmp_path):
    path = tmp_path / "a.json"
    cache.write_json(path, {"n": 7})
    whole = path.read_bytes()
    for i in range(8 * len(whole)):
        path.write_bytes(bytes(b ^ (1 << (i % 8)) * (n == i // 8) for n, b in enumerate(whole)))
        with pytest.raises(cache.DamagedError):
            cache.read_json(path)


def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match=r"a\.json"):
        cache.cached(tmp_path / "a.json", lambda: cache.read_json(tmp_path / "a.json"), None)


def test_a_missing_file_is_made_without_a_word(tmp_path, capsys):
    path = tmp_path / "new" / "a.json"
    assert cache.cached(path, lambda: cache.read_json(path), build(path, 5, [])) == 5
    assert capsys.readouterr().err == ""


def test_a_full_disk_names_the_folder_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}: No space left on device"):
        cache.write_json(tmp_path / "a.json", 1)
    assert not os.listdir(tmp_path)


def test_compiled_programs_that_are_half_written_or_damaged_go(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: seen.append(message))
    seen = []
    for name in ("jit_f-0", "jit_f-1", "jit_g-2", "jit_g-3"):
        (tmp_path / f"{name}-cache").write_bytes(b"program")
        (tmp_path / f"{name}-atime").write_bytes(b"time")
    (tmp_path / "jit_g-3-atime").unlink()
    (tmp_path / "jit_f-1-atime").unlink()
    (tmp_path / "jit_f-1-atime").mkdir()
    cache.heal_compiled(tmp_path)
    assert {p.name[:7] for p in tmp_path.iterdir()} == {"jit_f-0", "jit_g-2"}
    text = "Error reading persistent compilation cache entry for 'jit_f': error: Error -3"
    warnings.showwarning(text, UserWarning, "compiler.py", 1)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["jit_g-2-atime", "jit_g-2-cache"]
    assert capsys.readouterr().err.count("\n") == 1 and not seen
    warnings.showwarning("something else", UserWarning, "other.py", 1)
    assert seen == ["something else"]


def test_twenty_processes_build_once_and_agree(tmp_path):
    code = """if True:
        import os, sys, time
        from pathlib import Path
        from bitnet_jax import cache

        path = Path(sys.argv[1]) / "a.json"

        def build():
            os.write(2, b"built\\n")
            time.sleep(0.2)
            cache.write_json(path, "content")

        children = []
        for _ in range(20):
            if not (child := os.fork()):
                content = cache.cached(path, lambda: cache.read_json(path), build)
                os.write(1, f"{content}\\n".encode())
                os._exit(0)
            children.append(child)
        sys.exit(sum(os.waitpid(child, 0)[1] for child in children))
    """
    (tmp_path / "a.json").write_text("damaged")
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["content"] * 20
    assert run.stderr.count("built") == 1
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.json.lock"]


def test_without_a_network_one_attempt_is_made_and_said():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(UserError, match="X needs a download, and there is no network"):
        cache.require_network("X", f"http://127.0.0.1:{port}/file", "use Y")
    assert time.monotonic() - start < cache.PROBE_SECONDS + 1


def test_any_answer_of_a_server_is_a_network():
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        cache.require_network("X", f"http://127.0.0.1:{server.server_port}/", "use Y")
        thread.join()
