"""Rows of tokens: a prompt with its answer, their labels and rope ids, and the tokenizer that makes them."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from omni_cli import files
from omni_cli.models import families, losses, qwen_vl, rope, tiny, wiring
from omni_cli.recipe import Row
from omni_cli.samples import prompts
from omni_cli.samples.answer_formats import FORMATS
from omni_cli.samples.tiling import Family, Labels, TiledPreprocess

_SIDECAR_FORMAT = 1
SIDECAR = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("labels", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("position_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),  # 4 x length
    ]
)


def make_tokenizer(model: str, sentences: tuple[str, ...]) -> Any:
    """Return the base model's tokenizer; that of a model that is drawn here is made from the recipe's sentences."""
    if families.is_drawn(model):
        return tiny.tiny_tokenizer(sentences, families.family_of(model).name)
    return qwen_vl.load_tokenizer(model)


# To load one takes longer than to encode a recording. It is never given away: a trainer changes its own.
kept_tokenizer = lru_cache(maxsize=2)(make_tokenizer)


def encode_row(
    row: Mapping[str, Any], preprocess: TiledPreprocess, tokenizer: Any, time_step: float
) -> dict[str, list[int]]:
    """Return input_ids, labels and position_ids of a window; rope ids are `time_step` apart in time."""
    prompt = tokenizer.encode(prompts.render_prompt(preprocess, row["start_speed_mps"]), add_special_tokens=False)
    answer = tokenizer.encode(prompts.render_answer(preprocess.labels, row) + prompts.ANSWER_END)
    ids = prompt + answer
    positions = _positions(ids, preprocess, tokenizer, time_step)
    labels = [losses.IGNORED] * len(prompt) + answer
    return {"input_ids": ids, "labels": labels, "position_ids": positions.flatten().tolist()}


def _positions(ids: list[int], preprocess: TiledPreprocess, tokenizer: Any, time_step: float) -> Tensor:
    """Return (4, tokens); of a family with one-dimensional rope ids they are four times the text positions."""
    vision = preprocess.vision
    video_token = tokenizer.convert_tokens_to_ids(prompts.video_token(vision.family))
    if vision.reads == "frames":
        return rope.text_ids(ids, video_token=video_token, video_tokens=preprocess.visual_tokens)
    grid = preprocess.grid
    return rope.rope_ids(ids, video_token=video_token, grid=grid, merge=vision.merge, time_step=time_step)


def time_step(model: str, preprocess: TiledPreprocess) -> float:
    """Return how far the time ids of two grids are apart."""
    if preprocess.vision.family != "qwen2_5_vl":
        return 1.0
    if families.is_tiny(model):
        return tiny.TOKENS_PER_SECOND * preprocess.seconds_per_grid
    return float(families.model_config(model).vision_config.tokens_per_second) * preprocess.seconds_per_grid


def video_token(model: str, preprocess: TiledPreprocess) -> int:
    """Return the id that stands for a piece of a video; a loader's worker has it without loading a tokenizer."""
    return _video_token(model, tuple(prompts.sample_sentences(preprocess)), preprocess.vision.family)


@lru_cache(maxsize=8)
def _video_token(model: str, sentences: tuple[str, ...], family: Family) -> int:
    if families.is_drawn(model):
        return int(kept_tokenizer(model, sentences).convert_tokens_to_ids(prompts.video_token(family)))
    return wiring.placeholder_id(families.model_config(model))


def sidecar_key(model: str, preprocess: TiledPreprocess) -> str:
    """Return the hash of everything that token ids depend on; what is said is in it as the ids of an example."""
    tokenizer, step = _encoder(model, preprocess), time_step(model, preprocess)
    facts = {
        "format": _SIDECAR_FORMAT,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "preprocess": preprocess.model_dump(mode="json"),
        "time_step": step,
        "template": encode_row(_example(preprocess.labels), preprocess, tokenizer, step),
    }
    return files.hash_json(facts)[:16]


def _example(labels: Labels) -> dict[str, Any]:
    """Return a window in which no two numbers are alike: its ids tell which of them are said, in what order and how."""
    targets: dict[str, Any] = {"start_speed_mps": 7.89}
    for place, (name, value) in enumerate(FORMATS[labels].zero.items(), start=1):
        falling = 12.345 * place - 0.37 * np.arange(np.size(value)).reshape(np.shape(value))
        targets[name] = value if isinstance(value, str) else falling
    return targets


def encode_windows(model: str, windows: pa.Table, preprocess: TiledPreprocess) -> pa.Table:
    """Return input_ids, labels and position_ids of each window."""
    tokenizer, step = _encoder(model, preprocess), time_step(model, preprocess)
    rows = [encode_row(row, preprocess, tokenizer, step) for row in windows.to_pylist()]
    return pa.Table.from_pylist(rows, schema=SIDECAR)


def prompt_row(
    model: str, pictures: Tensor, preprocess: TiledPreprocess, tokenizer: Any, start_speed_mps: float
) -> Row:
    """Return a row whose answer is a placeholder, for a window that no shard holds."""
    targets = {**FORMATS[preprocess.labels].zero, "start_speed_mps": start_speed_mps}
    encoded = encode_row(targets, preprocess, tokenizer, time_step(model, preprocess))
    tensors = {name: torch.tensor(values) for name, values in encoded.items()}
    return {**tensors, "position_ids": tensors["position_ids"].view(4, -1), "pictures": pictures}


def _encoder(model: str, preprocess: TiledPreprocess) -> Any:
    return kept_tokenizer(model, tuple(prompts.sample_sentences(preprocess)))


def prompt_only(row: Row) -> tuple[Tensor, Tensor]:
    """Return the ids and the rope ids of a row without its answer."""
    length = int((row["labels"] == losses.IGNORED).sum())
    return row["input_ids"][:length], row["position_ids"][:, :length]
