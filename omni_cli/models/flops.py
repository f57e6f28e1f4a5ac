"""How many floating-point operations one training step of a Qwen-VL model needs: the model's, not the machine's.

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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

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
        model: a Qwen-VL model, adapted or not, as it learns.
        lengths: tokens of each window.
        scored: tokens whose prediction is scored, of all windows together.
        grid: patches of each window in time, height and width.
    """
    base = base_of(model)
    text, patches = base.config.get_text_config(), grid[0] * grid[1] * grid[2] * len(lengths)
    squares = sum(length * length for length in lengths)
    heads = text.num_attention_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    passes = 3 if _blocks_learn(base.model.visual) else 1
    return StepFlops(
        language=sum(lengths) * sum(_flops_a_token(layer) for layer in _linears(base.model.language_model)),
        head=scored * sum(_flops_a_token(layer) for layer in _linears(base.lm_head)),
        tower=patches * _tower_flops_a_patch(base.model.visual),
        attention=3 * 2 * squares * heads * text.num_hidden_layers,
        tower_attention=passes * 4.0 * base.model.visual.config.hidden_size * len(lengths) * tower_squares(base, grid),
    )


def _linears(module: nn.Module) -> Iterator[nn.Linear]:
    """Return the matrices that are in use: PEFT keeps the original of what it trains in full beside its copy."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and "original_module" not in name:
            yield layer


def _flops_a_token(layer: nn.Linear) -> float:
    return (6.0 if layer.weight.requires_grad else 4.0) * layer.in_features * layer.out_features


def _blocks_learn(visual: nn.Module) -> bool:
    """Say whether anything learns below the mergers, so that the tower is inside autograd."""
    return any(weight.requires_grad and "merger" not in name for name, weight in visual.named_parameters())


def _tower_flops_a_patch(visual: Any) -> float:
    """Return the operations of a patch; mergers work on groups of patches, and nothing comes before the first layer."""
    group, is_inside, flops = int(visual.config.spatial_merge_size) ** 2, _blocks_learn(visual), 0.0
    for name, layer in visual.named_modules():
        if isinstance(layer, nn.Linear) and "original_module" not in name:
            needs_gradient = is_inside or layer.weight.requires_grad
            each = _flops_a_token(layer) if needs_gradient else 2.0 * layer.in_features * layer.out_features
            flops += each / (group if "merger" in name else 1)
    embed = visual.patch_embed.proj.weight
    return flops + (4.0 if embed.requires_grad else 2.0) * int(embed.numel())


def tower_squares(base: Any, grid: tuple[int, int, int]) -> float:
    """Return the squares of the lengths that the tower attends over in one window, summed over its layers.

    Qwen3-VL's attends within each picture of the grid, Qwen2.5-VL's in most layers within squares of `window_size`.
    """
    config = base.model.visual.config
    time, height, width = grid
    whole = time * (height * width) ** 2
    full = getattr(config, "fullatt_block_indexes", None)
    if full is None:
        return float(config.depth * whole)
    merge = config.spatial_merge_size
    side = config.window_size // merge // config.patch_size
    rows, columns = (_pieces(length // merge, side) for length in (height, width))
    cut = time * sum((row * column * merge**2) ** 2 for row in rows for column in columns)
    return float(len(full) * whole + (config.depth - len(full)) * cut)


def _pieces(length: int, side: int) -> list[int]:
    return [min(side, length - start) for start in range(0, length, side)]
