"""Shards are a function of the data and the settings: not of workers, order, shares, kills or repeats."""

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.files import TEMPORARY_MARK
from omni_cli.recipe import SplitSettings
from omni_cli.report import Console
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.shards import frames_path, open_shards, windows_path
from omni_cli.sources.quarantine import write_quarantine
from omni_cli.stages.etl import EtlRequest, ensure_sidecar, etl
from omni_cli.stages.etl.estimate import check_space
from omni_cli.stages.locate import newest_shards, raw_folder
from tests.support import openpilot as made
from tests.support.folders import stamps, tree
from tests.support.injection import needs_strace, run_traced
from tests.support.openpilot import drive_folder, recording_id
from tests.support.plain_recipe import SAMPLE, Plain

QUIET = Console(quiet=True)
ROUTES = 6
TORN = 3  # the segment whose video is cut short


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six drives of one segment each; one video is cut short."""
    data = made.write_drives(tmp_path_factory.mktemp("data"), ROUTES)
    video = drive_folder(data, TORN) / "qcamera.ts"
    video.write_bytes(video.read_bytes()[:2000])
    return data


def run(data, out, recipe=None, **changes):
    return etl(recipe or Plain(), EtlRequest(data=data, out=out, **{"workers": 0, **changes}), QUIET)


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "shards"
    return run(data, out), out, tree(out)


def test_what_etl_says_is_what_is_on_disk(reference):
    result, out, _ = reference
    shards = open_shards(out)
    assert result["finished"]
    assert (result["recordings"], result["made"], result["kept"]) == (ROUTES - 1, ROUTES - 1, 0)
    assert list(result["refused"]) == [recording_id(TORN)]
    assert result["windows"] == {split: len(WindowDataset(shards, split)) for split in ("train", "val")}
    assert min(result["windows"].values()) > 0
    assert result["skew_ms"] == {"median": 0.0, "max": 0.0}  # one camera
    row = WindowDataset(shards, "val", result["sidecar"])[0]
    assert row["pictures"].shape == (8, 1, 56, 56, 3)
    assert row["input_ids"].tolist() == [round(row["mean_speed_mps"] * 100), 7]
    assert row["mean_speed_mps"] == pytest.approx(made.speed_at((row["start_us"] + row["end_us"]) / 2), abs=0.01)
    assert json.loads(json.dumps(result)) == result


def test_the_manifest_tells_neither_time_nor_place(reference, data):
    _, out, files = reference
    text = (out / "manifest.json").read_text() + "".join(path.read_text() for path in out.rglob("*.json"))
    assert str(data) not in text
    assert str(out) not in text
    assert not any(TEMPORARY_MARK in name for name in files)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_byte(reference, data, tmp_path, workers):
    run(data, tmp_path / "shards", workers=workers)
    assert tree(tmp_path / "shards") == reference[2]


def test_shares_in_any_order_change_no_byte(reference, data, tmp_path):
    results = [run(data, tmp_path / "shards", shard=(share, 3), max_refused=0.5) for share in (3, 1, 2)]
    assert [result["finished"] for result in results] == [False, False, True]
    assert tree(tmp_path / "shards") == reference[2]
    with pytest.raises(UsageError, match="--shard 4/3: expected I/N"):
        run(data, tmp_path / "shards", shard=(4, 3))


def test_a_second_run_touches_nothing(reference, data):
    _, out, files = reference
    before = stamps(out)
    result = run(data, out)
    assert (result["made"], result["kept"]) == (0, ROUTES - 1)
    assert stamps(out) == before
    assert tree(out) == files


@pytest.mark.parametrize("damage", ["flip", "delete", "no receipt", "no manifest"])
def test_only_what_is_damaged_is_made_again(reference, data, tmp_path, damage):
    out = tmp_path / "shards"
    shutil.copytree(reference[1], out)
    path = frames_path(out, recording_id(0))
    match damage:
        case "flip":
            content = bytearray(path.read_bytes())
            content[5000] ^= 4
            path.write_bytes(content)
        case "delete":
            path.unlink()
        case "no receipt":
            path.with_name("windows.arrow.receipt.json").unlink()
        case "no manifest":
            (out / "manifest.json").unlink()
    result = run(data, out)
    assert result["made"] == (0 if damage == "no manifest" else 1)
    assert tree(out) == reference[2]


def storm(mode, data, out, *numbers):
    command = [sys.executable, "-m", "tests.support.etl_storm", mode, str(data), str(out), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, [tree(folder) for folder in out.iterdir()]


@pytest.mark.fault("F1")
def test_killed_and_run_again_it_ends_with_the_same_bytes(reference, data, tmp_path):
    said, trees = storm("kills", data, tmp_path / "out", 3, 0, 1)
    assert said.startswith("3 kills")
    assert all(files == reference[2] for files in trees)


@pytest.mark.storm
@pytest.mark.fault("F1")
@pytest.mark.parametrize(("kills", "workers"), [(20, 0), (5, 2)])
def test_twenty_kills(reference, data, tmp_path, kills, workers):
    said, trees = storm("kills", data, tmp_path / "out", kills, workers, 2)
    assert said.startswith(f"{kills} kills")
    assert all(files == reference[2] for files in trees)


@needs_strace
@pytest.mark.storm
@pytest.mark.fault("F1", "F3", "F4")
def test_faults_at_forty_system_calls_of_the_whole_stage(reference, data, tmp_path):
    said, trees = storm("calls", data, tmp_path / "out", 40, 3)
    killed, refused, _ = (int(part.split()[0]) for part in said.split(", "))
    assert (killed >= 5, refused >= 5, len(trees) >= 10) == (True, True, True), said
    assert all(files == reference[2] for files in trees)


@pytest.mark.fault("F10")
def test_two_at_once_on_one_folder_make_the_same_bytes(reference, data, tmp_path):
    said, trees = storm("pairs", data, tmp_path / "out", 3, 0)
    assert (said, trees) == ("3 rounds\n", [reference[2]] * 3)


def test_another_setting_is_refused_in_the_same_folder_and_has_a_name_of_its_own(reference, data, tmp_path):
    other = Plain(sample=SAMPLE.model_copy(update={"canvas_px": 112}))
    with pytest.raises(UsageError, match=r"holds shards of other settings \(.*canvas_width_px: 56 -> 112"):
        run(data, reference[1], other)
    shutil.copytree(data / "raw", tmp_path / "raw")
    results = [run(tmp_path, None, recipe) for recipe in (Plain(), other)]
    assert results[0]["shards"] != results[1]["shards"]
    assert str(newest_shards(tmp_path)) == results[1]["shards"]


def test_changed_input_is_made_again_and_new_damage_withdraws_the_old_shard(data, tmp_path):
    shutil.copytree(data / "raw", tmp_path / "raw")
    out = tmp_path / "shards"
    run(tmp_path, out)
    made.write_segment(drive_folder(tmp_path, 0), 52)
    video = drive_folder(tmp_path, 5) / "qcamera.ts"
    video.write_bytes(b"")
    result = run(tmp_path, out, max_refused=0.4)
    assert (result["made"], result["kept"]) == (1, ROUTES - 3)
    assert set(result["refused"]) == {recording_id(TORN), recording_id(5)}
    fresh = tmp_path / "fresh"
    run(tmp_path, fresh, max_refused=0.4)
    assert (fresh / "manifest.json").read_bytes() == (out / "manifest.json").read_bytes()


def test_too_many_refusals_fail_and_publish_nothing(data, tmp_path):
    with pytest.raises(DataError, match=r"1 of 6 recordings refused, more than the 10% allowed; .*omni audit"):
        run(data, tmp_path / "shards", max_refused=0.1)
    with pytest.raises(DataError, match="unfinished"):
        open_shards(tmp_path / "shards")


@pytest.mark.parametrize(("torn", "refused"), [((0, 1, 2), "3 of 3"), ((0, 1), "2 of 3")])
def test_the_last_share_publishes_nothing_where_the_others_refused_too_much(data, tmp_path, torn, refused):
    for number in range(3):
        shutil.copytree(drive_folder(data, number), drive_folder(tmp_path, number))
    for number in torn:
        (drive_folder(tmp_path, number) / "qcamera.ts").write_bytes(b"")
    for share in range(1, len(torn) + 1):
        with pytest.raises(DataError, match=r"1 of 1 recording refused, more than the 20% allowed; the first is"):
            run(tmp_path, tmp_path / "shards", shard=(share, 4))
    for share in range(len(torn) + 1, 5):  # the fourth has nothing to do itself
        with pytest.raises(DataError, match=rf"{refused} recordings refused, .*{recording_id(0)}: .*omni audit$"):
            run(tmp_path, tmp_path / "shards", shard=(share, 4))
    with pytest.raises(DataError, match="unfinished"):
        open_shards(tmp_path / "shards")


def test_a_recording_in_quarantine_is_left_out_and_listed(data, tmp_path):
    shutil.copytree(data / "raw", tmp_path / "raw")
    write_quarantine(tmp_path / "raw" / "openpilot", {recording_id(TORN): "video is cut short"})
    result = run(tmp_path, tmp_path / "shards")
    assert (result["quarantined"], result["refused"]) == (1, {})
    assert open_shards(tmp_path / "shards").manifest.quarantined == {recording_id(TORN): "video is cut short"}


def test_a_split_by_time_is_marked_and_keeps_a_gap(data, tmp_path):
    split = SplitSettings(rule="time", validation=0.4, gap_s=0.1)
    result = run(data, tmp_path / "shards", Plain(split=split))
    assert result["split_rule"] == "time"
    shards = open_shards(tmp_path / "shards")
    for entry in shards.manifest.recordings:
        windows = shards.windows(entry.id).to_pylist()
        train_ends = max((row["end_us"] for row in windows if row["split"] == "train"), default=0)
        val_starts = min((row["start_us"] for row in windows if row["split"] == "val"), default=2**60)
        assert val_starts - train_ends >= 100_000


def test_a_split_file_decides_and_leaves_out_what_it_does_not_name(data, tmp_path):
    path = tmp_path / "split.csv"
    path.write_text(f"recording,split\n{recording_id(0)},val\n{recording_id(1)},train\n")
    result = run(data, tmp_path / "shards", split_file=path)
    assert (result["split_rule"], result["recordings"], result["unassigned"]) == ("file", 2, ROUTES - 2)
    assert open_shards(tmp_path / "shards").manifest.recordings[0].windows["train"] == 0
    path.write_text("recording,split\nnobody,val\n")
    with pytest.raises(UsageError, match="names recording nobody, which the data do not hold"):
        run(data, tmp_path / "other", split_file=path)


def test_a_dry_run_prints_the_plan_and_touches_nothing(data, tmp_path):
    before = tree(data)
    result = run(data, tmp_path / "shards", dry_run=True, profile="mi300x-bf16")
    assert (result["recordings"], result["canvas_px"], result["visual_tokens_per_window"]) == (ROUTES, [56, 56], 16)
    assert result["bytes_per_window"] == 8 * 56 * 56 * 3
    assert result["windows"] > 0
    assert tree(data) == before
    assert list(tmp_path.iterdir()) == []
    absent = run(tmp_path / "absent", tmp_path / "shards", dry_run=True)
    assert (absent["recordings"], absent["raw"], absent["profile"]) == (0, None, "")


def test_a_missing_camera_names_itself_and_the_remedy(data, tmp_path):
    recipe = Plain(sample=SAMPLE.model_copy(update={"cameras": "fcamera"}))
    with pytest.raises(OmniError):
        run(data, tmp_path / "shards", recipe)


def test_a_camera_that_no_recording_can_have_is_refused_before_any_is_opened(data, tmp_path):
    recipe = Plain(sample=SAMPLE.model_copy(update={"cameras": "qcam"}))
    with pytest.raises(UsageError, match="no camera 'qcam' in openpilot data; did you mean 'qcamera'"):
        run(data, tmp_path / "shards", recipe)
    assert not (tmp_path / "shards").exists()


def test_a_full_disk_is_refused_before_the_start(tmp_path):
    with pytest.raises(OmniError, match=r"about 1048576\.0 GiB are needed and .* are free"):
        check_space(tmp_path / "a" / "b", 1 << 50, 1)
    with pytest.raises(OmniError, match=r"about 10000000000000000 files are needed and \d+ more can be; free some"):
        check_space(tmp_path / "a" / "b", 1, 10**15)


def test_the_sidecar_is_remade_only_where_it_is_damaged(reference, data, tmp_path):
    out = tmp_path / "shards"
    shutil.copytree(reference[1], out)
    key = ensure_sidecar(open_shards(out), Plain(), QUIET)
    path = next((out / "tokens" / key).glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-4])
    ensure_sidecar(open_shards(out), Plain(), QUIET)
    assert tree(out) == reference[2]
    assert ensure_sidecar(open_shards(out), object(), QUIET) is None


def test_raw_data_are_found_or_the_way_to_get_them_is_told(data, tmp_path):
    raw = data / "raw" / "openpilot"
    assert raw_folder(data, None) == raw_folder(data, "openpilot") == ("openpilot", raw)
    assert raw_folder(raw, None) == ("openpilot", raw)
    with pytest.raises(UsageError, match=r"no data folder .*; get some with: omni fetch --source synthetic --chunks 2"):
        raw_folder(tmp_path / "absent", None)
    with pytest.raises(UsageError, match="raw: holds openpilot, not physical_ai_av; get it with: omni fetch"):
        raw_folder(data, "physical_ai_av")
    with pytest.raises(UsageError, match="unknown source 'openpylot'; did you mean 'openpilot'"):
        raw_folder(data, "openpylot")
    with pytest.raises(UsageError, match="holds no raw data and is no known layout"):
        raw_folder(tmp_path, None)
    with pytest.raises(UsageError, match="shards: holds no finished shards; make some with: omni etl"):
        newest_shards(tmp_path)
    (tmp_path / "features.csv").touch()
    assert raw_folder(tmp_path, None) == ("physical_ai_av", tmp_path)


def test_every_window_of_the_reference_opens(reference):
    shards = open_shards(reference[1])
    assert shards.damaged() == []
    assert all(windows_path(reference[1], entry.id).is_file() for entry in shards.manifest.recordings)


def test_words_and_bytes_are_the_same_from_inside_the_raw_data(reference, data, tmp_path, monkeypatch):
    monkeypatch.chdir(data / "raw" / "openpilot")
    assert run(Path(), tmp_path / "shards")["refused"] == reference[0]["refused"]
    assert tree(tmp_path / "shards") == reference[2]


@needs_strace
@pytest.mark.fault("F1", "F10")
def test_a_share_that_was_killed_between_two_tables_of_new_inputs_is_not_taken_for_done(data, tmp_path):
    for number in range(3):
        shutil.copytree(drive_folder(data, number), drive_folder(tmp_path, number))
    out, first = tmp_path / "shards", partial(run, tmp_path, tmp_path / "shards", shard=(1, 3))
    run(tmp_path, out)
    made.write_segment(drive_folder(tmp_path, 0), 52)
    # frames.arrow and its receipt are in their place: the windows beside them are still the old ones
    assert run_traced(first, "inject=rename:signal=SIGKILL:when=3") == -signal.SIGKILL
    assert frames_path(out, recording_id(0)).stat().st_mtime > windows_path(out, recording_id(0)).stat().st_mtime
    assert not run(tmp_path, out, shard=(2, 3))["finished"]
    assert first()["finished"]
    run(tmp_path, tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")
