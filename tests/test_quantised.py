"""Language models in 4 bits: which layers are, products that are true, adapters that learn beside them."""

import re
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from omni_cli.errors import OmniError, UsageError
from omni_cli.models import adapters, quantised, qwen_vl
from omni_cli.recipes.vlm import Vlm
from omni_cli.recipes.vlm.settings import VlmTrain
from omni_cli.report import Console
from omni_cli.samples.shards import open_shards
from omni_cli.stages import runs
from omni_cli.stages.doctor import DoctorRequest, doctor
from omni_cli.stages.evaluate import EvalRequest, evaluate
from omni_cli.stages.infer import InferRequest, infer, subject_of_run
from omni_cli.stages.merge import MergeRequest, merge
from omni_cli.stages.train import TrainRequest, train
from tests.support.no_bitsandbytes import without_bitsandbytes
from tests.support.pipeline import QUIET, Made, make_run, tiny_recipe, write_synthetic
from tests.test_models import make_rows

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
LINEARS = 2 * 7  # of two layers


@pytest.fixture
def unchecked(monkeypatch):
    """Products are checked anew, and not remembered."""
    monkeypatch.setattr(quantised, "check_products", quantised.check_products.__wrapped__)


def four_bit(family: str = "qwen2_5_vl", mode: str = "lora", **changes: Any) -> Vlm:
    return tiny_recipe(family, cameras="1-cam", mode=mode, quantization="nf4", **changes)


def packed_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.data.clone() for name, layer in quantised.quantised_layers(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_alone_is_quantised(family: str) -> None:
    """pain 13"""
    vlm = four_bit(family)
    built = vlm.build(vlm.preprocess())
    base = qwen_vl.base_of(built.model)
    expected = {
        f"model.language_model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in (
            *(f"self_attn.{letter}_proj" for letter in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    }
    assert {name.removesuffix(".base_layer") for name in quantised.quantised_layers(base)} == expected
    assert len(quantised.quantised_layers(built.model)) == LINEARS == len(expected)  # an adapter on one is no other
    assert built.notes[0].startswith(f"4-bit: {LINEARS} linears of the language model; vision tower, merger")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    vlm, folder = tiny_recipe(), tmp_path_factory.mktemp("base")
    vlm.save(vlm.build(vlm.preprocess()), folder)
    return folder


@pytest.mark.parametrize(
    ("skipped", "said"),
    [
        (["visual", "lm_head"], r"model\.visual\.\S+ was quantised, one of \d+ layers that should stay"),
        (None, r"model\.visual\.\S+ was quantised, one of \d+ layers that should stay"),
        (["model.visual", "lm_head", "down_proj"], r"layers\.0\.mlp\.down_proj was not quantised, one of 2; expected"),
    ],
)
def test_a_wrong_list_is_refused_by_its_first_name(folder, monkeypatch, skipped, said) -> None:
    """pain 13: "visual" alone, and the library's own default, quantise the tower."""
    monkeypatch.setattr(quantised, "_NOT_QUANTISED", skipped)
    with pytest.raises(OmniError, match=said):
        qwen_vl.load_model(str(folder), torch.float32, "nf4")


def test_a_base_that_others_quantised_is_checked_too(folder, tmp_path) -> None:
    """pain 13: nothing says so on the command line; its own configuration does."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForImageTextToText.from_pretrained(folder, quantization_config=how).save_pretrained(tmp_path)
    with pytest.raises(OmniError, match=r"model\.visual\.\S+ was quantised"):
        qwen_vl.load_model(str(tmp_path), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_this_machine_are_true(dtype: torch.dtype) -> None:
    assert 0 <= quantised.check_products("cpu", dtype) < 0.02


def half_wrong(found: torch.Tensor) -> torch.Tensor:
    """As on a GPU whose warps were taken for half as wide: every second number is nothing."""
    spoiled = found.clone()
    spoiled.view(-1)[::2] = 0
    return spoiled


def spoil(name: str, when=lambda *_: True):
    """Return a kernel of bitsandbytes that is wrong at times."""
    module, attribute = bitsandbytes, name
    if "." in name:
        inner, attribute = name.split(".")
        module = getattr(bitsandbytes, inner)
    true = getattr(module, attribute)

    def wrong(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = true(first, *args, **kwargs)
        return half_wrong(found) if when(first) else found

    return module, attribute, wrong


@pytest.mark.parametrize(
    ("kernel", "when", "said"),
    [
        ("matmul_4bit", lambda x: x.numel() == x.shape[-1], r"product of 1 rows by a matrix \(256, 64\)"),
        ("matmul_4bit", lambda x: len(x) > 64, r"product of 256 rows"),
        ("matmul_4bit", lambda x: x.requires_grad, r"product in training of 1 rows"),
        ("functional.dequantize_4bit", lambda _: True, r"a matrix \(256, 64\)"),
    ],
)
def test_a_kernel_that_is_wrong_at_times_is_found(kernel, when, said, monkeypatch, unchecked) -> None:
    """pain 20"""
    monkeypatch.setattr(*spoil(kernel, when))
    with pytest.raises(
        OmniError, match=r"bitsandbytes [\d.]+ multiplies wrongly in 4 bits on cpu: .* --set quantiz"
    ) as e:
        quantised.check_products("cpu", torch.bfloat16)
    assert re.search(said, str(e.value))


def test_a_wrong_gradient_is_found(monkeypatch, unchecked) -> None:
    """pain 20: backward multiplies in its own way."""
    backward = bitsandbytes.autograd._functions.MatMul4Bit.backward

    def wrong(context: Any, gradient: torch.Tensor) -> Any:
        first, *rest = backward(context, gradient)
        return half_wrong(first), *rest

    monkeypatch.setattr(bitsandbytes.autograd._functions.MatMul4Bit, "backward", staticmethod(wrong))
    with pytest.raises(OmniError, match="the gradient of a product of 1 rows by a matrix"):
        quantised.check_products("cpu", torch.bfloat16)


def test_a_single_wrong_number_is_found(monkeypatch, unchecked) -> None:
    """pain 20: the last output of the last row alone."""

    def last_lost(found: torch.Tensor) -> torch.Tensor:
        found = found.clone()
        found.view(-1)[-1] += 0.2 * found.float().square().mean().sqrt()
        return found

    true = bitsandbytes.matmul_4bit
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *args, **kwargs: last_lost(true(*args, **kwargs)))
    with pytest.raises(OmniError, match="multiplies wrongly"):
        quantised.check_products("cpu", torch.bfloat16)


def test_a_build_that_cannot_multiply_says_so_in_one_line(monkeypatch, unchecked) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", missing)
    with pytest.raises(OmniError, match=r"cannot multiply in 4 bits on cpu: no kernel image is available; use --set"):
        quantised.check_products("cpu", torch.bfloat16)


def test_wrong_products_stop_a_build_and_are_told_by_doctor(monkeypatch, unchecked, tmp_path) -> None:
    """pain 20"""
    vlm = four_bit()
    monkeypatch.setattr(*spoil("matmul_4bit"))
    with pytest.raises(OmniError, match="multiplies wrongly in 4 bits"):
        vlm.build(vlm.preprocess())
    checks = doctor(DoctorRequest(tmp_path, tmp_path), Console(quiet=True))["checks"]
    (found,) = [check for check in checks if check["name"] == "4-bit products"]
    assert (found["state"], "multiplies wrongly" in found["found"]) == ("broken", True)


def test_doctor_says_that_products_are_true(tmp_path) -> None:
    checks = doctor(DoctorRequest(tmp_path, tmp_path), Console(quiet=True))["checks"]
    (found,) = [check for check in checks if check["name"] == "4-bit products"]
    assert re.fullmatch(r"bitsandbytes [\d.]+ on cpu: at most [0-4]\.\d% off the dequantised ones", found["found"])
    assert found["state"] == "ok"


def test_without_bitsandbytes_the_install_line_is_named(folder) -> None:
    message = r"quantization = 'nf4': bitsandbytes cannot .* pip install 'omni-cli\[bnb\]'"
    with without_bitsandbytes(), pytest.raises(UsageError, match=message):
        qwen_vl.load_model(str(folder), torch.float32, "nf4")


def test_four_bits_do_not_learn_themselves() -> None:
    with pytest.raises(
        ValueError, match=r"weights of 4 bits cannot learn; take quantization = none, or tune\.mode = lor"
    ):
        Vlm(quantization="nf4", tune={"mode": "full"})


@pytest.mark.parametrize("mode", ["lora", "dora"])
@pytest.mark.parametrize(("family", "precision"), [("qwen2_5_vl", "bfloat16"), ("qwen3_vl", "float32")])
def test_an_adapter_learns_beside_four_bits(family: str, precision: str, mode: str) -> None:
    """pain 13, 17: the loss falls, all of the adapter moves in float32, not a bit of the base does, whatever it ran."""
    vlm = four_bit(family, mode, precision=precision)
    preprocess = vlm.preprocess()
    model = vlm.build(preprocess).model
    batch = vlm.collate(make_rows(vlm, [3.0, 17.5]), preprocess)
    learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before, packed = {name: weight.detach().clone() for name, weight in learning.items()}, packed_weights(model)
    optimizer, losses = torch.optim.AdamW(learning.values(), lr=1e-2), []
    for step in range(4):
        loss = vlm.loss(model.train(), batch, preprocess)
        (loss.total / loss.count).backward()
        if step:
            adapters.check_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # a CPU's kernel for evaluation would repack the weights in place, and cut the gradient
            vlm.loss(model.eval(), batch, preprocess)
        losses.append(float(loss.total.detach()))
    assert losses == sorted(losses, reverse=True)
    assert {weight.dtype for weight in learning.values()} == {torch.float32}
    assert all(not torch.equal(weight, before[name]) for name, weight in learning.items())
    assert any("lora_magnitude" in name for name in learning) == (mode == "dora")
    assert all(torch.equal(layer, packed[name]) for name, layer in packed_weights(model).items())


def test_a_forward_pass_outside_training_leaves_four_bits_as_they_are() -> None:
    vlm = four_bit()
    preprocess = vlm.preprocess()
    model = vlm.build(preprocess).model.eval()
    layer = next(iter(quantised.quantised_layers(model).values()))
    before = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    with torch.no_grad():
        vlm.loss(model, vlm.collate(make_rows(vlm, [3.0]), preprocess), preprocess)
    assert torch.equal(bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), before)


def test_a_plan_counts_the_bytes_of_four_bits() -> None:
    """Beside what is counted, each matrix has two tables of 16 and 256 numbers and the mean of its scales."""
    vlm = four_bit(precision="bfloat16")
    size = vlm.size(vlm.preprocess())
    base = vlm.load_base(vlm.preprocess())
    found = 0
    for weight in base.parameters():
        found += weight.numel() * weight.element_size()
    for layer in quantised.quantised_layers(base).values():
        state = layer.weight.quant_state
        found += state.absmax.numel() + state.state2.absmax.numel() * 4
    assert found == pytest.approx(size.weight_bytes, rel=1e-3)
    assert size.learning == adapters.trainable_count(vlm.build(vlm.preprocess()).model)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(folder, cameras=("camera_front_wide_120fov",))
    return folder


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> Made:
    """A run of DoRA beside four bits, with its checkpoints after two and four steps."""
    steps = VlmTrain(batch_size=2, max_steps=4, save_steps=2, log_steps=1, learning_rate=1e-2, workers=0)
    return make_run(tmp_path_factory.mktemp("made"), four_bit(mode="dora", train=steps), data=data)


def test_a_stopped_run_in_four_bits_goes_on_bit_for_bit(made, tmp_path: Path) -> None:
    """pain 12, 17: TRL would cast what learns to bfloat16; what is published is float32, and the same."""
    shutil.copytree(made.run.folder, folder := tmp_path / "run")
    (folder / "final.receipt.json").unlink()
    (folder / runs.CHECKPOINTS / "checkpoint-4.receipt.json").unlink()
    said = train(made.recipe, TrainRequest(made.shards, made.data, tmp_path, "run", "test"), QUIET)
    assert said["run"] == str(folder)
    weights, again = (load_file(run / runs.FINAL / "adapter_model.safetensors") for run in (made.run.folder, folder))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    assert {weight.dtype for weight in again.values()} == {torch.float32}


def test_magnitudes_have_moved_in_what_is_published(made) -> None:
    """pain 17: all of them, against the norms of the base's own rows, which they begin as."""
    vlm = made.recipe
    fresh = dict(vlm.build(vlm.preprocess()).model.named_parameters())
    published = load_file(made.run.final / "adapter_model.safetensors")
    magnitudes = {name: weight for name, weight in published.items() if "lora_magnitude" in name}
    assert len(magnitudes) == 2 * 4
    for name, weight in magnitudes.items():
        assert not torch.equal(weight, fresh[name.replace("_vector", "_vector.default.weight")])


def test_a_run_in_four_bits_is_measured_and_asked(made, tmp_path: Path) -> None:
    report = evaluate(made.recipe, made.run, EvalRequest(blind=False, controls="basic"), QUIET)
    assert {"model", "base"} & {condition["name"] for condition in report["conditions"]}
    (first, *_) = open_shards(made.shards).manifest.recordings
    asked = InferRequest((first.id,), data=made.data, out=tmp_path / "out")
    (clip,) = infer(made.recipe, subject_of_run(made.run), asked, QUIET)["clips"]
    assert clip["windows"] > 0


def test_a_run_in_four_bits_is_merged_into_the_base_as_it_was(made, tmp_path: Path) -> None:
    """pain 14: never into what is quantised."""
    said = merge(made.recipe, made.run, MergeRequest(out=tmp_path / "merged"), QUIET)
    merged = AutoModelForImageTextToText.from_pretrained(said["model"])
    assert not quantised.quantised_layers(merged)
    vlm = made.recipe.model_copy(update={"quantization": "none"})
    adapted = vlm.load(vlm.preprocess(), made.run.final).model.merge_and_unload()  # by PEFT, into what was drawn
    for name, weight in adapted.named_parameters():
        assert torch.allclose(weight, merged.get_parameter(name.replace("patch_embed.proj.proj", "patch_embed.proj")))
