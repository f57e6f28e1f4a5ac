"""The same training as stock TRL does it: the library's own model, padded batches, pixels in floating point.

Nothing here makes it slower than it is, and nothing of ours makes it faster: transformers' own vision tower with its
convolution and a call of attention a window, inside autograd where an adapter makes its input need gradients. Rope ids
are ours, so that both learn the same thing: the library's restart below a video's own (facts: `models/rope.py`).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from omni_cli.models import families, losses, qwen_vl
from omni_cli.models.drawn import draw
from omni_cli.models.flops import step_flops
from omni_cli.recipe import Batch, BuiltModel, Row, StockTraining
from omni_cli.recipes.vlm.settings import VlmTune
from omni_cli.recipes.vlm.tuning import tuned
from omni_cli.samples.tiling import TiledPreprocess

_VIDEO_TYPE = 2  # of a token, to transformers


def stock_training(
    built: BuiltModel, preprocess: TiledPreprocess, kind: tuple[str, str, str], tune: VlmTune, seed: int
) -> StockTraining:
    """Return TRL's training of what was built, from the same weights.

    Args:
        built: what learns our way.
        preprocess: of both.
        kind: the base model's name, precision and quantization.
        tune: what of it learns.
        seed: of a base that is drawn.
    """
    model = tuned(_base(*kind, built.tokenizer, seed), tune, qwen_vl.DTYPES[kind[1]])
    _copy_weights(built.model, model)
    if preprocess.vision.reads == "frames":
        return StockTraining(model, partial(stock_frames, preprocess=preprocess))
    video = qwen_vl.base_of(model).config.video_token_id
    return StockTraining(model, partial(stock_collate, preprocess=preprocess, video_token=video))


def rows_flops(model: nn.Module, rows: Sequence[Row], preprocess: TiledPreprocess) -> float:
    """Return the operations of forward and backward pass over rows."""
    scored = sum(int((row["labels"] != losses.IGNORED).sum()) for row in rows)
    return step_flops(model, [len(row["input_ids"]) for row in rows], scored, preprocess.grid).total


def _base(model: str, precision: str, quantization: str, tokenizer: Any, seed: int) -> PreTrainedModel:
    if families.is_drawn(model):  # alike from the start: of 4-bit weights, the scales are not copied over
        return draw(model, tokenizer, seed, precision, quantization)
    return qwen_vl.load_model(model, qwen_vl.DTYPES[precision], quantization)


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give a model of the same names the weights of another.

    Raises:
        KeyError: the names differ.
    """
    weights = dict(target.named_parameters())
    with torch.no_grad():
        for name, weight in source.named_parameters():
            weights.pop(name).copy_(weight)
    if weights:
        raise KeyError(next(iter(weights)))


def stock_collate(rows: Sequence[Row], preprocess: TiledPreprocess, video_token: int) -> Batch:
    """Stack rows into what the library's processor and a padding collator give."""
    batch = _padded(rows)
    positions = qwen_vl.pad_rows([row["position_ids"] for row in rows], 0)
    return {
        **batch,
        "position_ids": positions.transpose(0, 1).contiguous(),
        "mm_token_type_ids": (batch["input_ids"] == video_token) * _VIDEO_TYPE,
        "pixel_values_videos": _pixels(rows, preprocess),
        "video_grid_thw": torch.tensor([preprocess.grid] * len(rows)),
    }


def stock_frames(rows: Sequence[Row], preprocess: TiledPreprocess) -> Batch:
    """Do the same for a backbone that reads frames and counts tokens; InternVL's processor makes pictures of them."""
    frames = _pixels(rows, preprocess)
    is_pictures = preprocess.vision.family == "internvl"
    seen = {"pixel_values": frames.flatten(0, 1)} if is_pictures else {"pixel_values_videos": frames}
    return {**_padded(rows), **seen}


def _padded(rows: Sequence[Row]) -> Batch:
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": qwen_vl.pad_rows(ids, 0),
        "labels": qwen_vl.pad_rows([row["labels"] for row in rows], losses.IGNORED),
        "attention_mask": qwen_vl.pad_rows([torch.ones_like(row) for row in ids], 0),
    }


def _pixels(rows: Sequence[Row], preprocess: TiledPreprocess) -> torch.Tensor:
    return preprocess.pixel_values(torch.stack([row["pictures"] for row in rows]))
