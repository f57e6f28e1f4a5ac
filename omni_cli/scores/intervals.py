"""How sure a mean is, when windows of one recording are not independent."""

from collections.abc import Sequence

import numpy as np

from omni_cli.scene.clock import Float64Array

RESAMPLES = 2000


def interval_by_recording(
    values: Float64Array, recordings: Sequence[str], *, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Return a percentile bootstrap interval of the mean over windows, resampling whole recordings.

    Args:
        values: (n,) one number a window.
        recordings: (n,) which recording each window is from.
        level: coverage.
        seed: of the resampling.

    Returns:
        (low, high), or None with fewer than two recordings: one recording says nothing about another.

    Source: cluster (block) bootstrap; Davison and Hinkley, Bootstrap Methods and their Application, section 3.8.
    """
    names, owner = np.unique(np.asarray(recordings), return_inverse=True)
    if len(names) < 2:
        return None
    sums, counts = np.bincount(owner, weights=values), np.bincount(owner)
    drawn = np.random.default_rng(seed).integers(0, len(names), size=(RESAMPLES, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
