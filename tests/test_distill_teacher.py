"""ONNX teachers at etl: the labels are theirs, and they are known by their contents."""

import pickle
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.models.teacher import open_teacher
from omni_cli.recipe import SampleSettings
from omni_cli.recipes.distill import teaching
from omni_cli.recipes.distill.teaching import OnnxLabeller, identity, labeller
from omni_cli.samples.driven_path import DrivenPaths
from omni_cli.samples.shards import open_shards
from omni_cli.samples.step_labels import Looks, Scene
from omni_cli.scene.recording import Recording
from omni_cli.stages.etl import EtlRequest, etl
from tests.support import driving_onnx
from tests.support.driving import tiny_student
from tests.support.folders import tree
from tests.support.pipeline import QUIET
from tests.support.taught import comma, cut, student_of, write_bright_drives

COLD = 24  # steps before a teacher's memory is real


@pytest.fixture
def pair(tmp_path) -> list[Path]:
    return driving_onnx.write_v0_10_3(tmp_path)


# -- the labels are the teacher's


def looks_in_stretches(*lengths: int, left_hand: bool = False) -> Looks:
    """Looks at pictures whose brightness wanders; between two stretches one look is missing."""
    rng, count = np.random.default_rng(3), sum(lengths)
    breaks = np.repeat(np.arange(len(lengths)), lengths)
    coarse = np.clip(np.cumsum(rng.normal(0, 12, (count, 6, 4, 8)), axis=0) + 128, 0, 255).astype(np.uint8)
    pictures = coarse.repeat(32, axis=2).repeat(32, axis=3)
    rows = np.stack([rng.permutation(count) for _ in range(2)], axis=1)
    stored = tuple(pictures[np.argsort(rows[:, view])] // (view + 1) for view in range(2))
    instants_us = (np.arange(count) + breaks) * 200_000
    desire = np.where(rng.random(count) < 0.2, rng.integers(1, 8, count), 0)
    return Looks(instants_us, instants_us - 7, stored, rows, desire, left_hand)


def driven_at(speed_mps) -> DrivenPaths:
    count = len(speed_mps)
    zeros = np.zeros(count)
    return DrivenPaths(np.zeros((count, 33, 2), np.float32), np.full(count, 33), np.asarray(speed_mps), zeros)


DRIVE = Recording("drive", "test", {})
WRITERS = {
    "v0.10.3": driving_onnx.write_v0_10_3,
    "v0.10.0": driving_onnx.write_v0_10_0,
    "2026-02": driving_onnx.write_2026_02,
    "2026-06": driving_onnx.write_2026_06,
    "any batch": lambda folder: driving_onnx.write_v0_10_3(folder, batch="n"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_stretch_is_labelled_by_itself_where_the_memory_is_real(name, tmp_path):
    """The second is longer than what is labelled at once, the third too short."""
    paths, lengths = WRITERS[name](tmp_path), (30, 95, 20)
    looks = looks_in_stretches(*lengths, left_hand=name == "2026-06")
    speed = np.random.default_rng(4).uniform(5, 25, sum(lengths))
    labels = labeller(comma(paths))(DRIVE, looks, driven_at(speed))
    first = 0
    for length in lengths:
        rows = slice(first, first + length)
        seen = [np.stack([looks.pictures[v][looks.rows[row, v]] for v in (0, 1)]) for row in range(*rows.indices(999))]
        desire = np.eye(8, dtype=np.float32)[looks.desire_pulse[rows][1:]] * (np.arange(8) > 0)
        traffic = np.array([0, 1] if looks.is_left_hand_traffic else [1, 0], np.float32)
        said = open_teacher(paths, "cpu").label(
            np.stack(seen), desire.astype(np.float32), traffic, speed_mps=speed[rows][1:].astype(np.float32)
        )
        known = np.arange(length - 1) >= COLD
        assert labels.num_points[rows].tolist() == [0, *np.where(known, 33, 0)]
        assert labels.scene.is_known[rows].tolist() == [False, *known]
        path_m = (said.path_m - said.path_m[:, :1])[:, :, :2]
        for found, expected in [
            (labels.xy_m, path_m),
            *((getattr(labels.scene, one.name), getattr(said, one.name)) for one in fields(Scene)[1:]),
        ]:
            np.testing.assert_array_equal(found[rows][1:][known], expected[known])
            assert not found[rows][0].any()
            assert not found[rows][1:][~known].any()
        first += length


def test_nothing_of_one_drive_reaches_the_labels_of_another(pair):
    label, still = labeller(comma(pair)), driven_at(np.zeros(30))
    looks = looks_in_stretches(30)
    darker = replace(looks, pictures=tuple(pictures // 2 for pictures in looks.pictures))
    alone = label(DRIVE, darker, still).xy_m
    assert np.abs(label(DRIVE, looks, still).xy_m - alone).max() > 0.1
    np.testing.assert_array_equal(label(DRIVE, darker, still).xy_m, alone)


def test_where_the_speed_is_unknown_a_teacher_that_must_be_told_it_says_nothing(tmp_path):
    looks = looks_in_stretches(40)
    driven = driven_at(np.full(40, 12.0))
    driven = replace(driven, num_points=np.where(np.arange(40) == 30, 0, 33))
    told = labeller(comma(driving_onnx.write_v0_10_0(tmp_path)))(DRIVE, looks, driven)
    assert np.flatnonzero(told.num_points).tolist() == [*range(25, 30), *range(31, 40)]
    free = labeller(comma(driving_onnx.write_v0_10_3(tmp_path)))(DRIVE, looks, driven)
    assert np.flatnonzero(free.num_points).tolist() == list(range(25, 40))


def test_a_drive_too_short_for_the_memory_is_refused_by_name(pair):
    label = labeller(comma(pair))
    message = (
        r"drive: its teacher can label none of 43 frames: it needs 25 unbroken ones before, and the longest "
        r"stretch has 25; take longer drives, or a smaller --stride"
    )
    with pytest.raises(DataError, match=message):
        label(DRIVE, looks_in_stretches(18, 25), driven_at(np.zeros(43)))
    assert label(DRIVE, looks_in_stretches(26), driven_at(np.zeros(26))).num_points.tolist() == [0] * 25 + [33]


def test_workers_get_paths_and_the_device_that_was_found_and_open_the_files_once(pair, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ours = labeller(f"{pair[0].name}, {pair[1].name}")
    assert ours == OnnxLabeller(tuple(pair), "cpu", identity(comma(pair)))  # absolute, and never `auto`
    sent = pickle.loads(pickle.dumps(ours))
    sent(DRIVE, looks_in_stretches(26), driven_at(np.zeros(26)))
    for path in pair:
        path.unlink()
    sent(DRIVE, looks_in_stretches(26), driven_at(np.zeros(26)))


def test_a_worker_takes_no_other_files_than_those_that_the_work_began_with(pair, tmp_path):
    sent = pickle.loads(pickle.dumps(labeller(comma(pair))))
    labeller(comma(driving_onnx.write_2026_06(tmp_path)))  # a process keeps one teacher: as in a new one, none is open
    renamed(pair[0], "tiny/9")
    with pytest.raises(OmniError, match=rf"the work began with the teacher {sent.contents}, here the files hold onnx:"):
        sent(DRIVE, looks_in_stretches(26), driven_at(np.zeros(26)))


# -- a teacher is known by its contents


def renamed(path: Path, checkpoint: str) -> None:
    """Change one byte of a file: the last letter of the name that it carries, which `write_*` ends with its seed."""
    before = path.read_bytes()
    path.write_bytes(before.replace(b"tiny/1", checkpoint.encode()))
    assert sum(one != other for one, other in zip(before, path.read_bytes(), strict=True)) == 1
    onnx.checker.check_model(str(path))


def test_a_teacher_is_its_contents_wherever_they_lie_and_in_any_order(pair, tmp_path):
    name = identity(comma(pair))
    assert re.fullmatch(r"onnx:[0-9a-f]{16}", name)
    moved = [path.rename(tmp_path / f"moved_{path.name}") for path in pair]
    assert identity(comma(pair)) == teaching.ANY_ONNX
    assert identity(comma(moved[::-1])) == name
    renamed(moved[0], "tiny/3")
    assert identity(comma(moved)) not in (name, teaching.ANY_ONNX)


def test_slices_beside_a_file_are_a_part_of_it(pair):
    sidecars = [driving_onnx.move_slices_to_sidecar(path) for path in pair]
    before = identity(comma(pair))
    sidecars[0].write_bytes(sidecars[0].read_bytes() + b"\0")
    assert identity(comma(pair)) != before


def test_settings_are_written_without_paths(pair):
    recipe = tiny_student(sample={"teacher": comma(pair)})
    assert recipe.sample.teacher == comma(pair)
    written = recipe.model_dump(mode="json")
    assert written["sample"]["teacher"] == identity(comma(pair)) == recipe.preprocess().teacher
    again = type(recipe).model_validate_json(recipe.model_dump_json())
    assert again.preprocess() == recipe.preprocess()
    assert again.model_dump(mode="json") == written
    with pytest.raises(UsageError, match=r"sample.teacher = 'onnx:\w+' says what the files hold, not where they are"):
        again.table_maker()


@pytest.mark.parametrize("teacher", ["motion", "log"])
def test_teachers_without_files_need_nothing(teacher):
    recipe = tiny_student(sample={"teacher": teacher})
    assert (recipe.preprocess().teacher, recipe.notes()) == (teacher, ())
    assert isinstance(recipe.sample, SampleSettings)


# -- what etl writes


@pytest.fixture(scope="module")
def short_drives(tmp_path_factory) -> Path:
    return write_bright_drives(tmp_path_factory.mktemp("short"), clips=1, seconds=8.0)


def test_shards_are_the_same_wherever_the_files_lie_and_whoever_works(short_drives, tmp_path):
    paths = driving_onnx.write_v0_10_3(tmp_path)
    cut(student_of(paths), short_drives, tmp_path / "s")
    before = tree(tmp_path / "s")
    assert open_shards(tmp_path / "s").manifest.provenance["teacher_provider"] == ("cpu",)
    (tmp_path / "elsewhere").mkdir()
    moved = [path.rename(tmp_path / "elsewhere" / path.name) for path in paths]
    again = etl(student_of(moved), EtlRequest(data=short_drives, out=tmp_path / "s", workers=0), QUIET)
    assert (again["made"], again["kept"], tree(tmp_path / "s")) == (0, 2, before)
    cut(student_of(moved), short_drives, tmp_path / "pool", workers=2)
    assert tree(tmp_path / "pool") == before
    assert str(tmp_path) not in (tmp_path / "s" / "manifest.json").read_text()


def test_another_teacher_does_not_go_on_with_the_first_ones_shards(short_drives, tmp_path):
    """Half done or done: one changed byte of a file is another teacher, though it would say the same."""
    paths, out = driving_onnx.write_v0_10_3(tmp_path), tmp_path / "s"
    cut(student_of(paths), short_drives, out)
    before = tree(out)
    renamed(paths[0], "tiny/3")
    with pytest.raises(UsageError, match=r"holds shards of other settings \(.*teacher.*\); choose another folder with"):
        cut(student_of(paths), short_drives, out)
    assert tree(out) == before
    (out / "manifest.json").unlink()  # as if it had been stopped before its end
    again = etl(student_of(paths), EtlRequest(data=short_drives, out=out, workers=0), QUIET)
    assert (again["made"], again["kept"]) == (2, 0)
