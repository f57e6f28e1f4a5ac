"""A driving student sees the road: what it learned from pictures beats what needs none, and goes with them."""

import pytest

from omni_cli.commands._compose import recipe_maker
from omni_cli.report import Console
from omni_cli.stages.demo import PROFILE, DemoRequest, driving_demo


@pytest.mark.marathon
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_student_of_the_cars_own_motion_beats_constant_velocity(seed, tmp_path):
    """Held-out drives of the synthetic world, the whole demo with its own settings: minutes on two cores."""
    request = DemoRequest(tmp_path, seed=seed)
    report = driving_demo(recipe_maker("distill", PROFILE), request, Console(quiet=True))["student"]
    of = {condition["name"]: condition for condition in report["conditions"]}
    for key in ("ade_2s", "ade_5s"):
        assert of["model"][key] < of["constant velocity"][key]
        assert of["model"][f"{key}_interval"][1] < of["constant velocity"][f"{key}_interval"][0]
        assert of["pictures swapped"][key] > of["constant velocity"][key]
