"""How many floating-point operations one step of training a vision-language model needs: its own, not the machine's.

The rule (issue 5; a multiplication and an addition count two, P weights, T tokens):

    forward                                   2 P T
    gradient of what came in                  2 P T    where something before or inside it learns
    gradient of the weights                   2 P T    where they learn

so 4 P T for a frozen language model that carries adapters, whose own weights are added at 6 P T; 6 P T for one that
learns; 2 P T for a tower outside autograd. T is of real tokens, for the head of those that are scored, for the tower
of patches. Attention adds 4 S^2 W a layer for the forward pass over a sequence of S with heads of W numbers together
(two products of S x S x W), half of it where it is causal, and twice that for the backward pass. What is recomputed,
padded, or computed and thrown away is work of the machine, and is not counted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from omni_cli.models import wiring
from omni_cli.models.qwen_vl import base_of


@dataclass(frozen=True)
class StepFlops:
    """The operations of one step, by part."""

    language: float
    head: float
    tower: float
    attention: float  # of the language model
    tower_attention: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.language + self.head + self.tower + self.attention + self.tower_attention


def step_flops(model: nn.Module, lengths: Sequence[int], scored: int, grid: tuple[int, int, int]) -> StepFlops:
    """Return what forward and backward pass over some windows need.

    Args:
        model: a vision-language model, adapted or not, as it learns.
        lengths: tokens of each window.
        scored: tokens whose prediction is scored, of all windows together.
        grid: patches of each window in time, height and width.
    """
    base = base_of(model)
    text, tower = base.config.get_text_config(), wiring.tower_of(base)
    squares = sum(length * length for length in lengths)
    heads = text.num_attention_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    passes = 3 if _blocks_learn(tower) else 1
    return StepFlops(
        language=sum(lengths) * sum(_flops_a_token(layer) for layer in _linears(base.model.language_model)),
        head=scored * sum(_flops_a_token(layer) for layer in _linears(base.lm_head)),
        tower=len(lengths) * _tower_flops(base, grid),
        attention=3 * 2 * squares * heads * text.num_hidden_layers,
        tower_attention=passes * 4.0 * tower.config.hidden_size * len(lengths) * tower_squares(base, grid),
    )


def _named_linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Return the matrices that are in use: PEFT keeps the original of what it trains in full beside its copy."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and "original_module" not in name:
            yield name, layer


def _linears(module: nn.Module) -> Iterator[nn.Linear]:
    return (layer for _, layer in _named_linears(module))


def _flops_a_token(layer: nn.Linear) -> float:
    return (6.0 if layer.weight.requires_grad else 4.0) * layer.in_features * layer.out_features


def _blocks_learn(tower: nn.Module) -> bool:
    """Say whether anything learns below the mergers, so that the tower is inside autograd."""
    return any(weight.requires_grad and "merger" not in name for name, weight in tower.named_parameters())


def _tower_flops(base: Any, grid: tuple[int, int, int]) -> float:
    """Return the operations from the pixels of one window to what the language model reads.

    Nothing comes before the first layer; what has nothing that learns before or inside it needs no gradient.
    """
    tower = wiring.tower_of(base)
    is_inside = _blocks_learn(tower)
    flops = _embed_flops(tower) * math.prod(grid)
    for layer, rows in _rows_seen(base, grid):
        needs_gradient = is_inside or layer.weight.requires_grad
        flops += rows * (_flops_a_token(layer) if needs_gradient else 2.0 * layer.in_features * layer.out_features)
    return flops


def _embed_flops(tower: nn.Module) -> float:
    """Return the operations of a patch in the one convolution of a tower, or what stands in its place."""
    (embed,) = (layer for layer in tower.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d))
    return (4.0 if embed.weight.requires_grad else 2.0) * embed.weight.numel()


def _rows_seen(base: Any, grid: tuple[int, int, int]) -> Iterator[tuple[nn.Linear, float]]:
    """Return the matrices of the tower and what maps its output, each with the rows of one window that it multiplies.

    Qwen's mergers work on groups of patches inside the tower; InternVL's projector works on them beside it, that of
    LLaVA-OneVision on all patches, which are pooled after it.
    """
    tower, patches = wiring.tower_of(base), math.prod(grid)
    if not hasattr(base.model, "multi_modal_projector"):
        group = int(tower.config.spatial_merge_size) ** 2
        for name, layer in _named_linears(tower):
            yield layer, patches / (group if "merger" in name else 1)
        return
    read = patches + wiring.wiring_of(base).class_tokens * grid[0]
    yield from ((layer, read) for layer in _linears(tower))
    projected = list(_linears(base.model.multi_modal_projector))
    mapped = patches * tower.config.hidden_size / projected[0].in_features
    yield from ((layer, mapped) for layer in projected)


def tower_squares(base: Any, grid: tuple[int, int, int]) -> float:
    """Return the squares of the lengths that the tower attends over in one window, summed over its layers.

    It attends within each picture of the grid, Qwen2.5-VL's in most layers within squares of `window_size`.
    """
    config = wiring.tower_of(base).config
    time, height, width = grid
    whole = time * (height * width + wiring.wiring_of(base).class_tokens) ** 2
    full = getattr(config, "fullatt_block_indexes", None)
    if full is None:
        return float(_depth(config) * whole)
    merge = config.spatial_merge_size
    side = config.window_size // merge // config.patch_size
    rows, columns = (_pieces(length // merge, side) for length in (height, width))
    cut = time * sum((row * column * merge**2) ** 2 for row in rows for column in columns)
    return float(len(full) * whole + (config.depth - len(full)) * cut)


def _depth(config: Any) -> int:
    return int(config.depth if hasattr(config, "depth") else config.num_hidden_layers)


def _pieces(length: int, side: int) -> list[int]:
    return [min(side, length - start) for start in range(0, length, side)]
