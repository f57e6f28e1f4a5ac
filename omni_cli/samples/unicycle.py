"""A path as what a driver does: acceleration and curvature every 0.1 s, and the path that these give.

A unicycle moves along its heading. With speed v, heading theta, and acceleration a and curvature k that are constant
in a step,

    v' = v + a dt
    theta' = theta + k (v dt + a dt^2 / 2)
    p' = p + dt / 2 (v (cos theta, sin theta) + v' (cos theta', sin theta'))          the trapezoidal rule

Back from a path, each of theta, v, a, k is the solution of a linear least-squares problem: to fit the data, to change
smoothly (a penalty on its second or third derivative), and to be small where the data say nothing, as the curvature of
a car that stands. This is Tikhonov's regularisation; the weights are those of the source, so that the numbers are, too.

Source: NVlabs/alpamayo, `action_space/unicycle_accel_curvature.py` and `action_space/utils.py`.
"""

from typing import Any

import numpy as np
from scipy.linalg import solveh_banded

from omni_cli.scene.clock import Float64Array

STEP_S = 0.1
MAX_ACCELERATION_MPS2, MAX_CURVATURE_PER_M = 9.8, 0.33  # what the released model may do, to either side
_SECOND, _THIRD = (1.0, -2.0, 1.0), (-1.0, 3.0, -3.0, 1.0)
_BAND = 3  # no equation joins steps that are farther apart
_THETA_SMOOTH, _THETA_RIDGE = 1e-6, 1e-8
_SPEED_SMOOTH, _SPEED_RIDGE = 1e-6, 1e-4
_ACTION_SMOOTH, _ACTION_RIDGE = 1e-4, 1e-4


def speed_from_history(xy_m: Float64Array, yaw_rad: Float64Array) -> float:
    """Return the forward speed at the last of n poses, 0.1 s apart.

    Args:
        xy_m: (n, 2) in any frame.
        yaw_rad: (n,) in the same frame, without leaps of a turn.
    """
    normal, right = _speed_equations(np.diff(xy_m, axis=0), yaw_rad)
    normal += _roughness(len(yaw_rad), _THIRD, _SPEED_SMOOTH) + _SPEED_RIDGE * np.eye(len(yaw_rad))
    return float(_solved(normal, right)[-1])


def actions_from_path(xy_m: Float64Array, yaw_rad: Float64Array, speed_mps: float) -> Float64Array:
    """Return the accelerations and curvatures (n, 2) that drive a path.

    Args:
        xy_m: (n, 2) after 0.1, 0.2 ... s, in the rig frame at the start: x forward, y left.
        yaw_rad: (n,) headings there, without leaps of a turn.
        speed_mps: forward, at the start.
    """
    steps_m = np.diff(xy_m, axis=0, prepend=np.zeros((1, 2)))
    theta = _smooth_headings(yaw_rad)
    speed = _speeds(steps_m, theta, speed_mps)
    acceleration = _quotient(np.ones(len(steps_m)), np.diff(speed) / STEP_S)
    way_m = STEP_S * speed[:-1] + STEP_S**2 / 2 * acceleration
    return np.stack([acceleration, _quotient(way_m, np.diff(theta))], axis=1)


def path_from_actions(actions: Float64Array, speed_mps: float) -> tuple[Float64Array, Float64Array]:
    """Return where actions (n, 2) lead: positions (n, 2) and headings (n,), in the rig frame at the start."""
    acceleration, curvature = actions.T
    speed = np.concatenate([[speed_mps], speed_mps + np.cumsum(acceleration * STEP_S)])
    turn = curvature * (speed[:-1] * STEP_S + acceleration * STEP_S**2 / 2)
    theta = np.concatenate([[0.0], np.cumsum(turn)])
    velocity = speed[:, None] * np.stack([np.cos(theta), np.sin(theta)], axis=1)
    return np.cumsum((velocity[:-1] + velocity[1:]) * STEP_S / 2, axis=0), theta[1:]


def is_drivable(actions: Float64Array) -> bool:
    """Say whether no action (n, 2) is more than a car can do; a log that leaps asks for more."""
    limits = np.array([MAX_ACCELERATION_MPS2, MAX_CURVATURE_PER_M])
    return bool((np.abs(actions) <= limits).all())


def _smooth_headings(yaw_rad: Float64Array) -> Float64Array:
    """Return headings (n + 1,), the first of them zero."""
    rough = _roughness(len(yaw_rad) + 1, _THIRD, _THETA_SMOOTH)[1:, 1:]
    return np.append(0.0, _solved(rough + (1 + _THETA_RIDGE) * np.eye(len(yaw_rad)), yaw_rad))


def _speeds(steps_m: Float64Array, theta: Float64Array, first_mps: float) -> Float64Array:
    """Return speeds (n + 1,), the first of them given."""
    normal, right = _speed_equations(steps_m, theta)
    normal += _roughness(len(theta), _THIRD, _SPEED_SMOOTH)
    known = right[1:] - normal[1:, 0] * first_mps
    return np.append(first_mps, _solved(normal[1:, 1:] + _SPEED_RIDGE * np.eye(len(steps_m)), known))


def _speed_equations(steps_m: Float64Array, theta: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Return the normal equations of v_k u_k + v_{k+1} u_{k+1} = 2 / dt (p_{k+1} - p_k), u = (cos, sin) theta."""
    unit, twice = np.stack([np.cos(theta), np.sin(theta)], axis=1), 2 / STEP_S * steps_m
    beside = np.einsum("ij,ij->i", unit[:-1], unit[1:])
    own = np.full(len(theta), 2.0)  # cos^2 + sin^2 of the step before and of the one after
    own[[0, -1]] = 1.0
    normal = np.diag(own) + np.diag(beside, 1) + np.diag(beside, -1)
    around = np.pad(twice, ((1, 1), (0, 0)))
    return normal, np.einsum("ij,ij->i", unit, around[:-1] + around[1:])


def _quotient(by: Float64Array, of: Float64Array) -> Float64Array:
    """Return x (n,) with by * x = of, smooth, and small where `by` is."""
    rough = _roughness(len(of), _SECOND, _ACTION_SMOOTH)
    return _solved(np.diag(by**2 + _ACTION_RIDGE) + rough, by * of)


def _roughness(num: int, difference: tuple[float, ...], weight: float) -> Float64Array:
    """Return weight * D^T D (num, num), D the derivative of as many orders as `difference` has steps."""
    rows = max(num - len(difference) + 1, 0)
    derivative = np.zeros((rows, num))
    for shift, factor in enumerate(difference):
        derivative[np.arange(rows), np.arange(rows) + shift] = factor
    return np.asarray(weight / STEP_S ** (2 * (len(difference) - 1)) * derivative.T @ derivative)


def _solved(normal: Float64Array, right: Float64Array) -> Float64Array:
    """Solve a symmetric positive system; by its few diagonals, so that no number of threads changes a bit."""
    num = len(right)
    bands = np.zeros((_BAND + 1, num))
    for above in range(min(_BAND, num - 1) + 1):
        bands[_BAND - above, above:] = np.diagonal(normal, above)
    solved: Any = solveh_banded(bands, right)
    return np.asarray(solved)
