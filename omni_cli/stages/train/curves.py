"""Six panels of a training: what it learned, how fast, and what the machine did meanwhile. Pure drawing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from omni_cli.scene.clock import Float64Array

_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#2463a8", "#c8690a", "#2e7d4f", "#c02020", "#8a8f98"
_GPUS = (_BLUE, "#5b9bd5", "#123c69", "#7fb2e5")
_MOST_POINTS = 1200  # of a curve: more than a panel has pixels
_DOTTED = 40  # as many points or fewer are shown one by one
_STEEP = 50.0  # of the largest to the smallest loss: from there on a logarithmic axis
_DPI = 110
_CLOCKS = ((7200.0, 3600.0, "h"), (180.0, 60.0, "min"), (0.0, 1.0, "s"))

Lines = Sequence[Mapping[str, Any]]
Axis = Any


@dataclass(frozen=True)
class Curve:
    """One quantity."""

    label: str
    unit: str
    colour: str
    x: Float64Array
    y: Float64Array
    has_dots: bool = False


@dataclass(frozen=True)
class Panel:
    """The curves of the left axis and of the right one; those of one axis have one unit."""

    title: str
    x_label: str
    left: Sequence[Curve]
    right: Sequence[Curve] = ()


@dataclass(frozen=True)
class Marks:
    """Where training went on after it had ended, and where it went back."""

    resumed: Sequence[float] = ()
    rolled_back: Sequence[float] = ()


def telemetry_picture(history: Lines, telemetry: Lines, rolled_back_at: Sequence[int] = ()) -> Figure:
    """Draw six panels; what was not measured says so.

    Args:
        history: the logged steps.
        telemetry: the samples of all sessions.
        rolled_back_at: the steps from which training went back.
    """
    figure = Figure(figsize=(15.5, 8.4))
    figure.subplots_adjust(left=0.05, right=0.95, top=0.955, bottom=0.085, wspace=0.36, hspace=0.3)
    (loss, rate, pace), (load, memory, power) = figure.subplots(2, 3)
    opened = [line for line in telemetry if "opened" in line]
    by_step = Marks([line["step"] for line in opened[1:] if line["step"]], rolled_back_at)
    scale, unit = _clock(telemetry)
    by_time = Marks([line["elapsed_s"] / scale for line in opened[1:]])
    samples = [{**line, "clock": line["elapsed_s"] / scale} for line in telemetry if "opened" not in line]
    step, clock = "optimiser step", f"time trained, all sessions [{unit}]"
    _draw(loss, Panel("Loss", step, _losses(history)), by_step)
    _draw(rate, Panel("Learning rate and gradient", step, *_rates(history)), by_step)
    _draw(pace, Panel("Throughput and waiting for data", step, *_paces(history)), by_step)
    _draw(load, Panel("Load", clock, _loads(samples)), by_time)
    _draw(memory, Panel("Memory", clock, _memories(samples)), by_time)
    _draw(power, Panel("Power and energy", clock, *_powers(samples)), by_time)
    _scale_loss(loss, history)
    figure.text(0.5, 0.012, _key(by_time, rolled_back_at), ha="center", color=_GREY, fontsize=9)
    return figure


def _key(by_time: Marks, rolled_back_at: Sequence[int]) -> str:
    """Return what the vertical lines mean, of those that are there."""
    told = ["dotted: training went on after it had ended"] if by_time.resumed else []
    return "; ".join([*told, *(["dashed red: it went back to a checkpoint"] if rolled_back_at else [])])


def png(figure: Figure) -> bytes:
    """Return a picture's file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _losses(history: Lines) -> list[Curve]:
    training = _of(history, "step", "loss", Look("training loss", "loss", _BLUE))
    return [
        *training,
        *_of(history, "step", "validation_loss", Look("validation loss", "loss", _ORANGE, has_dots=True)),
    ]


def _rates(history: Lines) -> tuple[list[Curve], list[Curve]]:
    rate = _of(history, "step", "learning_rate", Look("learning rate", "", _BLUE))
    return rate, _of(history, "step", "grad_norm", Look("gradient norm, before clipping", "", _ORANGE))


def _paces(history: Lines) -> tuple[list[Curve], list[Curve]]:
    unit = "tokens" if any("tokens_per_s" in line for line in history) else "samples"
    pace = _of(history, "step", f"{unit}_per_s", Look(unit, "1/s", _BLUE))
    return pace, _of(history, "step", "data_wait_share", Look("time waiting for data", "%", _ORANGE, factor=100))


def _loads(samples: Lines) -> list[Curve]:
    gpus = _of_gpus(samples, "utilisation_share", "%", 100)
    own = Look("CPU, this training", "%", _GREY if gpus else _BLUE, factor=100)
    curves = [*gpus, *_of(samples, "clock", "process_cpu_share", own)]
    if not gpus:
        curves += _of(samples, "clock", "machine_cpu_share", Look("CPU, whole machine", "%", _GREY, factor=100))
    return curves


def _memories(samples: Lines) -> list[Curve]:
    gpus = _of_gpus(samples, "memory_bytes", "GiB", 2.0**-30)
    own = Look("host, this training", "GiB", _ORANGE if gpus else _BLUE, factor=2.0**-30)
    whole = Look("host, whole machine", "GiB", _GREY, factor=2.0**-30)
    mine = _of(samples, "clock", "process_memory_bytes", own)
    return [*gpus, *mine, *_of(samples, "clock", "machine_memory_bytes", whole)]


def _powers(samples: Lines) -> tuple[list[Curve], list[Curve]]:
    powers = _of_gpus(samples, "power_w", "W", 1.0)
    powers += _of(samples, "clock", "cpu_power_w", Look("CPU packages, whole machine", "W", _GREY))
    total = [{**line, "energy_j": energy_j} for line in samples if (energy_j := energy_of(line)) is not None]
    return powers, _of(total, "clock", "energy_j", Look("energy so far", "Wh", _GREEN, factor=1 / 3600))


def energy_of(line: Mapping[str, Any]) -> float | None:
    """Return what was measured of the energy so far, in joules; None where nothing was."""
    known = [line[name] for name in ("gpu_energy_j", "cpu_energy_j") if name in line]
    return sum(known) if known else None


@dataclass(frozen=True)
class Look:
    """How a quantity is shown."""

    label: str
    unit: str
    colour: str
    factor: float = 1.0
    has_dots: bool = False


def _of_gpus(samples: Lines, name: str, unit: str, factor: float) -> list[Curve]:
    count = max((len(line.get("gpus", ())) for line in samples), default=0)
    curves = []
    for index in range(count):
        look = Look(f"GPU {index}" if count > 1 else "GPU", unit, _GPUS[index % len(_GPUS)], factor)
        lines = [
            line["gpus"][index] | {"clock": line["clock"]} for line in samples if len(line.get("gpus", ())) > index
        ]
        curves += _of(lines, "clock", name, look)
    return curves


def _of(lines: Lines, x: str, y: str, look: Look) -> list[Curve]:
    """Return a curve of the lines that know its quantity; none where no line does."""
    known = [(line[x], line[y] * look.factor) for line in lines if y in line]
    if not known:
        return []
    points = _thinned(np.array(known, dtype=np.float64))
    has_dots = look.has_dots or len(points) <= _DOTTED
    return [Curve(look.label, look.unit, look.colour, points[:, 0], points[:, 1], has_dots)]


def _thinned(pairs: Float64Array) -> Float64Array:
    """Return (points, 2) as means of equally many points, where there are more than can be seen."""
    every = -(-len(pairs) // _MOST_POINTS)
    if every <= 1:
        return pairs
    starts = np.arange(0, len(pairs), every)
    return np.asarray(np.add.reduceat(pairs, starts) / np.diff([*starts, len(pairs)])[:, None])


def _clock(telemetry: Lines) -> tuple[float, str]:
    """Return how many seconds the unit of a time axis has, and its name."""
    most_s = max((line["elapsed_s"] for line in telemetry), default=0.0)
    return next((scale, unit) for least_s, scale, unit in _CLOCKS if most_s >= least_s)


def _draw(axis: Axis, panel: Panel, marks: Marks) -> None:
    axis.set_title(panel.title, fontsize=11.5, fontweight="bold", loc="left")
    axis.set_xlabel(panel.x_label, fontsize=9)
    for name in ("top", "right"):
        axis.spines[name].set_visible(False)
    if not (panel.left or panel.right):
        _say_nothing(axis)
        return
    axis.grid(color="#e6e8eb", linewidth=0.7)
    axis.tick_params(labelsize=8.5, length=3)
    for places, colour, style in ((marks.resumed, _GREY, ":"), (marks.rolled_back, _RED, "--")):
        for place in places:
            axis.axvline(place, color=colour, linewidth=1.1, linestyle=style)
    if panel.right:
        _draw_right(axis, panel.right)
    _draw_curves(axis, panel.left)


def _draw_right(axis: Axis, curves: Sequence[Curve]) -> None:
    """Draw behind what the left axis shows."""
    right = axis.twinx()
    right.tick_params(labelsize=8.5, length=3)
    for name in ("top", "left"):
        right.spines[name].set_visible(False)
    axis.set_zorder(right.get_zorder() + 1)
    axis.patch.set_visible(False)
    _draw_curves(right, curves, is_behind=True)


def _draw_curves(axis: Axis, curves: Sequence[Curve], *, is_behind: bool = False) -> None:
    for curve in curves:
        style = {"marker": "o", "markersize": 3.2} if curve.has_dots else {}
        shown = {"linewidth": 1.1, "alpha": 0.75} if is_behind else {"linewidth": 1.5}
        axis.plot(curve.x, curve.y, color=curve.colour, label=curve.label, **style, **shown)
    if not curves:
        axis.set_yticks([])
        return
    unit = f"[{curves[0].unit}]" if curves[0].unit not in ("", "loss") else ""
    if len(curves) == 1:
        axis.set_ylabel(f"{curves[0].label} {unit}".strip(), color=curves[0].colour, fontsize=9)
    else:
        axis.set_ylabel(unit or curves[0].unit, fontsize=9)
        axis.legend(fontsize=8.5, frameon=False, loc="best")
    axis.yaxis.set_major_formatter("{x:.4g}")
    least, most = min(curve.y.min() for curve in curves), max(curve.y.max() for curve in curves)
    if least >= 0 and most > 0:
        axis.set_ylim(0, most * 1.07)


def _say_nothing(axis: Axis) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color=_GREY, fontsize=12)


def _scale_loss(axis: Axis, history: Lines) -> None:
    """Show a loss that falls by far on a logarithmic axis."""
    losses = [line["loss"] for line in history]
    if losses and min(losses) > 0 and max(losses) / min(losses) > _STEEP:
        axis.set_yscale("log")
        axis.set_ylim(min(losses) * 0.8, max(losses) * 1.25)
