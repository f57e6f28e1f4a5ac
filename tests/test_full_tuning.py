"""pain 17: a model that is tuned in full learns in float32, whatever it computes in, and is published as was asked."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omni_cli.recipes.vlm import Vlm
from omni_cli.recipes.vlm.settings import VlmTune
from omni_cli.stages import checkpoints, disk, runs
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.train import TrainRequest, train
from tests.support.folders import tree
from tests.support.pipeline import QUIET, tiny_recipe, write_synthetic
from tests.test_models import make_rows

RATE = 1e-5  # usual in full tuning; of a weight of 0.02 the next in bfloat16 is ten of these away
FREEZES = [
    ("qwen2_5_vl", ()),
    ("qwen2_5_vl", ("language",)),
    ("qwen3_vl", ("merger",)),
    ("qwen3_vl", ("vision", "merger")),
    ("llava_onevision", ()),
    ("internvl", ("vision",)),
]


def recipe_of(family: str, freeze: tuple = (), precision: str = "bfloat16", **train_changes) -> Vlm:
    settings = tiny_recipe(family).train.model_copy(update=train_changes)
    return tiny_recipe(family, precision=precision, tune=VlmTune(mode="full", freeze=freeze), train=settings)


def gradients(vlm: Vlm, model: torch.nn.Module) -> torch.Tensor:
    batch = vlm.collate(make_rows(vlm, [3.0, 17.5]), vlm.preprocess())
    loss = vlm.loss(model.train(), batch, vlm.preprocess())
    (loss.total / loss.count).backward()
    return torch.cat([weight.grad.flatten().float() for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize(("family", "freeze"), FREEZES)
def test_a_step_that_sixteen_bits_would_round_away_is_kept(family, freeze, tmp_path) -> None:
    """The gradient is that of float32 but for rounding, every weight moves, and what is published is of 16 bits."""
    vlm, exact = recipe_of(family, freeze), recipe_of(family, freeze, "float32")
    built, preprocess = vlm.build(vlm.preprocess()), vlm.preprocess()
    learning = [weight for weight in built.model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in learning} == {torch.float32}
    assert vlm.size(preprocess).weight_bytes == sum(weight.nbytes for weight in built.model.parameters())
    found, expected = gradients(vlm, built.model), gradients(exact, exact.build(preprocess).model)
    assert 1e-4 < float((found - expected).norm() / expected.norm()) < 0.05  # computed in 16 bits, and only rounded
    before = [weight.detach().clone() for weight in learning]
    torch.optim.AdamW(learning, lr=RATE).step()
    moved = sum(int((weight != old).sum()) for weight, old in zip(learning, before, strict=True))
    assert moved > 0.95 * sum(weight.numel() for weight in learning)
    vlm.save(built, tmp_path)
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text())
    assert {config[part]["dtype"] for part in ("text_config", "vision_config")} | {config["dtype"]} == {"bfloat16"}
    assert {weight.dtype for weight in vlm.load(preprocess, tmp_path).model.parameters()} == {torch.bfloat16}


def test_a_frozen_tower_is_held_in_the_type_that_is_computed_in() -> None:
    vlm = recipe_of("qwen3_vl", ("vision",))
    model = vlm.build(vlm.preprocess()).model
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("full")
    write_synthetic(data)
    return Path(etl(tiny_recipe(), EtlRequest(data=data, workers=0), QUIET)["shards"])


def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_weights(shards, tmp_path) -> None:
    """A checkpoint keeps what learns in float32; its size was foreseen."""
    vlm = recipe_of("qwen2_5_vl", ("vision",), max_steps=4, save_steps=2, learning_rate=RATE)
    request = TrainRequest(shards, tmp_path, tmp_path, "r", "test")
    train(vlm, request, QUIET)
    run = runs.open_finished(tmp_path / "r")
    expected = tree(run.final)
    saved = run.folder / runs.CHECKPOINTS
    kinds = {weight.dtype for weight in load_file(saved / "checkpoint-2" / "model.safetensors").values()}
    assert kinds == {torch.float32, torch.bfloat16}
    size = vlm.size(vlm.preprocess())
    files = [path for path in (saved / "checkpoint-4").iterdir() if path.suffix in (".safetensors", ".pt")]
    found = sum(path.stat().st_size for path in files)
    foreseen = disk.checkpoint_bytes(size, "full", vlm.train.optimizer) - disk._BESIDE_BYTES
    assert foreseen == pytest.approx(found, rel=0.01, abs=40_000)
    final = (run.final / "model.safetensors").stat().st_size
    assert disk.final_bytes(size, "full") - disk._BESIDE_BYTES == pytest.approx(final, rel=0.01, abs=20_000)
    shutil.rmtree(run.final)
    (run.folder / "final.receipt.json").unlink()
    checkpoints.discard_from(saved, 3)
    assert checkpoints.steps_saved(saved) == [2]
    train(vlm, request, QUIET)
    assert tree(run.final) == expected
