"""The best of several answers that were drawn by chance: minADE_k and its like."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from omni_cli.scene.clock import Float64Array


def best_of(errors: Sequence[Float64Array], readable: npt.NDArray[np.bool_], instead: Float64Array) -> Float64Array:
    """Return the smallest of k errors of each window (n,), among the answers that could be read.

    A window of which no answer could be read has the error of what knows nothing: luck in the others must not hide it.
    Of several errors each has its own minimum, as in nuScenes: minADE_k and minFDE_k may be of two different answers.
    Source: nuscenes-devkit, `eval/prediction/metrics.py`, min_ade_k and min_fde_k.

    Args:
        errors: k of (n,).
        readable: (k, n) which answers could be read.
        instead: (n,) the error of an answer that could not.
    """
    least = np.min(np.where(readable, np.stack(errors), np.inf), axis=0)
    return np.asarray(np.where(readable.any(axis=0), least, instead))
