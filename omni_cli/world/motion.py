"""How the ego car moves on flat ground: gently, with stops, starts and curves, or along a winding road.

On a gentle road speed and curvature are random in time, and know nothing of each other. A winding road bends at random
along its way, and the car slows for its bends as a driver does: where it goes, and how fast, can be seen ahead.

Everything is sampled on a millisecond grid, fine enough that a line between two samples errs by under a micrometre.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

from omni_cli.scene.clock import Float64Array, Int64Array
from omni_cli.scene.poses import EgoMotion

TOP_SPEED_MPS = 20.0
_STOP_BAND_MPS = 2.0  # the raw speed wanders in -2..20 m/s; below zero the car stands
_MAX_CURVATURE_PER_M = 0.06
_CRUISE_MPS = 12.0  # on a winding road, where it is straight
_SPEED_UP_MPS2, _BRAKE_MPS2 = 1.5, 2.0
_WAY_STEP_M = 0.1
_STEP_US = 1_000
_EGO_PERIOD_US = 10_000
_BEFORE_US, _AFTER_US = 500_000, 600_000  # the grid reaches beyond the clip on both sides
_LOG_BEFORE_US, _LOG_AFTER_US = 200_000, 500_000  # and so does the 100 Hz log


@dataclass(frozen=True)
class Drive:
    """One drive on the millisecond grid. Anchor frame: the rig at t = 0 is the origin and looks along x."""

    time_us: Int64Array  # (n,)
    position_m: Float64Array  # (n, 2)
    yaw_rad: Float64Array  # (n,)
    speed_mps: Float64Array  # (n,) never negative
    acceleration_mps2: Float64Array  # (n,) along the car
    curvature_per_m: Float64Array  # (n,) left positive
    seconds: float

    @property
    def distance_m(self) -> Float64Array:
        """Return the way driven since t = 0 at each grid instant (n,)."""
        way = _integrate(self.speed_mps)
        return np.asarray(way - np.interp(0, self.time_us, way))

    def pose_at(self, at_us: float) -> tuple[float, float, float]:
        """Return x, y (m) and yaw (rad) at an instant."""
        before = int((at_us - self.time_us[0]) // _STEP_US)
        weight = (at_us - self.time_us[before]) / _STEP_US
        x, y = self.position_m[before] * (1 - weight) + self.position_m[before + 1] * weight
        yaw = self.yaw_rad[before] * (1 - weight) + self.yaw_rad[before + 1] * weight
        return float(x), float(y), float(yaw)

    def log(self) -> EgoMotion:
        """Return the 100 Hz ego motion from 0.2 s before the clip to 0.5 s after its end."""
        last_us = round(self.seconds * 1e6) + _LOG_AFTER_US
        kept = (self.time_us >= -_LOG_BEFORE_US) & (self.time_us <= last_us) & (self.time_us % _EGO_PERIOD_US == 0)
        yaw, speed = self.yaw_rad[kept], self.speed_mps[kept]
        forward = np.stack([np.cos(yaw), np.sin(yaw), 0 * yaw], axis=1)
        left = np.stack([-np.sin(yaw), np.cos(yaw), 0 * yaw], axis=1)
        along, curvature = self.acceleration_mps2[kept], self.curvature_per_m[kept]
        return EgoMotion(
            timestamp_us=self.time_us[kept],
            position_m=np.column_stack([self.position_m[kept], 0 * yaw]),
            quaternion_xyzw=np.stack([0 * yaw, 0 * yaw, np.sin(yaw / 2), np.cos(yaw / 2)], axis=1),
            velocity_mps=forward * speed[:, None],
            acceleration_mps2=forward * along[:, None] + left * (speed**2 * curvature)[:, None],
            curvature_per_m=curvature,
        )


def random_drive(rng: np.random.Generator, *, seconds: float, start_phase: float) -> Drive:
    """Return a drive whose speeds, over many drives, are near uniform in 0..20 m/s.

    Args:
        rng: the drive's own generator.
        seconds: length of the clip.
        start_phase: 0..1, where on the speed range the drive begins; spread it evenly over the drives of a set.
    """
    time_us = _time_us(seconds)
    speed = _random_speed(rng, len(time_us), start_phase)
    return _drive(time_us, speed, _random_curvature(rng, speed), seconds)


def winding_drive(rng: np.random.Generator, *, seconds: float) -> Drive:
    """Return a drive along a road of bends, each taken at about 3 m/s^2 across and 12 m/s at most.

    Args:
        rng: the drive's own generator.
        seconds: length of the clip.
    """
    time_us = _time_us(seconds)
    way_m = np.arange(0, _CRUISE_MPS * (np.ptp(time_us) / 1e6 + 1), _WAY_STEP_M)
    curvature = _random_bends(rng, len(way_m))
    speed = _speed_along(way_m, curvature, rng.uniform(2.8, 3.2))
    since_start_s = np.concatenate([[0.0], np.cumsum(_WAY_STEP_M * 2 / (speed[1:] + speed[:-1]))])
    speed = _smoothed(np.interp((time_us - time_us[0]) / 1e6, since_start_s, speed), width_s=0.3)
    return _drive(time_us, speed, np.interp(_integrate(speed), way_m, curvature), seconds)


def _time_us(seconds: float) -> Int64Array:
    return np.arange(-_BEFORE_US, round(seconds * 1e6) + _AFTER_US + _STEP_US, _STEP_US, dtype=np.int64)


def _drive(time_us: Int64Array, speed: Float64Array, curvature: Float64Array, seconds: float) -> Drive:
    yaw = _integrate(speed * curvature)
    yaw -= np.interp(0, time_us, yaw)
    position = np.stack([_integrate(speed * np.cos(yaw)), _integrate(speed * np.sin(yaw))], axis=1)
    position -= [np.interp(0, time_us, axis) for axis in position.T]
    acceleration = np.gradient(speed, _STEP_US / 1e6)
    return Drive(time_us, position, yaw, speed, acceleration, curvature, seconds)


def _random_speed(rng: np.random.Generator, num: int, start_phase: float) -> Float64Array:
    # A wandering value folded at both ends of a range is uniform over it, and so are the speeds of a data set.
    wander = np.cumsum(_smooth_noise(rng, num, every_s=1.5, spread=1.4, limit=2.5)) * (_STEP_US / 1e6)
    span = TOP_SPEED_MPS + _STOP_BAND_MPS
    folded = span - np.abs(np.mod(2 * span * start_phase + wander, 2 * span) - span)
    return _smoothed(np.maximum(folded - _STOP_BAND_MPS, 0), width_s=0.4)


def _random_curvature(rng: np.random.Generator, speed_mps: Float64Array) -> Float64Array:
    sideways_mps2 = _smooth_noise(rng, len(speed_mps), every_s=2.5, spread=0.9, limit=2.0)
    raw = sideways_mps2 / np.maximum(speed_mps, 5.0) ** 2
    return _smoothed(np.clip(raw, -_MAX_CURVATURE_PER_M, _MAX_CURVATURE_PER_M), width_s=0.3)


def _random_bends(rng: np.random.Generator, num: int) -> Float64Array:
    knot_m, spread_per_m, limit_per_m, width_m = 20.0, 0.035, 0.05, 4.0  # radii of 20 m and more
    step = round(knot_m / _WAY_STEP_M)
    knots = np.clip(rng.normal(0, spread_per_m, num // step + 2), -limit_per_m, limit_per_m)
    raw = np.interp(np.arange(num), np.arange(len(knots)) * step, knots)
    return np.asarray(gaussian_filter1d(raw, width_m / _WAY_STEP_M, mode="nearest"))


def _speed_along(way_m: Float64Array, curvature_per_m: Float64Array, sideways_mps2: float) -> Float64Array:
    """Return the highest speed at each place that no bend and neither pedal forbids (v^2 = v0^2 + 2 a s)."""
    slowest_per_m = sideways_mps2 / _CRUISE_MPS**2  # the curvature that is taken at full speed
    squared = sideways_mps2 / np.maximum(np.abs(curvature_per_m), slowest_per_m)
    gained, lost = 2 * _SPEED_UP_MPS2 * way_m, 2 * _BRAKE_MPS2 * way_m
    squared = gained + np.minimum.accumulate(squared - gained)
    squared = np.minimum.accumulate((squared + lost)[::-1])[::-1] - lost
    return np.sqrt(squared)


def _smooth_noise(rng: np.random.Generator, num: int, *, every_s: float, spread: float, limit: float) -> Float64Array:
    step = round(every_s * 1e6 / _STEP_US)
    knots = np.clip(rng.normal(0, spread, num // step + 2), -limit, limit)
    return np.interp(np.arange(num), np.arange(len(knots)) * step, knots)


def _smoothed(values: Float64Array, *, width_s: float) -> Float64Array:
    return np.asarray(gaussian_filter1d(values, width_s * 1e6 / _STEP_US, mode="nearest", truncate=3.0))


def _integrate(rate: Float64Array) -> Float64Array:
    steps = (rate[1:] + rate[:-1]) / 2 * (_STEP_US / 1e6)
    return np.concatenate([[0.0], np.cumsum(steps)])
