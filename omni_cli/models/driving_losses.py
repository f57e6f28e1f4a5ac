"""What a driving net learns from: sums of losses and what they count.

A total is a plain sum over labelled things, so totals of several losses may be weighted and added and, divided by one
count of the whole step of the optimiser (its steps of driving, say), average without bias over micro-batches.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from omni_cli.formats.driving_model import NUM_POINTS
from omni_cli.models.driving_net import Plans, VisionOutputs
from omni_cli.models.driving_outputs import EXP_CLIP
from omni_cli.models.driving_units import NUM_EDGES, plan_units

HUBER_DELTA = 1.0  # m and m/s: below it errors count squared, above it as they are
_BELIEVED = 0.5  # a teacher's line or lead that it holds for less likely has a probability to learn, and no place
_LEAD_NUMBERS = 3  # x, y and speed; what logs say of a lead's acceleration is noise (openpilot's own logs)


@dataclass(frozen=True)
class Summed:
    """A sum of losses and how many labelled things it is over."""

    total: Tensor  # ()
    count: Tensor  # ()


class VisionLabels(NamedTuple):
    """What a teacher saw at each of s steps, in calib: y right, z down."""

    known: Tensor  # (s,) bool: whether there is a label at all; where not, the rest may be anything
    lane_lines_m: Tensor  # (s, 4, 33, 2) y and z
    lane_line_prob: Tensor  # (s, 4)
    road_edges_m: Tensor  # (s, 2, 33, 2)
    lead: Tensor  # (s, 3, 4) x, y, speed, acceleration
    lead_prob: Tensor  # (s, 3)


def laplace_nll(mean: Tensor, log_scale: Tensor, target: Tensor) -> Tensor:
    """Return |target - mean| / b + log(2 b) with b = exp(min(log_scale, 11)), of each number.

    The negative logarithm of Laplace's density exp(-|x - mean| / b) / (2 b). That a net learns the scale's logarithm
    beside the mean is from Kendall and Gal 2017, arXiv:1703.04977; the clip from openpilot's `parse_model_outputs.py`.
    """
    log_b = log_scale.clamp(max=EXP_CLIP)
    nll: Tensor = (target - mean).abs() * torch.exp(-log_b) + math.log(2) + log_b
    return nll


def path_mask(num_points: Tensor) -> Tensor:
    """Return (s, 33) bool: the first `num_points` (s,) points of each path, those that the drive reached."""
    mask: Tensor = torch.arange(NUM_POINTS, device=num_points.device) < num_points[:, None]
    return mask


def winners(plans: Plans, path_m: Tensor, mask: Tensor) -> Tensor:
    """Return the plan (s,) of each step that lies nearest to the path, by mean distance over its masked points."""
    errors_m = torch.linalg.vector_norm(plans.mean_m.detach() - path_m[:, None], dim=3)  # (s, m, 33)
    nearest: Tensor = (
        (errors_m * mask[:, None]).sum(dim=2).argmin(dim=1)
    )  # every plan has as many points: a sum will do
    return nearest


def plan_losses(plans: Plans, path_m: Tensor, num_points: Tensor, beta: float = 1.0) -> dict[str, Summed]:
    """Return the losses of plans against the paths of s steps; each counts the steps with a path.

    `plan`: the winner's Laplace NLL, summed over its points' coordinates; the others learn nothing (winner takes all:
    Guzman-Rivera et al. 2012, "Multiple Choice Learning"). `plan_choice`: the cross-entropy of the mixture's weights
    against the winner (both as Cui et al. 2019, arXiv:1809.10732, train several trajectories).

    Each number's likelihood weighs (b / spread)^beta with b held still: the beta-NLL of Seitzer et al. 2022,
    arXiv:2203.09168, for Laplace's density. Plain likelihood (beta 0) divides a mean's gradient by its scale. Near the
    car scales shrink at once, as every path begins alike, and 1 / b then drowns what pictures say of the points ahead:
    the net stays at the average path (measured). With beta 1 a mean learns from |error| / spread.

    Args:
        plans: of s steps.
        path_m: (s, 33, 2); anything past a step's last point.
        num_points: (s,) how many points of each path there are.
        beta: 0 (plain likelihood) to 1.
    """
    mask = path_mask(num_points)
    path_m = _labelled(path_m, mask)
    best, rows = winners(plans, path_m, mask), torch.arange(len(path_m), device=path_m.device)
    log_scale = plans.log_scale[rows, best]
    log_spread = torch.log(plan_units(log_scale)[1])
    weight = torch.exp(beta * (log_scale.detach().clamp(max=EXP_CLIP) - log_spread))
    nll = laplace_nll(plans.mean_m[rows, best], log_scale, path_m) * weight
    has_path = num_points > 0
    choice = functional.cross_entropy(plans.logit, best, reduction="none")
    count = has_path.sum()
    return {
        "plan": Summed((nll * mask[:, :, None]).sum(), count),
        "plan_choice": Summed((choice * has_path).sum(), count),
    }


def vision_losses(seen: VisionOutputs, labels: VisionLabels) -> dict[str, Summed]:
    """Return the losses of what is seen at s steps.

    `lane_lines`, `road_edges`: L1, the mean over a line's 66 numbers in m, summed over lines and counting them; a lane
    line that its teacher doubts is left out. `leads`: Huber on x, y and speed, their mean, counting believed leads.
    `lane_line_prob`, `lead_prob`: binary cross-entropy against the teacher's probabilities, counting those. `..._scale`
    is the Laplace NLL of the same errors with the means held still: it teaches scales and leaves means to L1 and Huber.
    """
    known = labels.known[:, None]
    lanes, leads = known & (labels.lane_line_prob > _BELIEVED), known & (labels.lead_prob > _BELIEVED)
    edges = known.expand(-1, NUM_EDGES)
    moving = slice(_LEAD_NUMBERS)
    lead, lead_log_scale, lead_label = (
        seen.lead[..., moving],
        seen.lead_log_scale[..., moving],
        labels.lead[..., moving],
    )
    lane_label, edge_label = labels.lane_lines_m, labels.road_edges_m
    return {
        "lane_lines": l1(seen.lane_lines_m, lane_label, lanes),
        "lane_lines_scale": scale_nll(seen.lane_lines_m, seen.lane_lines_log_scale, lane_label, lanes),
        "lane_line_prob": bce(seen.lane_line_logit, labels.lane_line_prob, known),
        "road_edges": l1(seen.road_edges_m, edge_label, edges),
        "road_edges_scale": scale_nll(seen.road_edges_m, seen.road_edges_log_scale, edge_label, edges),
        "leads": huber(lead, lead_label, leads),
        "leads_scale": scale_nll(lead, lead_log_scale, lead_label, leads),
        "lead_prob": bce(seen.lead_logit, labels.lead_prob, known),
    }


def l1(mean: Tensor, target: Tensor, mask: Tensor) -> Summed:
    """Return the mean |target - mean| of each thing in the mask (s, k), summed; mean and target are (s, k, ...)."""
    return _over_things((_labelled(target, mask) - mean).abs(), mask)


def huber(mean: Tensor, target: Tensor, mask: Tensor) -> Summed:
    """Return the mean Huber loss of each thing in the mask (s, k), summed; mean and target are (s, k, ...).

    e^2 / 2 where |e| < 1 and |e| - 1 / 2 beyond (Huber 1964, "Robust Estimation of a Location Parameter").
    """
    error = functional.huber_loss(mean, _labelled(target, mask), reduction="none", delta=HUBER_DELTA)
    return _over_things(error, mask)


def scale_nll(mean: Tensor, log_scale: Tensor, target: Tensor, mask: Tensor) -> Summed:
    """Return the mean Laplace NLL of each thing in the mask (s, k), summed; no gradient reaches the mean."""
    return _over_things(laplace_nll(mean.detach(), log_scale, _labelled(target, mask)), mask)


def bce(logit: Tensor, probability: Tensor, mask: Tensor) -> Summed:
    """Return the binary cross-entropy of logits (s, k) against probabilities, summed over the mask (s, k) or (s, 1)."""
    mask = mask.expand_as(logit)
    error = functional.binary_cross_entropy_with_logits(logit, _labelled(probability, mask), reduction="none")
    return _over_things(error, mask)


def _labelled(target: Tensor, mask: Tensor) -> Tensor:
    """Put zeros where there is no label: a NaN there would reach the gradient even through a mask."""
    return target.where(mask.view(*mask.shape, *(1,) * (target.ndim - mask.ndim)), 0.0)


def _over_things(error: Tensor, mask: Tensor) -> Summed:
    each = error.flatten(mask.ndim).mean(dim=-1) if error.ndim > mask.ndim else error
    return Summed((each * mask).sum(), mask.sum())
