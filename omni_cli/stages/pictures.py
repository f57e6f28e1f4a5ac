"""What people would rather look at: pictures of a run and its evaluation."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from omni_cli import files
from omni_cli.errors import DataError
from omni_cli.recipe import Pair
from omni_cli.samples.camera_frames import camera_frames
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.prompts import camera_title
from omni_cli.samples.waypoints import NUM_HISTORY, check_poses, refusal, waypoints_at
from omni_cli.samples.windows import camera_streams
from omni_cli.scene.clock import Float64Array, latest_at
from omni_cli.scene.ground_paths import path_pixels, path_runs
from omni_cli.scene.recording import CameraStream, Recording
from omni_cli.stages.checkpoints import read_history

_BLUE, _GREY = "#2463a8", "#888888"


def evaluation_pictures(
    folder: Path, run_folder: Path | None, dataset: WindowDataset, pairs: Sequence[Pair]
) -> list[Path]:
    """Draw predicted against true values, the loss of a run, a window's pictures and the skew; return the PNG files."""
    drawn = {
        "predicted.png": predicted_against_true(pairs),
        **({"loss.png": loss_curve(read_history(run_folder))} if run_folder else {}),
        "window.png": window(dataset),
        "skew.png": skew(dataset),
    }
    return [save(figure, folder / name) for name, figure in drawn.items()]


def predicted_against_true(pairs: Sequence[Pair]) -> Figure:
    """Draw one panel a quantity; unreadable answers are ticks at the left edge."""
    figure = Figure(figsize=(5 * len(pairs), 4.6), layout="constrained")
    for axis, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        known = ~np.isnan(pair.predicted)
        both = np.concatenate([pair.truth, pair.predicted[known]])
        limits = [float(both.min()), float(both.max())] if len(both) else [0.0, 1.0]
        axis.plot(limits, limits, color=_GREY, linewidth=1)
        axis.scatter(pair.truth[known], pair.predicted[known], s=14, color=_BLUE, alpha=0.6, linewidths=0)
        axis.plot(pair.truth[~known], np.full((~known).sum(), limits[0]), "|", color="#c02020")
        axis.set_xlabel(f"true {pair.title} [{pair.unit}]")
        axis.set_ylabel(f"predicted {pair.title} [{pair.unit}]")
        axis.set_aspect("equal", adjustable="datalim")
    return figure


def loss_curve(history: Sequence[Mapping[str, float]]) -> Figure:
    """Draw the training loss over steps."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.plot([line["step"] for line in history], [line["loss"] for line in history], ".-", color=_BLUE)
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("training loss")
    return figure


def window(dataset: WindowDataset, index: int = 0) -> Figure:
    """Draw the first and the last instant of a window, with the names of the views."""
    preprocess, instants = dataset.preprocess, dataset.pictures(index).numpy()
    shown = [preprocess.shown(instants[place]) for place in (0, -1)]
    height, width = shown[0].shape[:2]
    figure = Figure(figsize=(11, 11 / 2 * height / width + 0.5), layout="constrained")
    for axis, picture, number in zip(figure.subplots(1, 2), shown, (1, len(instants)), strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(f"frame {number} of {len(instants)}", fontsize=10)
        axis.set_axis_off()
        for x, y, view in preprocess.titles():
            box = {"facecolor": "black", "alpha": 0.5, "pad": 1, "linewidth": 0}
            axis.text(x + 1, y + 1, camera_title(view), color="white", fontsize=8, va="top", bbox=box)
    return figure


def skew(dataset: WindowDataset) -> Figure:
    """Draw how old frames are at their instants, and how far apart the cameras are."""
    rows = [dataset.row(index) for index in range(len(dataset))]
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, column, colour in (
        ("oldest frame", "max_age_us", _BLUE),
        ("spread of cameras", "max_skew_us", "#d08020"),
    ):
        axis.hist([row[column] / 1000 for row in rows], bins=30, alpha=0.6, label=name, color=colour)
    axis.set_xlabel("worst of a window [ms]")
    axis.set_ylabel("windows")
    axis.legend()
    return figure


def write_driven_path(path: Path, recording: Recording, at_us: int, cameras: Sequence[str]) -> Path:
    """Write `driven_path` as a PNG; return its path."""
    return save(driven_path(recording, at_us, cameras), path)


def driven_path(recording: Recording, at_us: int, cameras: Sequence[str]) -> Figure:
    """Draw the true path of the next 6.4 s over each camera's picture of an instant, with a dot a second.

    It proves, or disproves, clocks, poses and calibration together: the line must lie on the road.

    Args:
        recording: with poses from 1.5 s before the instant to 6.4 s after it.
        at_us: the instant; each camera shows its last frame that is not later.
        cameras: with a calibration.

    Raises:
        DataError: a camera is missing or damaged, or the poses do not reach.
    """
    if why := refusal(check_poses(recording), at_us):
        raise DataError(f"{recording.id}: no driven path at {at_us / 1e6:.2f} s, {why}; choose another instant")
    path_m = waypoints_at(recording, np.array([at_us]))[at_us].xyz_m[NUM_HISTORY:]
    columns = min(len(cameras), 2)
    figure = Figure(figsize=(8 * columns, 4.9 * -(-len(cameras) // columns)), layout="constrained")
    streams = camera_streams(recording, cameras).values()
    axes = figure.subplots(-(-len(cameras) // columns), columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, stream in zip(axes, streams, strict=False):
        _draw_path(axis, recording, stream, path_m, at_us)
    return figure


def _draw_path(axis: Any, recording: Recording, stream: CameraStream, path_m: Float64Array, at_us: int) -> None:
    frame = int(latest_at(stream.timestamp_us, np.array([at_us]))[0])
    if frame < 0 or stream.calibration is None:
        raise DataError(f"{recording.id} {stream.name}: no picture at {at_us / 1e6:.2f} s, or no calibration")
    seen, taken_us = camera_frames(f"{recording.id} {stream.name}", stream), int(stream.timestamp_us[frame])
    width_px, height_px = seen.size_px
    ((_, picture),) = seen.decode([frame], width_px=width_px, height_px=height_px, decoder="pyav")
    axis.imshow(picture)
    for run in path_runs(stream.calibration, recording.ego, path_m, taken_us, at_us):
        axis.plot(*run.T, color="#40e070", linewidth=2.2, alpha=0.9)
    dots, is_inside = path_pixels(stream.calibration, recording.ego, path_m[9::10], taken_us, at_us)
    axis.plot(*dots[is_inside].T, "o", color="#ffd040", markersize=5, markeredgecolor="black")
    axis.set_title(f"{camera_title(stream.name)}, taken {(at_us - taken_us) / 1000:.0f} ms before", fontsize=10)
    axis.set_xlim(-0.5, width_px - 0.5)
    axis.set_ylim(height_px - 0.5, -0.5)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG; return its path."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    files.write_bytes(path, buffer.getvalue())
    return path
