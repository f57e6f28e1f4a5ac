"""What `omni fetch` is asked: selections, and requests that cannot be, refused before anything is written."""

import subprocess
import sys
from pathlib import Path

import pytest

from omni_cli.__main__ import run
from omni_cli.errors import UsageError
from omni_cli.formats.physical_ai_av import CAMERA_SETS
from omni_cli.report import Console
from omni_cli.stages.fetch import FetchRequest, SyntheticSpec, camera_names, fetch
from omni_cli.stages.fetch.selection import parse_chunks
from omni_cli.stages.pipeline import FetchSettings, fetch_request
from tests.support.chunks import get


def test_requests_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(UsageError, match="either --chunks or --clips"):
        get(tmp_path, chunks=None)
    with pytest.raises(UsageError, match=r"cannot fetch 'openpilott'; did you mean 'openpilot'"):
        get(tmp_path, source="openpilott")
    with pytest.raises(UsageError, match="omni fetch --source openpilot --from ROUTES"):
        get(tmp_path, source="openpilot")


def test_chunks_that_cannot_be_read_are_refused_before_a_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for text in ("x", "1-x", "3-1"):
        with pytest.raises(UsageError, match=r"--chunks .*: cannot read .*; for example --chunks 5"):
            get(tmp_path, source="physical_ai_av", chunks=text)


def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "synthetic").touch()
    assert run(["fetch", "--source", "synthetic", "--chunks", "1", "--data", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told.endswith("raw/synthetic: file exists; a folder was expected there; choose another\n")
    assert told.count("\n") == 1
    for seconds in ("nan", "inf"):
        assert run(["fetch", "--source", "synthetic", "--chunks", "1", "--seconds", seconds]) == 2


def test_what_fetches_does_not_import_torch():
    code = "import sys, omni_cli.stages.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_selection():
    known = (0, 1, 3, 4, 7)
    assert parse_chunks("3", known) == (0, 1, 3)
    assert parse_chunks("3-4", known) == (3, 4)
    assert parse_chunks("7,0-1", known) == (0, 1, 7)
    for text in ("9", "0", "0-8", "1-0", "a", "1,,3", "0-2", "1-99999999999"):
        with pytest.raises(UsageError, match=r"--chunks"):
            parse_chunks(text, known)
    assert camera_names("4-cam") == CAMERA_SETS["4-cam"]
    assert camera_names("fcamera", "openpilot") == ("fcamera",)
    assert camera_names(" camera_rear_tele_30fov ,1-cam") == ("camera_rear_tele_30fov", "camera_front_wide_120fov")
    with pytest.raises(UsageError, match="did you mean 'camera_front_wide_120fov'"):
        camera_names("camera_front_wide_120")


def test_the_fetch_table_of_omni_run_draws_the_same_world_as_omni_fetch() -> None:
    assert fetch_request(FetchSettings(), Path("d")).synthetic == SyntheticSpec()
    assert fetch_request(FetchSettings(), Path("d")).chunks == "2"
    asked = fetch_request(FetchSettings(rig="b", clutter=0.5, seed=3, size="96x54", roads="winding"), Path("d"))
    assert asked.synthetic == SyntheticSpec(rig="b", clutter=0.5, seed=3, width_px=96, height_px=54, roads="winding")


@pytest.mark.parametrize("source", ["openpilot", "comma2k19"])
@pytest.mark.parametrize("asked", [{"chunks": "2"}, {"clips": ("xxx",)}, {"cameras": ("fcamera",)}])
def test_no_part_is_chosen_of_what_is_imported_whole(tmp_path, source, asked):
    (option,) = asked
    with pytest.raises(UsageError, match=rf"--{option}: {source} segments are imported whole, .*; leave it out"):
        fetch(FetchRequest(source, tmp_path / "data", origin=tmp_path, **asked), Console(quiet=True))
    assert not (tmp_path / "data").exists()
