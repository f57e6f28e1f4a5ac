"""What `omni etl --dry-run` foresees, beside what the real etl makes of the same data."""

import pytest

from omni_cli.formats.physical_ai_av import CAMERA_SETS
from omni_cli.recipe import SplitSettings
from omni_cli.recipes.vlm.settings import VlmSample
from omni_cli.samples.reasoning import reasoning_windows
from omni_cli.samples.waypoints import waypoint_windows
from omni_cli.sources import open_source
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.etl import dry_run as planned
from tests.support.pipeline import QUIET, tiny_recipe, write_synthetic

ONE = CAMERA_SETS["1-cam"]
CLIPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two chunks of four drives of 9 s: some have no text, and one has a text that comes too late."""
    data = tmp_path_factory.mktemp("foreseen")
    write_synthetic(data, seconds=9.0, fps=10, cameras=ONE, clips_per_chunk=CLIPS // 2)
    return data


def recipe_of(labels, rule="hash", **sample):
    values = {"cameras": "1-cam", "window": 4, "stride": 4, "canvas_px": 84, "labels": labels, **sample}
    split = SplitSettings(rule=rule, validation=0.4, gap_s=0.5)
    return tiny_recipe(cameras="1-cam", sample=VlmSample(**values), split=split)


def foreseen_and_made(data, out, recipe):
    request = {"data": data, "out": out, "workers": 0}
    foreseen = etl(recipe, EtlRequest(**request, dry_run=True), QUIET)
    made = etl(recipe, EtlRequest(**request), QUIET)
    frames = sum(path.stat().st_size for path in out.rglob("frames.arrow"))
    return foreseen, made, frames


@pytest.mark.parametrize(
    ("labels", "rule"), [("ego-motion", "hash"), ("ego-motion", "time"), ("waypoints", "hash"), ("reasoning", "hash")]
)
def test_windows_are_counted_as_etl_makes_them(data, tmp_path, labels, rule):
    foreseen, made, frames_bytes = foreseen_and_made(data, tmp_path / "shards", recipe_of(labels, rule))
    assert made["refused"] == {}
    for split, count in made["windows"].items():  # all eight were opened
        assert foreseen["windows_by_split"][split] == pytest.approx(count, abs=1)
    assert foreseen["windows"] == pytest.approx(sum(made["windows"].values()), abs=1)
    assert 0.97 * frames_bytes <= foreseen["stored_bytes"] <= frames_bytes  # all but the heads of so small pictures


@pytest.mark.parametrize("labels", ["ego-motion", "waypoints", "reasoning"])
def test_of_some_that_are_opened_the_others_are_judged(data, tmp_path, labels, monkeypatch):
    monkeypatch.setattr(planned, "_OPENED", CLIPS // 2)
    foreseen, made, _ = foreseen_and_made(data, tmp_path / "shards", recipe_of(labels))
    assert foreseen["windows"] == pytest.approx(sum(made["windows"].values()), rel=0.3)


@pytest.mark.parametrize(("labels", "windows_of"), [("waypoints", waypoint_windows), ("reasoning", reasoning_windows)])
def test_windows_and_rows_are_the_same(data, labels, windows_of):
    recipe = recipe_of(labels)
    reader, preprocess = open_source("synthetic", data / "raw" / "synthetic"), recipe.preprocess()
    maker = recipe.table_maker()
    assert maker.choose.func is windows_of
    assert (maker.reach.before_us, maker.reach.after_us) == (1_500_000, 6_400_000)
    for ref in reader.recordings():
        recording = reader.open(ref.id, preprocess.cameras)
        chosen = maker.choose(recording, preprocess, assign_split=lambda _first, _last: "val")
        table = maker(recording, preprocess, assign_split=lambda _first, _last: "val").windows
        assert [window.end_us for window in chosen.windows] == table["end_us"].to_pylist()
        assert list(chosen.splits) == table["split"].to_pylist()
