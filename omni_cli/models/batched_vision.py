"""A Qwen-VL vision tower in a few large calls instead of one for each attention window.

transformers 5.23 calls attention once for each window of each picture unless FlashAttention is installed, and embeds
patches with a convolution whose kernel is the whole input. Both are the same sums as a batched call and a matrix
product. Weights keep their names, so checkpoints are the library's.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface

# The library gives sequence lengths only to implementations with "flash" in their name.
BATCHED = "omni_flash_by_length"
PLAIN = "sdpa"


class LinearPatchEmbed(nn.Module):
    """Flattened patches (patches, values) to embeddings (patches, width), with the weights of a convolution."""

    def __init__(self, proj: nn.Conv3d) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Embed patches; every one is as large as the kernel."""
        weight = self.proj.weight
        return linear(hidden_states.to(weight.dtype), weight.flatten(1), self.proj.bias)


def batch_vision(model: Any) -> Any:
    """Let a Qwen-VL model's tower work in batches, as others do by themselves; returns the model."""
    if not hasattr(model.model, "visual"):
        return model
    visual = model.model.visual
    visual.patch_embed = LinearPatchEmbed(visual.patch_embed.proj)
    set_attention(visual, BATCHED)
    return model


def set_attention(visual: Any, name: str) -> None:
    """Choose how a vision tower attends: `BATCHED` or `PLAIN`."""
    # The public setter asks the hub for kernels where a name has "flash" in it.
    visual.config._attn_implementation = name


def attend_by_length(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within sequences that lie one after the other, all of one length in one call.

    Args:
        query: (1, heads, tokens, width), as are `key` and `value`.
        key: see `query`.
        value: see `query`.
        attention_mask: none; sequences are kept apart by their lengths.
        scaling: of the scores.
        cu_seq_lens_q: (sequences + 1,) where each sequence begins, and where the last one ends.
        dropout: of the weights.

    Returns:
        (1, tokens, heads, width), and no weights.
    """
    lengths = tuple(cu_seq_lens_q.diff().tolist())
    distinct = sorted(set(lengths))
    inputs = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (tokens, heads, width)
    if len(distinct) == 1:
        return _attend(inputs, distinct[0], scaling, dropout)[None], None
    order, back = _by_length(lengths, query.device)
    sizes = [length * lengths.count(length) for length in distinct]
    alike = zip(*(torch.split(tensor[order], sizes) for tensor in inputs), strict=True)
    outputs = [_attend(list(some), length, scaling, dropout) for length, some in zip(distinct, alike, strict=True)]
    return torch.cat(outputs)[back][None], None


@lru_cache(maxsize=4)
def _by_length(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what puts the tokens of equally long sequences beside each other, shortest first, and what undoes it.

    Kept, since each layer of each step asks for the same: a GPU waits meanwhile.
    """
    with torch.inference_mode(False):  # whoever asks first: a later training keeps them for its way back
        each = torch.tensor(lengths)
        order = each.repeat_interleave(each).argsort(stable=True).to(device)
        return order, order.argsort()


def _attend(inputs: list[Tensor], length: int, scaling: float, dropout: float) -> Tensor:
    query, key, value = (tensor.reshape(-1, length, *tensor.shape[1:]).transpose(1, 2) for tensor in inputs)
    output = scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
    return output.transpose(1, 2).flatten(0, 1)


AttentionInterface.register(BATCHED, attend_by_length)
