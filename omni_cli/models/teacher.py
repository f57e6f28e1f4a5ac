"""Driving models of several generations as teachers, run on a recording's steps as the car runs them.

What 5 Hz means. A car runs its model at 20 Hz, but since October 2024 the model's memory lies at 5 Hz: its two pictures
are 0.2 s apart, its features those of now, 0.2 s ago, 0.4 s ago, its desire pulses merged over 0.2 s (openpilot
`modeld.py`, commits e442425c9, d807b5c47, a2c5fca78). So a step fed from the steps before it sees what the model in the
car sees at that instant, once 5 s are behind it; until then the memory holds zeros, and the step is not `warm`.
Generations whose memory lies at 20 Hz cannot be fed truly and are refused.

What `prev_desired_curv` is. Its name says the curvature that the model wanted before; the car's `modeld.py` multiplies
that by zero for every supercombo whose memory lies at 5 Hz, from the first on (`0. * self.prev_desired_curv_20hz[-4]`,
e442425c9 of 2024-10; 5018cf75f of 2024-12 takes the input away), and for pairs since July 2025 (64fd3f986). So zeros
are what these see in the car. The pairs between, from March 2025 on (d807b5c47), did read it back, and are refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omni_cli.errors import DataError
from omni_cli.formats.driving_model import (
    CHECKPOINT_KEY,
    DESIRES,
    FEATURE_LEN,
    HISTORY_STEPS,
    PICTURE_SHAPE,
    TRAFFIC_CONVENTIONS,
)
from omni_cli.models.driving_outputs import Float32Array, parse_outputs
from omni_cli.models.onnx_runtime import AUTO
from omni_cli.models.teacher_graphs import NEEDED, PAST_STEPS, Graph, open_graphs

# What a car that is not known gets: its actuators' typical delay and openpilot's smoothing.
LATERAL_DELAY_S, LONGITUDINAL_DELAY_S = 0.3, 0.45
_FRAME_AND_HALF_S = 0.075  # `action_t` counts from the end of the exposure to the middle of the next interval


@dataclass(frozen=True)
class TeacherState:
    """What a teacher remembers of one recording."""

    features: Float32Array  # (24, 512) of the steps before, the newest last, zeros before the first
    desire: Float32Array  # (24, 8) likewise
    steps: int  # seen so far


@dataclass(frozen=True)
class TeacherLabels:
    """What a teacher says of n steps, in calib: x forward, y right, z down."""

    path_m: Float32Array  # (n, 33, 3) at T_IDXS_S
    lane_lines_m: Float32Array  # (n, 4, 33, 2) y and z at X_IDXS_M: outer left, left, right, outer right
    lane_line_prob: Float32Array  # (n, 4)
    road_edges_m: Float32Array  # (n, 2, 33, 2) y and z: left, right
    lead: Float32Array  # (n, 3, 4) x, y, v, a of the first point of the lead at 0, 2 and 4 s
    lead_prob: Float32Array  # (n, 3)
    warm: npt.NDArray[np.bool_]  # (n,) the teacher's memory of 5 s is real
    state: TeacherState  # for the next steps of the same recording


@dataclass(frozen=True)
class Teacher:
    """A driving model; nothing of a recording stays in it."""

    graphs: tuple[Graph, ...]  # as they run; what a later one says replaces what an earlier one said

    @property
    def provider(self) -> str:
        """Return what runs it: `cuda`, `tensorrt`, `rocm`, `cpu`."""
        return self.graphs[0].session.provider

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what the user should be told of how it runs."""
        return tuple(dict.fromkeys(graph.session.note for graph in self.graphs if graph.session.note))

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Return the names that its files carry."""
        return tuple(graph.session.metadata.get(CHECKPOINT_KEY, "") for graph in self.graphs)

    @property
    def needs_speed(self) -> bool:
        """Return whether `label` must be told the car's speed."""
        return any("lateral_control_params" in graph.session.inputs for graph in self.graphs)

    def label(
        self,
        pictures: npt.NDArray[np.uint8],
        desire: Float32Array,
        traffic: Float32Array,
        *,
        speed_mps: Float32Array | None = None,
        lateral_delay_s: float = LATERAL_DELAY_S,
        longitudinal_delay_s: float = LONGITUDINAL_DELAY_S,
        state: TeacherState | None = None,
    ) -> TeacherLabels:
        """Say what the teacher sees at n consecutive steps of one recording, 0.2 s apart.

        Args:
            pictures: (n + 1, 2, 6, 128, 256) the narrow and the wide view; step i sees pictures i and i + 1.
            desire: (n, 8) one where a desire begins; column 0 is never set.
            traffic: (2,) one-hot: right-hand, left-hand traffic.
            speed_mps: (n,); only where `needs_speed`.
            lateral_delay_s: from a command to the wheels, with smoothing.
            longitudinal_delay_s: from a command to the acceleration, with smoothing.
            state: of the steps before these; None begins a recording.

        Raises:
            ValueError: shapes do not fit one another, or the speed is missing.
            DataError: the model's answer is not finite.
        """
        if speed_mps is None and not self.needs_speed:
            speed_mps = np.zeros(len(desire), np.float32)
        speed = _check_shapes(pictures, desire, traffic, speed_mps)
        before = state or _new_state()
        features = np.concatenate([before.features, np.zeros((len(desire), FEATURE_LEN), np.float32)])
        desires = np.concatenate([before.desire, desire.astype(np.float32)])
        sources: Mapping[str, Callable[[int, int], npt.NDArray[Any]]] = {
            **dict.fromkeys(("img", "input_imgs"), partial(_pairs, pictures[:, 0])),
            **dict.fromkeys(("big_img", "big_input_imgs"), partial(_pairs, pictures[:, 1])),
            **dict.fromkeys(("desire", "desire_pulse"), partial(_windows, desires, HISTORY_STEPS)),
            "traffic_convention": partial(_repeated, traffic),
            "prev_desired_curv": partial(_repeated, np.zeros((HISTORY_STEPS, 1))),  # as in the car: see above
            "action_t": partial(_repeated, np.add([lateral_delay_s, longitudinal_delay_s], _FRAME_AND_HALF_S)),
            "lateral_control_params": partial(_with_delay, speed, lateral_delay_s),
        }
        said: dict[str, Float32Array] = {}
        for graph in self.graphs:
            memory = {"features_buffer": partial(_windows, features, graph.memory_steps)}
            said |= _run(graph, {**sources, **memory}, features, len(desire))
        return _labels(said, before, features, desires)


def open_teacher(paths: Sequence[Path], providers: str = AUTO, *, threads: int = 0) -> Teacher:
    """Load a teacher; see `open_graphs`."""
    return Teacher(open_graphs(paths, providers, threads=threads))


def _new_state() -> TeacherState:
    return TeacherState(
        np.zeros((PAST_STEPS, FEATURE_LEN), np.float32), np.zeros((PAST_STEPS, DESIRES), np.float32), steps=0
    )


def _check_shapes(
    pictures: npt.NDArray[np.uint8], desire: Float32Array, traffic: Float32Array, speed_mps: Float32Array | None
) -> Float32Array:
    """Return the speed, which must be there."""
    steps = len(desire)
    expected = ((steps + 1, 2, *PICTURE_SHAPE), (steps, DESIRES), (TRAFFIC_CONVENTIONS,), (steps,))
    found = (pictures.shape, desire.shape, traffic.shape, None if speed_mps is None else speed_mps.shape)
    if speed_mps is None or found != expected or not steps:
        raise ValueError(f"pictures, desire, traffic, speed: shapes {found}, expected {expected} of one step or more")
    return speed_mps


def _run(
    graph: Graph, sources: Mapping[str, Callable[[int, int], npt.NDArray[Any]]], features: Float32Array, steps: int
) -> dict[str, Float32Array]:
    """Run one graph over all steps, and put the features that it says into `features` as it goes."""
    said = []
    for start in range(0, steps, graph.batch):
        stop = min(start + graph.batch, steps)
        inputs = {name: sources[name](start, stop).astype(spec.dtype) for name, spec in graph.session.inputs.items()}
        said.append(parse_outputs(graph.session.run(inputs)[0], graph.slices))
        if graph.role != "policy":
            features[PAST_STEPS + start : PAST_STEPS + stop] = said[-1]["hidden_state"]
    return {name: np.concatenate([one[name] for one in said]) for name in said[0]}


def _pairs(pictures: npt.NDArray[np.uint8], start: int, stop: int) -> npt.NDArray[np.uint8]:
    return np.concatenate([pictures[start:stop], pictures[start + 1 : stop + 1]], axis=1)


def _windows(padded: Float32Array, length: int, start: int, stop: int) -> Float32Array:
    return np.stack([padded[step : step + length] for step in range(start, stop)])


def _repeated(value: npt.NDArray[Any], start: int, stop: int) -> npt.NDArray[Any]:
    return np.repeat(value[None], stop - start, axis=0)


def _with_delay(speed_mps: Float32Array, delay_s: float, start: int, stop: int) -> Float32Array:
    return np.stack([speed_mps[start:stop], np.full(stop - start, delay_s)], axis=1)


def _labels(
    said: Mapping[str, Float32Array], before: TeacherState, features: Float32Array, desires: Float32Array
) -> TeacherLabels:
    steps = len(said["plan"])
    for name in NEEDED:
        bad = ~np.isfinite(said[name]).reshape(steps, -1).all(axis=1)
        if bad.any():
            step = before.steps + int(bad.argmax())
            raise DataError(f"the teacher's '{name}' is not finite at step {step}; float16 on another provider?")
    return TeacherLabels(
        path_m=said["plan"][:, :, :3],
        lane_lines_m=said["lane_lines"],
        lane_line_prob=said["lane_lines_prob"],
        road_edges_m=said["road_edges"],
        lead=said["lead"][:, :, 0],
        lead_prob=said["lead_prob"],
        warm=before.steps + np.arange(steps) >= PAST_STEPS,
        state=TeacherState(features[-PAST_STEPS:].copy(), desires[-PAST_STEPS:].copy(), before.steps + steps),
    )
