"""What the demos have in common: steps that say what they are for, each of which a second call finds done."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_cli.errors import DataError
from omni_cli.report import Console, counted
from omni_cli.samples.shards import open_shards
from omni_cli.stages import runs
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.bench import BenchRequest, bench
from omni_cli.stages.demo.request import PROFILE, DemoRequest
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.evaluate import EvalRequest, evaluate, show_scores
from omni_cli.stages.export import ExportRequest, export
from omni_cli.stages.fetch import FetchRequest, SyntheticSpec, fetch
from omni_cli.stages.infer import InferRequest, infer, subject_of_run
from omni_cli.stages.train import TrainRequest, train


@dataclass
class Story:
    """Numbers the steps and says what each is for."""

    console: Console
    steps: int
    step: int = 0

    @contextmanager
    def tell(self, verb: str, purpose: str) -> Iterator[None]:
        """Say which step begins, and after it how long it took."""
        self.step += 1
        self.console.say(f"\n[{self.step}/{self.steps}] omni {verb}: {purpose}")
        started = time.monotonic()
        yield
        self.console.say(f"      {time.monotonic() - started:.0f} s")


@dataclass(frozen=True)
class Drives:
    """The drives of one lesson: `num_chunks` of a synthetic world under a name of their own."""

    name: str
    spec: SyntheticSpec
    num_chunks: int
    cameras: Sequence[str]
    about: str  # what they are, for the story


def render_drives(drives: Drives, request: DemoRequest, story: Story) -> Path:
    """Render and audit drives, and return the data folder they lie in.

    Raises:
        DataError: the audit refused some.
    """
    data = request.folder / drives.name
    wanted = FetchRequest(
        "synthetic", data, str(drives.num_chunks), cameras=tuple(drives.cameras), workers=request.workers,
        synthetic=drives.spec,
    )  # fmt: skip
    with story.tell("fetch", f"{drives.num_chunks * drives.spec.clips_per_chunk} {drives.about}"):
        fetch(wanted, story.console)
    with story.tell("audit", "is every frame where its timestamp says, does the car move as cars can?"):
        audited = audit(AuditRequest(wanted.folder), story.console)
    if audited["refused"]:
        raise DataError(f"{wanted.folder}: {audited['refused']} units refused, named above; delete the folder")
    return data


@dataclass(frozen=True)
class Lesson:
    """What a recipe learns from drives: the run's name, and why."""

    run: str
    windows: str  # what its windows are
    why: str
    blind: bool  # train a blind twin to compare with


def learn(recipe: Any, lesson: Lesson, data: Path, request: DemoRequest, story: Story) -> dict[str, Any]:
    """Make windows, train, and measure on drives held out."""
    console, runs_folder = story.console, request.folder / "runs"
    with story.tell("etl", lesson.windows):
        shards = Path(etl(recipe, EtlRequest(data, "synthetic", workers=request.workers), console)["shards"])
    with story.tell("train", lesson.why):
        train(recipe, TrainRequest(shards, data, runs_folder, lesson.run, PROFILE), console)
    twin = "; a twin is trained blind" if lesson.blind else ""
    with story.tell("eval", f"on held-out drives, beside controls that must fail{twin}"):
        return evaluate(
            recipe,
            runs.open_finished(runs_folder / lesson.run),
            EvalRequest(blind=lesson.blind, controls="basic"),
            console,
        )


def export_model(recipe: Any, run: runs.Run, purpose: str, story: Story) -> dict[str, Any]:
    """Export what a run learned."""
    with story.tell("export", purpose):
        return export(recipe, run, ExportRequest(format="onnx"), story.console)


def ask_and_time(recipe: Any, run: runs.Run, data: Path, request: DemoRequest, story: Story) -> dict[str, Any]:
    """Let a run's model speak of a drive that it never saw, and time every part."""
    console, clip = story.console, held_out_recording(run)
    with story.tell("infer", "what it says of one drive that it never saw, drawn over the pictures"):
        asked = InferRequest((clip,), data=data, out=request.folder / "infer" / run.name, overlay=True)
        answers = infer(recipe, subject_of_run(run), asked, console)
    with story.tell("bench", "how fast each part is on this machine"):
        timed = bench(recipe, BenchRequest(None, data, run.folder.parent, PROFILE), console)
    return {"infer": answers, "bench": timed}


def held_out_recording(run: runs.Run) -> str:
    """Return a recording that the run was not trained on."""
    manifest = open_shards(Path(run.manifest.shards.folder)).manifest
    return next(entry.id for entry in manifest.recordings if entry.windows.get("val"))


def show_table(name: str, report: dict[str, Any], recipe: Any, console: Console) -> None:
    """Show how well a run's model did beside everything it was compared with."""
    title = f"{name}: {counted(report['windows'], 'window')} of {counted(report['recordings'], 'drive')} it never saw"
    show_scores(title, report, recipe.metrics, console)


def farewell(report: Mapping[str, Any], folder: Path, minutes: float, next_steps: Sequence[str]) -> str:
    """Return where to look and what to try next."""
    return "\n".join(
        [
            f"\n{minutes:.1f} minutes. Look at:",
            f"  predicted against true motion   {Path(report['report']).with_name('predicted.png')}",
            f"  the whole report                {report['report']}",
            f"  answers over the pictures       {folder / 'infer'}",
            "Next:",
            *(f"  {step}" for step in next_steps),
            "",
        ]
    )
