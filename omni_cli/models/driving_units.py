"""What the raw numbers of the driving student stand for.

Every regressed number is `centre + spread * u`, where the net gives u and these tables give the rest, so that an
untrained net (u near 0) says something plausible and every u has the same size to learn. Its scale is
`spread * exp(s)` with |s| < 5. Coordinates are calib: x forward, y right, z down.
"""

import torch
from torch import Tensor
from torch.nn import functional

from omni_cli.formats.driving_model import NUM_POINTS, T_IDXS_S, X_IDXS_M

NUM_LINES, NUM_EDGES, NUM_LEADS = 4, 2, 3
_MAX_LOG_SPREADS = 5.0
_LANE_WIDTH_M, _CAMERA_HEIGHT_M = 3.6, 1.2
_ROAD_WIDTH_M = 12.0


def plans(raw: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return means and log-scales (b, count, 33, 2) of plans, x and y at T_IDXS_S."""
    return _scaled(raw.reshape(-1, 2, count, NUM_POINTS, 2), *plan_units(raw))


def lane_lines(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and log-scales (b, 4, 33, 2) of lane lines, y and z at X_IDXS_M."""
    return _lines(raw, NUM_LINES, _LANE_WIDTH_M, width_spread_m=0.5)


def road_edges(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and log-scales (b, 2, 33, 2) of road edges, y and z at X_IDXS_M."""
    return _lines(raw, NUM_EDGES, _ROAD_WIDTH_M, width_spread_m=2.0)


def leads(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and log-scales (b, 3, 4) of leads: 40 +- 40 m, 0 +- 2 m, 10 +- 10 m/s; fixed, 0 +- 3 m/s^2."""
    learned = functional.pad(raw.reshape(-1, 2, NUM_LEADS, 3), (0, 1))
    return _scaled(learned, raw.new_tensor([40.0, 0.0, 10.0, 0.0]), raw.new_tensor([40.0, 2.0, 10.0, 3.0]))


def plan_units(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return centre and spread (33, 2) of a plan's x and y at T_IDXS_S, in m.

    Forward x = v t with speeds of 10 +- 10 m/s. Sideways y = a t^2 / 2 with accelerations of 0 +- 1 m/s^2, which is
    comfortable driving. A floor of 1 m and 0.25 m serves the first points, where a logged plan begins behind the
    camera.
    """
    time_s = like.new_tensor(T_IDXS_S.tolist())
    centre = torch.stack([10 * time_s, 0 * time_s], dim=1)
    return centre, torch.stack([1 + 10 * time_s, 0.25 + time_s**2 / 2], dim=1)


def _scaled(raw: Tensor, centre: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and logarithm of the scale from raw (b, 2, ...): means, then log-scales.

    The bound is smooth, so that no scale gets stuck at it, and below e^11, where openpilot's parser clips.
    """
    log_spreads = _MAX_LOG_SPREADS * torch.tanh(raw[:, 1] / _MAX_LOG_SPREADS)
    return centre + spread * raw[:, 0], torch.log(spread) + log_spreads


def _lines(raw: Tensor, count: int, gap_m: float, width_spread_m: float) -> tuple[Tensor, Tensor]:
    """Return means and log-scales (b, count, 33, 2) of lines `gap_m` apart around the car, y and z at X_IDXS_M.

    y spreads by the line's own place, a heading of 0.02 rad and a curvature of 1 / 500 m (y = k x^2 / 2); z, the height
    of the camera, by 0.1 m and a slope of 1 %.
    """
    forward_m = raw.new_tensor(X_IDXS_M.tolist())
    places_m = gap_m * (torch.arange(count, device=raw.device) - (count - 1) / 2)
    centre_y = places_m[:, None].expand(count, NUM_POINTS)
    centre = torch.stack([centre_y, torch.full_like(centre_y, _CAMERA_HEIGHT_M)], dim=2)
    spread_y = width_spread_m + 0.02 * forward_m + forward_m**2 / 1000
    spread = torch.stack([spread_y, 0.1 + 0.01 * forward_m], dim=1)
    return _scaled(raw.reshape(-1, 2, count, NUM_POINTS, 2), centre, spread)
