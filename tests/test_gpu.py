"""What only a GPU shows; `make test-gpu` runs these, and without a GPU they fail rather than skip."""

import pytest
import torch

from omni_cli.models.attention_kernels import UNFUSED, chosen_kernels
from omni_cli.models.quantised import check_products
from omni_cli.recipes.vlm.settings import VlmSample, VlmTrain
from omni_cli.samples.dataset import ALL, WindowDataset
from omni_cli.samples.shards import open_shards
from omni_cli.stages.bench import BenchRequest, bench
from omni_cli.stages.etl import ensure_sidecar
from omni_cli.stages.runs import open_finished
from omni_cli.stages.train import TrainRequest, train
from omni_cli.stages.train.forecast import forecast
from tests.support.pipeline import QUIET, make_run, tiny_recipe, write_synthetic
from tests.support.small_configs import write_small_config

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
    lines = result["parts"]["train"]["lines"]
    assert lines["step"]["peak_memory_gib"] > 0
    assert lines["stock TRL: step"]["peak_memory_gib"] > 0


def test_packed_windows_answer_as_windows_alone_in_16_bit(made):
    """pain 3: by the kernels that a GPU attends with, which are others than a CPU's."""
    recipe, preprocess = made.recipe, made.run.manifest.preprocess
    shards = open_shards(made.shards)
    dataset = WindowDataset(shards, ALL, ensure_sidecar(shards, recipe, QUIET))
    built = recipe.place(recipe.load(preprocess, made.run.final), "cuda", "bfloat16")
    assert recipe.self_test(built, dataset).startswith("packed rows answer as rows alone")


def test_attention_has_a_fused_kernel():
    assert UNFUSED not in chosen_kernels("cuda", torch.bfloat16).values()


def test_products_of_4_bits_are_right():
    """pain 20: ROCm's have been wrong at about half of all elements."""
    assert check_products("cuda", torch.bfloat16) < 0.05


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_random_weights_are_drawn_on_the_gpu_and_learned_beside_stock_trl(family, quantization, tmp_path):
    model = f"random:{write_small_config(tmp_path / 'config', family)}"
    recipe = tiny_recipe(family, mode="lora", model=model, train=settings(), quantization=quantization, **BF16)
    base = recipe.load_base(recipe.preprocess())
    assert {weight.device.type for weight in base.parameters()} == {"cuda"}
    request = BenchRequest("train", tmp_path, tmp_path, "test", repeats=2)
    ratios = bench(recipe, request, QUIET)["parts"]["train"]["ratios"]
    assert {"MFU", "stock TRL: step / step"} <= ratios.keys()


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_memory_of_a_step_is_foreseen_within_a_fifth(is_checkpointed, tmp_path):
    """As torch's allocator counts it, of a model whose activations dwarf its weights."""
    sample = {"cameras": "1-cam", "window": 16, "stride": 16, "canvas_px": 504}
    train_settings = settings(batch_size=4, gradient_checkpointing=is_checkpointed)
    recipe = tiny_recipe(mode="lora", train=train_settings, **BF16).model_copy(update={"sample": VlmSample(**sample)})
    request = BenchRequest("train", tmp_path, tmp_path, "test", repeats=2, is_beside_stock=False)
    taken = bench(recipe, request, QUIET)["parts"]["train"]["lines"]["step"]["peak_memory_gib"]
    foreseen = forecast(recipe, recipe.preprocess(), on_gpu=True)
    assert foreseen is not None
    assert foreseen.peak / 2**30 == pytest.approx(taken, rel=0.2)


def loaded(made):
    built = made.recipe.load(made.run.manifest.preprocess, made.run.final)
    return made.recipe.place(built, "cuda", "float32")  # so that a difference is an error, not rounding


def logits(recipe, model, rows, preprocess):
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in recipe.collate(rows, preprocess).items()}
    return recipe.outputs(model, batch, preprocess)
