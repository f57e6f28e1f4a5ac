"""How far a long item is: told by its worker, drawn by the bar, and without a trace in what is made."""

import pytest

from omni_cli.formats.physical_ai_av import CAMERA_SETS
from omni_cli.report import Console
from omni_cli.samples.shards import frames_path
from omni_cli.stages import worker
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.etl.plan import Unit
from omni_cli.stages.etl.stage import _Told
from omni_cli.stages.etl.unit import UnitResult
from omni_cli.stages.pool import run_pool
from tests.support.pipeline import tiny_recipe, write_synthetic


def by_quarters(item):
    worker._TELL_S = 0.0
    for quarter in (1, 2, 3, 4):
        worker.moved(quarter / 4)
    return item


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_tells_how_far_its_item_is(monkeypatch, workers):
    monkeypatch.setattr(worker, "_TELL_S", 0.0)
    heard = []
    outcomes = run_pool(by_quarters, ["a"], workers=workers, listen=lambda *told: heard.append(told))
    assert [outcome.result for outcome in outcomes] == ["a"]
    assert heard == [("a", 0.25), ("a", 0.5), ("a", 0.75), ("a", 1.0)]


class Bar:
    """Remembers what it is told."""

    def __init__(self):
        self.done, self.seen = 0, []

    def advance(self, count=1, note="", under_way=0.0):
        self.done += count
        self.seen.append(self.done + under_way)

    def under_way(self, units):
        self.seen.append(self.done + units)


def test_the_bar_moves_inside_recordings_and_counts_them_once():
    bar = Bar()
    told, first, second = _Told(Console(), bar), Unit("a", "a", "train"), Unit("b", "b", "train")
    for unit, share in ((first, 0.5), (second, 0.25), (first, 0.75)):
        told.watch(unit, share)
    told.hear(first, UnitResult("made"))
    told.watch(second, 0.5)
    assert bar.seen == [0.5, 0.75, 1.0, 1.25, 1.5]  # never back by what others have done
    assert bar.done == 1


def test_etl_says_what_was_there_already(tmp_path, capsys):
    write_synthetic(tmp_path, cameras=CAMERA_SETS["1-cam"])
    request = EtlRequest(tmp_path, workers=0)
    first = etl(tiny_recipe(cameras="1-cam"), request, Console())
    assert "already there" not in capsys.readouterr().err
    again = etl(tiny_recipe(cameras="1-cam"), request, Console())
    count = again["kept"]
    assert count == first["made"]
    assert f"already there: {count} recordings; nothing was left to do\n" in capsys.readouterr().err
    gone = next(iter(sorted((tmp_path / "shards").glob("*/recordings/*"))))
    frames_path(gone.parent.parent, gone.name).unlink()
    etl(tiny_recipe(cameras="1-cam"), request, Console())
    assert f"already there: {count - 1} recording{'s' if count > 2 else ''}, 1 made now\n" in capsys.readouterr().err


def test_an_unfinished_folder_of_other_settings_is_told_before_it_is_made_anew(tmp_path, capsys):
    write_synthetic(tmp_path, cameras=CAMERA_SETS["1-cam"])
    request, recipe = EtlRequest(tmp_path, out=tmp_path / "s", workers=0), tiny_recipe(cameras="1-cam")
    etl(recipe, request, Console())
    for name in ("manifest.json", "manifest.json.receipt.json"):
        (tmp_path / "s" / name).unlink(missing_ok=True)
    etl(recipe, request, Console())
    assert "other settings" not in capsys.readouterr().err
    for name in ("manifest.json", "manifest.json.receipt.json"):
        (tmp_path / "s" / name).unlink(missing_ok=True)
    other = recipe.model_copy(update={"sample": recipe.sample.model_copy(update={"stride": 2})})
    etl(other, request, Console())
    said = capsys.readouterr().err
    assert "s: 2 recordings of other settings, or of another version of omni, made anew; to keep what is there" in said
