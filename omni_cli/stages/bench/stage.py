"""The stage itself: find or make the inputs, measure the parts asked for, show one table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from omni_cli import telemetry
from omni_cli.config import nearest
from omni_cli.errors import UsageError
from omni_cli.report import Console
from omni_cli.stages.bench.answers import bench_infer
from omni_cli.stages.bench.inputs import Inputs
from omni_cli.stages.bench.latency import bench_export, find_export
from omni_cli.stages.bench.loader import bench_loader
from omni_cli.stages.bench.recordings import bench_etl
from omni_cli.stages.bench.steps import PEAK, PEAK_BESIDE_WEIGHTS, bench_train
from omni_cli.stages.bench.texture import TextureSpec
from omni_cli.stages.bench.timing import Line, Part
from omni_cli.stages.runs import Run

PARTS: Mapping[str, Callable[[Inputs, int], Part]] = {
    "etl": bench_etl,
    "loader": bench_loader,
    "train": bench_train,
    "infer": bench_infer,
    "export": bench_export,
}
_PEAKS = {PEAK: "peak memory of the GPU", PEAK_BESIDE_WEIGHTS: "peak memory beside the weights"}
GPU = "gpu"  # the rows of `bench_gpu`, which are no part of these


@dataclass(frozen=True)
class BenchRequest:
    """What a user asked of `omni bench`."""

    part: str | None  # None: all of them
    data: Path
    runs: Path
    profile: str
    repeats: int = 5
    teacher: tuple[Path, ...] = ()  # its ONNX files, to be measured beside the run's; empty: those of the settings
    run: Run | None = None  # whose settings the recipe has; None: the newest that has the recipe's
    texture: TextureSpec | None = None  # what etl is measured on too where the user's videos are easier to decode
    is_beside_stock: bool = True  # train is measured in turn with the stock library's


def bench(recipe: Any, request: BenchRequest, console: Console) -> dict[str, Any]:
    """Measure how fast the stages are.

    Raises:
        UsageError: an unknown part, or one that needs what is not there.
        OmniError: another omni is taking the raw data away.
    """
    if request.part is not None and request.part not in PARTS:
        raise UsageError(f"nothing to measure called {request.part!r}; {nearest(request.part, (*PARTS, GPU))}")
    with (
        TemporaryDirectory(prefix="omni-bench-") as work,
        Inputs(
            recipe,
            request.data,
            request.runs,
            Path(work),
            console=console,
            teacher=request.teacher,
            run=request.run,
            texture=request.texture,
            is_beside_stock=request.is_beside_stock,
        ) as inputs,
    ):
        parts = [_measure(name, inputs, request.repeats) for name in _chosen(request, inputs, console)]
    device, threads = _device(), torch.get_num_threads()
    title = f"{request.profile} on {device}, torch threads {threads}, {request.repeats} repeats"
    console.table(title, ("what", "p50", "p95", "p99", "a second"), [row for part in parts for row in _rows(part)])
    return {
        "profile": request.profile,
        "recipe": recipe.name,
        "model": recipe.model,
        "precision": recipe.precision,
        "device": device,
        "threads": threads,
        "parts": {part.name: part.facts() for part in parts},
        "machine": telemetry.machine_facts(),
    }


def _chosen(request: BenchRequest, inputs: Inputs, console: Console) -> list[str]:
    if request.part is not None:
        return [request.part]
    if find_export(inputs) is None:
        console.say("export is left out: no ONNX export of a run of this profile (omni export --format onnx)")
        return [name for name in PARTS if name != "export"]
    return list(PARTS)


def _measure(name: str, inputs: Inputs, repeats: int) -> Part:
    inputs.console.say(f"measuring {name}")
    part = PARTS[name](inputs, repeats)
    inputs.console.say(f"{name}: {part.on}")
    return part


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else telemetry.cpu_name()


def _rows(part: Part) -> list[tuple[str, ...]]:
    ratios = [("  " + name, f"{ratio:.2f}x", "", "", "") for name, ratio in part.ratios.items()]
    return [*(row for line in part.lines for row in (_row(part.name, line), *_peaks(line))), *ratios]


def _peaks(line: Line) -> list[tuple[str, ...]]:
    """Return a row on the memory that a line notes; a None was not measured."""
    peaks = [(title, line.notes[key]) for key, title in _PEAKS.items() if key in line.notes]
    return [(f"  {title}", "not measured" if gib is None else f"{gib:.3f} GiB", "", "", "") for title, gib in peaks]


def _row(part: str, line: Line) -> tuple[str, ...]:
    facts = line.timing.facts()
    rates = ", ".join(f"{rate:,.1f} {unit}" for unit, rate in line.rates().items())
    return f"{part}: {line.what}", *(_short(facts[name]) for name in ("median_s", "p95_s", "p99_s")), rates


def _short(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
