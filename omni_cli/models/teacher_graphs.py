"""The ONNX files of a driving model: which generation they are, what each does, where its outputs lie.

The generation is read from the names and shapes of the inputs, never from a file's name. Source of the generations:
openpilot `selfdrive/modeld` from e442425c9 (2024-10) to v0.10.3, and its models of 2026.
"""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_cli.errors import DataError
from omni_cli.formats.driving_model import (
    DESIRES,
    FEATURE_LEN,
    HISTORY_STEPS,
    PICTURE_SHAPE,
    SLICES_KEY,
    TRAFFIC_CONVENTIONS,
    decode_slices,
    read_metadata,
)
from omni_cli.models.driving_outputs import check_widths
from omni_cli.models.onnx_runtime import AUTO, OnnxSession, open_session

PAST_STEPS = HISTORY_STEPS - 1
_BATCH = 16  # steps at once, where the graph's batch axis is free

_PAIR = (2 * PICTURE_SHAPE[0], *PICTURE_SHAPE[1:])
_PICTURES = ({"img", "big_img"}, {"input_imgs", "big_input_imgs"})
_INPUTS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("img", "big_img", "input_imgs", "big_input_imgs"), _PAIR),
    **dict.fromkeys(("desire", "desire_pulse"), (HISTORY_STEPS, DESIRES)),
    "traffic_convention": (TRAFFIC_CONVENTIONS,),
    "lateral_control_params": (2,),
    "prev_desired_curv": (HISTORY_STEPS, 1),
    "action_t": (2,),
}
_MEMORY = {"policy": HISTORY_STEPS, "supercombo": PAST_STEPS}  # a supercombo adds the newest features itself
NEEDED = ("plan", "lane_lines", "lane_lines_prob", "road_edges", "lead", "lead_prob", "hidden_state")
_KNOWN = (
    "known are the vision + policy pairs since July 2025 (v0.10), the vision + on-policy + off-policy triple of "
    "2026-02, the supercombos of 2024-10 and 2026-06"
)


@dataclass(frozen=True)
class Graph:
    """One ONNX program of a driving model."""

    session: OnnxSession
    slices: Mapping[str, slice]
    role: str  # vision, policy, supercombo
    batch: int  # steps at once

    @property
    def memory_steps(self) -> int:
        """Return how many steps its features buffer holds; 0: it has none."""
        return _MEMORY.get(self.role, 0)


def open_graphs(paths: Sequence[Path], providers: str = AUTO, *, threads: int = 0) -> tuple[Graph, ...]:
    """Load the files of one model; what a later graph says replaces what an earlier one said.

    Args:
        paths: its .onnx files, in any order.
        providers: see `open_session`.
        threads: see `open_session`.

    Raises:
        UsageError: see `open_session`.
        DataError: a file is damaged, of an unknown generation, without slices, or the files do not belong together.
        OmniError: see `open_session`.
    """
    graphs = [_graph(open_session(path, providers, threads=threads)) for path in paths]
    for path in paths:
        _check_is_one_file(path)
    # The off-policy says lanes and leads; a plan is the on-policy's, which therefore comes last.
    graphs.sort(key=lambda graph: (graph.role != "vision", "lane_lines" not in graph.slices))
    _check_set(graphs)
    return tuple(graphs)


def _check_is_one_file(path: Path) -> None:
    """Refuse a program whose weights lie in another file: a model is known, and copied, by what its own files hold.

    Raises:
        DataError: they do.
    """
    if importlib.util.find_spec("onnx") is None:
        return
    onnx: Any = importlib.import_module("onnx")
    tensors = onnx.load(str(path), load_external_data=False).graph.initializer
    if apart := [one.name for one in tensors if one.data_location == onnx.TensorProto.EXTERNAL]:
        raise DataError(
            f"{path}: {len(apart)} of its weights lie in another file; expected a program in one: "
            "write it again with onnx.save_model(onnx.load(FILE), FILE)"
        )


def sidecar_of(path: Path) -> Path:
    """Return where openpilot releases the slices of an ONNX file that does not hold them itself."""
    return path.with_name(f"{path.stem}_metadata.pkl")


def _role(session: OnnxSession) -> str:
    names = set(session.inputs)
    pictures = names & set().union(*_PICTURES)
    remembers = {"features_buffer", "traffic_convention"} <= names and bool(names & {"desire", "desire_pulse"})
    if pictures in _PICTURES and names == pictures:
        return "vision"
    if remembers and names <= {*_INPUTS, "features_buffer"} and (not pictures or pictures in _PICTURES):
        return "supercombo" if pictures else "policy"
    raise _unknown(session)


def _check_inputs(session: OnnxSession, role: str) -> None:
    expected = {**_INPUTS, "features_buffer": (_MEMORY.get(role, 0), FEATURE_LEN)}
    for name, spec in session.inputs.items():
        if spec.shape[1:] != expected[name] or spec.shape[0] not in (1, None):
            raise _unknown(session)


def _unknown(session: OnnxSession) -> DataError:
    found = ", ".join(f"{name} {list(spec.shape[1:])}" for name, spec in session.inputs.items())
    return DataError(f"{session.path}: a model of the inputs {found}: {_reason(session)}; {_KNOWN}")


def _reason(session: OnnxSession) -> str:
    memory = session.inputs.get("features_buffer")
    if any(name.startswith("state_") for name in session.inputs):
        return "it keeps a memory of 20 Hz inside the graph, and omni looks at 5 Hz"
    if memory and memory.shape[1] in (99, 100):
        return "it remembers features at 20 Hz, and omni looks at 5 Hz"
    if "calib" in session.inputs:
        return "it watches the driver, not the road"
    return "no driving model that omni knows has them"


def _graph(session: OnnxSession) -> Graph:
    role = _role(session)
    _check_inputs(session, role)
    width = _width(session)
    slices = _slices(session)
    if width is not None:
        check_widths(slices, width, str(session.path))
    is_free = all(spec.shape[0] is None for spec in session.inputs.values()) and role != "supercombo"
    return Graph(session, slices, role, _BATCH if is_free else 1)


def _width(session: OnnxSession) -> int | None:
    shapes = {name: spec.shape for name, spec in session.outputs.items()}
    if [len(shape) for shape in shapes.values()] != [2]:
        raise DataError(f"{session.path}: answers with {shapes}; expected one vector for each step")
    return next(iter(shapes.values()))[1]


def _slices(session: OnnxSession) -> dict[str, slice]:
    path = session.path
    sidecar = sidecar_of(path)
    if SLICES_KEY in session.metadata:
        return decode_slices(session.metadata[SLICES_KEY], f"{path}: {SLICES_KEY}")
    if sidecar.is_file():
        return dict(read_metadata(sidecar).output_slices)
    raise DataError(
        f"{path}: its metadata has no '{SLICES_KEY}' and there is no {sidecar.name} beside it; without one of them "
        "nobody knows where its outputs lie: put the file there that openpilot releases with the model"
    )


def _check_set(graphs: Sequence[Graph]) -> None:
    """Check that the files are one model.

    Raises:
        DataError: they are not.
    """
    paths = ", ".join(str(graph.session.path) for graph in graphs)
    roles = sorted(graph.role for graph in graphs)
    if roles not in (["supercombo"], ["policy", "vision"], ["policy", "policy", "vision"]):
        raise DataError(f"{paths}: found {' + '.join(roles) or 'nothing'}; expected the files of one model: {_KNOWN}")
    names = {name for graph in graphs for name in graph.session.inputs}
    if {"input_imgs", "prev_desired_curv"} <= names and len(graphs) > 1:  # a supercombo is given zeros in the car too
        raise DataError(
            f"{paths}: a pair of before July 2025 reads back the curvature that it said 0.05 s ago, and omni looks "
            f"at 5 Hz; {_KNOWN}"
        )
    said = {name for graph in graphs[1:] for name in graph.slices} - {"hidden_state"} | set(graphs[0].slices)
    if missing := [name for name in NEEDED if name not in said]:
        raise DataError(
            f"{paths}: together they say no {', '.join(missing)}; expected the files of one model: {_KNOWN}"
        )
    with_lanes = sum("lane_lines" in graph.slices for graph in graphs[1:])
    if len(graphs) == 3 and with_lanes != 1:
        raise DataError(
            f"{paths}: {with_lanes} of the two policies say lanes; expected 1: an off-policy, and an on-policy"
        )
