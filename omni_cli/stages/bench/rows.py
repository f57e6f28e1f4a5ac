"""What a large GPU is measured by: whole trainings of random weights, each in a process of its own, into one table.

A GPU that is lent for minutes has no network: the models are `random:`, the windows are of a synthetic drive. Rows come
in the order of their worth, and what is measured is on disk before the next row begins, so that neither a row that
fails nor the end of the time costs another.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from omni_cli import files, telemetry
from omni_cli.errors import OmniError, UsageError
from omni_cli.report import Console, counted

_LEAST_S = 30.0  # a row that has less time is not begun
_QWEN2_5 = "model=random:Qwen/Qwen2.5-VL-7B-Instruct"
_QWEN3 = "model=random:Qwen/Qwen3-VL-8B-Instruct"
_KEPT, _AGAIN = "train.gradient_checkpointing=false", "train.gradient_checkpointing=true"
_MISSING = "-"


@dataclass(frozen=True)
class Row:
    """One training to be measured: what is set over the profile, and whether stock TRL takes turns with it."""

    name: str
    sets: tuple[str, ...]
    is_beside_stock: bool
    repeats: int = 5


ROWS = (
    Row("Qwen2.5-VL-7B, LoRA, 32 windows, layers recomputed", (_QWEN2_5, "train.batch_size=32", _AGAIN), True),
    Row("Qwen2.5-VL-7B, LoRA, 8 windows, layers kept", (_QWEN2_5, "train.batch_size=8", _KEPT), False),
    Row("Qwen2.5-VL-7B, LoRA, 4 windows, layers kept", (_QWEN2_5, "train.batch_size=4", _KEPT), True),
    Row("Qwen3-VL-8B, LoRA, 32 windows, layers recomputed", (_QWEN3, "train.batch_size=32", _AGAIN), True),
    Row(
        "Qwen3-VL-8B, LoRA on NF4, 32 windows, layers recomputed",
        (_QWEN3, "quantization=nf4", "train.batch_size=32", _AGAIN),
        False,
    ),
    Row(
        "Qwen2.5-VL-7B, LoRA, 32 windows, layers recomputed, compiled",
        (_QWEN2_5, "train.batch_size=32", _AGAIN, "train.compile=true"),
        False,
    ),
)


@dataclass(frozen=True)
class RowsRequest:
    """What a user asked of `omni bench gpu`."""

    recipe: str  # that learns
    profile: str
    out: Path
    minutes: float  # for all rows together
    sets: tuple[str, ...] = ()  # over those of every row


def bench_gpu(request: RowsRequest, console: Console) -> dict[str, Any]:
    """Measure what a large GPU is measured by.

    Raises:
        UsageError: torch sees no GPU.
        OmniError: no row could be measured.
    """
    if not torch.cuda.is_available():
        raise UsageError("torch sees no GPU; omni bench train measures a CPU")
    return bench_rows(ROWS, request, torch.cuda.get_device_name(), console)


def bench_rows(rows: Sequence[Row], request: RowsRequest, device: str, console: Console) -> dict[str, Any]:
    """Measure rows, each in a process of its own; those before are on disk whatever becomes of the next.

    They lie in a file beside the one that was asked for, which is as it was until there is a row to put there.

    Args:
        rows: in the order of their worth.
        request: where to, and how long at most.
        device: that they run on.
        console: told of each row, and of the table.

    Raises:
        OmniError: none could be measured.
    """
    until_s = time.monotonic() + request.minutes * 60
    document = {
        "device": device,
        "profile": request.profile,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": telemetry.machine_facts(),
    }
    measured: list[dict[str, Any]] = []
    part, failed = request.out.with_name(request.out.name + ".part"), 0
    for row in rows:
        console.say(f"measuring {row.name}")
        measured.append({"name": row.name, "set": list(row.sets), **_measured(row, request, until_s)})
        console.say(f"{row.name}: {_told(measured[-1])}")
        failed = sum("failed" in one for one in measured)
        files.write_json(part, {**document, "failed": failed, "rows": measured})
        if failed < len(measured):
            part.replace(request.out)
    if failed == len(measured):
        raise OmniError(f"no row could be measured, see {part}; the first: {_first_line(measured[0]['failed'])}")
    result = {**document, "failed": failed, "rows": measured, "table": markdown({**document, "rows": measured})}
    told = f"{request.out} holds what was measured, {failed} of {counted(len(measured), 'row')} failed"
    console.say(f"{told}; as a table:\n\n{result['table']}")
    return result


def markdown(document: dict[str, Any]) -> str:
    """Return what was measured as a table for a README, with the device, the date and the versions."""
    versions = document["machine"]["packages"]
    used = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "peft") if name in versions
    )
    titles = ("training", "samples/s", "tokens/s", "MFU", "peak GiB", "loader wait", "against stock TRL")
    lines = [f"{document['device']}, {document['date']}, {used}:", "", _line(titles), _line(["---"] * len(titles))]
    return "\n".join([*lines, *(_line(_cells(row)) for row in document["rows"])])


def _measured(row: Row, request: RowsRequest, until_s: float) -> dict[str, Any]:
    """Return a row's measurement, or why there is none."""
    left_s = until_s - time.monotonic()
    if left_s < _LEAST_S:
        return {"failed": f"not begun: the {request.minutes:g} minutes are over"}
    started_s = time.monotonic()
    with TemporaryDirectory(prefix="omni-rows-") as work:
        try:
            done = subprocess.run(
                _command(row, request, Path(work)),
                env={**_environment(), "TMPDIR": work},  # what a row leaves that is stopped goes with the folder
                capture_output=True,
                text=True,
                timeout=left_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"stopped: the {request.minutes:g} minutes are over"}
    return {"took_s": round(time.monotonic() - started_s, 1), **_result(done.stdout, done.returncode)}


def _command(row: Row, request: RowsRequest, work: Path) -> list[str]:
    """Return the command that measures a row on a synthetic drive, whatever data and runs are here."""
    sets = [word for setting in (*row.sets, *request.sets) for word in ("--set", setting)]
    where = ["--data", str(work / "data"), "--runs", str(work / "runs")]
    beside = [] if row.is_beside_stock else ["--alone"]
    options = ["--profile", request.profile, "--recipe", request.recipe, "--repeats", str(row.repeats), *where, *beside]
    return [sys.executable, "-m", "omni_cli", "bench", "train", *options, *sets, "--quiet", "--json"]


def _environment() -> dict[str, str]:
    # Batches of other lengths would leave holes in memory that no later one fits.
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}


def _result(output: str, code: int) -> dict[str, Any]:
    try:
        document = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        return {"failed": f"ended with code {code} and without a word"}
    if "error" in document:
        return {"failed": document["error"]["message"].removeprefix("this is a bug in omni: ")}
    return {"train": document["parts"]["train"]}


def _told(row: dict[str, Any]) -> str:
    return (
        row["failed"] if "failed" in row else ", ".join(f"{cell}" for cell in _cells(row)[1:3]) + " samples, tokens/s"
    )


def _cells(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        why = _first_line(row["failed"]).partition(". ")[0].replace("|", "/")  # which would end the cell
        return [row["name"], why, *[_MISSING] * 5]
    ratios, step = row["train"]["ratios"], row["train"]["lines"]["step"]
    rates, peak_gib = step["per_second"], step.get("peak_memory_gib")
    over_stock = ratios.get("stock TRL: step / step")
    return [
        row["name"],
        f"{rates['samples']:.2f}",
        f"{rates['tokens']:,.0f}",
        f"{ratios['MFU']:.0%}",
        _MISSING if peak_gib is None else f"{peak_gib:.0f}",
        f"{ratios['data / step']:.1%}",
        _MISSING if over_stock is None else f"{over_stock:.2f}x",
    ]


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
