"""A LoRA adapter on a base that was really trained learns another car and another answer, from its pictures."""

from dataclasses import replace
from pathlib import Path

import pytest

from omni_cli.formats.physical_ai_av import CAMERA_SETS
from omni_cli.recipes.vlm import Vlm
from omni_cli.recipes.vlm.settings import VlmSample, VlmTrain, VlmTune
from omni_cli.stages import runs
from omni_cli.stages.demo.seeing import DRIVES, SAMPLE
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.evaluate import EvalRequest, evaluate
from omni_cli.stages.fetch import FetchRequest, fetch
from omni_cli.stages.train import TrainRequest, train
from tests.support.pipeline import QUIET

EVERY_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASE = Path(__file__).parent / "assets" / "tiny_base"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    data = tmp_path_factory.mktemp("adapt")
    drives = replace(DRIVES, seed=77, rig="b")
    fetch(FetchRequest("synthetic", data, "10", cameras=CAMERA_SETS["4-cam"], workers=2, synthetic=drives), QUIET)
    recipe = Vlm(
        model=str(BASE),
        precision="float32",
        sample=VlmSample(**SAMPLE, labels="ego-motion"),
        tune=VlmTune(mode="lora", rank=16, alpha=32, targets=EVERY_LINEAR),
        train=VlmTrain(batch_size=8, learning_rate=2e-3, max_steps=400, gradient_checkpointing=False, workers=0),
    )
    shards = Path(etl(recipe, EtlRequest(data, "synthetic", workers=2), QUIET)["shards"])
    trained = train(recipe, TrainRequest(shards, data, data / "runs", "adapter", "cpu-tiny"), QUIET)
    measured = evaluate(recipe, runs.open_finished(Path(trained["run"])), EvalRequest(blind=False), QUIET)
    return {scores["name"]: scores for scores in measured["conditions"]}


def test_it_knows_the_speed_of_drives_it_never_saw(report) -> None:
    assert report["model"]["unreadable"] < 0.2
    assert report["model"]["speed_mae_of_reference"] < 0.75  # measured: 0.31


@pytest.mark.parametrize("control", ["pictures swapped", "first frame repeated"])
def test_without_its_own_pictures_it_knows_nothing(report, control: str) -> None:
    assert report[control]["speed_mae_of_reference"] > 0.9
