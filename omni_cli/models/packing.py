"""Rows of tokens laid one after the other in one flat row, without padding, each of which attends to itself alone.

Left to itself transformers 5.23 keeps packed rows apart by a mask of length x length, 4 GB for 65,536 tokens, and
computes all of it. Here each row is a call of its own, or all are one call where they are equally long. What tells rows
apart is passed with every call, so that checkpointed layers find it when they are computed again; without it the
library's own attention answers, as it does while text is generated.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from omni_cli.errors import DataError, UsageError
from omni_cli.models.losses import IGNORED
from omni_cli.models.wiring import positions

BY_SAMPLE = "omni_by_sample"
_WHOLE = "full_attention"


def pack(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Lay rows one after the other.

    Args:
        rows: each with input_ids (tokens,), labels (tokens,) and position_ids (4, tokens).

    Returns:
        input_ids and labels (1, s); position_ids (4, 1, s), whose first row begins anew with every sample, and tells
        the library's own attention where; cu_seq_lens (rows + 1,) int32, where each row begins and the last one ends.

    Raises:
        DataError: the first token of a row has a label, which the row before would have to predict.
    """
    if any(bool((row["labels"][:1] != IGNORED).any()) for row in rows):
        raise DataError(
            "the first token of a sample has a label, which no token before it predicts; run omni etl again"
        )
    lengths = [len(row["input_ids"]) for row in rows]
    text = torch.cat([torch.arange(length) for length in lengths])
    return {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "labels": torch.cat([row["labels"] for row in rows])[None],
        "position_ids": torch.cat([text[None], torch.cat([row["position_ids"][1:] for row in rows], dim=1)])[:, None],
        "cu_seq_lens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
    }


def lengths_of(cu_seq_lens: Tensor) -> tuple[int, ...]:
    """Return how long each row is."""
    return tuple(cu_seq_lens.diff().tolist())


def attend_by_sample(model: Any) -> Any:
    """Let the language model of a vision-language model attend within each packed row; returns the model.

    Raises:
        UsageError: it attends in sliding windows.
    """
    config = model.model.language_model.config
    if any(kind != _WHOLE for kind in getattr(config, "layer_types", None) or ()):
        raise UsageError(f"model {config.name_or_path!r} attends in sliding windows, which omni cannot train")
    config._attn_implementation = BY_SAMPLE
    return model


@contextmanager
def by_library(model: Any) -> Iterator[None]:
    """Let the language model attend as the library does."""
    config = model.model.language_model.config
    ours, config._attn_implementation = config._attn_implementation, "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = ours


def told_apart(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a model's forward pass needs to keep the rows of a packed batch apart.

    Args:
        model: a vision-language model of transformers, not wrapped.
        batch: what `pack` returned.
    """
    apart: dict[str, Any] = {
        "position_ids": positions(model, batch["position_ids"]),
        "attention_mask": None,
        "use_cache": False,
    }
    if model.model.language_model.config._attn_implementation != BY_SAMPLE:
        return apart  # in exactly this form the library makes a mask of the positions; any mask of ours would leak
    # The library makes no mask where one with four dimensions is given. An empty one fits no attention but ours.
    return apart | {"attention_mask": torch.empty(1, 1, 0, 0), "sample_lengths": lengths_of(batch["cu_seq_lens"])}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sample_lengths: tuple[int, ...] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each row; where no lengths are given, as the library does.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, width).
        key: (1, a divisor of heads, tokens, width), as is `value`.
        value: see `key`.
        attention_mask: the library's; none is used for packed rows.
        sample_lengths: tokens of each row.
        dropout: of the weights.
        scaling: of the scores.
        others: what only the library's attention reads.

    Returns:
        (1, tokens, heads, width), and no weights.
    """
    if sample_lengths is None:
        by_library = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return by_library[0], None
    is_grouped = query.shape[1] != key.shape[1]
    causal = partial(
        scaled_dot_product_attention, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=is_grouped
    )
    inputs = (query, key, value)
    if len(set(sample_lengths)) == 1:
        rows = [_stacked(tensor, len(sample_lengths)) for tensor in inputs]
        return causal(*rows).transpose(1, 2).flatten(0, 1)[None], None
    pieces = zip(*(torch.split(tensor, list(sample_lengths), dim=2) for tensor in inputs), strict=True)
    return torch.cat([causal(*piece).transpose(1, 2) for piece in pieces], dim=1), None


def _stacked(tensor: Tensor, rows: int) -> Tensor:
    """View (1, heads, tokens, width) as (rows, heads, tokens of each, width)."""
    heads, tokens, width = tensor.shape[1:]
    return tensor.view(heads, rows, tokens // rows, width).transpose(0, 1)


AttentionInterface.register(BY_SAMPLE, attend)
AttentionMaskInterface.register(BY_SAMPLE, sdpa_mask)
