"""How far predicted waypoints are from those driven, and the paths of cars that need no eyes: rig frame, y left.

ADE up to a horizon is the mean distance over the waypoints up to it, FDE the distance at it; both are planar.
"""

from collections.abc import Sequence

import numpy as np

from omni_cli.scene.clock import Float64Array

STEP_S = 0.1
HORIZONS_S = (1.0, 2.0, 3.0, 6.4)


def displacement_errors(
    predicted_m: Float64Array, truth_m: Float64Array, horizons_s: Sequence[float] = HORIZONS_S
) -> tuple[Float64Array, Float64Array]:
    """Return ADE and FDE (n, h) in metres.

    Args:
        predicted_m: (n, 64, 2) after 0.1, 0.2 ... 6.4 s.
        truth_m: (n, 64, 2).
        horizons_s: (h,) in tenths of a second.
    """
    steps = np.round(np.asarray(horizons_s) / STEP_S).astype(int)
    distance = np.linalg.norm(predicted_m - truth_m, axis=-1)
    return np.cumsum(distance, axis=1)[:, steps - 1] / steps, distance[:, steps - 1]


def path_lengths(path_m: Float64Array) -> Float64Array:
    """Return how long paths (n, 64, 2) that begin at the rig are (n,), in metres."""
    steps = np.diff(path_m, axis=1, prepend=np.zeros_like(path_m[:, :1]))
    return np.asarray(np.linalg.norm(steps, axis=-1).sum(axis=1))


def arcs(speed_mps: Float64Array, yaw_rate_radps: Float64Array, num: int) -> Float64Array:
    """Return the paths (n, num, 2) of cars that keep their speed (n,) and their yaw rate (n,), left positive.

    An arc of length s that turns by a has the chord s sinc(a / 2) in the direction a / 2.
    """
    time_s = np.arange(1, num + 1) * STEP_S
    half_turn = yaw_rate_radps[:, None] * time_s / 2
    chord_m = speed_mps[:, None] * time_s * np.sinc(half_turn / np.pi)
    return np.stack([chord_m * np.cos(half_turn), chord_m * np.sin(half_turn)], axis=-1)
