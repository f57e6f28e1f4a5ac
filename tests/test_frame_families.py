"""LLaVA-OneVision and InternVL, which read whole frames, against the library's own forward, generation and prompts."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    InternVLProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from omni_cli.errors import UsageError
from omni_cli.models import families, qwen_vl, wiring
from omni_cli.models.adapters import check_gradients
from omni_cli.recipes.vlm import Vlm
from omni_cli.samples import prompts
from omni_cli.samples.tiling import TiledPreprocess
from tests.test_models import make_rows

FAMILIES = ("llava_onevision", "internvl")
SPEEDS_MPS = (3.2, 115.75, -0.5)
EIGHT_SPEEDS_MPS = (0.0, 2.5, 5.25, 9.75, 13.5, 17.0, 22.75, 31.25)


def recipe(family: str, mode: str = "full", **more: Any) -> Vlm:
    sample = {"cameras": "4-cam", "window": 3, **more.pop("sample", {})}
    return Vlm(model=f"tiny:{family}", precision="float32", sample=sample, tune={"mode": mode, "rank": 4}, **more)


def librarys_own(model: Any, folder: Any) -> Any:
    model.save_pretrained(folder)
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def as_the_library_reads(rows: list[dict[str, Any]], preprocess: TiledPreprocess, *, left: bool = False) -> Any:
    """Return the inputs of the library's forward pass: padded rows, a mask, and float pixels."""
    pixels = preprocess.pixel_values(torch.stack([row["pictures"] for row in rows]))
    is_video = preprocess.vision.family == "llava_onevision"
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": qwen_vl.pad_rows(ids, 0, left=left),
        "attention_mask": qwen_vl.pad_rows([torch.ones_like(row) for row in ids], 0, left=left),
        **({"pixel_values_videos": pixels} if is_video else {"pixel_values": pixels.flatten(0, 1)}),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_librarys_own(family: str, tmp_path) -> None:
    vlm = recipe(family)
    preprocess, rows = vlm.preprocess(), make_rows(vlm, SPEEDS_MPS)
    model = vlm.build(preprocess).model
    library = librarys_own(model, tmp_path)
    labels = qwen_vl.pad_rows([row["labels"] for row in rows], -100)
    theirs = library(**as_the_library_reads(rows, preprocess), labels=labels, use_cache=False).loss
    ours = vlm.loss(model, vlm.collate(rows, preprocess), preprocess)
    assert float(ours.total.detach() / ours.count) == pytest.approx(float(theirs.detach()), rel=1e-5)
    theirs.backward()
    (ours.total / ours.count).backward()
    check_gradients(model)
    expected = dict(library.named_parameters())
    for name, weight in model.named_parameters():
        if weight.grad is None:  # what no output depends on
            assert expected[name].grad is None or float(expected[name].grad.abs().max()) < 1e-7, name
        else:
            largest = float(expected[name].grad.abs().max())
            assert torch.allclose(weight.grad, expected[name].grad, atol=1e-4 * largest, rtol=0), name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_answer_as_rows_alone(family: str) -> None:
    vlm = recipe(family)
    preprocess, rows = vlm.preprocess(), make_rows(vlm, SPEEDS_MPS)
    model = vlm.build(preprocess).model.eval()
    with torch.no_grad():
        together = vlm.outputs(model, vlm.collate(rows, preprocess), preprocess)
        alone = torch.cat([vlm.outputs(model, vlm.collate([row], preprocess), preprocess) for row in rows])
    assert len({len(row["input_ids"]) for row in rows}) > 1
    assert torch.allclose(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_samples_are_learned_to_exact_answers(family: str) -> None:
    """The prompts are all the same: only the pictures tell which answer is asked for."""
    vlm = recipe(family)
    preprocess, rows = vlm.preprocess(), make_rows(vlm, EIGHT_SPEEDS_MPS)
    built = vlm.build(preprocess)
    optimizer = torch.optim.AdamW(built.model.train().parameters(), lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = vlm.loss(built.model, vlm.collate(rows, preprocess), preprocess)
        (loss.total / loss.count).backward()
        optimizer.step()
    answers = [row["input_ids"][row["labels"] != -100] for row in rows]
    expected = [built.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    built.model.eval()
    assert len(set(expected)) == 8
    assert [answer.text for answer in vlm.predict(built, rows, preprocess)] == expected
    held = vlm.predict(vlm.held_to_format(built, preprocess), rows, preprocess)
    assert [(answer.text, answer.held.off_grammar) for answer in held] == [(text, 0) for text in expected]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_the_librarys_own_generation(family: str, tmp_path) -> None:
    vlm = recipe(family)
    preprocess, rows = vlm.preprocess(), make_rows(vlm, SPEEDS_MPS)
    built = vlm.build(preprocess)
    library = librarys_own(built.model.eval(), tmp_path)
    end, pad = built.tokenizer.convert_tokens_to_ids(prompts.ANSWER_END), built.tokenizer.pad_token_id
    greedy = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=pad)
    asked = [{**row, "input_ids": row["input_ids"][row["labels"] == -100]} for row in rows]
    inputs = as_the_library_reads(asked, preprocess, left=True)
    tokens = library.generate(**inputs, generation_config=greedy)[:, inputs["input_ids"].shape[1] :]
    theirs = built.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    ours = [prediction.text for prediction in vlm.predict(built, rows, preprocess)]
    assert len(set(theirs)) > 1
    assert all(one.startswith(other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_learns_and_its_tower_stays_outside_autograd(family: str) -> None:
    """Pain 4: where the language model alone learns, no layer of the tower is in the graph."""
    vlm = recipe(family, "lora")
    preprocess, rows = vlm.preprocess(), make_rows(vlm, SPEEDS_MPS)
    model = vlm.build(preprocess).model.train()
    model.enable_input_require_grads()
    qwen_vl.base_of(model).activation_checkpointing_enable()
    pixels = preprocess.pixel_values(rows[0]["pictures"][None])
    assert not qwen_vl.video_features(model, pixels, torch.tensor([preprocess.grid])).pooler_output.requires_grad
    vlm.loss(model, vlm.collate(rows, preprocess), preprocess).total.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize(("family", "layer"), [("llava_onevision", "k_proj"), ("internvl", "fc1")])
def test_an_adapter_sits_on_the_tower_too(family: str, layer: str) -> None:
    vlm = recipe(family, "lora")
    vlm = vlm.model_copy(update={"tune": vlm.tune.model_copy(update={"vision_targets": (layer,)})})
    preprocess, rows = vlm.preprocess(), make_rows(vlm, SPEEDS_MPS)
    model = vlm.build(preprocess).model.train()
    vlm.loss(model, vlm.collate(rows, preprocess), preprocess).total.backward()
    found = [name for name, weight in model.named_parameters() if "vision_tower" in name and weight.requires_grad]
    assert len(found) == 2 * 3  # two matrices on each of three layers
    assert all(f".{layer}.lora_" in name for name in found)
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_merger_learns_the_graph_begins_at_it(family: str) -> None:
    vlm = recipe(family, "lora")
    vlm = vlm.model_copy(update={"tune": vlm.tune.model_copy(update={"train_merger": True})})
    preprocess, rows = vlm.preprocess(), make_rows(vlm, SPEEDS_MPS)
    model = vlm.build(preprocess).model.train()
    base = qwen_vl.base_of(model)
    base.activation_checkpointing_enable()
    model.enable_input_require_grads()
    seen: list[bool] = []
    first = next(module for name, module in base.named_modules() if re.search(r"vision_tower.*layers?\.0$", name))
    first.register_forward_hook(lambda _module, _inputs, output: seen.append(
        (output[0] if isinstance(output, tuple) else output).requires_grad
    ))  # fmt: skip
    vlm.loss(model, vlm.collate(rows, preprocess), preprocess).total.backward()
    assert seen == [False]
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad and "lora" not in name}
    assert learning
    assert all("multi_modal_projector" in name for name in learning)
    assert all(weight.grad is not None and weight.grad.any() for name, weight in model.named_parameters()
               if name in learning)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_blind_training_is_exactly_grey_pictures(family: str) -> None:
    blind, seeing = recipe(family, train={"blind": True}), recipe(family)
    preprocess, rows = blind.preprocess(), make_rows(blind, SPEEDS_MPS)
    model = blind.build(preprocess).model.eval()
    grey = [{**row, "pictures": torch.full_like(row["pictures"], 128)} for row in rows]
    with torch.no_grad():
        shared = blind.loss(model, blind.collate(rows, preprocess), preprocess).total
        each = seeing.loss(model, seeing.collate(grey, preprocess), preprocess).total
    assert float(shared) == pytest.approx(float(each), rel=1e-5)


@pytest.mark.parametrize(("side", "patches"), [(112, 8), (384, 27)])
def test_llava_onevision_gets_as_many_placeholders_as_its_own_processor_writes(side: int, patches: int) -> None:
    preprocess = recipe("llava_onevision").preprocess()
    vision = preprocess.vision.model_copy(update={"side_px": side})
    preprocess = preprocess.model_copy(update={"vision": vision, "canvas_width_px": side, "canvas_height_px": side})
    processor = SimpleNamespace(num_image_tokens=patches**2, video_token="<video>")
    theirs = LlavaOnevisionProcessor.replace_video_token(processor, {"pixel_values_videos": [torch.empty(3, 3)]}, 0)
    assert f"<|im_start|>user\n{theirs}\n" in prompts.render_prompt(preprocess, 0.0)
    assert preprocess.visual_tokens == theirs.count("<video>")


def test_internvl_gets_the_frames_that_its_own_processor_writes() -> None:
    preprocess = recipe("internvl").preprocess()
    processor = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="<IMG_CONTEXT>", image_seq_length=16
    )
    theirs = InternVLProcessor.replace_video_token(processor, {"pixel_values_videos": [torch.empty(3, 3)]}, 0)
    assert f"<|im_start|>user\n{theirs}\n" in prompts.render_prompt(preprocess, 0.0)
    assert preprocess.visual_tokens == theirs.count("<IMG_CONTEXT>")


def test_frames_are_normalised_as_the_librarys_processor_does() -> None:
    one_view = recipe("llava_onevision", sample={"window": 1, "cameras": "camera_front_wide_120fov"})
    preprocess = one_view.preprocess()
    (picture,) = make_rows(one_view, [3.0])
    ours = preprocess.pixel_values(picture["pictures"][None])[0, 0]
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": 112, "width": 112}, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_grid_pinpoints=[[112, 112]]
    )
    canvas = picture["pictures"][0, 0].permute(2, 0, 1).numpy()
    theirs = processor(images=canvas, return_tensors="pt", input_data_format="channels_first").pixel_values[0, 0]
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_model_that_reads_one_size_leaves_no_choice_of_canvas() -> None:
    preprocess = recipe("internvl", sample={"canvas_px": 504}).preprocess()
    assert (preprocess.canvas_width_px, preprocess.canvas_height_px) == (112, 112)
    assert preprocess.grid == (3, 8, 8)
    values = {**preprocess.model_dump(), "canvas_width_px": 224}
    with pytest.raises(ValueError, match="224x112 px is not the one of its model of 112 px"):
        TiledPreprocess.model_validate(values)


def test_a_model_in_other_patches_is_refused(tmp_path) -> None:
    vision = {"model_type": "siglip_vision_model", "patch_size": 16, "image_size": 384}
    LlavaOnevisionConfig(vision_config=vision).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"384\] px in patches of \[16\]; omni knows llava_onevision"):
        families.side_px(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forecast_counts_four_bits_of_the_language_model_alone(family: str) -> None:
    vlm = recipe(family, "lora")
    config = vlm.load_base(vlm.preprocess()).config
    model = qwen_vl.empty_model(config)
    whole, quantised = (qwen_vl.weight_bytes(model, torch.bfloat16, kind) for kind in ("none", "nf4"))
    decoder = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and ".language_model.layers." in name
    )
    assert whole - quantised == pytest.approx(decoder * (2 - 0.5 - 1 / 64 - 1 / 4096), abs=1)


def test_every_family_is_wired() -> None:
    for family in families.FAMILIES:
        vlm = Vlm(model=f"tiny:{family}", precision="float32", sample={"cameras": "4-cam", "window": 2})
        base = qwen_vl.base_of(vlm.build(vlm.preprocess()).model)
        assert wiring.tower_of(base) is not None
        assert wiring.placeholder_id(base.config) == vlm.tokenizer(vlm.preprocess()).convert_tokens_to_ids(
            prompts.video_token(vlm.preprocess().vision.family)
        )
