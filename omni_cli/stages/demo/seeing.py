"""The demo of the `vlm` recipe: a tiny vision-language model, then an adapter on it.

The model learns in full to read its speed from four cameras of one rig. A LoRA adapter then teaches it the other rig
and a longer answer. Everything is measured on drives that were never seen, then merged, exported, asked about a clip,
and timed. With `--base smollm2` a real pretrained language model takes the tiny one's place between the two: it looks
through the tower that the tiny model learned.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from omni_cli.formats.physical_ai_av import CAMERA_SETS
from omni_cli.models import graft
from omni_cli.recipe import BuiltModel
from omni_cli.report import Console
from omni_cli.stages import models, runs
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
from omni_cli.stages.merge import MergeRequest, merge

_STEPS = {"tiny": 14, "smollm2": 15}
_CHUNKS, _BASE_STEPS = 50, 1000  # the adapter gets half as many drives
_ADAPTER_RUNS = {"tiny": "adapter", "smollm2": "adapter-smollm2"}  # both fit in one folder
_ADAPTER_STEPS = {"tiny": 400, "smollm2": 150}
_ADAPTER_RATES = {"tiny": 2e-3, "smollm2": 1e-3}
# Many short drives: with few, a model learns what each looks like instead of how it moves (measured).
DRIVES = SyntheticSpec(clips_per_chunk=10, seconds=1.2, fps=10, width_px=96, height_px=54, clutter=0.2)
SAMPLE = {"cameras": "4-cam", "window": 8, "stride": 1, "rate_hz": 10.0, "canvas_px": 112}
_WINDOWS = "windows of eight instants on true time, decoded once, one fifth of the drives held out"
_WHY = {
    "base": "a small model learns from nothing to read its speed from pictures",
    "adapter": "LoRA teaches it the other car and the longer answer; the base stays as it is",
    "adapter-smollm2": "LoRA and a new merger teach SmolLM2 to see, the other car, and the longer answer",
}
_NEXT = (
    "your own video      omni infer clip.mp4",
    "your own routes     omni fetch --source openpilot --from ROUTES",
    "the real data set   omni fetch --chunks 5   (a Hugging Face account that accepted its licence)",
    "a real model        omni train --profile mi300x-bf16 --dry-run",
)


def seeing_demo(make_recipe: RecipeMaker, request: DemoRequest, console: Console) -> dict[str, Any]:
    """Run the whole way in a folder of its own; run again, it finishes what is missing.

    Args:
        make_recipe: makes a recipe of the demo's profile with some settings laid over it.
        request: the folder and the size.
        console: tells the story.
    """
    started = time.monotonic()
    if request.base == "smollm2":
        graft.smollm2_file()  # missing, it is said now and not in five minutes
    story, runs_folder = Story(console, _STEPS[request.base]), request.folder / "runs"
    base = make_recipe(base_settings(request))
    base_eval = learn(base, _lesson("base"), _drives(request, "a", story), request, story)
    seeing = runs.open_finished(runs_folder / "base")
    adapted = seeing.final if request.base == "tiny" else _give_language(base, seeing, request, story)
    adapter, name = make_recipe(adapter_settings(request, adapted)), _ADAPTER_RUNS[request.base]
    adapter_data = _drives(request, "b", story)
    adapter_eval = learn(adapter, _lesson(name), adapter_data, request, story)
    made = _use(adapter, runs.open_finished(runs_folder / name), adapter_data, request, story)
    show_table("base", base_eval, base, console)
    show_table(name, adapter_eval, adapter, console)
    minutes = (time.monotonic() - started) / 60
    console.say(farewell(adapter_eval, request.folder, minutes, _NEXT))
    return {"folder": str(request.folder), "base": base_eval, "adapter": adapter_eval, **made, "minutes": minutes}


def base_settings(request: DemoRequest) -> dict[str, Any]:
    """Return what the tiny base learns: a whole number of metres a second."""
    return {
        "sample": {**SAMPLE, "labels": "speed"},
        "tune": {"mode": "full"},
        "train": {"max_steps": request.base_steps or _BASE_STEPS, "seed": request.seed},
    }


def adapter_settings(request: DemoRequest, base: Path) -> dict[str, Any]:
    """Return what the adapter learns on top of it: the seeds' answer, on the other rig."""
    return {
        "model": str(base),
        "sample": {**SAMPLE, "labels": "ego-motion"},
        "tune": {
            "mode": "lora",
            "rank": 16,
            "alpha": 32,
            "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "train_merger": request.base != "tiny",  # a grafted one is new
        },
        "train": {
            "max_steps": request.adapter_steps or _ADAPTER_STEPS[request.base],
            "learning_rate": _ADAPTER_RATES[request.base],
            "seed": request.seed,
        },
    }


def _lesson(run: str) -> Lesson:
    return Lesson(run, _WINDOWS, _WHY[run], blind=True)


def _drives(request: DemoRequest, rig: str, story: Story) -> Path:
    chunks = request.chunks or _CHUNKS
    drives = Drives(
        name=f"rig-{rig}",
        spec=replace(DRIVES, seed=2 * request.seed + (rig == "b"), rig=rig),
        num_chunks=chunks if rig == "a" else chunks // 2,
        cameras=CAMERA_SETS["4-cam"],
        about=f"short synthetic drives of a car with rig {rig}",
    )
    return render_drives(drives, request, story)


def _give_language(recipe: Any, run: runs.Run, request: DemoRequest, story: Story) -> Path:
    """Make the folder of SmolLM2 under the vision tower of a run."""
    folder, key = request.folder / request.base, models.weights_key(run)
    with story.tell("demo", "SmolLM2, a real language model, takes the tiny one's place under the trained tower"):
        if models.made_from(folder, run_weights=key):
            story.console.say(f"{folder} is made from these weights; nothing to do")
            return folder
        llama, tokenizer = graft.load_llama(graft.smollm2_file())
        seeing = recipe.load(run.manifest.preprocess, run.final).model
        with models.publish_folder(folder, "grafting into") as (made, facts):
            recipe.save(BuiltModel(graft.graft(llama, tokenizer, seeing, request.seed), tokenizer), made)
            facts["run_weights"] = key
        story.console.say(f"{folder}: the logits of a text are SmolLM2's own, bit for bit")
    return folder


def _use(recipe: Any, run: runs.Run, data: Path, request: DemoRequest, story: Story) -> dict[str, Any]:
    with story.tell("merge", "the adapter folded into its base, published only if the logits are the same"):
        merged = merge(recipe, run, MergeRequest(), story.console)
    exported = export_model(
        recipe, run, "tower and decoder as ONNX, compared with torch before they are published", story
    )
    return {"merged": merged, "exported": exported} | ask_and_time(recipe, run, data, request, story)
