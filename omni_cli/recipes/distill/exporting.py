"""A student as the two programs that a car runs, and the proof that they drive alike."""

import copy
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from omni_cli.errors import OmniError, UsageError
from omni_cli.formats.driving_model import POLICY_INPUTS, POLICY_SLICES, VISION_INPUTS, VISION_SLICES
from omni_cli.models import adapters, driving_export
from omni_cli.models.driving_export import POLICY_NAME, VISION_NAME, PolicyContract, VisionContract
from omni_cli.models.driving_net import DrivingNet
from omni_cli.models.driving_parity import Apart, furthest_apart
from omni_cli.recipe import Program, RunProgram
from omni_cli.recipes.distill.rows import noise_drive

_SEED = 20_261
_STEPS = 50  # two buffers full
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2}  # of the largest number of its kind
_REHEARSED = ((VISION_NAME, VISION_SLICES), (POLICY_NAME, POLICY_SLICES))


def whole(model: nn.Module) -> DrivingNet:
    """Return a student without an adapter: its own net, or a merged copy."""
    net = adapters.merge(copy.deepcopy(model)) if isinstance(model, PeftModel) else model
    return cast(DrivingNet, net.eval())


def programs(net: DrivingNet, batches: Sequence[int], checkpoint: str) -> list[Program]:
    """Return both programs, for a fixed batch or, of several, for any.

    Raises:
        UsageError: there are several, and the student can be traced for one only.
    """
    batch = batches[0] if len(batches) == 1 else None
    if batch is None and not net.takes_any_batch:
        raise UsageError(
            f"--batch {batches[0]}-{batches[-1]}: this student was imported from ONNX programs of a fixed batch, and "
            f"is exported for one number of steps; give one, such as --batch {batches[0]}, and export again for others"
        )
    vision, policy = VisionContract(net.vision), PolicyContract(net.policy)
    looks = driving_export.example_inputs(VISION_INPUTS, batch or 2, _SEED)
    plans = driving_export.example_inputs(POLICY_INPUTS, batch or 2, _SEED)
    names = driving_export.OUTPUT_NAMES
    return [
        Program(
            VISION_NAME, vision, looks, names, batch, driving_export.vision_metadata(checkpoint, net.vision.carries)
        ),
        Program(
            POLICY_NAME, policy, plans, names, batch, driving_export.policy_metadata(checkpoint, net.policy.carries)
        ),
    ]


def rehearse(net: DrivingNet, run: RunProgram, batch: int, dtype: str) -> dict[str, float]:
    """Drive with the programs and with the student, both with buffers that slide, and compare all that they say.

    Args:
        net: the student.
        run: (program, inputs) -> outputs.
        batch: that the programs were made for.
        dtype: of the programs.

    Returns:
        by program how far they part at most, as a share of the largest number of its kind.

    Raises:
        OmniError: that is more than 1e-4 (float16: 2e-2).
    """
    vision, policy = VisionContract(net.vision), PolicyContract(net.policy)

    def of(name: str) -> driving_export.Program:
        return lambda inputs: run(name, _repeated(inputs, batch))[0][:1]

    pictures, desire, traffic = noise_drive(_STEPS, _SEED)
    with torch.no_grad():
        found = driving_export.drive(of(VISION_NAME), of(POLICY_NAME), pictures, desire, traffic)
        expected = driving_export.drive(
            lambda inputs: vision(**inputs)[0], lambda inputs: policy(**inputs)[0], pictures, desire, traffic
        )
    both = zip(_REHEARSED, found, expected, strict=True)
    return {
        f"{_STEPS} steps of {name}": _share(name, furthest_apart(said.numpy(), truth.numpy(), slices), dtype)
        for (name, slices), said, truth in both
    }


def _repeated(inputs: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    return {name: tensor.expand(batch, *tensor.shape[1:]).contiguous() for name, tensor in inputs.items()}


def _share(name: str, apart: Apart, dtype: str) -> float:
    if not apart.share <= _TOLERANCE[dtype]:
        raise OmniError(
            f"over {_STEPS} steps {name} differs from the student most in {apart.kind}: by {apart.difference:.1e}, "
            f"{_TOLERANCE[dtype] * apart.largest:.1e} allowed; nothing is published: try --dtype float32"
        )
    return apart.share
