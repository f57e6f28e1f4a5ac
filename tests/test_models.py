"""Qwen-VL models: rope ids, batches, adapters, and the checks that guard them."""

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForImageTextToText

from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.models import adapters, batched_vision, families, losses, qwen_vl
from omni_cli.models.rope import rope_ids
from omni_cli.recipes.vlm import Vlm
from omni_cli.samples.answer_formats import FORMATS

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


def recipe(family: str, mode: str = "full", **train: Any) -> Vlm:
    sample = {"cameras": "4-cam", "window": 4, "canvas_px": 112}
    return Vlm(model=f"tiny:{family}", precision="float32", sample=sample, tune={"mode": mode, "rank": 4}, train=train)


def make_rows(vlm: Vlm, speeds: Sequence[float]) -> list[dict[str, Any]]:
    preprocess, generator = vlm.preprocess(), torch.Generator().manual_seed(0)
    zero = FORMATS[preprocess.labels].zero
    zero = {**zero, "future_xyz_m": list(zero.get("future_xyz_m", ()))}
    targets = [{**zero, "start_speed_mps": v, "mean_speed_mps": v, "displacement_m": 0.3 * v} for v in speeds]
    rows = []
    for row in vlm.encode_windows(pa.Table.from_pylist(targets), preprocess).to_pylist():
        tensors = {name: torch.tensor(values) for name, values in row.items()}
        tensors["position_ids"] = tensors["position_ids"].view(4, -1)
        pixels = torch.randint(0, 256, preprocess.window_shape, generator=generator, dtype=torch.uint8)
        rows.append({**tensors, "pictures": pixels})
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_losses_equal_single_ones(family: str) -> None:
    vlm = recipe(family)
    preprocess, built, rows = vlm.preprocess(), vlm.build(vlm.preprocess()), make_rows(vlm, [3.2, 115.75, -0.5])
    built.model.eval()
    with torch.no_grad():
        together = vlm.loss(built.model, vlm.collate(rows, preprocess), preprocess)
        alone = [vlm.loss(built.model, vlm.collate([row], preprocess), preprocess) for row in rows]
    assert int(together.count) == sum(int(loss.count) for loss in alone)
    mean = sum(float(loss.total) for loss in alone) / int(together.count)
    assert float(together.total) / int(together.count) == pytest.approx(mean, abs=1e-5)


def librarys_own(model: Any) -> Any:
    """Return the library's model with the same weights, none of its parts replaced."""
    model.save_pretrained(folder := tempfile.mkdtemp())
    library = AutoModelForImageTextToText.from_pretrained(folder)
    shutil.rmtree(folder)
    assert library.config.vision_config._attn_implementation == "sdpa"
    assert isinstance(library.model.visual.patch_embed.proj, torch.nn.Conv3d)
    assert not isinstance(library.model.visual.patch_embed, batched_vision.LinearPatchEmbed)
    return library.eval()


def seen(output: Any) -> torch.Tensor:
    return torch.cat([output.pooler_output, *(getattr(output, "deepstack_features", None) or ())])


def test_how_windows_of_a_length_are_put_together_is_found_once() -> None:
    """pain 5: and not by each layer of each step, while a GPU waits (21 ms a layer for 32 windows of 16 frames)."""
    vlm, grids = recipe("qwen2_5_vl"), torch.tensor([(1, 6, 10), (4, 4, 8), (2, 10, 4)])
    tower = vlm.build(vlm.preprocess()).model.model.visual
    pixels = torch.rand(int(grids.prod(1).sum()), 3 * 2 * 14 * 14)
    batched_vision._by_length.cache_clear()
    first, again = (seen(tower(pixels, grid_thw=grids)) for _ in range(2))
    assert torch.equal(first, again)
    ways = batched_vision._by_length.cache_info()
    assert (ways.misses, ways.hits) == (2, 2 * tower.config.depth - 2)  # of windows, and of whole pictures


def test_a_model_learns_after_one_has_answered_windows_of_the_same_lengths() -> None:
    """What is kept of how they are put together is no inference tensor, which no way back could keep."""
    tokens = [torch.rand(1, 2, 9, 4, requires_grad=True) for _ in range(3)]
    told = {"attention_mask": None, "scaling": 0.5, "cu_seq_lens_q": torch.tensor([0, 2, 5, 9])}
    batched_vision._by_length.cache_clear()
    with torch.inference_mode():
        answered, _ = batched_vision.attend_by_length(torch.nn.Identity(), *tokens, **told)
    learned, _ = batched_vision.attend_by_length(torch.nn.Identity(), *tokens, **told)
    learned.sum().backward()
    assert torch.equal(answered, learned.detach())
    assert all(torch.isfinite(one.grad).all() for one in tokens if one.grad is not None)
    assert batched_vision._by_length.cache_info().misses == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grids", [[(2, 4, 8), (2, 4, 8)], [(1, 6, 10), (4, 4, 8), (2, 10, 4)]])
def test_a_batched_tower_equals_the_librarys_with_its_gradients(family: str, grids) -> None:
    """pain 5, 6: a few large calls, and patches embedded as a matrix product.

    The second case has attention windows of several lengths, cut off at the pictures' edges.
    """
    vlm = recipe(family)
    model = vlm.build(vlm.preprocess()).model
    towers = [model.model.visual, librarys_own(model).model.visual]
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(patches, towers[0].patch_embed.proj.weight[0].numel())
    outputs = [seen(tower(pixels, torch.tensor(grids), return_dict=True)) for tower in towers]
    assert torch.allclose(*outputs, atol=3e-6 * float(outputs[1].detach().abs().max()), rtol=0)
    weighting = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weighting).sum().backward()
    for (name, ours), theirs in zip(towers[0].named_parameters(), towers[1].parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-4 * float(theirs.grad.abs().max()), rtol=0), name


class Calls(TorchFunctionMode):
    """Counts what torch is asked for, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("grids", "lengths"), [([(2, 4, 8), (2, 4, 8)], 1), ([(1, 6, 10), (4, 4, 8), (2, 10, 4)], 3)])
def test_a_tower_attends_once_a_layer_and_length_and_convolves_nothing(family: str, grids, lengths: int) -> None:
    """pain 5, 6: where the library attends once for each window of each picture, and embeds patches by a convolution.

    Of each case the attention windows, and the pictures, have as many different lengths.
    """
    vlm = recipe(family)
    model = vlm.build(vlm.preprocess()).model
    called = []
    for tower in (model.model.visual, librarys_own(model).model.visual):
        pixels = torch.randn(sum(t * h * w for t, h, w in grids), tower.patch_embed.proj.weight[0].numel())
        with Calls() as calls:
            tower(pixels, grid_thw=torch.tensor(grids))
        convolved = [name for name in calls.counts if "conv" in name]
        called.append((calls.counts["scaled_dot_product_attention"], convolved))
    (ours, theirs), layers = called, model.model.visual.config.depth
    assert ours == (lengths * layers, [])
    assert theirs[0] > 2 * ours[0]
    assert theirs[1] == ["conv3d"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_librarys_own_forward(family: str) -> None:
    """The library computes features and positions itself; a short wide video has the same positions in both."""
    vlm = recipe(family)
    preprocess, (row,) = vlm.preprocess(), make_rows(vlm, [7.5])
    model = vlm.build(preprocess).model.eval()
    library = librarys_own(model)
    batch = vlm.collate([row], preprocess)
    pixels, grid = preprocess.pixel_values(batch["pictures"]), torch.tensor([preprocess.grid])
    video = model.config.video_token_id
    with torch.no_grad():
        features = qwen_vl.video_features(model, pixels, grid)
        ours = qwen_vl.forward_logits(model, batch, features, torch.arange(len(row["input_ids"])))
        (theirs,) = library(
            input_ids=batch["input_ids"],
            pixel_values_videos=pixels,
            video_grid_thw=grid,
            mm_token_type_ids=(batch["input_ids"] == video).int() * 2,
            second_per_grid_ts=torch.tensor([preprocess.seconds_per_grid]),
        ).logits
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("text_before", "grid", "time_step", "after"), [(3, (2, 4, 8), 2.0, 7), (3, (16, 4, 8), 2.0, 34)]
)
def test_text_goes_on_after_the_largest_position(text_before, grid, time_step, after) -> None:
    """Pain 2: transformers 4.57 and serving stacks continue at max() + 1; 5.x restarts at 7 in both cases."""
    video = [9] * (grid[0] * grid[1] * grid[2] // 4)
    ids = rope_ids([1] * text_before + video + [1], video_token=9, grid=grid, merge=2, time_step=time_step)
    assert ids[0].tolist() == list(range(text_before + len(video) + 1))
    assert ids[1:, -1].tolist() == [after] * 3
    assert ids[1, text_before + len(video) - 1] == text_before + int((grid[0] - 1) * time_step)


def test_fractional_time_steps_are_truncated_after_multiplication() -> None:
    ids = rope_ids([9] * 8, video_token=9, grid=(8, 2, 2), merge=2, time_step=0.4)
    assert ids[1].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_placeholders_that_do_not_match_the_grid_are_an_error() -> None:
    with pytest.raises(ValueError, match="3 video tokens"):
        rope_ids([9] * 3, video_token=9, grid=(1, 4, 4), merge=2, time_step=1.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["lora", "dora"])
def test_an_adapter_starts_as_its_base_and_sits_on_the_language_model_alone(family: str, mode: str) -> None:
    vlm, full = recipe(family, mode), recipe(family)
    preprocess, rows = vlm.preprocess(), make_rows(vlm, [3.0])
    adapted, base = vlm.build(preprocess).model.eval(), full.build(preprocess).model.eval()
    batch = vlm.collate(rows, preprocess)
    with torch.no_grad():
        difference = vlm.loss(adapted, batch, preprocess).total - full.loss(base, batch, preprocess).total
    assert abs(float(difference)) < 1e-4
    names = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert len(names) == 2 * 4 * (3 if mode == "dora" else 2)
    assert all(".language_model.layers." in name for name in names)


def test_trainable_count_of_a_published_model() -> None:
    """Qwen2.5-VL-7B with r=16 on q,k,v,o: 16 x 28 x (2 (3584 + 3584) + 2 (3584 + 512))."""
    vlm = Vlm(model="Qwen/Qwen2.5-VL-7B-Instruct", tune={"rank": 16, "alpha": 32})
    total, trainable, weight_bytes, *_ = vlm.size(vlm.preprocess())
    assert trainable == 16 * 28 * (2 * (3584 + 3584) + 2 * (3584 + 512)) == 10_092_544
    assert total == 8_292_166_656
    assert weight_bytes == 2 * total


def test_a_wrong_adapter_is_found() -> None:
    vlm = recipe("qwen2_5_vl", "lora")
    model = vlm.build(vlm.preprocess()).model
    asked = adapters.AdapterSpec(rank=8, alpha=32, dropout=0.0, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    with pytest.raises(OmniError, match=r"has rank 4 and scale 8\.0; asked for 8 and 4\.0"):
        adapters.verify(model, asked)
    narrower = adapters.AdapterSpec(rank=4, alpha=32, dropout=0.0, targets=("q_proj",))
    with pytest.raises(OmniError, match="adapter sits on"):
        adapters.verify(model, narrower)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "k_porj"), r"tune\.targets: 'k_porj' is no layer .* did you mean 'k_proj'\?"),
        (("foo",), "'foo' is no layer of the language model; known: down_proj, gate_proj"),
        ((), "'nothing' is no layer of the language model"),
    ],
)
def test_a_target_that_is_no_layer_is_refused(targets, message: str) -> None:
    vlm = recipe("qwen2_5_vl", "lora")
    asked = vlm.model_copy(update={"tune": vlm.tune.model_copy(update={"targets": targets})})
    with pytest.raises(UsageError, match=message):
        asked.build(asked.preprocess())


def test_a_target_that_some_layers_lack_is_found() -> None:
    vlm = recipe("qwen2_5_vl", "lora")
    model = vlm.build(vlm.preprocess()).model
    layer = model.base_model.model.model.language_model.layers[1].self_attn
    layer.v_proj = layer.v_proj.base_layer
    asked = adapters.AdapterSpec(rank=4, alpha=32, dropout=0.0, targets=vlm.tune.targets)
    with pytest.raises(OmniError, match="adapter sits on 1 layers named v_proj; the language model has 2"):
        adapters.verify(model, asked)


def test_gradient_check_names_the_tensor() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(requires_grad=False)
    model(torch.ones(1, 2)).sum().backward()
    adapters.check_gradients(model)
    model[1].weight.grad.fill_(float("nan"))
    with pytest.raises(OmniError, match=r"gradient of 1\.weight is not finite"):
        adapters.check_gradients(model)
    model[1].weight.grad.zero_()
    with pytest.raises(OmniError, match=r"1\.weight is exactly zero"):
        adapters.check_gradients(model)
    model[1].weight.grad = None
    with pytest.raises(OmniError, match=r"1\.weight received no gradient"):
        adapters.check_gradients(model)
    model[1].weight.grad = torch.ones(2, 2)
    model[0].bias.grad = torch.ones(2)
    with pytest.raises(OmniError, match=r"frozen weight 0\.bias"):
        adapters.check_gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_tower_is_outside_autograd(family: str) -> None:
    vlm = recipe(family, "lora")
    preprocess = vlm.preprocess()
    model = vlm.build(preprocess).model
    pixels = preprocess.pixel_values(make_rows(vlm, [1.0])[0]["pictures"][None])
    features = qwen_vl.video_features(model, pixels, torch.tensor([preprocess.grid]))
    assert not features.pooler_output[0].requires_grad
    full = recipe(family).build(preprocess).model
    assert qwen_vl.video_features(full, pixels, torch.tensor([preprocess.grid])).pooler_output[0].requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_blind_training_is_exactly_grey_pictures(family: str) -> None:
    blind, seeing = recipe(family, blind=True), recipe(family)
    preprocess, rows = blind.preprocess(), make_rows(blind, [3.0, 12.5])
    model = seeing.build(preprocess).model.eval()
    grey = [{**row, "pictures": torch.full_like(row["pictures"], 128)} for row in rows]
    with torch.no_grad():
        shared = blind.loss(model, blind.collate(rows, preprocess), preprocess).total
        drawn = seeing.loss(model, seeing.collate(grey, preprocess), preprocess).total
    assert float(shared) == pytest.approx(float(drawn), abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_answers_equals_single_answers(family: str) -> None:
    vlm = recipe(family)
    preprocess, rows = vlm.preprocess(), make_rows(vlm, [3.0, 12.5])
    built = vlm.build(preprocess)
    built.model.eval()
    together = [prediction.text for prediction in vlm.predict(built, rows, preprocess)]
    assert together == [vlm.predict(built, [row], preprocess)[0].text for row in rows]


def test_token_loss_counts_only_labelled_tokens() -> None:
    logits, labels = torch.randn(12, 11), torch.randint(0, 11, (1, 12))
    labels[0, :3] = losses.IGNORED
    labels[0, 6:9] = losses.IGNORED
    positions = losses.labelled_positions(labels)
    total, count = losses.token_loss(logits[positions], labels, positions)
    expected = torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], reduction="sum")
    assert int(count) == 6
    assert torch.allclose(total, expected)


def test_answers_are_greedy_whatever_the_base_prefers() -> None:
    """Published Qwen2.5-VL ship a repetition penalty, which changes digits."""
    vlm = recipe("qwen2_5_vl")
    preprocess, rows = vlm.preprocess(), make_rows(vlm, [3.0])
    built = vlm.build(preprocess)
    plain = vlm.predict(built, rows, preprocess)[0].text
    built.model.generation_config.update(repetition_penalty=1.9, no_repeat_ngram_size=1)
    assert vlm.predict(built, rows, preprocess)[0].text == plain
    assert built.model.generation_config.repetition_penalty == 1.9


def saved(folder: Path) -> Vlm:
    vlm = recipe("qwen2_5_vl")
    vlm.save(vlm.build(vlm.preprocess()), folder)
    return vlm.model_copy(update={"model": str(folder)})


def test_a_base_that_lacks_weights_is_refused(tmp_path) -> None:
    """pain 6: the library would draw them at random."""
    vlm = saved(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {k: v for k, v in load_file(path).items() if "merger.mlp.2" not in k}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 2 of its weights, first model\.visual\.merger\.mlp\.2\.bias"):
        vlm.build(vlm.preprocess())


@pytest.mark.fault("F24")
def test_pickled_weights_are_never_loaded(tmp_path) -> None:
    vlm = saved(tmp_path)
    path = tmp_path / "model.safetensors"
    torch.save(load_file(path), tmp_path / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(DataError, match="pickled weights are never loaded"):
        vlm.build(vlm.preprocess())
    with pytest.raises(DataError, match="pickled weights are never loaded"):
        vlm.base_fingerprint()


def test_a_base_is_known_by_its_weights_its_configuration_or_its_commit(tmp_path, monkeypatch) -> None:
    vlm = saved(tmp_path / "here")
    before = vlm.base_fingerprint()
    config = tmp_path / "here" / "config.json"
    config.write_text(config.read_text() + " ")
    assert vlm.base_fingerprint() != before
    commit = "c" * 40
    cached = tmp_path / "cache" / "models--org--vlm"
    shutil.copytree(tmp_path / "here", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert qwen_vl.weights_fingerprint("org/vlm") == f"org/vlm@{commit}"


def test_a_base_that_is_none_says_what_it_is(tmp_path) -> None:
    for folder in ("adapter", "run/final"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "adapter" / "adapter_config.json").touch()
    for name, said in {
        "adapter": "is an adapter, and no base; fold it in with: omni merge",
        "run": f"is a run; its weights are in {tmp_path / 'run' / 'final'}",
        "absent": ": no such folder here; expected a folder with weights, or a hub id such as",
    }.items():
        with pytest.raises(UsageError, match=re.escape(f"model '{tmp_path / name}'") + ".*" + re.escape(said)):
            qwen_vl.weights_fingerprint(str(tmp_path / name))
    with pytest.raises(UsageError, match="model 'runs/absent/final': no such folder here"):
        qwen_vl.weights_fingerprint("runs/absent/final")
    with pytest.raises(UsageError, match="model runs/absent/export/hf: no such folder; give a folder of weights"):
        families.model_config("runs/absent/export/hf")


def test_four_bits_are_counted_for_what_is_quantised_alone() -> None:
    """Qwen3-VL-8B: 36 layers of 7 matrices in NF4; embeddings, head and tower in 16 bits."""
    plain = Vlm(model="Qwen/Qwen3-VL-8B-Instruct")
    total, _, sixteen, *_ = plain.size(plain.preprocess())
    quantised = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    _, _, four, *_ = plain.model_copy(update={"quantization": "nf4"}).size(plain.preprocess())
    assert sixteen == 2 * total
    assert four == pytest.approx(2 * (total - quantised) + 0.5159 * quantised, rel=1e-4)


@pytest.mark.parametrize("device", ["meta", "gpu", "cuda:x"])
def test_a_device_that_is_none_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match=f"--device {device}: expected cpu, cuda or cuda:N"):
        qwen_vl.place(torch.nn.Linear(2, 2), device, None)
