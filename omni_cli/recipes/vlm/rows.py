"""Rows of tokens: a prompt with its answer, their labels and rope ids, and the tokenizer that makes them."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pyarrow as pa
from torch import Tensor

from omni_cli.models import families, losses, qwen_vl, rope, tiny
from omni_cli.recipe import Row
from omni_cli.samples import prompts
from omni_cli.samples.tiling import TiledPreprocess

SIDECAR = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("labels", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("position_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),  # 4 x length
    ]
)


def make_tokenizer(model: str, sentences: tuple[str, ...]) -> Any:
    """Return the base model's tokenizer; a tiny model's is made from the recipe's sentences."""
    return tiny.tiny_tokenizer(sentences) if families.is_tiny(model) else qwen_vl.load_tokenizer(model)


# To load one takes longer than to encode a recording. It is never given away: a trainer changes its own.
kept_tokenizer = lru_cache(maxsize=2)(make_tokenizer)


def encode_row(
    row: Mapping[str, Any], preprocess: TiledPreprocess, tokenizer: Any, time_step: float
) -> dict[str, list[int]]:
    """Return input_ids, labels and position_ids of a window; rope ids are `time_step` apart in time."""
    prompt = tokenizer.encode(prompts.render_prompt(preprocess, row["start_speed_mps"]), add_special_tokens=False)
    answer = tokenizer.encode(prompts.render_answer(preprocess.labels, row) + prompts.ANSWER_END)
    ids = prompt + answer
    positions = rope.rope_ids(
        ids,
        video_token=tokenizer.convert_tokens_to_ids(prompts.VIDEO_TOKEN),
        grid=preprocess.grid,
        merge=preprocess.vision.merge,
        time_step=time_step,
    )
    labels = [losses.IGNORED] * len(prompt) + answer
    return {"input_ids": ids, "labels": labels, "position_ids": positions.flatten().tolist()}


def prompt_only(row: Row) -> tuple[Tensor, Tensor]:
    """Return the ids and the rope ids of a row without its answer."""
    length = int((row["labels"] == losses.IGNORED).sum())
    return row["input_ids"][:length], row["position_ids"][:, :length]
