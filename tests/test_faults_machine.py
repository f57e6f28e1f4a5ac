"""Etl on a machine that fails: a full or failing disk, a clock that jumps, too few descriptors, a power cut."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from omni_cli.errors import refused_by_machine
from tests.support import openpilot as made
from tests.support.etl_once import command, run, undisturbed
from tests.support.folders import tree
from tests.support.injection import needs_strace
from tests.support.openpilot import drive_folder, recording_id

DRIVES = 4
HOSTILE = recording_id(2)
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return made.write_drives(tmp_path_factory.mktemp("data"), DRIVES)


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory) -> dict[str, str]:
    return undisturbed(data, tmp_path_factory.mktemp("reference"))


def ended(arguments, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False, env=environment)


def in_a_mount_of_its_own(script, **variables):
    """Run a shell script that may mount; the test is left out where the system forbids it."""
    inside = ["unshare", "--map-root-user", "--mount", "bash", "-euc"]
    if ended([*inside, "mount -t tmpfs tmpfs /mnt"]).returncode:
        pytest.skip("this system lets no user mount")
    return ended([*inside, script], **variables)


FULL = """
mkdir -p "$PLACE/disk" && mount -t tmpfs -o size=280m,nr_inodes=200 tmpfs "$PLACE/disk"
"$PYTHON" -m tests.support.etl_once "$DATA" "$PLACE/disk/shards" "$FILLING" && exit 9
rm -f "$PLACE"/disk/ballast*
"$PYTHON" -m tests.support.etl_once "$DATA" "$PLACE/disk/shards" '{"workers": 0}'
cp -r "$PLACE/disk/shards" "$PLACE/copy"
"""


@pytest.mark.fault("F3")
@pytest.mark.parametrize(
    ("kind", "room"),
    [("fill", r"0 bytes and 1\d\d files are free"), pytest.param("litter", "and 0 files are", marks=pytest.mark.storm)],
)
def test_a_disk_that_fills_up_stops_etl_which_goes_on_when_there_is_room(data, reference, tmp_path, kind, room):
    filling = {"workers": 1, "poison": {HOSTILE: f"{kind}={tmp_path}/disk/ballast"}}
    variables = {"PYTHON": sys.executable, "DATA": str(data), "PLACE": str(tmp_path), "FILLING": json.dumps(filling)}
    done = in_a_mount_of_its_own(FULL, **variables)
    assert done.returncode == 0, done.stderr
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: {tmp_path}/disk/shards/recordings/{HOSTILE}")
    assert "no space left on device; free the disk and run the same command again (" in error
    assert re.search(rf"recordings? left, about [\d,]+ bytes are needed, .*{room}", error), error
    assert tree(tmp_path / "copy") == reference


SMALL = """
mkdir -p "$PLACE/disk" && mount -t tmpfs -o "$SIZE" tmpfs "$PLACE/disk"
"$PYTHON" -m tests.support.etl_once "$DATA" "$PLACE/disk/shards" '{"workers": 0}'
"""


@pytest.mark.storm
@pytest.mark.fault("F3", "F4")
@pytest.mark.parametrize(
    ("size", "line"),
    [
        ("size=20m", "/disk: about 0.0 GiB are needed and 0.0 GiB are free; free some space"),
        ("size=280m,nr_inodes=30", "/disk: about 40 files are needed and 29 more can be; free some space"),
        ("size=280m,ro", "/disk/shards: read-only file system; choose another folder"),
    ],
)
def test_a_disk_that_cannot_hold_the_shards_is_told_before_anything_is_decoded(data, tmp_path, size, line):
    variables = {"PYTHON": sys.executable, "DATA": str(data), "PLACE": str(tmp_path), "SIZE": size}
    done = in_a_mount_of_its_own(SMALL, **variables)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}{line}")


@needs_strace
@pytest.mark.fault("F4")
@pytest.mark.parametrize(
    "case",
    [
        ("read,pread64", "EIO", "input/output error"),
        pytest.param(("openat", "EACCES", "permission denied"), marks=pytest.mark.storm),
    ],
)
def test_an_input_that_the_disk_refuses_is_refused_alone(data, reference, tmp_path, case):
    (call, error, told), video, out = case, drive_folder(data, 2) / "qcamera.ts", tmp_path / "shards"
    strace = ["strace", "-f", "-qqq", "-o", os.devnull, "-P", str(video), "-e", f"inject={call}:error={error}"]
    done = ended([*strace, *command(data, out, workers=0)])
    assert done.returncode == 0, done.stderr
    refused = json.loads(done.stdout)["refused"]
    assert list(refused) == [HOSTILE]
    assert told in refused[HOSTILE]
    assert str(data) not in refused[HOSTILE]
    run(data, out, workers=0, quiet=True)
    assert tree(out) == reference


@pytest.mark.storm
@pytest.mark.fault("F12")
@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
def test_a_clock_that_jumps_changes_nothing(data, reference, tmp_path):
    """A year ahead, then within a run three years back; every file of another age."""
    out, clock = tmp_path / "shards", tmp_path / "clock"
    shutil.copytree(data, tmp_path / "data")
    clock.write_text("+1y")
    for age, path in enumerate([*tmp_path.rglob("*")]):
        os.utime(path, (2e9 - age * 1e8,) * 2)
    faked = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    faked |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}  # a step moves neither
    for expected in ({"made": DRIVES, "kept": 0}, {"made": 0, "kept": DRIVES}):
        done = ended(command(tmp_path / "data", out, workers=1, poison={HOSTILE: f"clock={clock}"}), **faked)
        assert done.returncode == 0, done.stderr
        assert expected.items() <= json.loads(done.stdout).items()
        assert tree(out) == reference
        for path in out.rglob("*"):
            os.utime(path, (0, 0))


SCARCE = """
mount -t tmpfs -o size=1m tmpfs /dev/shm
ulimit -n 64
"$PYTHON" -m tests.support.etl_once "$DATA" "$PLACE/shards" '{"workers": 2}'
"""


@pytest.mark.storm
@pytest.mark.fault("F22")
def test_few_descriptors_and_little_shared_memory_are_enough(data, reference, tmp_path):
    done = in_a_mount_of_its_own(SCARCE, PYTHON=sys.executable, DATA=str(data), PLACE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "shards") == reference


@pytest.mark.fault("F22")
def test_too_few_descriptors_are_told_with_the_remedy(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            (tmp_path / "a").open("w")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    told = refused_by_machine(caught.value)
    assert (
        told == f"{tmp_path}/a: too many open files; allow more of them with ulimit -n and run the same command again"
    )


@pytest.mark.fault("F32")
def test_what_a_power_cut_left_as_zeros_is_made_again(data, reference, tmp_path):
    """Every name is there and every length is right; the content of one file never reached the disk."""
    run(data, tmp_path / "shards", workers=0, quiet=True)
    own = {Path(name).name: name for name in sorted(reference)}
    assert own.keys() >= {"frames.arrow", "windows.arrow", "manifest.json", "frames.arrow.receipt.json"}
    for name in own.values():
        path = tmp_path / "shards" / name
        content = path.read_bytes()
        kept = len(content) // 2
        path.write_bytes(content[:kept] + bytes(len(content) - kept))
        run(data, tmp_path / "shards", workers=0, quiet=True)
        assert tree(tmp_path / "shards") == reference, name
