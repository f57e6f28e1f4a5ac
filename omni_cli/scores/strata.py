"""What kind of driving a window shows, so that an error can be told apart by it: by manoeuvre, and by speed.

Both are rates, so that they mean the same for windows of a second and futures of 6.4 s. A car that hardly moves is
`standing`; one that turns is told by its side; one that goes on straight by how its speed changes.

The thresholds of standing and turning are those by which the Waymo Open Motion Dataset tells trajectories apart (5 m,
and a net change of heading of pi/6, both over its 8 s), divided by these 8 s. Source: waymo-open-dataset,
`metrics/motion_metrics_utils.cc`, ClassifyTrack. That of braking and accelerating is ours: 1 m/s^2 is more than a
car's speed changes on a cruise, and less than most drivers brake with at a light.
"""

from dataclasses import dataclass

import numpy as np

from omni_cli.scene.clock import Float64Array, Int64Array

_WAYMO_S = 8.0
STANDING_MPS = 5.0 / _WAYMO_S  # slower in the mean is standing: 0.63 m/s
TURNING_RADPS = np.pi / 6 / _WAYMO_S  # faster in the mean is a turn: 0.065 rad/s, 3.8 degrees a second
CHANGING_MPS2 = 1.0  # more is braking or accelerating
MANOEUVRES = ("standing", "left", "right", "braking", "accelerating", "straight", "unknown")
BAND_EDGES_MPS = (2.0, 7.0, 14.0, 22.0)  # about 7, 25, 50 and 80 km/h
BANDS = ("under 2 m/s", "2 to 7 m/s", "7 to 14 m/s", "14 to 22 m/s", "22 m/s and more", "unknown")


@dataclass(frozen=True)
class Strata:
    """One way to tell n windows apart."""

    title: str
    names: tuple[str, ...]  # in the order of a table
    of: Int64Array  # (n,) which of the names each window has

    def where(self, name: str) -> np.ndarray:
        """Say which windows (n,) have a name."""
        return np.asarray(self.of == self.names.index(name))


def motion_strata(
    mean_speed_mps: Float64Array, acceleration_mps2: Float64Array, yaw_rate_radps: Float64Array, speed_mps: Float64Array
) -> tuple[Strata, Strata]:
    """Return n windows by manoeuvre and by speed.

    Args:
        mean_speed_mps: (n,) over the time that is told apart; backward is negative.
        acceleration_mps2: (n,) mean of the same time.
        yaw_rate_radps: (n,) likewise, left positive.
        speed_mps: (n,) by which the bands are told.
    """
    by_manoeuvre = manoeuvres(mean_speed_mps, acceleration_mps2, yaw_rate_radps)
    return Strata("manoeuvre", MANOEUVRES, by_manoeuvre), Strata("speed", BANDS, speed_bands(speed_mps))


def manoeuvres(
    mean_speed_mps: Float64Array, acceleration_mps2: Float64Array, yaw_rate_radps: Float64Array
) -> Int64Array:
    """Return which of `MANOEUVRES` each of n windows is; arguments as of `motion_strata`, NaN where not known."""
    moves = np.abs(mean_speed_mps)
    faster = acceleration_mps2 * np.where(mean_speed_mps < 0, -1.0, 1.0)  # backward, braking is a positive one
    of_each = (
        moves < STANDING_MPS,
        yaw_rate_radps >= TURNING_RADPS,
        yaw_rate_radps <= -TURNING_RADPS,
        ~np.isfinite(yaw_rate_radps + faster),  # a turn that nobody measured is no straight
        faster <= -CHANGING_MPS2,
        faster >= CHANGING_MPS2,
        np.isfinite(moves),
    )
    names = ("standing", "left", "right", "unknown", "braking", "accelerating", "straight")
    return np.select(of_each, [MANOEUVRES.index(name) for name in names], MANOEUVRES.index("unknown")).astype(np.int64)


def speed_bands(speed_mps: Float64Array) -> Int64Array:
    """Return which of `BANDS` each speed (n,) is in, forward or backward; an edge belongs to the faster band."""
    bands = np.searchsorted(BAND_EDGES_MPS, np.abs(speed_mps), side="right")
    return np.where(np.isfinite(speed_mps), bands, len(BAND_EDGES_MPS) + 1).astype(np.int64)


def mean_acceleration(start_mps: Float64Array, mean_mps: Float64Array, duration_s: Float64Array) -> Float64Array:
    """Return the constant acceleration (n,) by which a speed at the start becomes a mean; NaN where no time passes.

    With v(t) = v0 + a t the mean over T is v0 + a T / 2.
    """
    return per_second(2 * (mean_mps - start_mps), duration_s)


def per_second(values: Float64Array, duration_s: Float64Array) -> Float64Array:
    """Return values (n,) over durations (n,), NaN where no time passes."""
    times = np.where(duration_s > 0, duration_s, np.nan)
    return np.asarray(values / times)
