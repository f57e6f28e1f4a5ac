"""What people would rather look at: pictures of a run and its evaluation, and one HTML page that holds them."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from omni_cli import files
from omni_cli.recipe import Pair
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.prompts import camera_title
from omni_cli.stages.checkpoints import read_history

_BLUE, _GREY = "#2463a8", "#888888"


def evaluation_pictures(folder: Path, run_folder: Path, dataset: WindowDataset, pairs: Sequence[Pair]) -> list[Path]:
    """Draw predicted against true values, the loss, a window's pictures and the skew; return the PNG files."""
    drawn = {
        "predicted.png": predicted_against_true(pairs),
        "loss.png": loss_curve(read_history(run_folder)),
        "window.png": window(dataset),
        "skew.png": skew(dataset),
    }
    return [_save(figure, folder / name) for name, figure in drawn.items()]


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
    axis.plot([line["step"] for line in history], [line["loss"] for line in history], color=_BLUE)
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


def write_html(
    path: Path,
    report: Mapping[str, Any],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    drawn: Sequence[Path],
) -> None:
    """Write one page that needs no other file."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    images = "".join(f'<p><img alt="{path.stem}" src="data:image/png;base64,{_base64(path)}"></p>' for path in drawn)
    style = (
        "body{font:15px sans-serif;margin:2em;max-width:75em} img{max-width:100%}"
        "td,th{padding:.2em .9em;text-align:right} td:first-child{text-align:left}"
    )
    numbers = html.escape(json.dumps(report, indent=2, sort_keys=True))
    page = (
        f"<!doctype html><meta charset=utf-8><title>omni eval</title><style>{style}</style>"
        f"<h1>{html.escape(str(report['run']))}</h1><table><tr>{head}</tr>{body}</table>{images}"
        f"<details><summary>numbers</summary><pre>{numbers}</pre></details>\n"
    )
    files.write_text(path, page)


def _save(figure: Figure, path: Path) -> Path:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    files.write_bytes(path, buffer.getvalue())
    return path


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
