"""`omni fetch --source synthetic`: rendered once, mended where it is damaged, and kept where another rendered it."""

import json
from pathlib import Path

import pytest

from omni_cli import files
from omni_cli.errors import UsageError
from omni_cli.formats.physical_ai_av import CAMERAS, CLIP_INDEX_FILE
from omni_cli.report import Console
from omni_cli.sources import open_source
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.fetch import SyntheticSpec
from tests.support.chunks import contents, get, just_before_the_lock

WORLD = SyntheticSpec(seed=3, clips_per_chunk=1, seconds=0.3, fps=10, width_px=64, height_px=36)
SYNTHETIC = {"source": "synthetic", "cameras": CAMERAS[:2], "synthetic": WORLD, "workers": 2}


def test_what_another_process_rendered_meanwhile_is_kept(tmp_path, monkeypatch):
    just_before_the_lock(monkeypatch, lambda: get(tmp_path, chunks="0-0", **SYNTHETIC))
    get(tmp_path, chunks="1-1", **SYNTHETIC)
    folder = tmp_path / "raw" / "synthetic"
    assert sorted(map(int, json.loads((folder / "synthetic.json").read_text())["chunks"])) == [0, 1]
    assert [ref.bundle for ref in open_source("synthetic", folder).recordings()] == ["chunk_0000", "chunk_0001"]
    assert get(tmp_path, chunks="2", **SYNTHETIC)["fetched"] == 0


def test_fetched_again_nothing_is_written_but_what_differs(tmp_path):
    get(tmp_path, chunks="0-0", **SYNTHETIC)
    folder = tmp_path / "raw" / "synthetic"
    index = folder / CLIP_INDEX_FILE
    outdated = {path: path.read_bytes() for path in (index, files.receipt_path(index))}
    get(tmp_path, **SYNTHETIC)
    whole = contents(folder)

    def written():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}

    before = written()
    assert get(tmp_path, **SYNTHETIC)["fetched"] == 0
    assert written() == before
    for path, content in outdated.items():  # as a kill between the chunk and the index leaves them
        path.write_bytes(content)
    get(tmp_path, **SYNTHETIC)
    changed = {path.name for path, time_ns in written().items() if before[path] != time_ns} - {"synthetic"}
    assert changed == {"clip_index.parquet", "clip_index.parquet.receipt.json"}
    assert contents(folder) == whole
    assert audit(AuditRequest(folder), Console(quiet=True))["refused"] == 0


def test_the_synthetic_world_is_rendered_once_and_mended(tmp_path):
    options = SYNTHETIC
    result = get(tmp_path, **options)
    folder = tmp_path / "raw" / "synthetic"
    assert (result["chunks"], result["fetched"], result["clips"]) == ([0, 1], 2, 2)
    assert len(open_source("synthetic", folder).recordings()) == 2
    before = contents(folder)
    assert get(tmp_path, **options)["fetched"] == 0
    Path(result["paths"][0]).write_bytes(b"damaged")
    assert get(tmp_path, **options)["fetched"] == 1
    assert contents(folder) == before
    get(tmp_path, **{**options, "chunks": "3-3"})
    assert sorted(map(int, json.loads((folder / "synthetic.json").read_text())["chunks"])) == [0, 1, 3]
    assert len(open_source("synthetic", folder).recordings()) == 3
    record = json.loads((folder / "synthetic.json").read_text())
    del record["spec"]["roads"]  # as it was written before there were winding ones
    (folder / "synthetic.json").write_text(json.dumps(record))
    assert get(tmp_path, **options)["fetched"] == 0
    other = {**options, "synthetic": SyntheticSpec(seed=4, clips_per_chunk=1, seconds=0.3, fps=10)}
    with pytest.raises(UsageError, match=r"another synthetic world \(.*seed: 3 there, 4 asked for.*--data"):
        get(tmp_path, **other)
    assert get(tmp_path / "dry", **options, dry_run=True)["fetched"] == 2
    assert not (tmp_path / "dry").exists()
