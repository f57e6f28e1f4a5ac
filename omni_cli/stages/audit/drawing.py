"""The pictures of an audit's report. Deterministic: the same findings give the same bytes on one machine."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from omni_cli.report import counted
from omni_cli.stages.checks.findings import Finding

STATES = ("not there", "fine", "warned", "refused")
_COLOURS = ("#d9d9d9", "#4c9a6a", "#e8b33a", "#c0392b")
_BLUE, _GREY = "#2463a8", "#888888"
_MAX_COLUMNS = 400  # more recordings than that are drawn as bands
_WORST_SHARE = 0.5  # of a band's colour: one refused recording among hundreds is to be seen
_MAX_BARS = 26
_DPI = 110


def coverage(recordings: Sequence[str], cameras: Sequence[str], state: npt.NDArray[np.int8]) -> Figure:
    """Draw which camera of which recording is fine; of thousands, a mix of neighbours in which the worst stays seen.

    Args:
        recordings: names, in the order of the columns.
        cameras: names of the rows; the last may stand for what concerns no camera.
        state: (rows, columns) index into STATES.
    """
    bands = min(len(recordings), _MAX_COLUMNS)
    edges = np.linspace(0, len(recordings), bands + 1).astype(int)
    drawn = np.stack([_mixed(state[:, a:b]) for a, b in pairwise(edges)], axis=1)
    figure = Figure(figsize=(11, 1.35 + 0.27 * len(cameras)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(drawn, aspect="auto", interpolation="nearest", extent=(0, len(recordings), len(cameras), 0))
    axis.set_yticks(np.arange(len(cameras)) + 0.5, labels=list(cameras), fontsize=9)
    axis.hlines(np.arange(1, len(cameras)), 0, len(recordings), color="white", linewidth=2)
    if len(recordings) <= _MAX_COLUMNS // 4:
        axis.vlines(np.arange(1, len(recordings)), 0, len(cameras), color="white", linewidth=0.6)
    share = f", {len(recordings) / bands:.0f} to a band, the worst of it stands out" if len(recordings) > bands else ""
    axis.set_xlabel(f"{counted(len(recordings), 'recording')} by name{share}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    marks = [Patch(color=colour, label=name) for name, colour in zip(STATES, _COLOURS, strict=True)]
    figure.legend(handles=marks, loc="outside upper right", ncols=len(marks), frameon=False, fontsize=9)
    return figure


def _mixed(state: npt.NDArray[np.int8]) -> npt.NDArray[np.float64]:
    """Return the colour (rows, 3) of neighbours (rows, recordings): their mean, and the worst of them."""
    colours = np.array([to_rgb(colour) for colour in _COLOURS])
    return np.asarray((1 - _WORST_SHARE) * colours[state].mean(axis=1) + _WORST_SHARE * colours[state.max(axis=1)])


def states(
    recordings: Sequence[str], cameras: Sequence[str], there: Mapping[str, Sequence[str]], findings: Sequence[Finding]
) -> npt.NDArray[np.int8]:
    """Return the state of each camera (row) of each recording (column); a last row is of what concerns no camera.

    Args:
        recordings: names.
        cameras: names.
        there: recording -> its cameras that were read.
        findings: about them.
    """
    column, row = ({name: at for at, name in enumerate(names)} for names in (recordings, cameras))
    state = np.zeros((len(cameras) + 1, len(recordings)), dtype=np.int8)
    for recording, found in there.items():
        state[[row[camera] for camera in found], column[recording]] = STATES.index("fine")
    state[-1] = STATES.index("fine")
    for finding in findings:
        if finding.recording in column:
            level = STATES.index("refused" if finding.severity == "refuse" else "warned")
            at = row.get(finding.camera, len(cameras)), column[finding.recording]
            state[at] = max(state[at], level)
    return state


def histogram(told: Mapping[str, Any], label: str, *, is_log: bool = False) -> Figure:
    """Draw counts by edges; the outermost bins hold what lies beyond them.

    Where one value lies far from the others, neighbours are drawn as one bar: fifty would be lines.
    """
    edges, counts = grouped(*_shown(np.array(told["edges"]), np.array(told["counts"])))
    figure = Figure(figsize=(5.3, 2.9), layout="constrained")
    axis = figure.subplots()
    shares = 100 * counts / max(counts.sum(), 1)
    # a line around each: a bar of one instant in thousands is seen too
    axis.bar(edges[:-1], shares, np.diff(edges), align="edge", color=_BLUE, edgecolor=_BLUE, linewidth=shares > 0)
    axis.set_xlim(edges[0], edges[-1])
    axis.locator_params(axis="x", nbins=6)  # labels of small numbers are long
    axis.set_xlabel(label)
    axis.set_ylabel("share of the time [%]")
    axis.spines[["top", "right"]].set_visible(False)
    if is_log and counts.any():
        axis.set_yscale("log")
        axis.set_ylim(shares[shares > 0].min() / 10, 200)  # the smallest bar is a bar too
    return figure


def phases(cameras: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw how much later each camera's frames are than the reference camera's: range, and median as a dot."""
    names = list(cameras)[::-1]
    told = [cameras[name]["phase_ms"] for name in names]
    figure = Figure(figsize=(5.3, max(1.4, 0.9 + 0.3 * len(names))), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color=_GREY, linewidth=0.8)
    axis.hlines(range(len(names)), [one["min"] for one in told], [one["max"] for one in told], color=_BLUE, linewidth=5,
                alpha=0.35)  # fmt: skip
    axis.plot([one["median"] for one in told], range(len(names)), "o", color=_BLUE, markersize=5)
    axis.set_yticks(range(len(names)), labels=[short(name) for name in names], fontsize=9)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlabel("phase [ms]: median, and from the least to the most")
    axis.spines[["top", "right", "left"]].set_visible(False)
    return figure


def short(camera: str) -> str:
    """Return a camera's name for a label: front wide 120."""
    return camera.removeprefix("camera_").removesuffix("fov").replace("_", " ")


def png(figure: Figure) -> bytes:
    """Return a figure as PNG, without what changes from one call to the next."""
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
    return stream.getvalue()


def grouped(
    edges: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return edges (n + 1,) and counts (n,) of as few neighbours together as make at most _MAX_BARS bars."""
    together = -(-len(counts) // _MAX_BARS)
    begins = np.arange(0, len(counts), together)
    return edges[np.append(begins, len(counts))], np.add.reduceat(counts, begins)


def _shown(
    edges: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the bins that hold something, and one around them."""
    filled = np.flatnonzero(counts)
    if not len(filled):
        return edges, counts
    first, last = max(filled[0] - 1, 0), min(filled[-1] + 2, len(counts))
    return edges[first : last + 1], counts[first:last]
