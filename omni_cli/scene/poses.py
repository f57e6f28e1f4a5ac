"""Rigid poses and ego motion.

`a_T_b` maps points given in frame b to frame a. Frames: *anchor* (fixed to the ground, z up, where the log's poses
live), *rig* (rear axle on the ground; x forward, y left, z up), *camera* (x right, y down, z forward).
"""

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation, Slerp

from omni_cli.scene.clock import Float64Array, Int64Array


@dataclass(frozen=True)
class Pose:
    """One or many rigid transforms a_T_b: rotation, then translation."""

    rotation: Rotation  # one, or n
    translation_m: Float64Array  # (3,) or (n, 3)

    def apply(self, points_m: Float64Array) -> Float64Array:
        """Map points (n, 3) from frame b to frame a."""
        return np.asarray(self.rotation.apply(points_m) + self.translation_m)

    def inverse(self) -> "Pose":
        """Return b_T_a."""
        rotation = self.rotation.inv()
        return Pose(rotation, -rotation.apply(self.translation_m))

    def __matmul__(self, other: "Pose") -> "Pose":
        """Return a_T_c = a_T_b @ b_T_c."""
        return Pose(self.rotation * other.rotation, self.apply(other.translation_m))


@dataclass(frozen=True)
class EgoState:
    """Ego motion at n instants. Vectors are in the anchor frame unless the name says otherwise."""

    timestamp_us: Int64Array  # (n,)
    anchor_T_rig: Pose
    velocity_mps: Float64Array  # (n, 3)
    acceleration_mps2: Float64Array  # (n, 3)
    curvature_per_m: Float64Array  # (n,) left positive

    def body_velocity_mps(self) -> Float64Array:
        """Return the velocity in the rig frame (n, 3): x is forward speed, negative in reverse."""
        return np.asarray(self.anchor_T_rig.rotation.inv().apply(self.velocity_mps))

    def body_acceleration_mps2(self) -> Float64Array:
        """Return the acceleration in the rig frame (n, 3)."""
        return np.asarray(self.anchor_T_rig.rotation.inv().apply(self.acceleration_mps2))


@dataclass(frozen=True)
class EgoMotion:
    """Ego motion as logged, and at any instant between its first and last sample.

    Positions follow a not-a-knot cubic spline, orientations slerp, the rest is linear: the rules of NVIDIA's
    `physical_ai_av` devkit. Nothing is extrapolated.
    """

    timestamp_us: Int64Array  # (n,) strictly increasing
    position_m: Float64Array  # (n, 3) anchor
    quaternion_xyzw: Float64Array  # (n, 4) anchor_R_rig
    velocity_mps: Float64Array  # (n, 3) anchor
    acceleration_mps2: Float64Array  # (n, 3) anchor
    curvature_per_m: Float64Array  # (n,)

    @property
    def span_us(self) -> tuple[int, int]:
        """Return the first and the last instant."""
        return int(self.timestamp_us[0]), int(self.timestamp_us[-1])

    def covers(self, start_us: int, end_us: int) -> bool:
        """Say whether both instants lie inside the log."""
        first, last = self.span_us
        return first <= start_us and end_us <= last

    def at(self, at_us: Int64Array) -> EgoState:
        """Interpolate at instants (m,).

        Raises:
            ValueError: an instant lies outside the log.
        """
        at_us = np.asarray(at_us, dtype=np.int64)
        first, last = self.span_us
        if at_us.size and not (first <= at_us.min() and at_us.max() <= last):
            raise ValueError(f"ego motion spans {first}..{last} us; asked for {at_us.min()}..{at_us.max()} us")
        # The spline is built on times relative to the first sample, as the devkit does: small numbers keep precision.
        knots, query = (self.timestamp_us - first).astype(np.float64), (at_us - first).astype(np.float64)
        rotation = Slerp(knots, Rotation.from_quat(self.quaternion_xyzw))(query)
        return EgoState(
            timestamp_us=at_us,
            anchor_T_rig=Pose(rotation, CubicSpline(knots, self.position_m)(query)),
            velocity_mps=_linear(query, knots, self.velocity_mps),
            acceleration_mps2=_linear(query, knots, self.acceleration_mps2),
            curvature_per_m=np.interp(query, knots, self.curvature_per_m),
        )

    def between(self, start_us: int, end_us: int) -> "EgoMotion":
        """Return the samples inside a span, with one more on either side where there is one."""
        low = max(int(np.searchsorted(self.timestamp_us, start_us, side="right")) - 1, 0)
        high = int(np.searchsorted(self.timestamp_us, end_us, side="left")) + 1
        kept = slice(low, high)
        return EgoMotion(
            timestamp_us=self.timestamp_us[kept],
            position_m=self.position_m[kept],
            quaternion_xyzw=self.quaternion_xyzw[kept],
            velocity_mps=self.velocity_mps[kept],
            acceleration_mps2=self.acceleration_mps2[kept],
            curvature_per_m=self.curvature_per_m[kept],
        )


def _linear(query: Float64Array, knots: Float64Array, values: Float64Array) -> Float64Array:
    return np.stack([np.interp(query, knots, column) for column in values.T], axis=-1)
