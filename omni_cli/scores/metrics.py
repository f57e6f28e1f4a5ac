"""Errors of predictions, as pure functions of what was said and what is true."""

import numpy as np

from omni_cli.scene.clock import Float64Array


def absolute_errors(predicted: Float64Array, truth: Float64Array, fallback: float) -> Float64Array:
    """Return |error| of each window (n,).

    An answer that could not be read (NaN) is scored as if it had been `fallback` (the train set's median): it knows
    nothing, and must not improve the mean by being left out.
    """
    return np.asarray(np.abs(np.where(np.isnan(predicted), fallback, predicted) - truth))
