"""The vision tower as ONNX holds it, what other tools read beside the weights, and the noise that models are asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_cli import files
from omni_cli.models import families, hub_files, qwen_vl, vision_tower
from omni_cli.recipe import BuiltModel, Program, Row
from omni_cli.recipes.vlm.about import VLLM_TEMPLATE
from omni_cli.samples import prompts
from omni_cli.samples.answer_formats import FORMATS
from omni_cli.samples.tiling import TiledPreprocess

_PROBE_SEED = 20_260
_PROBE_SPEEDS_MPS = (3.0, 21.5)


def tower_programs(model: Any, preprocess: TiledPreprocess, batches: Sequence[int]) -> list[Program]:
    """Return the vision tower, once for each number of windows; one that reads frames, of several, for any number."""
    if preprocess.vision.reads == "patches":
        return [tower_program(model, preprocess, batch) for batch in batches]
    batch = batches[0] if len(batches) == 1 else None
    tower, pixels = vision_tower.FrameTower(model), _looked_at(preprocess, batch or 2)
    free_axes = tower.free_axes() if batch is None else {}
    inputs = {vision_tower.INPUT_NAME: pixels}
    return [Program("vision", tower, inputs, tower.output_names(), batch, free_axes=free_axes)]


def tower_program(model: Any, preprocess: TiledPreprocess, batch: int) -> Program:
    """Return the vision tower of a model for a fixed number of windows: the grid is fixed inside it."""
    pixels = _looked_at(preprocess, batch)
    tower = vision_tower.VisionTower(model, preprocess.grid, batch, pixels)
    inputs = {vision_tower.INPUT_NAME: pixels}
    return Program(f"vision-b{batch}", tower, inputs, tower.output_names(), batch)


def _looked_at(preprocess: TiledPreprocess, windows: int) -> Tensor:
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    return preprocess.pixel_values(_noise((windows, *preprocess.window_shape), generator))


def probe_rows(recipe: Any, built: BuiltModel, preprocess: TiledPreprocess) -> list[Row]:
    """Return two windows of noise, as the recipe asks about windows that no shard holds."""
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    windows = [_noise(preprocess.window_shape, generator) for _ in _PROBE_SPEEDS_MPS]
    pairs = zip(windows, _PROBE_SPEEDS_MPS, strict=True)
    return [recipe.prompt_row(pictures, preprocess, built.tokenizer, speed_mps) for pictures, speed_mps in pairs]


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return uint8 pictures of noise."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def write_served_files(folder: Path, preprocess: TiledPreprocess) -> None:
    """Write what `AutoProcessor`, `generate` and vLLM read beside the weights of a model or an adapter.

    Of Qwen3-VL, vLLM finds a video by the whole `<|vision_start|><|video_pad|><|vision_end|>` and puts marked frames
    in its place (vllm/model_executor/models/qwen3_vl.py, `_get_prompt_updates`; issue 46817); transformers replaces
    the `<|video_pad|>` alone and keeps the marks around it. Training knows no marks around: so each has a template.
    """
    canvas_px = (preprocess.canvas_width_px, preprocess.canvas_height_px)
    family = families.FAMILIES[preprocess.vision.family]
    hub_files.write_processor_config(folder, family, canvas_px=canvas_px, num_frames=preprocess.num_frames)
    template, named = prompts.chat_template(preprocess), hub_files.named_tokens(family.name)
    tokenizer = qwen_vl.load_tokenizer(str(folder), named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(prompts.ANSWER_END)
    most = FORMATS[preprocess.labels].max_tokens
    hub_files.write_generation_config(folder, end=end, pad=tokenizer.pad_token_id, most=most)
    if preprocess.vision.family == "qwen3_vl":
        video = prompts.video_token("qwen3_vl")
        marked = template.replace(video, f"<|vision_start|>{video}<|vision_end|>")
        files.write_text(folder / VLLM_TEMPLATE, marked)
