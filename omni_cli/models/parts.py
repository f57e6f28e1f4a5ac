"""The three parts of a vision-language model: what each is called, and which of them learn."""

import re
from collections import Counter
from collections.abc import Collection
from typing import Literal

from torch import nn

Part = Literal["vision", "merger", "language"]
TITLES: dict[Part, str] = {"vision": "the vision tower", "merger": "the merger", "language": "the language model"}
_MERGER = re.compile(r"(^|\.)(visual\.(merger|deepstack_merger_list)|multi_modal_projector|image_newline)(\.|$)")
_VISION = re.compile(r"(^|\.)(visual|vision_tower)\.")


def part_of(name: str) -> Part:
    """Return the part that a weight belongs to, by its name in a model, adapted or not.

    The merger is what maps the tower's output to the language model's width, on every level; embeddings and the head
    are the language model's.
    """
    if _MERGER.search(name):
        return "merger"
    return "vision" if _VISION.search(name) else "language"


def learning_counts(model: nn.Module) -> Counter[Part]:
    """Return how many weights of each part learn; a part without any is not there."""
    counts: Counter[Part] = Counter()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            counts[part_of(name)] += weight.numel()
    return counts


def learning_names(model: nn.Module, part: Part) -> frozenset[str]:
    """Return the names of the weights of a part that learn."""
    return frozenset(
        name for name, weight in model.named_parameters() if weight.requires_grad and part_of(name) == part
    )


def freeze(model: nn.Module, frozen: Collection[Part]) -> nn.Module:
    """Let the weights of some parts not learn; returns the model."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(weight.requires_grad and part_of(name) not in frozen)
    return model
