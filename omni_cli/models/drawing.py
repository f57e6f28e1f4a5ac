"""Answers drawn by chance, each by a seed of its own, whatever else is in the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class SeededNoise(LogitsProcessor):
    """Makes of a greedy choice a draw from softmax(logits / temperature), by a seed for each row.

    The largest of logits / T + G, with G independent Gumbel noise, is distributed so. `generate` draws all rows of a
    batch from one generator, where what a window answers depends on its neighbours; here each row has one.
    Source: the Gumbel-max trick, Maddison et al., A* Sampling, 2014, section 2.

    Args:
        seeds: one a row.
        temperature: above 0.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self._seeds, self._temperature = seeds, temperature
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (rows, vocabulary) whose largest is the token drawn."""
        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds]
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self._temperature - noise.log()
