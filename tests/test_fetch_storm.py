"""`omni fetch` in a storm: two processes on one folder, a hub that breaks in every way, and SIGKILL again and again."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omni_cli import files
from tests.support import pai
from tests.support.chunks import BIG, TOKEN, write_repository
from tests.support.hub import Fault, serve_hub

CHUNKS = 14
BIG_BYTES = 700_000
LYING_FLOCK = Path(__file__).parent / "support" / "lying_flock"
OWN_LOCKS = (".lock", ".ledger.json.lock")  # empty files that stay; what holds them ends with its process
BOUND_S = 300.0


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Real small tables, and 42 zips of random bytes: 30 MB."""
    return write_repository(tmp_path_factory.mktemp("repository"), CHUNKS, clips=1, zip_bytes=BIG_BYTES)


def storm(seed):
    """Return faults that strike at random moments: resets, FINs, 5xx of both servers, expired addresses, flips."""
    chance = random.Random(seed)

    def at(count, match, kind, **options):
        return [
            Fault(match, kind, skip=chance.randrange(2 if "POST" in match else 30), **options) for _ in range(count)
        ]

    return [
        *(
            fault
            for kind in ("reset", "fin")
            for _ in range(5)
            for fault in at(1, "storage GET", kind, after=chance.randrange(BIG_BYTES))
        ),
        *(fault for status in (500, 503, 429) for fault in at(2, "storage GET", "status", status=status)),
        *at(4, "storage GET", "status", status=403),
        *at(3, "hub HEAD", "status", status=503),
        *at(2, "hub HEAD", "refuse"),
        *at(2, "hub POST", "status", status=502),
        *at(2, "storage GET", "flip", after=BIG_BYTES - 1),
    ]


def start(data, home, *, path=None):
    arguments = ["fetch", "--chunks", str(CHUNKS), "--cameras", ",".join(BIG), "--workers", "3", "--quiet"]
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HF_HOME": str(home), **({"PYTHONPATH": str(path)} if path else {})}
    return subprocess.Popen(
        [sys.executable, "-m", "omni_cli", *arguments, "--data", str(data)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ride_out(hub, begin, kills, seed):
    """Kill one of two processes whenever another random share of the bytes has left the hub, and start it anew."""
    chance = random.Random(seed)
    total = hub.sent() + sum(stored.size for stored in hub.stored.values())
    moments = sorted(chance.uniform(0.03, 0.85) * total for _ in range(kills))
    processes, deadline = [begin(), begin()], time.monotonic() + BOUND_S
    for moment in moments:
        while hub.sent() < moment and time.monotonic() < deadline:
            time.sleep(0.01)
        victim = chance.choice([process for process in processes if process.poll() is None] or processes)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        processes = [begin() if process is victim else process for process in processes]
    try:
        return [
            (process.communicate(timeout=deadline - time.monotonic())[1], process.returncode) for process in processes
        ]
    finally:
        for process in processes:
            process.kill()


def left(folder):
    """Return what a fetch must not leave."""
    marks = (files.TEMPORARY_MARK, ".part", ".lock", ".incomplete", "~")
    names = [path for path in folder.rglob("*") if any(mark in path.name for mark in marks) or path.name == ".fetch"]
    return [path for path in names if path.name not in OWN_LOCKS]


def assert_whole(repository, folder, hub):
    """Every file of the cameras is there, right, and vouched for; the token never went to the storage."""
    for chunk in range(CHUNKS):
        for camera in BIG:
            origin = pai.zip_path(repository, camera, chunk)
            path = folder / origin.relative_to(repository)
            assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(origin.read_bytes()).digest()
            assert files.verified_receipt(path)
    assert not any(entry.had_token for entry in hub.asked("storage"))


@pytest.mark.fault("F1", "F7", "F8", "F10")
@pytest.mark.parametrize(
    "course",  # kills, seed
    [(3, 1), pytest.param((10, 2), marks=pytest.mark.storm)],
)
def test_two_processes_in_a_storm_bring_every_file_once(repository, tmp_path, monkeypatch, record_property, course):
    kills, seed = course
    with serve_hub(repository) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.token, hub.bytes_per_second, hub.faults = TOKEN, 1_500_000, storm(seed)
        ends = ride_out(hub, lambda: start(tmp_path, tmp_path.parent / "home"), kills, seed)
        assert [code for _, code in ends] == [0, 0], ends
        assert_whole(repository, tmp_path / "raw" / "physical_ai_av", hub)
        assert not left(tmp_path)
        assert sum(fault.times for fault in hub.faults) == 0
        share = hub.sent("camera_") / (CHUNKS * len(BIG) * BIG_BYTES)
        record_property("bytes on the wire / bytes of the files", f"{share:.3f}")
        assert share <= 1.15


@pytest.mark.fault("F10")
@pytest.mark.storm
def test_two_processes_whose_locks_do_not_hold_still_bring_right_files(repository, tmp_path, monkeypatch):
    with serve_hub(repository) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.bytes_per_second, hub.faults = 1_500_000, storm(4)
        ends = ride_out(hub, lambda: start(tmp_path, tmp_path.parent / "home", path=LYING_FLOCK), 4, 4)
        assert [code for _, code in ends] == [0, 0], ends
        assert_whole(repository, tmp_path / "raw" / "physical_ai_av", hub)
        assert not left(tmp_path)


@pytest.mark.fault("F2")
def test_ctrl_c_is_heard_at_once_and_what_came_is_kept(repository, tmp_path, monkeypatch):
    with serve_hub(repository) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.faults.append(Fault("storage GET", "stall", after=300_000, seconds=60, times=1_000))
        process = start(tmp_path, tmp_path.parent / "home")
        while hub.sent("camera_") < 900_000:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert "interrupted; run the same command again" in process.communicate(timeout=20)[1]
        assert process.returncode == 130
        assert time.monotonic() - started < 8.0  # the hub's own limit for a silent line is 10 s, three times over
        partials = (tmp_path / "raw" / "physical_ai_av" / ".fetch").glob("*.part")
        assert sum(path.stat().st_size for path in partials) >= 600_000
