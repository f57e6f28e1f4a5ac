"""What omni 0.5 finished stays finished: its runs and shards are known by hashes of what it wrote.

The golden manifest was written by omni 0.5.0: `RunManifest(...)` of `Vlm(model="tiny:qwen2_5_vl")`, with its key.
"""

import json
from pathlib import Path

import pytest

from omni_cli.errors import UsageError
from omni_cli.files import read_json, write_json
from omni_cli.stages import runs
from omni_cli.stages.train import TrainRequest, train
from tests.support.pipeline import QUIET, make_run, tiny_recipe, write_synthetic

GOLDEN = json.loads((Path(__file__).parent / "assets" / "run_of_0.5.json").read_text())
LATER = {  # settings that omni 0.5 did not know, by table
    "tune": ("rank_stabilised", "freeze", "vision_targets"),
    "train": ("publish", "validation_windows", "vision_learning_rate", "merger_learning_rate"),
}


def test_the_key_of_a_run_of_omni_0_5_is_what_its_receipts_say():
    assert runs.RunManifest.model_validate_json(json.dumps(GOLDEN["run"])).key() == GOLDEN["key"]
    known = {table: set(values) for table, values in GOLDEN["run"]["settings"].items() if isinstance(values, dict)}
    assert not any(name in known[table] for table, names in LATER.items() for name in names)


@pytest.fixture
def older(tmp_path):
    """A finished run as omni 0.5 would have left it, and how it is asked for again."""
    data = tmp_path / "data"
    write_synthetic(data, cameras=("camera_front_wide_120fov",))
    made = make_run(tmp_path, tiny_recipe(cameras="1-cam"), data=data)
    path = made.run.folder / runs.RUN_FILE
    manifest = read_json(path)
    for table, names in LATER.items():
        for name in names:
            del manifest["settings"][table][name]
    write_json(path, manifest)
    runs.open_run(made.run.folder).seal(steps=2, loss=1.0)
    return made.recipe, TrainRequest(made.shards, data, tmp_path / "runs", "run", "test")


def test_a_finished_run_of_omni_0_5_is_finished(older, tmp_path):
    recipe, request = older
    assert runs.open_finished(tmp_path / "runs" / "run").is_done()
    assert train(recipe, request, QUIET)["loss"] == 1.0


def test_what_omni_0_5_did_not_know_is_compared_with_its_default(older):
    recipe, request = older
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"publish": "best"})})
    with pytest.raises(UsageError, match=r"other settings \(settings.train.publish: last -> best\)"):
        train(other, request, QUIET)
    compiled = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": True})})
    with pytest.raises(UsageError, match=r"other settings \(settings.train.compile: False -> True\)"):
        train(compiled, request, QUIET)
