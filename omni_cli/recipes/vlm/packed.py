"""What the `vlm` recipe learns from at a time: windows in one flat row, and the proof that none sees another."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from omni_cli.errors import DataError, OmniError
from omni_cli.models import packing, qwen_vl, wiring
from omni_cli.models.modes import evaluating
from omni_cli.recipe import Batch, Row
from omni_cli.recipes.vlm.rows import prompt_only
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.tiling import TiledPreprocess

_GREY = 128
_MOST_TESTED = 3
# As a share of the largest logit, and how often the first choice has to be the same: sums in another order round
# differently, in 16 bit by so much that two choices of nearly the same logit may change places.
_ALLOWED = {torch.float32: (1e-4, 0.9), torch.float16: (2e-2, 0.9), torch.bfloat16: (5e-2, 0.8)}


def collate(rows: Sequence[Row], preprocess: TiledPreprocess, video_token: int) -> Batch:
    """Lay rows one after the other; pictures stay uint8 (n, frames, cameras, height, width, 3).

    Raises:
        DataError: a row has not one placeholder for each token that its pictures become.
    """
    for row in rows:
        _check_placeholders(row, preprocess.visual_tokens, video_token)
    return {**packing.pack(rows), "pictures": torch.stack([row["pictures"] for row in rows])}


def _check_placeholders(row: Row, expected: int, video_token: int) -> None:
    if (found := int((row["input_ids"] == video_token).sum())) != expected:
        window = f"window {row['window']} of {row['recording']}" if "recording" in row else "a window of no shard"
        raise DataError(
            f"{window} has {found} video tokens, its pictures become {expected}; nothing is ever cut or filled up: "
            "make its shards again with omni etl"
        )


def left_padded(rows: Sequence[Row], pad: int, device: torch.device) -> Batch:
    """Return the prompts of rows as generation reads them: padded on the left, with a mask."""
    prompts = [prompt_only(row) for row in rows]
    ids = [ids for ids, _ in prompts]
    batch = {
        "input_ids": qwen_vl.pad_rows(ids, pad, left=True),
        "attention_mask": qwen_vl.pad_rows([torch.ones_like(row) for row in ids], 0, left=True),
        "position_ids": qwen_vl.pad_rows([places for _, places in prompts], 0, left=True).transpose(0, 1),
        "pictures": torch.stack([row["pictures"] for row in rows]),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def features(model: nn.Module, pictures: Tensor, preprocess: TiledPreprocess, *, is_blind: bool) -> Any:
    """Return what the vision tower makes of windows (n, frames, cameras, height, width, 3) uint8.

    Args:
        model: a vision-language model, wrapped or not.
        pictures: of the windows.
        preprocess: how they become numbers.
        is_blind: all of them are grey.
    """
    windows = len(pictures)
    if is_blind:
        pictures = torch.full_like(pictures[:1], _GREY)
    dtype = wiring.tower_of(qwen_vl.base_of(model)).dtype
    pixels = preprocess.pixel_values(pictures).to(dtype)
    grids = torch.tensor([preprocess.grid] * len(pictures), device=pictures.device)
    seen = qwen_vl.video_features(model, pixels, grids)
    return wiring.repeated(seen, windows) if is_blind else seen


def telling_rows(dataset: WindowDataset, batch_size: int) -> list[Row]:
    """Return the shortest, the longest and a middle window, no more than learn at a time; two at least."""
    lengths = dataset.token_lengths()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    chosen = [order[0], order[-1], order[len(order) // 2]]
    return [dataset[index] for index in chosen[: max(2, min(batch_size, _MOST_TESTED))]]


def self_test(recipe: Any, model: nn.Module, dataset: WindowDataset) -> str:
    """Return one line on packed windows against windows alone; empty where none are packed.

    Args:
        recipe: how windows are collated and answered.
        model: what learns.
        dataset: its windows.

    Raises:
        OmniError: they see each other.
    """
    if recipe.train.batch_size == 1:
        return ""
    rows = telling_rows(dataset, recipe.train.batch_size)
    return compare(model, rows, partial(answers, recipe, model, dataset.preprocess))


def answers(recipe: Any, model: nn.Module, preprocess: Preprocess, rows: Sequence[Row]) -> Tensor:
    """Return the logits of rows in one batch, where the model is."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in recipe.collate(rows, preprocess).items()}
    logits: Tensor = recipe.outputs(model, batch, preprocess)
    return logits


@torch.no_grad()
def compare(model: nn.Module, rows: Sequence[Row], answer: Callable[[Sequence[Row]], Tensor]) -> str:
    """Compare what a model says of packed rows with what the library's own attention says of each alone.

    Args:
        model: what learns; its modes and the random numbers stay as they are.
        rows: two at least.
        answer: rows -> logits (labelled tokens of all rows, vocabulary).

    Returns:
        One line on how far they part.

    Raises:
        OmniError: too far.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        together = answer(rows)
        stack.enter_context(packing.by_library(qwen_vl.base_of(model)))
        alone = torch.cat([answer([row]) for row in rows])
    return _verdict(together, alone)


def _verdict(together: Tensor, alone: Tensor) -> str:
    share, agreeing = _ALLOWED[together.dtype]
    largest = float(alone.abs().max())
    difference = float((together.float() - alone.float()).abs().max())
    agree = float((together.argmax(-1) == alone.argmax(-1)).double().mean())
    found = f"largest logit difference {difference:.1e} of {largest:.3g}, the same first choice at {agree:.0%}"
    if not difference <= share * largest or agree < agreeing:
        raise OmniError(
            f"packed rows do not answer as rows alone: {found}; expected at most {share * largest:.1e} and "
            f"{agreeing:.0%}: nothing is learned from windows that see each other; --set train.batch_size=1 packs none"
        )
    return f"packed rows answer as rows alone: {found}"
