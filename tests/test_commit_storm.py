"""Killed, or failed by the disk, at any system call: nothing torn is ever taken for done, and a second try mends it.

The calls of one writer are counted under strace; then it is run again and again, each time with SIGKILL, ENOSPC or EIO
at another one of them.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from omni_cli.files import (
    RECEIPT_SUFFIX,
    TEMPORARY_MARK,
    commit,
    commit_json,
    remove_leftovers,
    sha256_of,
    verified_receipt,
    write_json,
)
from omni_cli.stages.fetch import landing
from tests.support.injection import CRASHED, count_calls, needs_strace, run_traced

pytestmark = needs_strace
OLD, NEW = (hashlib.shake_128(name).digest(24_000) for name in (b"old", b"new"))
FAULTS = ("signal=SIGKILL", "error=ENOSPC", "error=EIO")
READS = ("read", "fstat", "newfstatat", "lseek")  # a full disk can be read


class Commit:
    """An artefact with its receipt, a document, and a document with a receipt: in the place of older ones."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "shard.arrow"
        self.note, self.manifest = folder / "note.json", folder / "manifest.json"

    def prepare(self) -> None:
        self.write(OLD)

    def act(self) -> None:
        remove_leftovers(self.folder)
        self.write(NEW)

    def write(self, content: bytes) -> None:
        told = sha256_of_bytes(content)
        commit(self.path, lambda stream: write_slowly(stream, content), told=told)
        write_json(self.note, {"told": told})
        commit_json(self.manifest, {"told": told})

    def wrong(self) -> list[str]:
        """What is taken for done and is neither the old nor the new."""
        contents, found = {sha256_of_bytes(content): content for content in (OLD, NEW)}, []
        receipt = verified_receipt(self.path)
        if receipt and contents.get(receipt["told"]) != self.path.read_bytes():
            found.append("the artefact")
        for path in (self.note, self.manifest):
            if (path == self.note or verified_receipt(path)) and json.loads(path.read_text())["told"] not in contents:
                found.append(path.name)
        return found

    def is_done(self) -> bool:
        told = sha256_of_bytes(NEW)
        is_whole = all(verified_receipt(path) for path in (self.path, self.manifest))
        return is_whole and self.path.read_bytes() == NEW and json.loads(self.note.read_text())["told"] == told


class Land:
    """A fetched file, verified where it was staged, moved to its place."""

    def __init__(self, folder: Path) -> None:
        self.staged, self.path = folder / "staging" / "part", folder / "chunk" / "a.zip"

    def prepare(self) -> None:
        self.staged.parent.mkdir(parents=True)

    def act(self) -> None:
        remove_leftovers(self.staged.parent)
        if not landing.is_landed(self.path, sha256=sha256_of_bytes(NEW)):
            with self.staged.open("wb") as stream:  # as a download ends
                stream.write(NEW)
                stream.flush()
                os.fsync(stream.fileno())
            landing.land(self.staged, self.path, sha256=sha256_of_bytes(NEW))

    def wrong(self) -> list[str]:
        return ["the file"] if landing.is_landed(self.path) and self.path.read_bytes() != NEW else []

    def is_done(self) -> bool:
        return (
            landing.is_landed(self.path)
            and self.path.read_bytes() == NEW
            and sha256_of(self.path) == sha256_of_bytes(NEW)
        )


def write_slowly(stream, content):
    for start in range(0, len(content), 9_000):
        stream.write(content[start : start + 9_000])


def sha256_of_bytes(content):
    return hashlib.sha256(content).hexdigest()


def faults(writer, folder, every):
    """Yield (call, fault, place): every place of every call, or each of some."""
    writer(fresh(writer, folder)).prepare()
    counts = count_calls(writer(folder).act, folder.parent / "log")
    places = [
        (call, fault, place)
        for call, fault in itertools.product(sorted(counts), FAULTS)
        if not (call in READS and fault == "error=ENOSPC")
        for place in range(1, counts[call] + 1)
    ]
    assert {"write", "fsync", "openat"} < counts.keys()
    assert counts["fsync"] >= 4
    return places[::every]


def fresh(writer, folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def storm(writer, folder, every):
    """Return how many faults were met, and every one after which something was wrong."""
    places, wrong, met = faults(writer, folder, every), [], 0
    for call, fault, place in places:
        made = writer(fresh(writer, folder))
        made.prepare()
        code = run_traced(made.act, f"inject={call}:{fault}:when={place}")
        met += code != 0
        torn = made.wrong()
        made.act()
        left = [path for path in folder.rglob("*") if TEMPORARY_MARK in path.name]
        if torn or left or not made.is_done() or code == CRASHED:
            wrong.append((call, fault, place, code, torn, left))
    return len(places), met, wrong


@pytest.mark.fault("F1", "F3", "F4")
@pytest.mark.parametrize("writer", [Commit, Land])
def test_a_fault_at_some_calls_leaves_nothing_torn(writer, tmp_path):
    total, met, wrong = storm(writer, tmp_path / "folder", 11)
    assert wrong == []
    assert (total > 8, met > 0.6 * total) == (True, True)


@pytest.mark.storm
@pytest.mark.fault("F1", "F3", "F4")
@pytest.mark.parametrize("writer", [Commit, Land])
def test_a_fault_at_every_call_leaves_nothing_torn(writer, tmp_path):
    total, met, wrong = storm(writer, tmp_path / "folder", 1)
    assert wrong == []
    assert (total > 80, met > 0.6 * total) == (True, True)


def named_too_early(log: Path) -> list[str]:
    """Names that a power cut could keep without what they stand for: what they were given to was not yet flushed.

    A receipt speaks of names too: those in its folder must be flushed before it has its own.
    """
    opened, unflushed, found = {}, set(), []
    for call, arguments, result in re.findall(r"^\d+ +(\w+)\((.*)\) += (\d+)", log.read_text(), re.MULTILINE):
        paths, descriptor = re.findall(r'"([^"]+)"', arguments), arguments.partition(",")[0]
        match call:
            case "openat":
                opened[result] = paths[0]
            case "write" if descriptor in opened:
                unflushed.add(opened[descriptor])
            case "fsync":
                unflushed.discard(opened[descriptor])
            case "rename":
                folder = str(Path(paths[1]).parent)
                speaks_of = {paths[0], folder} if paths[1].endswith(RECEIPT_SUFFIX) else {paths[0]}
                found += [paths[1]] * bool(speaks_of & unflushed)
                unflushed = {folder, *(paths[1] if path == paths[0] else path for path in unflushed)}
    return found + sorted(unflushed)


@pytest.mark.fault("F32")
@pytest.mark.parametrize("writer", [Commit, Land])
def test_no_name_reaches_the_disk_before_what_it_stands_for(writer, tmp_path):
    made, log = writer(fresh(writer, tmp_path / "folder")), tmp_path / "log"
    made.prepare()
    assert run_traced(made.act, log=log) == 0
    assert log.read_text().count("rename(") >= 2
    assert named_too_early(log) == []


@pytest.mark.fault("F32")
@pytest.mark.parametrize(("is_flushed", "early"), [(False, ["a", "a.receipt.json"]), (True, ["a.receipt.json"])])
def test_a_writer_that_does_not_flush_is_found(is_flushed, early, tmp_path):
    """Neither its content; or that, and not the name that its receipt speaks of."""
    folder, log = tmp_path / "folder", tmp_path / "log"
    folder.mkdir()

    def act():
        for name in ("a", f"a{RECEIPT_SUFFIX}"):
            with (folder / "new").open("wb", buffering=0) as stream:
                stream.write(NEW)
                if is_flushed:
                    os.fsync(stream.fileno())
            (folder / "new").rename(folder / name)

    assert run_traced(act, log=log) == 0
    assert {Path(name).name for name in named_too_early(log)} == {*early, folder.name}


@pytest.mark.fault("F1")
def test_the_storm_finds_a_writer_that_takes_a_file_for_done_because_it_is_there(tmp_path):
    class Naive(Commit):
        def write(self, content):
            with self.path.open("wb") as stream:
                write_slowly(stream, content)

        def prepare(self):
            pass

        def act(self):
            if not self.path.exists():
                self.write(NEW)

        def wrong(self):
            return ["torn"] if self.path.exists() and self.path.read_bytes() != NEW else []

        def is_done(self):
            return self.path.read_bytes() == NEW

    folder = tmp_path / "folder"
    made = Naive(fresh(Naive, folder))
    assert run_traced(made.act, "inject=write:signal=SIGKILL:when=2") == -9
    made.act()
    assert made.wrong() == ["torn"]
