"""Rows of steps as a batch, and what a student said as predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import one_hot

from omni_cli.formats.driving_model import DESIRES, FEATURE_LEN, NUM_POINTS, PICTURE_SHAPE
from omni_cli.models.driving_losses import VisionLabels
from omni_cli.models.driving_net import DrivingNet, Plans, VisionOutputs, save_net
from omni_cli.recipe import Batch, Prediction, Row
from omni_cli.samples.model_steps import ModelFramePreprocess
from omni_cli.scores.paths import best_hypothesis

_NOT_COUNTED = -100  # what the Trainer takes for no label
_NOISE_SEED = 20_260
_SEEN_NUMBERS = FEATURE_LEN + 4 * (NUM_POINTS * 4 + 1) + 2 * NUM_POINTS * 4 + 3 * (4 * 2 + 1)  # lanes, edges, leads
_SCENE_SHAPES = {
    "scene_is_known": (),
    "scene_lane_lines_m": (4, NUM_POINTS, 2),
    "scene_lane_line_prob": (4,),
    "scene_road_edges_m": (2, NUM_POINTS, 2),
    "scene_lead": (3, 4),
    "scene_lead_prob": (3,),
}


def collate(rows: Sequence[Row], steps: int, warmup_steps: int) -> Batch:
    """Stack rows of n steps.

    A step counts that is not of the warm-up, that the filters let pass, and whose path has a point. `labels` says so in
    the Trainer's words, which counts them over the whole step of the optimiser.

    Args:
        rows: of the dataset.
        steps: n of a row.
        warmup_steps: the first of a row, which do not count.
    """
    counts = torch.stack([row["counts"] for row in rows]) * (torch.arange(steps) >= warmup_steps)
    points = torch.stack([row["target_points"] for row in rows]) * counts
    left = torch.tensor([row["left_hand_traffic"] for row in rows])
    batch: dict[str, Tensor] = {
        "pictures": torch.stack([row["pictures"] for row in rows]),
        "desire_pulse": _pulses(torch.stack([row["desire_pulse"] for row in rows])),
        "traffic_convention": one_hot(left.long(), 2).float(),
        "target_xy_m": torch.stack([row["target_xy_m"] for row in rows]).view(len(rows), steps, NUM_POINTS, 2),
        "target_points": points,
        "labels": torch.where(points > 0, 1, _NOT_COUNTED),
    }
    return batch | _scene(rows, steps, counts)


def noise_rows(preprocess: ModelFramePreprocess, count: int = 2) -> list[Row]:
    """Return windows of seeded noise, one in each traffic, without labels."""
    generator, steps = torch.Generator().manual_seed(_NOISE_SEED), preprocess.steps
    return [
        {
            "pictures": torch.randint(0, 256, preprocess.window_shape, dtype=torch.uint8, generator=generator),
            "desire_pulse": torch.randint(0, DESIRES, (steps,), generator=generator),
            "left_hand_traffic": number % 2,
            **unlabelled(steps),
        }
        for number in range(count)
    ]


def noise_drive(steps: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return seeded pictures (steps + 1, 2, 6, 128, 256), desire pulses (steps, 8) and right-hand traffic (2,)."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (steps + 1, 2, *PICTURE_SHAPE), dtype=torch.uint8, generator=generator)
    desire = _pulses(torch.randint(0, DESIRES, (steps,), generator=generator))
    return pictures, desire, torch.tensor([1.0, 0.0])


def unlabelled(steps: int) -> Row:
    """Return the targets of a row that has none."""
    return {
        "counts": torch.ones(steps, dtype=torch.int32),
        "target_xy_m": torch.zeros(steps * NUM_POINTS * 2),
        "target_points": torch.zeros(steps, dtype=torch.int32),
        "scene_is_known": torch.zeros(0),
    }


def num_hypotheses(numbers: int) -> int:
    """Return how many plans a step's numbers hold: each adds its 33 x 2 means and scales and one score."""
    return (numbers - _SEEN_NUMBERS) // (NUM_POINTS * 2 * 2 + 1)


def save_student(model: nn.Module, folder: Path) -> None:
    """Write an adapter's folder, or a whole student's."""
    if isinstance(model, PeftModel):
        model.save_pretrained(folder)
    else:
        save_net(cast(DrivingNet, model), folder)


def vision_labels(batch: Batch) -> VisionLabels:
    """Return what the teacher saw at the steps of a batch, flat."""
    values = {name: batch[name].flatten(0, 1) for name in _SCENE_SHAPES}
    known = values.pop("scene_is_known") > 0
    return VisionLabels(known, *values.values())


def predictions(seen: VisionOutputs, plans: Plans, windows: int, *, has_scene: bool) -> list[Prediction]:
    """Return for each window the most likely plan of every step, its scale, and what is on the road if that was taught.

    Args:
        seen: at the steps of all windows.
        plans: likewise.
        windows: how many there are.
        has_scene: lanes and leads were taught.
    """
    logit = plans.logit.float().cpu().numpy()
    values = {
        "xy_m": best_hypothesis(plans.mean_m.float().cpu().numpy(), logit),
        "scale_m": best_hypothesis(plans.log_scale.exp().float().cpu().numpy(), logit),
    }
    if has_scene:
        shown = {"lane_lines_m": seen.lane_lines_m, "road_edges_m": seen.road_edges_m, "lead": seen.lead}
        shown |= {"lane_line_prob": seen.lane_line_logit.sigmoid(), "lead_prob": seen.lead_logit.sigmoid()}
        values |= {name: tensor.float().cpu().numpy() for name, tensor in shown.items()}
    split = {name: array.reshape(windows, -1, *array.shape[1:]) for name, array in values.items()}
    return [Prediction("", {name: array[row] for name, array in split.items()}) for row in range(windows)]


def _pulses(desire: Tensor) -> Tensor:
    """Return one-hot desires; none is all zeros, as openpilot feeds it."""
    pulses = one_hot(desire.long(), DESIRES).float()
    pulses[..., 0] = 0
    return pulses


def _scene(rows: Sequence[Row], steps: int, counts: Tensor) -> dict[str, Tensor]:
    if not len(rows[0]["scene_is_known"]):
        return {}
    stacked = {
        name: torch.stack([row[name] for row in rows]).view(len(rows), steps, *shape)
        for name, shape in _SCENE_SHAPES.items()
    }
    return {**stacked, "scene_is_known": stacked["scene_is_known"] * counts}
