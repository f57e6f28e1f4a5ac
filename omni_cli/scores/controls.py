"""Controls: what a model is shown instead of the truth, to prove that its pictures matter."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def swap_between_groups(groups: Sequence[str], seed: int = 0) -> npt.NDArray[np.int64]:
    """Return for each window the index of a window of another group, whose pictures it will be shown.

    A group is a recording, or a stretch of time where there is but one. Every window draws from the others uniformly,
    so that the swapped pictures have the pictures' own distribution.

    Raises:
        ValueError: there is only one group.
    """
    names = np.asarray(groups)
    if len(np.unique(names)) < 2:
        raise ValueError("pictures can be swapped between at least two groups")
    generator = np.random.default_rng(seed)
    return np.array([generator.choice(np.nonzero(names != name)[0]) for name in names], dtype=np.int64)


def derangement(count: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return one of the orders of `count` things in which none keeps its place, each as likely as the others.

    Raises:
        ValueError: there is only one thing.
    """
    if count < 2:
        raise ValueError("one thing alone keeps its place")
    order = np.arange(count)
    while (order == np.arange(count)).any():  # about one of e orders is one
        order = generator.permutation(count)
    return np.asarray(order, dtype=np.int64)
