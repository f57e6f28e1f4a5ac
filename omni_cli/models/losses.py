"""Losses as sums over what they count."""

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100


def labelled_positions(labels: Tensor) -> Tensor:
    """Return the positions (k,) whose logits predict a labelled token in any row of labels (n, l)."""
    return torch.nonzero((labels[:, 1:] != IGNORED).any(dim=0)).squeeze(1)


def token_loss(logits: Tensor, labels: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of next tokens, and how many tokens were scored.

    Args:
        logits: (n, k, vocabulary) at `positions`.
        labels: (n, l); -100 is not scored.
        positions: (k,) from `labelled_positions`.
    """
    targets = labels[:, positions + 1]
    total = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return total, (targets != IGNORED).sum()
