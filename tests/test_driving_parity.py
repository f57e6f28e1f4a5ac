"""Two programs of a driving model are compared kind by kind: no large number hides a small one that is wrong."""

import math

import numpy as np
import pytest

from omni_cli.errors import OmniError
from omni_cli.formats.driving_model import POLICY_SLICES, VISION_SLICES
from omni_cli.models.driving_net import DrivingNet, new_net
from omni_cli.models.driving_parity import furthest_apart
from omni_cli.recipes.distill import exporting

CONTRACTS = {"vision": (VISION_SLICES, 1576, slice(917, 989, 4)), "policy": (POLICY_SLICES, 1000, slice(0, 495, 15))}
NUMBERS = np.random.default_rng(0)


def said_by(width: int, metres: slice) -> np.ndarray:
    """Two steps of small numbers, and a hundred metres ahead among them."""
    said = NUMBERS.normal(0, 0.1, (2, width)).astype(np.float32)
    said[:, metres] = 111.0
    return said


@pytest.mark.parametrize("name", CONTRACTS)
def test_what_is_wrong_is_named_wherever_it_is(name: str) -> None:
    slices, width, metres = CONTRACTS[name]
    wanted = said_by(width, metres)
    named = [part for part in slices if part != "pad"]
    inside = [index for part in named for index in range(slices[part].start, slices[part].stop)]
    for index in NUMBERS.choice(inside, 60, replace=False):
        found = wanted.copy()
        found[1, index] += 0.01 * max(1.0, float(abs(wanted[:, index]).max()))
        apart = furthest_apart(found, wanted, slices)
        (part,) = (part for part in named if slices[part].start <= index < slices[part].stop)
        assert apart.kind.split(",")[0] == part
        assert apart.share > 0.009


def test_the_same_is_no_difference_and_no_number_is_the_largest() -> None:
    wanted = said_by(1000, slice(0, 495, 15))
    assert furthest_apart(wanted, wanted, POLICY_SLICES).share == 0
    wrong = wanted.copy()
    wrong[0, 992] = np.nan
    apart = furthest_apart(wrong, wanted, POLICY_SLICES)
    assert (apart.kind, apart.share) == ("desire_state", math.inf)


def test_a_small_yaw_counts_as_an_angle() -> None:
    """A hundredth of a radian is nothing beside one metre, and a fifth of what an angle counts at least."""
    wanted = np.zeros((1, 1000), np.float32)
    found = wanted.copy()
    found[0, 11 + 15 * 20] = 0.01
    apart = furthest_apart(found, wanted, POLICY_SLICES)
    assert (apart.kind, apart.share) == ("plan, column 11", pytest.approx(0.2))


@pytest.fixture(scope="module")
def net() -> DrivingNet:
    return new_net("tiny:resnet", num_hypotheses=2, hidden=24, seed=3).eval()


def rehearsed(net: DrivingNet, name: str, index: int, by: float) -> dict[str, float]:
    programs = {one.name: one.module for one in exporting.programs(net, [1], "x")}

    def run(program: str, inputs):
        said = programs[program](**inputs)[0].detach().clone()
        if program == name:
            said[:, index] += by
        return [said]

    return exporting.rehearse(net, run, 1, "float32")


@pytest.mark.parametrize(
    ("name", "index", "kind"),
    [
        ("driving_vision", VISION_SLICES["lane_lines_prob"].start + 1, "lane_lines_prob"),
        ("driving_vision", VISION_SLICES["lead_prob"].start, "lead_prob"),
        ("driving_policy", 11 + 15 * 20, "plan, column 11"),
        ("driving_policy", 1 + 15 * 20, "plan, column 1"),
    ],
)
def test_a_rehearsal_hears_one_wrong_number(net: DrivingNet, name: str, index: int, kind: str) -> None:
    assert max(rehearsed(net, name, index, 0.0).values()) < 1e-6
    with pytest.raises(OmniError, match=rf"over 50 steps {name} differs from the student most in {kind}: by 1\.0e-02"):
        rehearsed(net, name, index, 0.01)
