"""Losses as sums over what they count."""

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100


def labelled_positions(labels: Tensor) -> Tensor:
    """Return the positions (k,) of a flat row of labels (1, s) whose logits predict a labelled token."""
    return torch.nonzero(labels[0, 1:] != IGNORED).squeeze(1)


def token_loss(logits: Tensor, labels: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of next tokens, and how many tokens were scored.

    Args:
        logits: (k, vocabulary) at `positions`.
        labels: (1, s); -100 is not scored.
        positions: (k,) from `labelled_positions`.
    """
    targets = labels[0, positions + 1]
    total = functional.cross_entropy(logits.float(), targets, reduction="sum")
    return total, (targets != IGNORED).sum()
