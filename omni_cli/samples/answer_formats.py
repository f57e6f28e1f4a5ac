"""What a model answers, by what the labels tell: a fixed text that is rendered from targets and read back.

Of 64 waypoints 13 are spoken, every half second and the last: a spline through them finds the others again to
centimetres, as a car is inert. They are written in metres with one decimal, x ahead and y left, with no word between:
Qwen's tokenizers give each digit a token, so that 64 in full would cost some 600 tokens, these cost about 120. A fixed
number of waypoints at fixed times is what a parser can check, and half seconds are what 2 Hz benchmarks score.

Beside its parser each format has a grammar, to which a model can be held while it answers: every text of the grammar is
read by the parser, and every text that targets are rendered to is in the grammar. So is any other that the parser reads
in the same words, for a model that is held must not say another number than when it is free; hence both read numbers by
one pattern. A thought is free where the labels' own is free text; where it states the numbers that are read, as of ego
motion, its words are as fixed as theirs.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import CubicSpline

from omni_cli.samples.tiling import Labels
from omni_cli.scene.clock import Float64Array

GRID_S = np.arange(1, 65) * 0.1  # of the waypoints that are stored
SPOKEN = (*range(4, 60, 5), 63)  # which of them are said: 0.5, 1 ... 6 and 6.4 s
_SPOKEN_S = GRID_S[list(SPOKEN)]
_NUMBER = r"-?[0-9]{1,6}(?:\.[0-9]{1,6})?"
_METRES = r"-?[0-9]{1,3}\.[0-9]"  # of a path
_EGO_MOTION = re.compile(rf"Avg Velocity: ({_NUMBER})m/s\. Total displacement: ({_NUMBER})m\.")
_SPEED = re.compile(rf"Speed ({_NUMBER}) m/s\.")
_PAIRS = f"(?: {_METRES},{_METRES}){{{len(SPOKEN)}}}"
_PATH = rf"Waypoints:({_PAIRS})(?![\d.,-])(?! -?\d)"
_WAYPOINTS = re.compile(_PATH)
_REASONING = re.compile(rf"<think>\n([^\n]+)\n</think>\n{_PATH}")
_EXAMPLE = "Slow down to 00 m/s because the road bends to the left ahead."


@dataclass(frozen=True)
class AnswerGrammar:
    r"""All the texts that are answers in a format: a free thought where there is one, and what is read.

    Attributes:
        said: a regular expression as both Python and Rust read it: of ASCII, digits as `[0-9]`, no look-around.
        most_tokens: by which any answer has ended, if each byte of it is a token: thought, tags, `said` and the end.
        thought_tokens: of the free thought, one line that does not hold its closing tag, at most; 0: there is none.
    """

    said: str
    most_tokens: int
    thought_tokens: int = 0

    @property
    def lark(self) -> str:
        """The grammar as llguidance reads it; at the last token of its budget a thought is closed.

        Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
        """
        said = f"/{self.said.replace('/', chr(92) + '/')}/"
        if not self.thought_tokens:
            return f"start: SAID\nSAID: {said}\n"
        thought = f"thought[max_tokens={self.thought_tokens}]: THOUGHT\nTHOUGHT: /[^\\n]+/ & ~/.*<\\/think>.*/\n"
        return f'start: "<think>\\n" thought "\\n</think>\\n" SAID\n{thought}SAID: {said}\n'

    def holds(self, text: str) -> bool:
        """Say whether a text is in the grammar, whatever the tokens of its thought."""
        thought = r"<think>\n(?:(?!</think>)[^\n])+\n</think>\n" if self.thought_tokens else ""
        return re.fullmatch(thought + self.said, text) is not None


@dataclass(frozen=True)
class AnswerFormat:
    """How one kind of labels is asked for, answered and read back."""

    question: str
    render: Callable[[Mapping[str, Any]], str]  # targets of a window -> answer
    parse: Callable[[str], dict[str, Any] | None]  # and back; None where it is not in the format
    max_tokens: int  # of an answer, at most; it may end before
    zero: Mapping[str, Any]  # targets of a window in which nothing happens
    grammar: AnswerGrammar


def spoken_path(xy_m: Float64Array) -> Float64Array:
    """Return the whole path (64, 2) of its spoken waypoints (13, 2): a cubic spline from the rig through them."""
    knots_s, knots_m = np.append(0.0, _SPOKEN_S), np.vstack([np.zeros((1, 2)), xy_m])
    return np.asarray(CubicSpline(knots_s, knots_m)(GRID_S))


def plain_number(value: float, digits: int) -> str:
    """Format without a negative zero."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _render_ego_motion(targets: Mapping[str, Any]) -> str:
    speed, displacement = float(targets["mean_speed_mps"]), float(targets["displacement_m"])
    said = f"Avg Velocity: {plain_number(speed, 2)}m/s. Total displacement: {plain_number(displacement, 2)}m."
    return f"<think>\n{said}\n</think>\nAction: Displacement of {plain_number(displacement, 1)} meters."


def _parse_ego_motion(text: str) -> dict[str, Any] | None:
    match = _EGO_MOTION.search(text)
    return {"mean_speed_mps": float(match[1]), "displacement_m": float(match[2])} if match else None


def _render_speed(targets: Mapping[str, Any]) -> str:
    # Fixed width: the first digit says the most.
    return f"Speed {plain_number(float(targets['mean_speed_mps']), 0).zfill(3)} m/s."


def _parse_speed(text: str) -> dict[str, Any] | None:
    match = _SPEED.search(text)
    return {"mean_speed_mps": float(match[1])} if match else None


def _render_waypoints(targets: Mapping[str, Any]) -> str:
    xyz_m = np.asarray(targets["future_xyz_m"], dtype=np.float64).reshape(-1, 3)[list(SPOKEN)]
    return "Waypoints: " + " ".join(f"{plain_number(x, 1)},{plain_number(y, 1)}" for x, y, _ in xyz_m.tolist())


def _parse_waypoints(text: str) -> dict[str, Any] | None:
    match = _WAYPOINTS.search(text)
    return {"xy_m": _path_of(match[1])} if match else None


def _render_reasoning(targets: Mapping[str, Any]) -> str:
    return f"<think>\n{targets['reasoning']}\n</think>\n{_render_waypoints(targets)}"


def _parse_reasoning(text: str) -> dict[str, Any] | None:
    match = _REASONING.search(text)
    return {"reasoning": match[1], "xy_m": _path_of(match[2])} if match else None


def _path_of(said: str) -> Float64Array:
    return spoken_path(np.array([pair.split(",") for pair in said.split()], dtype=np.float64))


_STILL = {"mean_speed_mps": 0.0, "displacement_m": 0.0}
_PARKED = {"future_xyz_m": np.zeros(3 * len(GRID_S)), "reasoning": _EXAMPLE}
_WHERE = "Where is it 0.5, 1.0 ... 6.0 and 6.4 s after the last frame, in metres ahead and to the left?"
_WHY = "What does its driver do next, and why? "
_EGO_MOTION_SAID = (
    rf"<think>\nAvg Velocity: {_NUMBER}m/s\. Total displacement: {_NUMBER}m\.\n</think>\n"
    rf"Action: Displacement of {_NUMBER} meters\."
)
_SPEED_SAID = rf"Speed {_NUMBER} m/s\."
_PATH_SAID = f"Waypoints:{_PAIRS}"
FORMATS: Mapping[Labels, AnswerFormat] = {
    "ego-motion": AnswerFormat(
        "How does the car move?", _render_ego_motion, _parse_ego_motion, 96, _STILL,
        AnswerGrammar(_EGO_MOTION_SAID, 144),
    ),
    "speed": AnswerFormat(
        "How does the car move?", _render_speed, _parse_speed, 96, _STILL, AnswerGrammar(_SPEED_SAID, 32)
    ),
    "waypoints": AnswerFormat(
        f"How will the car move? {_WHERE}", _render_waypoints, _parse_waypoints, 256, _PARKED,
        AnswerGrammar(_PATH_SAID, 256),
    ),
    "reasoning": AnswerFormat(
        f"How will the car move? {_WHY}{_WHERE}", _render_reasoning, _parse_reasoning, 768, _PARKED,
        AnswerGrammar(_PATH_SAID, 768, thought_tokens=512),
    ),
}  # fmt: skip
