"""What is said to a model and read back from it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_cli.recipes.vlm import Vlm
from omni_cli.samples.prompts import ANSWERED, camera_title, parse_answer, render_answer, render_prompt

SEEDS_FORMAT = """<think>
Avg Velocity: 5.23m/s. Total displacement: 42.15m.
</think>
Action: Displacement of 42.1 meters."""


def test_the_seeds_answer_format_letter_for_letter() -> None:
    assert render_answer("ego-motion", {"mean_speed_mps": 5.23, "displacement_m": 42.149}) == SEEDS_FORMAT


@pytest.mark.parametrize(("labels", "tolerance"), [("ego-motion", 0.0051), ("speed", 0.5001)])
@given(speed=st.floats(-40, 70), displacement=st.floats(-500, 500))
def test_an_answer_reads_back_to_its_precision(labels, tolerance, speed, displacement) -> None:
    truth = {"mean_speed_mps": speed, "displacement_m": displacement}
    text = render_answer(labels, truth)
    values = parse_answer(labels, text)
    assert values is not None
    assert tuple(values) == ANSWERED[labels]
    assert all(abs(value - truth[name]) <= tolerance for name, value in values.items())
    assert not any(f"-{zero}" in text.split() for zero in ("0", "0.0", "0.00"))


@pytest.mark.parametrize("text", ["", "Avg Velocity: fast", "Avg Velocity: 5.23m/s.", "Speed x m/s."])
def test_an_unreadable_answer_is_none(text: str) -> None:
    assert parse_answer("ego-motion", text) is None
    assert parse_answer("speed", text) is None


def test_the_prompt_names_cameras_and_time_and_holds_every_placeholder() -> None:
    preprocess = Vlm(model="tiny:qwen2_5_vl", sample={"cameras": "4-cam", "window": 8}).preprocess()
    prompt = render_prompt(preprocess, 7.25)
    assert prompt.count("<|video_pad|>") == preprocess.visual_tokens
    assert "front wide, front tele, rear left, rear right" in prompt
    assert "7.25" not in prompt
    told = preprocess.model_copy(update={"past_speed": True})
    assert "7.25 m/s" in render_prompt(told, 7.25)


def test_qwen3_states_the_time_of_each_grid() -> None:
    preprocess = Vlm(model="tiny:qwen3_vl", sample={"window": 4, "rate_hz": 2.0}).preprocess()
    prompt = render_prompt(preprocess, 0.0)
    assert "<0.2 seconds><|vision_start|>" in prompt
    assert "<1.2 seconds><|vision_start|>" in prompt
    assert prompt.count("<|vision_start|>") == preprocess.grid[0]


def test_camera_titles() -> None:
    assert camera_title("camera_cross_left_120fov") == "cross left"
    assert camera_title("qcamera") == "qcamera"
