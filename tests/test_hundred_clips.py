"""A chunk as large as the data set's, 100 clips of four cameras, through fetch, audit and etl as a user runs them."""

import json

import pytest

from omni_cli.samples.shards import open_shards
from tests.support.hundred_clips import CLIPS, draw_repository, through_fetch_audit_and_etl


@pytest.mark.storm
def test_a_whole_chunk_goes_through_in_one_go(tmp_path):
    root, work = tmp_path / "hub", tmp_path / "user"
    draw_repository(root, seconds=2.5, width_px=96, height_px=54)
    work.mkdir()
    fetched, audited, cut = through_fetch_audit_and_etl(root, work)
    assert [done.returncode for done in (fetched, audited, cut)] == [0, 0, 0], cut.stderr
    (folder,) = (work / "data" / "shards").iterdir()
    shards = open_shards(folder)
    assert len(shards.manifest.recordings) == CLIPS
    assert not shards.manifest.refused
    assert f"{CLIPS} audited, 0 refused" in audited.stderr
    receipts = list((work / "data" / "raw" / "physical_ai_av").rglob("camera_*.zip.receipt.json"))
    assert len(receipts) == 4
    assert all(json.loads(path.read_text())["sha256"] for path in receipts)
