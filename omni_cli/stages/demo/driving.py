"""The demo of the `distill` recipe: a tiny driving student learns to plan from pictures of winding roads.

Its teacher is the car's own motion. A car that slows for bends is where its speed and turn of now do not lead, so a
plan is better than keeping both only if the road ahead was seen; shown another drive's road, the student must fail.
"""

import time
from dataclasses import replace
from typing import Any

from omni_cli.errors import UsageError
from omni_cli.formats.physical_ai_av import CAMERA_SETS
from omni_cli.report import Console
from omni_cli.stages import runs
from omni_cli.stages.demo.request import DemoRequest, RecipeMaker
from omni_cli.stages.demo.steps import (
    Drives,
    Lesson,
    Story,
    ask_and_time,
    export_model,
    farewell,
    learn,
    render_drives,
    show_table,
)
from omni_cli.stages.fetch import SyntheticSpec

_STEPS = 8
_CHUNKS, _BASE_STEPS = 25, 600
# Five frames a second are what a driving model looks at; twelve seconds leave a path of ten to learn.
DRIVES = SyntheticSpec(
    clips_per_chunk=10, seconds=12.0, fps=5, width_px=480, height_px=270, rig="a", clutter=0.5, roads="winding"
)
SAMPLE = {"cameras": "1-cam", "window": 8, "stride": 7, "max_age_ms": 250.0}
_LESSON = Lesson(
    run="student",
    windows="a second and a half of model frames each, warped from the calibrated camera; one fifth held out",
    why="a small student learns from nothing to plan the path that the car took",
    blind=False,  # it takes as long as the student; pictures swapped tell as much
)
_NEXT = (
    "your own routes        omni fetch --source openpilot --from ROUTES && omni etl --recipe distill",
    "openpilot's model      omni etl --recipe distill --teacher driving_vision.onnx,driving_policy.onnx",
    "a real backbone        omni train --recipe distill --profile mi300x-bf16 --dry-run",
)


def driving_demo(make_recipe: RecipeMaker, request: DemoRequest, console: Console) -> dict[str, Any]:
    """Run the whole way in a folder of its own; run again, it finishes what is missing.

    Args:
        make_recipe: makes a recipe of the demo's profile with some settings laid over it.
        request: the folder and the size.
        console: tells the story.

    Raises:
        UsageError: something is asked for that it has not.
    """
    if request.base != "tiny" or request.adapter_steps is not None:
        raise UsageError("--base and --adapter-steps: this demo has no adapter; leave them out")
    started = time.monotonic()
    story, recipe = Story(console, _STEPS), make_recipe(student_settings(request))
    drives = Drives(
        name="drives",
        spec=replace(DRIVES, seed=request.seed),
        num_chunks=request.chunks or _CHUNKS,
        cameras=CAMERA_SETS["1-cam"],
        about="short synthetic drives along winding roads",
    )
    data = render_drives(drives, request, story)
    report = learn(recipe, _LESSON, data, request, story)
    run = runs.open_finished(request.folder / "runs" / _LESSON.run)
    purpose = "vision and policy as ONNX, compared with torch over fifty steps before they are published"
    made = {"exported": export_model(recipe, run, purpose, story)} | ask_and_time(recipe, run, data, request, story)
    show_table(_LESSON.run, report, recipe, console)
    minutes = (time.monotonic() - started) / 60
    console.say(farewell(report, request.folder, minutes, _NEXT))
    return {"folder": str(request.folder), _LESSON.run: report, **made, "minutes": minutes}


def student_settings(request: DemoRequest) -> dict[str, Any]:
    """Return what the student learns, and from which windows."""
    return {
        "sample": SAMPLE,
        "train": {
            "batch_size": 8,
            "max_steps": request.base_steps or _BASE_STEPS,
            "warmup_steps": 2,
            "seed": request.seed,
        },
    }
