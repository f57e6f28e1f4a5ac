"""What only a GPU shows; `make test-gpu` runs these, and without a GPU they fail rather than skip."""

import pytest
import torch

from omni_cli.recipes.vlm.settings import VlmTrain
from omni_cli.samples.dataset import ALL, WindowDataset
from omni_cli.samples.shards import open_shards
from omni_cli.stages.bench import BenchRequest, bench
from omni_cli.stages.etl import ensure_sidecar
from omni_cli.stages.runs import open_finished
from omni_cli.stages.train import TrainRequest, train
from tests.support.pipeline import QUIET, make_run, tiny_recipe, write_synthetic

pytestmark = pytest.mark.gpu
BF16 = {"precision": "bfloat16"}


@pytest.fixture(scope="module", autouse=True)
def _gpu():
    if not torch.cuda.is_available():
        pytest.fail("torch sees no GPU; run these tests where there is one")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    write_synthetic(folder)
    return folder


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def made(request, data, tmp_path_factory):
    """A few bfloat16 steps of an adapter over a tiny model."""
    recipe = tiny_recipe(request.param, mode="lora", train=settings(max_steps=4), **BF16)
    return make_run(tmp_path_factory.mktemp("run"), recipe, data=data)


def settings(**changes):
    values = {
        "batch_size": 2,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "warmup_ratio": 0.0,
        "workers": 0,
    }
    return VlmTrain(**{**values, **changes})


def test_a_bfloat16_training_steps_and_its_gradients_were_checked(made):
    weights = torch.cat([weight.flatten() for weight in loaded(made).model.parameters()])
    assert bool(torch.isfinite(weights).all())
    assert open_finished(made.run.folder).is_done()
    result = train(made.recipe, TrainRequest(made.shards, made.data, made.run.folder.parent, "run", "test"), QUIET)
    assert result["gradients_checked_at_step"] is not None


def test_batched_answers_and_logits_equal_single_ones(made):
    recipe, preprocess, built = made.recipe, made.run.manifest.preprocess, loaded(made)
    shards = open_shards(made.shards)
    dataset = WindowDataset(shards, ALL, ensure_sidecar(shards, recipe, QUIET))
    rows = [dataset[index] for index in range(4)]
    together = recipe.predict(built, rows, preprocess)
    assert [answer.text for answer in together] == [recipe.predict(built, [row], preprocess)[0].text for row in rows]
    with torch.no_grad():
        packed = logits(recipe, built.model, rows, preprocess)
        alone = torch.cat([logits(recipe, built.model, [row], preprocess) for row in rows])
        torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


def test_the_gpu_answers_as_the_cpu_does(made):
    recipe, preprocess = made.recipe, made.run.manifest.preprocess
    shards = open_shards(made.shards)
    row = WindowDataset(shards, ALL, ensure_sidecar(shards, recipe, QUIET))[0]
    on_gpu, on_cpu = loaded(made), recipe.load(preprocess, made.run.final)
    with torch.no_grad():
        found = logits(recipe, on_gpu.model, [row], preprocess).cpu()
        torch.testing.assert_close(found, logits(recipe, on_cpu.model.float(), [row], preprocess), atol=1e-3, rtol=1e-3)


def test_bench_names_the_gpu_and_its_memory(tmp_path):
    recipe = tiny_recipe(train=settings(), **BF16)
    result = bench(recipe, BenchRequest("train", tmp_path, tmp_path, "test", repeats=2), QUIET)
    assert result["device"] == torch.cuda.get_device_name()
    assert result["parts"]["train"]["peak_memory_gib"] > 0


def loaded(made):
    built = made.recipe.load(made.run.manifest.preprocess, made.run.final)
    return made.recipe.place(built, "cuda", "float32")  # so that a difference is an error, not rounding


def logits(recipe, model, rows, preprocess):
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in recipe.collate(rows, preprocess).items()}
    return recipe.outputs(model, batch, preprocess)
