"""An etl that gives no window says why, and leaves nothing that could be taken for half-made shards."""

import shutil

import pytest

from omni_cli.__main__ import run as omni
from omni_cli.errors import DataError
from omni_cli.files import write_json
from omni_cli.report import Console
from omni_cli.samples.shards import open_shards, recording_folder
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.etl import EtlRequest, etl
from tests.support.etl_once import run as etl_once
from tests.support.folders import tree
from tests.support.openpilot import drive_folder, recording_id, write_drives
from tests.support.pipeline import write_synthetic
from tests.support.plain_recipe import SAMPLE, Plain

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def drives(tmp_path_factory):
    return write_drives(tmp_path_factory.mktemp("drives"), 2)


@pytest.fixture
def data(drives, tmp_path):
    shutil.copytree(drives / "raw", tmp_path / "data" / "raw")
    return tmp_path / "data"


def run(data, out, *, window=8, console=QUIET, **options):
    recipe = Plain(sample=SAMPLE.model_copy(update={"window": window}))
    return etl(recipe, EtlRequest(data=data, out=out, **{"workers": 0, **options}), console)


def test_drives_that_are_all_too_short_leave_no_folder(data, capsys):
    out = data / "shards" / "long"
    foreseen = run(data, out, window=400, dry_run=True, console=Console())
    assert foreseen["windows"] == 0
    assert "warning: no window in what was looked at; the first is " in capsys.readouterr().err
    with pytest.raises(
        DataError, match=r"2 of 2 .*no window of 400 frames.*lower --window.*; nothing is left in .*long"
    ):
        run(data, out, window=400)
    assert not out.exists()
    assert audit(AuditRequest(data), QUIET)["refused"] == 0
    assert run(data, out)["finished"]


@pytest.mark.parametrize("labels", ["waypoints", "reasoning"])
def test_omni_etl_of_drives_without_a_future_leaves_no_folder(tmp_path, capsys, labels):
    """Waypoints refuse such a drive; reasoning gives an empty shard of it."""
    write_synthetic(tmp_path, cameras=("camera_front_wide_120fov",))  # 2.5 s: 6.4 are asked for
    words = ["etl", "--data", str(tmp_path), "--profile", "cpu-tiny", "--cameras", "1-cam", "--workers", "0"]
    assert omni([*words, "--window", "4", "--labels", labels]) == 3
    said = capsys.readouterr().err
    assert "ends less than 6.4 s after the window" in said
    assert "; nothing is left in " in said.strip().splitlines()[-1]
    assert list((tmp_path / "shards").iterdir()) == []
    assert omni(["audit", str(tmp_path)]) == 0


def test_what_was_there_before_and_has_windows_stays(data):
    out = data / "shards" / "some"
    run(data, out)
    for number in range(2):
        (drive_folder(data, number) / "qcamera.ts").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 2 recordings refused.*omni audit$"):
        run(data, out)
    assert (recording_folder(out, recording_id(0)) / "frames.arrow").exists()


def test_anothers_recording_stays_and_so_does_the_rest(data):
    out = data / "shards" / "mixed"
    write_json(recording_folder(out, "another") / "refused.json", {"plan_key": "another", "reason": "of another plan"})
    with pytest.raises(DataError, match=r"omni audit$"):
        run(data, out, window=400)
    assert len(list((out / "recordings").iterdir())) == 3


def test_the_note_of_a_crash_stays(data):
    out = data / "shards" / "crashed"
    shutil.rmtree(drive_folder(data, 1))
    with pytest.raises(DataError, match=r"1 of 1 recording refused.*crashes.json tells where"):
        etl_once(data, out, poison={recording_id(0): "raise"}, workers=0, quiet=True)
    assert (recording_folder(out, recording_id(0)) / "crashes.json").exists()


def test_shares_leave_what_tells_the_others(data):
    out = data / "shards" / "shared"
    for share in (1, 2):
        with pytest.raises(DataError, match=r"omni audit$"):
            run(data, out, window=400, shard=(share, 2))
    assert len(tree(out)) == 2
    with pytest.raises(DataError, match="unfinished"):
        open_shards(out)
    with pytest.raises(DataError, match="nothing is left in"):  # one that does it all knows that nobody waits
        run(data, out, window=400)
    assert not out.exists()
