"""Nothing half-written is ever taken for done."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from omni_cli.errors import OmniError
from omni_cli.files import (
    TEMPORARY_MARK,
    atomic_write,
    canonical_json,
    commit,
    commit_stream,
    exclusive,
    receipt_path,
    remove_leftovers,
    sha256_of,
    verified_receipt,
    write_bytes,
)


def test_a_failed_write_leaves_the_old_content_and_no_temporary(tmp_path):
    path = tmp_path / "a"
    write_bytes(path, b"old")
    with pytest.raises(TypeError, match="bytes-like"), atomic_write(path) as stream:
        stream.write([b"new", None])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["flip", "truncate", "append", "delete", "no receipt", "torn receipt"])
def test_only_an_intact_artefact_with_its_receipt_is_done(tmp_path, damage):
    path = tmp_path / "shard.arrow"
    commit(path, lambda stream: stream.write(b"x" * 100), rows=7)
    assert verified_receipt(path, expect={"rows": 7})
    assert not verified_receipt(path, expect={"rows": 8})
    content = path.read_bytes()
    match damage:
        case "flip":
            path.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
        case "truncate":
            path.write_bytes(content[:-1])
        case "append":
            path.write_bytes(content + b"x")
        case "delete":
            path.unlink()
        case "no receipt":
            receipt_path(path).unlink()
        case "torn receipt":
            receipt_path(path).write_text(receipt_path(path).read_text()[:20])
    assert verified_receipt(path) is None


KILLED = """
import os, signal, sys
from pathlib import Path
from omni_cli.files import atomic_write
with atomic_write(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def leave_behind(folder):
    """Return the temporary file of a process that was killed while it wrote."""
    before = set(folder.iterdir())
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder / "a-1")], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = set(folder.iterdir()) - before
    return left


def test_leftovers_of_dead_processes_go_and_those_of_the_living_stay(tmp_path):
    gone = leave_behind(tmp_path)
    with atomic_write(tmp_path / "b"):
        (kept,) = set(tmp_path.iterdir()) - {gone}
        remove_leftovers(tmp_path)
        assert (gone.exists(), kept.exists()) == (False, True)
    assert list(tmp_path.iterdir()) == [tmp_path / "b"]


@pytest.mark.parametrize("pid", ["the same", "none"])
def test_what_another_host_writes_is_left_alone_for_a_day(tmp_path, pid, monkeypatch):
    left = leave_behind(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 2e9)  # this host's clock is years ahead: the disk's own counts
    name, _, rest = left.name.rpartition(TEMPORARY_MARK)
    host, number, token = rest.split("-")
    elsewhere = f"{int(host, 16) ^ 1:08x}"
    other = left.rename(tmp_path / f"{name}{TEMPORARY_MARK}{elsewhere}-{number if pid == 'the same' else ''}-{token}")
    remove_leftovers(tmp_path)
    assert other.exists()
    yesterday = other.stat().st_mtime - 25 * 3600
    os.utime(other, (yesterday, yesterday))
    remove_leftovers(tmp_path)
    assert not other.exists()


def test_what_an_earlier_process_of_the_same_number_left_goes(tmp_path):
    """A container that is started again numbers its processes as before."""
    with atomic_write(tmp_path / "b"):
        (kept,) = tmp_path.iterdir()
        gone = tmp_path / kept.name.replace(f"-{os.getpid()}.", f"-{os.getpid()}.9")
        gone.touch()
        remove_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.fault("F11")
def test_the_lock_of_a_dead_process_is_taken_over_and_that_of_a_living_one_is_not(tmp_path):
    (tmp_path / ".lock").write_text("1\n")  # the oldest of all processes; what a lock file says is nobody's claim
    os.utime(tmp_path / ".lock", (0, 0))
    with (
        exclusive(tmp_path, "testing"),
        pytest.raises(OmniError, match="another omni is testing"),
        exclusive(tmp_path, "testing"),
    ):
        pass
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OmniError, match="another omni is holding"), exclusive(tmp_path, "holding"):
            pass
        holder.kill()
        holder.wait()
    with exclusive(tmp_path, "testing"):
        pass


HOLDER = """
import sys, time
from pathlib import Path
from omni_cli.files import exclusive
with exclusive(Path(sys.argv[1]), "holding"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_what_is_hashed_beside_its_writer_is_the_file_block_after_block(tmp_path):
    rng, path = random.Random(0), tmp_path / "a"
    blocks = [rng.randbytes(size) for size in (7, 3 << 20, 1, 64, 1 << 20, 5 << 20, 2 << 20, 9, 0, 4 << 20, 3)]
    receipt = commit_stream(path, lambda stream: [stream.write(block) for block in blocks], told=1)
    assert path.read_bytes() == b"".join(blocks)
    assert (receipt["told"], receipt["size"], receipt["sha256"]) == (1, path.stat().st_size, sha256_of(path))
    assert verified_receipt(path) == receipt


def test_a_writer_that_fails_leaves_neither_a_file_nor_a_thread(tmp_path):
    def write(stream):
        stream.write(bytes(3 << 20))
        raise ValueError("no more")

    before = threading.active_count()
    with pytest.raises(ValueError, match="no more"):
        commit_stream(tmp_path / "a", write)
    assert (list(tmp_path.iterdir()), threading.active_count()) == ([], before)


def test_canonical_json_is_one_spelling():
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == '{"a":[1.5,"é"],"b":1}'
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))
