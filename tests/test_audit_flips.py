"""One flipped bit at rest, anywhere in anything that omni wrote, is found and named; so is a torn file."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save

from omni_cli import files
from omni_cli.report import Console
from omni_cli.samples.shards import write_stream
from omni_cli.stages.audit import AuditRequest, artefacts, audit
from omni_cli.stages.audit.subset import EVERYTHING
from omni_cli.stages.audit.targets import units_of
from omni_cli.stages.checks.units import check_unit
from omni_cli.stages.runs import CONFIG, FINAL, HISTORY, LEARNED, RUN_FILE, Run, RunManifest, ShardsUsed, seal_folder
from tests.support import pai
from tests.support.drives import preprocess

FLIPS = 120
CLIP = pai.clip_ids(0)[0]


def _arrow(rows: int) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"pixels": pa.array([bytes(range(64))] * rows, pa.large_binary()), "row": list(range(rows))})
    write_stream(table, sink, rows_per_batch=4)
    return sink.getvalue().to_pybytes()


def _weights() -> bytes:
    return save({"layer.lora_A": np.arange(64, dtype=np.float32)})


def _chunk_file(tmp_path: Path, feature: str) -> bytes:
    return pai.zip_path(pai.write_repository(tmp_path / "repository"), feature).read_bytes()


SINGLE = {  # one file with its receipt
    "videos": lambda tmp: ("camera.chunk_0000.zip", _chunk_file(tmp, pai.FRONT)),
    "calibration": lambda tmp: ("camera_intrinsics.chunk_0000.parquet", _chunk_file(tmp, "camera_intrinsics")),
    "ego motion": lambda tmp: ("egomotion.chunk_0000.zip", _chunk_file(tmp, "egomotion")),
    "index": lambda tmp: ("clip_index.parquet", pai.parquet(pa.table({"clip_id": [CLIP], "chunk": [0]}))),
    "frames": lambda _: ("frames.arrow", _arrow(8)),
    "windows": lambda _: ("windows.arrow", _arrow(2)),
    "tokens": lambda _: ("0.arrow", _arrow(3)),
    "manifest": lambda _: ("manifest.json", b'{"format": 1, "recordings": [{"id": "a", "num_frames": 120}]}\n'),
}
SEALED = {  # a folder whose receipt lists its files
    "checkpoint": {"model.safetensors": _weights(), "optimizer.pt": bytes(range(200)), "trainer_state.json": b"{}"},
    "onnx export": {"model.onnx": bytes(range(256)) * 2, "card.json": b'{"opset": 20}'},
    "hf export": {"model.safetensors": _weights(), "config.json": b'{"hidden_size": 64}'},
}


def found(folder: Path) -> list[str]:
    """What `audit --deep` says of the artefacts of one folder, without the rest of the stage."""
    receipts = artefacts.read_receipts(folder)
    by_content, _ = artefacts.content_findings(receipts, EVERYTHING, 1, lambda _: None)
    said = [*receipts.findings, *artefacts.size_findings(receipts), *by_content]
    return [finding.code for finding in said]


def flip_all(folder: Path, path: Path, rng: random.Random, count: int = FLIPS) -> list[tuple[int, int]]:
    """Flip one bit at a time; return the (byte, bit) that were not found."""
    whole, silent = path.read_bytes(), []
    for _ in range(count):
        at, bit = rng.randrange(len(whole)), rng.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        if not found(folder):
            silent.append((at, bit))
    path.write_bytes(whole)
    assert not found(folder)
    return silent


@pytest.mark.fault("F6")
@pytest.mark.parametrize("kind", SINGLE)
def test_no_flip_in_a_file_or_its_receipt_is_silent(tmp_path, kind):
    name, content = SINGLE[kind](tmp_path)
    path = tmp_path / "audited" / name
    files.commit(path, lambda stream: stream.write(content), rows=12, rate=1e-05, unit_key=files.hash_json(kind))
    for target in (path, files.receipt_path(path)):
        assert flip_all(path.parent, target, random.Random(kind)) == []


@pytest.mark.fault("F6")
@pytest.mark.parametrize("kind", SEALED)
def test_no_flip_in_a_sealed_folder_or_its_receipt_is_silent(tmp_path, kind):
    folder = tmp_path / "run" / "sealed"
    folder.mkdir(parents=True)
    for name, content in SEALED[kind].items():
        (folder / name).write_bytes(content)
    seal_folder(folder, run="key", step=4, losses={8: 0.5, 16: 1e-05})
    largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    for target in (largest, files.receipt_path(folder)):
        assert flip_all(folder.parent, target, random.Random(kind)) == []


def finished_run(folder: Path) -> Run:
    used = ShardsUsed(folder="data/shards/one", fingerprint="0" * 64, split_rule="hash")
    facts = {
        "recipe": "vlm",
        "profile": "cpu-tiny",
        "settings": {},
        "base_fingerprint": "1" * 64,
        "machine": {"cores": 2},
    }
    run = Run(folder, RunManifest(**facts, preprocess=preprocess(), shards=used))
    run.final.mkdir(parents=True)
    (run.final / "adapter_model.safetensors").write_bytes(_weights())
    files.write_json(folder / RUN_FILE, run.manifest.model_dump(mode="json"))
    files.write_json(folder / LEARNED, {"recordings": ["a", "b"], "windows": 12, "medians": {"speed": 8.25}})
    files.write_text(folder / CONFIG, "[train]\nlearning_rate = 1e-4\n")
    files.write_text(folder / HISTORY, '{"loss":0.5,"step":1}\n{"loss":0.25,"step":2}\n')
    run.seal(steps=2, loss=0.25)
    return run


@pytest.mark.fault("F6")
@pytest.mark.parametrize("name", [f"{FINAL}/adapter_model.safetensors", RUN_FILE, LEARNED, CONFIG, HISTORY])
def test_no_flip_in_a_finished_run_is_silent(tmp_path, name):
    run = finished_run(tmp_path / "run")
    assert run.is_done()
    assert flip_all(run.folder, run.folder / name, random.Random(name)) == []


@pytest.mark.fault("F6")
def test_a_flip_in_a_member_is_found_by_its_crc_where_nobody_wrote_a_receipt(tmp_path):
    """Of a folder that omni did not fetch a flip can be seen only where the zip proves its members."""
    path = pai.zip_path(pai.write_repository(tmp_path / "physical_ai_av"), pai.FRONT)
    whole, rng = path.read_bytes(), random.Random(6)
    video = whole.index(b"mdat") + 4
    for _ in range(12):
        at = rng.randrange(video, video + 400)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        units, _ = units_of("physical_ai_av", tmp_path / "physical_ai_av", None)
        assert [finding.code for finding in check_unit(units[0], deep=True).findings] == ["damaged-member"]


@pytest.mark.fault("F5")
@pytest.mark.parametrize("tear", ["short", "long", "zeros"])
@pytest.mark.parametrize("target", ["artefact", "receipt"])
def test_a_torn_file_is_found(tmp_path, tear, target):
    path = tmp_path / "audited" / "frames.arrow"
    files.commit(path, lambda stream: stream.write(_arrow(8)))
    torn = path if target == "artefact" else files.receipt_path(path)
    whole = torn.read_bytes()
    half = len(whole) // 2
    torn.write_bytes({"short": whole[:half], "long": whole + b"\0", "zeros": whole[:half] + bytes(half)}[tear])
    assert found(path.parent)


@pytest.mark.fault("F6")
def test_one_audit_names_a_flip_in_every_file_of_a_store(tmp_path):
    root = pai.write_repository(tmp_path / "raw" / "physical_ai_av")
    for path in [path for path in root.rglob("*") if path.is_file()]:
        files.write_receipt(path)
    finished_run(tmp_path / "shards" / "run")
    assert audit(AuditRequest(tmp_path, deep=True), Console(quiet=True))["refused"] == 0
    sealed = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(files.RECEIPT_SUFFIX)]
    rng = random.Random(1)
    for path in sealed:
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    result = audit(AuditRequest(tmp_path, deep=True), Console(quiet=True))
    named = {Path(found["place"]) / found["file"] for found in result["findings"] if found["code"] == "wrong-content"}
    assert named == set(sealed)
    assert result["read"]["files"] == result["read"]["of_files"] == len(sealed)


def test_a_file_without_a_receipt_is_named(tmp_path):
    for name in ("a.arrow", "b.arrow"):
        files.commit(tmp_path / "one" / name, lambda stream: stream.write(b"x" * 40))
    files.receipt_path(tmp_path / "one" / "b.arrow").unlink()
    result = audit(AuditRequest(tmp_path / "one"), Console(quiet=True))
    assert [(f["code"], f["detail"].partition(":")[0]) for f in result["findings"]] == [("unsealed", "b.arrow")]


def test_subsets_part_a_store_and_say_what_was_read(tmp_path):
    for number in range(60):
        files.commit(tmp_path / "store" / f"{number}.bin", lambda stream: stream.write(b"y" * 100))
    (tmp_path / "store" / "7.bin").write_bytes(b"n" * 100)
    parts = [audit(AuditRequest(tmp_path / "store", subset=f"{part}/3"), Console(quiet=True)) for part in (1, 2, 3)]
    assert sum(part["read"]["files"] for part in parts) == 60
    assert sum(part["refused"] for part in parts) == 1
    share = audit(AuditRequest(tmp_path / "store", subset="25%"), Console(quiet=True))["read"]
    assert 5 <= share["files"] <= 25
    assert (share["of_files"], share["bytes"]) == (60, 100 * share["files"])
    assert audit(AuditRequest(tmp_path / "store"), Console(quiet=True))["read"]["files"] == 0
