"""The student in the real models' place: names, types, widths and slices of openpilot v0.10.3, in two programs.

What the real models say and the student has not learned is zero, or what an imported program says of it, which nothing
taught while it was adapted. Either is named in the file's metadata. What follows from a path is derived inside the
graph from the likeliest one: velocity, acceleration, yaw, yaw rate; a lead goes on from its first point at constant
speed. A Laplace scale b becomes a standard deviation, b sqrt(2).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from omni_cli.formats.driving_model import (
    FEATURE_LEN,
    HISTORY_STEPS,
    NUM_POINTS,
    OUTPUT_NAME,
    PLAN_COLUMNS,
    PLAN_WIDTH,
    POLICY_SLICES,
    POLICY_WIDTH,
    SLICES_KEY,
    T_IDXS_S,
    VISION_SLICES,
    VISION_WIDTH,
    InputSpec,
    encode_slices,
)
from omni_cli.models.driving_net import PolicyNet, VisionNet
from omni_cli.scene.clock import Float64Array

VISION_NAME, POLICY_NAME = "driving_vision", "driving_policy"
OUTPUT_NAMES = (OUTPUT_NAME,)
_LOG_SQRT_2 = math.log(2) / 2
_LEAD_TIMES_S = (0.0, 2.0, 4.0, 6.0, 8.0, 10.0)
_FIT_HALF_WIDTH_S, _FIT_POINTS = 1.0, 5
_SLOWEST_MPS = 1.0
_NOT_LEARNED_KEY, _CARRIED_KEY, _DERIVED_KEY = "omni_not_learned", "omni_carried", "omni_derived"
_VISION_NOT_LEARNED = ("meta", "desire_pred", "pose", "wide_from_device_euler", "road_transform")
_POLICY_NOT_LEARNED = ("desire_state", "plan: z, roll, pitch and every scale but that of x and y")

Program = Callable[[Mapping[str, Tensor]], Tensor]


class VisionContract(nn.Module):
    """`driving_vision.onnx`: (b, 12, 128, 256) uint8 pictures, narrow and wide, to (b, 1576)."""

    def __init__(self, vision: VisionNet) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, img: Tensor, big_img: Tensor) -> tuple[Tensor]:
        """Return everything that is seen, as one vector a step."""
        seen, carried = self.vision.say(img, big_img)
        unused = torch.zeros_like(seen.lane_line_logit)
        parts = {
            "lane_lines": _normal(seen.lane_lines_m, seen.lane_lines_log_scale),
            # a reader takes the second of each line's two scores
            "lane_lines_prob": torch.stack([unused, seen.lane_line_logit], dim=2),
            "road_edges": _normal(seen.road_edges_m, seen.road_edges_log_scale),
            "lead": _normal(_future_leads(seen.lead), seen.lead_log_scale[:, :, None].expand(-1, -1, 6, -1)),
            "lead_prob": seen.lead_logit,
            "hidden_state": seen.features,
            **carried,
        }
        return (_flat(parts, VISION_SLICES, VISION_WIDTH),)


class PolicyContract(nn.Module):
    """`driving_policy.onnx`: desires, traffic and the features of 25 steps to (b, 1000)."""

    def __init__(self, policy: PolicyNet) -> None:
        super().__init__()
        self.policy = policy
        self.follows: Tensor
        self.register_buffer("follows", _follows_from_a_path(), persistent=False)

    def forward(self, desire_pulse: Tensor, traffic_convention: Tensor, features_buffer: Tensor) -> tuple[Tensor]:
        """Return the likeliest plan and what follows from it, as one vector a step."""
        plans, carried = self.policy.say(features_buffer, desire_pulse, traffic_convention)
        best = plans.logit.argmax(dim=1)[:, None, None, None].expand(-1, 1, NUM_POINTS, 2)
        path_m = plans.mean_m.gather(1, best).squeeze(1)
        log_std = plans.log_scale.gather(1, best).squeeze(1) + _LOG_SQRT_2
        plan = torch.cat([motion(path_m), functional.pad(log_std, (0, PLAN_WIDTH - 2))], dim=1)
        if "plan" in carried:
            plan = torch.where(self.follows, plan, carried["plan"].view_as(plan))
        return (_flat({**carried, "plan": plan}, POLICY_SLICES, POLICY_WIDTH),)


def motion(path_m: Tensor) -> Tensor:
    """Return a plan's 15 numbers at T_IDXS_S, (b, 33, 15) as PLAN_COLUMNS has them, from x and y (b, 33, 2).

    As the real models do, velocity and acceleration are in the car's own axes at each time, not in those of now: in a
    bend the first is its speed and 0. Yaw is the path's direction, positive to the right.
    """
    derivative = path_m.new_tensor(derivative_matrix(T_IDXS_S).tolist())
    velocity = derivative @ path_m
    yaw = headings(velocity)
    own = [path_m, _turned(velocity, yaw), _turned(derivative @ velocity, yaw)]
    flat = [functional.pad(value, (0, 1)) for value in own]  # z is 0
    turning = [functional.pad(value[..., None], (2, 0)) for value in (yaw, (derivative @ yaw[..., None])[..., 0])]
    return torch.cat([*flat, *turning], dim=2)  # and so are roll and pitch


def headings(velocity: Tensor) -> Tensor:
    """Return the directions (b, 33) of velocities (b, 33, 2) in rad, the first seen from x, each next from the last.

    They add up over any bend. A standing car turns by nothing: where two speeds multiply to less than (1 m/s)^2 the
    angle between them is what it would be there, so that noise on a path that goes nowhere turns into no heading.
    """
    before = torch.cat([torch.ones_like(velocity[:, :1]) * velocity.new_tensor([1.0, 0.0]), velocity[:, :-1]], dim=1)
    cross = before[..., 0] * velocity[..., 1] - before[..., 1] * velocity[..., 0]
    turn = torch.atan(cross / (before * velocity).sum(dim=2).clamp(min=_SLOWEST_MPS**2))
    all_before = torch.ones(NUM_POINTS, NUM_POINTS, dtype=turn.dtype, device=turn.device).triu()
    return turn @ all_before  # a sum up to each: ONNX Runtime's CumSum knows no float16


def _turned(vector: Tensor, yaw: Tensor) -> Tensor:
    """Return vectors (b, 33, 2) of the axes of now in axes that are turned by yaw (b, 33)."""
    cos, sin = torch.cos(yaw), torch.sin(yaw)
    x, y = vector.unbind(dim=2)
    return torch.stack([cos * x + sin * y, cos * y - sin * x], dim=2)


def derivative_matrix(time_s: Float64Array) -> Float64Array:
    """Return D (n, n): D x is the time derivative of a signal x at unevenly spaced times.

    Each row is the slope at its own time of a quadratic fitted by least squares (Savitzky and Golay 1964, on an uneven
    grid) to the points within 1 s, or to the nearest five. It is exact for constant acceleration. Differences of
    neighbours would be as well, but the first two of a path's times are 10 ms apart: 1 cm of noise in the path would
    be 1.4 m/s in its first speed and 45 m/s^2 in its first acceleration. This way it is 0.03 m/s and 0.09 m/s^2.
    """
    matrix = np.zeros((len(time_s), len(time_s)))
    for row, now_s in enumerate(time_s):
        away_s = np.abs(time_s - now_s)
        near = away_s <= max(_FIT_HALF_WIDTH_S, np.sort(away_s)[_FIT_POINTS - 1])
        powers = np.vander(time_s[near] - now_s, 3, increasing=True)
        matrix[row, near] = np.linalg.pinv(powers)[1]
    return matrix


def vision_metadata(checkpoint: str, carries: Collection[str] = ()) -> dict[str, str]:
    """Return the metadata of `driving_vision.onnx`, as openpilot's files have it, and what is not learned.

    Args:
        checkpoint: what the model is made of.
        carries: parts that an imported program says.
    """
    goes_on = "lead: its points after the first"
    if "lead" in carries:
        return _metadata(checkpoint, VISION_SLICES, (*_VISION_NOT_LEARNED, goes_on), carries)
    return _metadata(checkpoint, VISION_SLICES, _VISION_NOT_LEARNED, carries, goes_on)


def policy_metadata(checkpoint: str, carries: Collection[str] = ()) -> dict[str, str]:
    """Return the metadata of `driving_policy.onnx`, as openpilot's files have it, and what is not learned.

    Args:
        checkpoint: what the model is made of.
        carries: parts that an imported program says.
    """
    follows = "plan: velocity, acceleration, yaw, yaw rate"
    return _metadata(checkpoint, POLICY_SLICES, _POLICY_NOT_LEARNED, carries, follows)


def example_inputs(specs: Mapping[str, InputSpec], batch: int, seed: int) -> dict[str, Tensor]:
    """Return seeded noise for a program's inputs, `batch` steps of it."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _noise((batch, *spec.shape[1:]), spec.dtype, generator) for name, spec in specs.items()}


def drive(look: Program, plan: Program, pictures: Tensor, desire: Tensor, traffic: Tensor) -> tuple[Tensor, Tensor]:
    """Run both programs over a drive step by step as a car does, and return what they say, (n, 1576) and (n, 1000).

    Args:
        look: the vision program.
        plan: the policy program; its buffers slide by a step each time, and are zero before the start.
        pictures: (n + 1, 2, 6, 128, 256) uint8, narrow and wide; step i sees pictures i and i + 1.
        desire: (n, 8) pulses.
        traffic: (2,) one-hot.
    """
    features = torch.zeros(1, HISTORY_STEPS, FEATURE_LEN)
    pulses = torch.zeros(1, HISTORY_STEPS, desire.shape[1])
    seen, planned = [], []
    for older, newer, pulse in zip(pictures[:-1], pictures[1:], desire, strict=True):
        views = torch.cat([older, newer], dim=1)
        seen.append(look({"img": views[None, 0], "big_img": views[None, 1]}))
        features = torch.cat([features[:, 1:], seen[-1][:, None, VISION_SLICES["hidden_state"]]], dim=1)
        pulses = torch.cat([pulses[:, 1:], pulse[None, None]], dim=1)
        given = {"desire_pulse": pulses, "traffic_convention": traffic[None], "features_buffer": features}
        planned.append(plan(given))
    return torch.cat(seen), torch.cat(planned)


def _metadata(
    checkpoint: str,
    slices: Mapping[str, slice],
    not_learned: Sequence[str],
    carries: Collection[str],
    derived: str = "",
) -> dict[str, str]:
    carried = [one for one in not_learned if one.split(":")[0] in carries]
    zero = [one for one in not_learned if one not in carried]
    notes = {_NOT_LEARNED_KEY: "; ".join(zero), _CARRIED_KEY: "; ".join(carried), _DERIVED_KEY: derived}
    told = {key: note for key, note in notes.items() if note}
    return {"model_checkpoint": checkpoint, SLICES_KEY: encode_slices(slices), **told}


def _follows_from_a_path() -> Tensor:
    """Return which numbers of a plan, means and then scales (66, 15), are a path's x and y or follow from them."""
    follows = torch.zeros(2 * NUM_POINTS, PLAN_WIDTH, dtype=torch.bool)
    for name in ("position", "velocity", "acceleration"):
        follows[:NUM_POINTS, PLAN_COLUMNS[name].start : PLAN_COLUMNS[name].stop - 1] = True
    for name in ("euler", "euler_rate"):
        follows[:NUM_POINTS, PLAN_COLUMNS[name].stop - 1] = True
    follows[NUM_POINTS:, :2] = True
    return follows


def _noise(shape: tuple[int, ...], dtype: str, generator: torch.Generator) -> Tensor:
    if dtype == "uint8":
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.rand(shape, generator=generator)


def _normal(mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return all means, then all logarithms of standard deviations: a Laplace variance is 2 b^2."""
    return torch.cat([mean.flatten(1), log_scale.flatten(1) + _LOG_SQRT_2], dim=1)


def _future_leads(lead: Tensor) -> Tensor:
    """Return (b, 3, 6, 4) from the first point (b, 3, 4) of each lead: x + v t, and the rest as it is."""
    time_s = lead.new_tensor(_LEAD_TIMES_S)
    ahead = lead[:, :, 2:3] * time_s
    return lead[:, :, None] + functional.pad(ahead[..., None], (0, 3))


def _flat(parts: Mapping[str, Tensor], slices: Mapping[str, slice], width: int) -> Tensor:
    """Lay parts into one vector (b, width) where the slices say; what no part covers is zero."""
    some = next(iter(parts.values()))
    steps = some.shape[0]  # not len(): the exporter would take it for a constant
    pieces, end = [], 0
    for name in sorted(parts, key=lambda name: slices[name].start):
        pieces += [some.new_zeros(steps, slices[name].start - end), parts[name].flatten(1)]
        end = slices[name].stop
    return torch.cat([*pieces, some.new_zeros(steps, width - end)], dim=1)
