"""`omni demo`: the whole way on a CPU, without a network, and what each step is for.

A tiny vision-language model learns in full to read its speed from four cameras of one rig. A LoRA adapter then teaches
it the other rig and a longer answer. Everything is measured on drives that were never seen, then merged, exported,
asked about a clip, and timed. With `--base smollm2` a real pretrained language model takes the tiny one's place between
the two: it looks through the tower that the tiny model learned.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from omni_cli.errors import DataError
from omni_cli.formats.physical_ai_av import CAMERA_SETS
from omni_cli.models import graft
from omni_cli.recipe import BuiltModel
from omni_cli.report import Console
from omni_cli.samples.shards import open_shards
from omni_cli.stages import models, runs
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.bench import BenchRequest, bench
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.evaluate import EvalRequest, evaluate, table_of
from omni_cli.stages.export import ExportRequest, export
from omni_cli.stages.fetch import FetchRequest, SyntheticSpec, fetch
from omni_cli.stages.infer import InferRequest, infer, subject_of_run
from omni_cli.stages.merge import MergeRequest, merge
from omni_cli.stages.train import TrainRequest, train

PROFILE = "cpu-tiny"
Base = Literal["tiny", "smollm2"]
_STEPS = {"tiny": 14, "smollm2": 15}
_ADAPTER_RUNS = {"tiny": "adapter", "smollm2": "adapter-smollm2"}  # both fit in one folder
_ADAPTER_STEPS = {"tiny": 400, "smollm2": 150}
_ADAPTER_RATES = {"tiny": 2e-3, "smollm2": 1e-3}
# Many short drives: with few, a model learns what each looks like instead of how it moves (measured).
DRIVES = SyntheticSpec(clips_per_chunk=10, seconds=1.2, fps=10, width_px=96, height_px=54, clutter=0.2)
SAMPLE = {"cameras": "4-cam", "window": 8, "stride": 1, "rate_hz": 10.0, "canvas_px": 112}

RecipeMaker = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class DemoRequest:
    """One call of `omni demo`."""

    folder: Path
    seed: int = 0
    chunks: int = 50  # of the base's drives; the adapter gets half as many
    base_steps: int = 1000
    adapter_steps: int | None = None  # None: what suits the base
    workers: int = 2
    base: Base = "tiny"


@dataclass
class _Story:
    """Numbers the steps and says what each is for."""

    console: Console
    steps: int
    step: int = 0

    @contextmanager
    def tell(self, verb: str, purpose: str) -> Iterator[None]:
        self.step += 1
        self.console.say(f"\n[{self.step}/{self.steps}] omni {verb}: {purpose}")
        started = time.monotonic()
        yield
        self.console.say(f"      {time.monotonic() - started:.0f} s")


def demo(make_recipe: RecipeMaker, request: DemoRequest, console: Console) -> dict[str, Any]:
    """Run the whole way in a folder of its own; run again, it finishes what is missing.

    Args:
        make_recipe: makes a recipe of the demo's profile with some settings laid over it.
        request: the folder and the size.
        console: tells the story.
    """
    started = time.monotonic()
    if request.base == "smollm2":
        graft.smollm2_file()  # missing, it is said now and not in five minutes
    story, runs_folder = _Story(console, _STEPS[request.base]), request.folder / "runs"
    base = make_recipe(base_settings(request))
    base_data = _drives(request, "a", request.chunks, story)
    base_eval = _learn(base, base_data, request, "base", story)
    seeing = runs.open_finished(runs_folder / "base")
    adapted = seeing.final if request.base == "tiny" else _give_language(base, seeing, request, story)
    adapter = make_recipe(adapter_settings(request, adapted))
    adapter_data = _drives(request, "b", request.chunks // 2, story)
    name = _ADAPTER_RUNS[request.base]
    adapter_eval = _learn(adapter, adapter_data, request, name, story)
    made = _use(adapter, runs.open_finished(runs_folder / name), adapter_data, request, story)
    for run_name, report, recipe in (("base", base_eval, base), (name, adapter_eval, adapter)):
        console.table(
            f"{run_name}: {report['windows']} windows of {report['recordings']} drives it never saw",
            *table_of(report, recipe.metrics),
        )
    minutes = (time.monotonic() - started) / 60
    console.say(_farewell(adapter_eval, made, request.folder, minutes))
    return {"folder": str(request.folder), "base": base_eval, "adapter": adapter_eval, **made, "minutes": minutes}


def base_settings(request: DemoRequest) -> dict[str, Any]:
    """Return what the tiny base learns: a whole number of metres a second."""
    return {
        "sample": {**SAMPLE, "labels": "speed"},
        "tune": {"mode": "full"},
        "train": {"max_steps": request.base_steps, "seed": request.seed},
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


_WHY = {
    "base": "a small model learns from nothing to read its speed from pictures",
    "adapter": "LoRA teaches it the other car and the longer answer; the base stays as it is",
    "adapter-smollm2": "LoRA and a new merger teach SmolLM2 to see, the other car, and the longer answer",
}


def _drives(request: DemoRequest, rig: str, chunks: int, story: _Story) -> Path:
    data = request.folder / f"rig-{rig}"
    options = replace(DRIVES, seed=2 * request.seed + (rig == "b"), rig=rig)
    wanted = FetchRequest(
        "synthetic", data, str(chunks), cameras=CAMERA_SETS["4-cam"], workers=request.workers, synthetic=options
    )
    with story.tell("fetch", f"{chunks * options.clips_per_chunk} short synthetic drives of a car with rig {rig}"):
        fetch(wanted, story.console)
    with story.tell("audit", "is every frame where its timestamp says, does the car move as cars can?"):
        audited = audit(AuditRequest(wanted.folder), story.console)
    if audited["refused"]:
        raise DataError(f"{wanted.folder}: {audited['refused']} units refused, named above; delete the folder")
    return data


def _learn(recipe: Any, data: Path, request: DemoRequest, name: str, story: _Story) -> dict[str, Any]:
    console, runs_folder = story.console, request.folder / "runs"
    with story.tell("etl", "windows of eight instants on true time, decoded once, one fifth of the drives held out"):
        shards = Path(etl(recipe, EtlRequest(data, "synthetic", workers=request.workers), console)["shards"])
    with story.tell("train", _WHY[name]):
        train(recipe, TrainRequest(shards, data, runs_folder, name, PROFILE), console)
    with story.tell("eval", "on held-out drives, beside controls that must fail; a twin is trained blind"):
        return evaluate(recipe, runs.open_finished(runs_folder / name), EvalRequest(), console)


def _give_language(recipe: Any, run: runs.Run, request: DemoRequest, story: _Story) -> Path:
    """Make the folder of SmolLM2 under the vision tower of a run."""
    folder, key = request.folder / request.base, models.weights_key(run)
    with story.tell("demo", "SmolLM2, a real language model, takes the tiny one's place under the trained tower"):
        if models.made_from(folder, run_weights=key):
            story.console.say(f"{folder} is made from these weights; nothing to do")
            return folder
        llama, tokenizer = graft.load_llama(graft.smollm2_file())
        seeing = recipe.load(run.manifest.preprocess, run.final).model
        with models.publish_folder(folder, "grafting into") as made:
            recipe.save(BuiltModel(graft.graft(llama, tokenizer, seeing, request.seed), tokenizer), made)
        runs.seal_folder(folder, run_weights=key)
        story.console.say(f"{folder}: the logits of a text are SmolLM2's own, bit for bit")
    return folder


def _use(recipe: Any, run: runs.Run, data: Path, request: DemoRequest, story: _Story) -> dict[str, Any]:
    console = story.console
    with story.tell("merge", "the adapter folded into its base, published only if the logits are the same"):
        merged = merge(recipe, run, MergeRequest(), console)
    with story.tell("export", "the vision tower as ONNX, compared with torch before it is published"):
        exported = export(recipe, run, ExportRequest(format="onnx"), console)
    clip = _held_out_recording(run)
    with story.tell("infer", "what it says of one drive that it never saw, drawn over the pictures"):
        subject = subject_of_run(run)
        asked = InferRequest((clip,), data=data, out=request.folder / "infer" / run.name, overlay=True)
        answers = infer(recipe, subject, asked, console)
    with story.tell("bench", "how fast each part is on this machine"):
        timed = bench(recipe, BenchRequest(None, data, run.folder.parent, PROFILE), console)
    return {"merged": merged, "exported": exported, "infer": answers, "bench": timed}


def _held_out_recording(run: runs.Run) -> str:
    manifest = open_shards(Path(run.manifest.shards.folder)).manifest
    return next(entry.id for entry in manifest.recordings if entry.windows.get("val"))


def _farewell(report: Mapping[str, Any], made: Mapping[str, Any], folder: Path, minutes: float) -> str:
    return (
        f"\n{minutes:.1f} minutes. Look at:\n"
        f"  predicted against true motion   {Path(report['report']).with_name('predicted.png')}\n"
        f"  the whole report                {report['report']}\n"
        f"  answers over the pictures       {folder / 'infer'}\n"
        "Next:\n"
        "  your own video      omni infer clip.mp4\n"
        "  your own routes     omni fetch --source openpilot --from ROUTES\n"
        "  the real data set   omni fetch --chunks 5   (a Hugging Face account that accepted its licence)\n"
        "  a real model        omni train --profile mi300x-bf16 --dry-run\n"
    )
