"""What processes share of a staging folder, and which names of a repository become paths at all."""

import os
import threading
import time
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_cli.downloads import Meter, StoppedError, claimed, sweep, unsafe_path_reason
from omni_cli.formats.physical_ai_av import FEATURES


def silent():
    return Meter(lambda _: None)


@pytest.mark.fault("F10", "F11")
def test_a_claim_is_for_one_and_ends_with_it(tmp_path):
    staging = tmp_path / "staging"
    with claimed(staging, "a", silent()) as is_mine, claimed(staging, "a", silent(), wait=False) as is_second:
        assert (is_mine, is_second) == (True, False)
        with claimed(staging, "b", silent(), wait=False) as is_other:
            assert is_other
    assert not list(staging.iterdir())
    (staging / "a.lock").touch()  # as a kill leaves it
    with claimed(staging, "a", silent(), wait=False) as is_mine:
        assert is_mine
    stopped = silent()
    stopped.stop()
    with claimed(staging, "a", silent()), pytest.raises(StoppedError), claimed(staging, "a", stopped):
        pass


@pytest.mark.fault("F10")
def test_one_after_the_other_however_many_wait(tmp_path):
    inside, most, total = [], [], []

    def work():
        for _ in range(5):
            with claimed(tmp_path / "staging", "a", silent()):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()
                total.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (max(most), len(total)) == (1, 30)


def test_what_nobody_works_on_is_swept_away(tmp_path):
    staging = tmp_path / "staging"
    staging.mkdir()
    held, free = "a" * 64, "b" * 40
    for name in (f"{held}.1-x.part", f"{free}.2-y.part", f"{free}.3-z.part.receipt.json", f"{free}-0-9.part"):
        (staging / name).touch()
    (staging / f"{free}.lock").touch()
    with claimed(staging, held, silent()):
        sweep(staging)
        assert {path.name for path in staging.iterdir()} == {f"{held}.1-x.part", f"{held}.lock"}
    sweep(staging)
    assert not staging.exists()
    sweep(staging)


HOSTILE = [
    "", "/", "/etc/passwd", "..", "../x", "a/../../x", "a//b", "a/", "./a", "a/.", "C:\\x", "C:/x", "c:x", "a\\b",
    "ok/..\\..\\x", "a\0b", "a\nb", "a\x1b[31m", "a\u202eb", "a\u200bb", "\ud800", ".fetch/x", ".lock", "a/.git/config",
    ".cache/huggingface/trees/x.json", "x.zip.receipt.json", "X.ZIP.RECEIPT.JSON", "a.omni-tmp-1", "nul", "a/CON.txt",
    "com1.csv", "a.", "a ", " a", "x" * 181, "/".join(["deep"] * 300), "e\u0301.csv", "Revision.JSON", "a?b", "a|b",
]  # fmt: skip


@pytest.mark.fault("F14")
def test_hostile_names_are_refused_and_the_real_ones_are_not():
    for path in HOSTILE:
        assert unsafe_path_reason(path, ("revision.json",)) is not None, path
    real = [feature.chunk_path(3116) for feature in FEATURES.values()]
    for path in (*real, "clip_index.parquet", "metadata/data_collection.parquet", "ein schöner Name+(1).zip"):
        assert unsafe_path_reason(path, ("revision.json",)) is None, path


@pytest.mark.fault("F14")
@given(st.text(max_size=40) | st.lists(st.sampled_from(["..", ".", "", "a", "C:", "\\", "nul", ".x"])).map("/".join))
def test_a_name_that_is_let_through_stays_inside_on_every_system(path):
    if unsafe_path_reason(path) is not None:
        return
    root = Path("/data/raw").resolve()
    assert Path(os.path.normpath(root / path)).is_relative_to(root)
    for flavour in (PurePosixPath(path), PureWindowsPath(path)):
        assert not flavour.is_absolute()
        assert not flavour.drive
        assert ".." not in flavour.parts
        assert not flavour.is_reserved() if isinstance(flavour, PureWindowsPath) else True
        assert not any(part.startswith(".") or part.endswith(".receipt.json") for part in flavour.parts)
    path.encode()
    assert not set(path) & {chr(code) for code in (*range(32), *range(127, 160), 0x200B, 0x202E, 0x2028)}
