"""`omni bench train`: our steps beside stock TRL's on the same rows, and how many operations a step needs."""

import re
import threading
from itertools import product

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import set_seed

from omni_cli.models import flops
from omni_cli.models.qwen_vl import base_of, tower_is_frozen
from omni_cli.recipes.vlm import Vlm
from omni_cli.recipes.vlm.settings import VlmTune
from omni_cli.report import Console
from omni_cli.stages import resident
from omni_cli.stages.bench import BenchRequest, bench
from omni_cli.stages.bench.peak import _of_sheet, peak_of
from omni_cli.stages.bench.turns import Turns
from omni_cli.stages.etl import EtlRequest, etl
from tests.support.pipeline import QUIET, tiny_recipe, write_synthetic

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    write_synthetic(folder / "data", cameras=("camera_front_wide_120fov",))
    for family in FAMILIES:
        recipe, own = tiny_recipe(family, cameras="1-cam"), folder / family / "shards" / "s"
        etl(recipe, EtlRequest(data=folder / "data", out=own, workers=0), QUIET)
    return folder


@pytest.mark.parametrize(
    ("family", "mode"),
    [*product(("qwen2_5_vl", "qwen3_vl"), ("lora", "full")), ("llava_onevision", "lora"), ("internvl", "full")],
)
def test_stock_trl_learns_the_same_from_the_same_rows(data, tmp_path, family, mode, capsys):
    """Six steps at accumulation 1 in float32; full tuning divides tiny gradients by their own size (Adam)."""
    recipe = tiny_recipe(family, cameras="1-cam", mode=mode)
    request = BenchRequest("train", data / family, tmp_path, "test", repeats=4)
    part = bench(recipe, request, Console())["parts"]["train"]
    assert part["largest_relative_loss_difference"] < 2e-5
    said = capsys.readouterr().err
    assert "the losses of our steps and stock TRL's part by " in said
    if not torch.cuda.is_available():
        assert len(re.findall(r"peak memory beside the weights\W+\d\.\d{3} GiB", said)) == 2
    lines, ratios = part["lines"], part["ratios"]
    assert [line["repeats"] for line in lines.values()] == [4] * 10
    assert ratios["stock TRL: step / step"] == pytest.approx(
        lines["stock TRL: step"]["median_s"] / lines["step"]["median_s"]
    )
    rates = lines["step"]["per_second"]
    assert ratios["MFU"] == pytest.approx(rates["GFLOP of the model"] / part["peak_gigaflops_per_s"])
    assert part["peak"].startswith("measured in this run") or torch.cuda.is_available()


@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate is told bf16 there")
@pytest.mark.parametrize(("family", "freeze"), [("qwen3_vl", ("vision",)), ("qwen2_5_vl", ())])
def test_both_compute_in_16_bits_where_what_learns_is_held_in_float32(data, tmp_path, monkeypatch, family, freeze):
    """As TRL's own default has it on a CPU; a frozen tower of 16 bits takes nothing else."""
    computed, product = [], torch.nn.functional.linear

    def noted(*given):
        result = product(*given)
        if len(result) == 1 or result.ndim == 3:  # of the language model: ours packs its rows, stock pads them
            computed.append(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    recipe = tiny_recipe(family, cameras="1-cam", precision="bfloat16", tune=VlmTune(mode="full", freeze=freeze))
    part = bench(recipe, BenchRequest("train", data / family, tmp_path, "test", repeats=1), QUIET)["parts"]["train"]
    assert set(computed) == {torch.bfloat16}
    assert part["largest_relative_loss_difference"] < 0.03  # an order of summing in 16 bits, through three steps


def test_ours_is_measured_alone_where_memory_has_no_room_for_both(data, tmp_path):
    recipe = tiny_recipe(cameras="1-cam", mode="lora")
    request = BenchRequest("train", data / "qwen2_5_vl", tmp_path, "test", repeats=1, is_beside_stock=False)
    part = bench(recipe, request, QUIET)["parts"]["train"]
    assert not [name for name in (*part["lines"], *part["ratios"]) if "stock" in name]
    assert part["ratios"]["MFU"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is measured instead")
def test_the_peak_memory_of_each_side_is_measured_on_a_cpu_and_is_that_of_its_own_step(data, tmp_path, monkeypatch):
    """A batch that holds 256 MiB more is seen in ours, and not in stock TRL's turns beside it."""
    kept, mib = Vlm.loss, 1 << 20

    def wasteful(self, model, batch, preprocess):
        held = torch.ones(64 * mib)
        return kept(self, model, batch, preprocess), held

    def peaks():
        request = BenchRequest("train", data / "qwen3_vl", tmp_path, "test", repeats=1)
        lines = bench(tiny_recipe("qwen3_vl", cameras="1-cam"), request, QUIET)["parts"]["train"]["lines"]
        return [lines[name]["peak_memory_beside_weights_gib"] * 1024 for name in ("step", "stock TRL: step")]

    ours, stock = peaks()
    assert 10 < ours < 200  # Adam's state of 1.4 million weights alone is 11 MiB
    assert 10 < stock < 200
    monkeypatch.setattr(Vlm, "loss", lambda *given: wasteful(*given)[0])
    more, as_before = peaks()
    assert more - ours == pytest.approx(256, abs=100)
    assert as_before == pytest.approx(stock, abs=100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is measured instead")
def test_where_the_kernel_tells_no_peak_it_is_said_that_it_was_not_measured(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resident, "_CLEAR", tmp_path / "no" / "clear_refs")
    recipe = tiny_recipe(cameras="1-cam", mode="lora")
    request = BenchRequest("train", data / "qwen2_5_vl", tmp_path, "test", repeats=1, is_beside_stock=False)
    line = bench(recipe, request, Console())["parts"]["train"]["lines"]["step"]
    assert line["peak_memory_beside_weights_gib"] is None
    assert re.search(r"peak memory beside the weights\W+not measured", capsys.readouterr().err)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_operations_of_a_step_are_what_pytorch_counts(family, mode):
    """PyTorch counts causal attention whole; the head is run where any row is scored; all else agrees."""
    recipe = tiny_recipe(family, cameras="1-cam", mode=mode)
    preprocess = recipe.preprocess()
    set_seed(0)
    built = recipe.build(preprocess)
    built.model.train()
    if mode != "full":
        built.model.enable_input_require_grads()  # as gradient checkpointing needs it; else the first layer saves some
    rows = recipe.probe_rows(built, preprocess)[:1]
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        recipe.loss(built.model, recipe.collate(rows, preprocess), preprocess).total.backward()
    lengths = [len(row["input_ids"]) for row in rows]
    scored = int((rows[0]["labels"] != -100).sum())
    ours = flops.step_flops(built.model, lengths, scored, preprocess.grid)
    assert counter.get_total_flops() == pytest.approx(ours.total + ours.attention)
    assert recipe.step_flops(built, rows, preprocess) == ours.total


def test_the_rule_of_the_issue():
    """4 P T for a frozen language model, 6 A T for its adapters, 2 P T for a frozen tower, 6 P T for what learns."""
    adapted, whole = (tiny_recipe(mode=mode) for mode in ("lora", "full"))
    counted = {}
    for recipe in (adapted, whole):
        built = recipe.build(recipe.preprocess())
        counted[recipe.tune.mode] = flops.step_flops(built.model, [100], 0, (2, 8, 8))
        language = base_of(built.model).model.language_model.layers
        weights = sum(w.numel() for name, w in language.named_parameters() if w.ndim == 2 and "lora" not in name)
        adapters = sum(w.numel() for name, w in language.named_parameters() if "lora" in name)
        per_token = 6 * weights if recipe.tune.mode == "full" else 4 * weights + 6 * adapters
        assert counted[recipe.tune.mode].language == 100 * per_token
        assert tower_is_frozen(built.model) == (recipe.tune.mode == "lora")
    assert counted["full"].tower_attention == 3 * counted["lora"].tower_attention
    assert 2.4 < counted["full"].tower / counted["lora"].tower < 3


def test_a_peak_is_faster_than_any_other_product(monkeypatch):
    peak = peak_of(torch.float32)
    assert peak.flops_per_s > 1e9
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert peak_of(torch.bfloat16).flops_per_s == 989.4e12


@pytest.mark.parametrize("name", ["NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"])
def test_a_slower_card_of_the_same_chip_has_no_sheet(name):
    assert _of_sheet(name) is None
    assert _of_sheet("NVIDIA GeForce RTX 4090").flops_per_s == 165.2e12


def test_turns_are_taken_two_steps_each_and_a_failure_ends_them_all():
    turns, order = Turns(), []
    turns.join("a"), turns.join("b")

    def run(name, steps):
        for _ in range(steps):
            turns.wait(name)
            order.append(name)
            turns.step_done()
        turns.leave(name, has_failed=False)

    threads = [threading.Thread(target=run, args=arguments) for arguments in (("a", 3), ("b", 5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert "".join(order) == "aabbabbb"
    turns.join("c"), turns.join("d")
    turns.leave("c", has_failed=True)
    turns.wait("d")
    assert turns.is_over
