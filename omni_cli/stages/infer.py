"""`omni infer`: ask a model about clips, with the very preprocessing that it was trained with."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from omni_cli import files
from omni_cli.errors import OmniError, UsageError
from omni_cli.recipe import Asked, BuiltModel, Formatted, Inferable, Prediction, Questions, require
from omni_cli.report import Console, counted
from omni_cli.samples import views
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import safe_name
from omni_cli.samples.tiling import TiledPreprocess
from omni_cli.scene.recording import Recording
from omni_cli.stages import runs
from omni_cli.stages.clips import Clip, find_clips
from omni_cli.stages.etl.estimate import slow_line
from omni_cli.stages.etl.identity import slow_cameras
from omni_cli.stages.models import ModelFolder, check_base, ready_device
from omni_cli.stages.overlay import Said, write_overlay

_BATCH = 8  # windows; of one generation they wait for the longest answer
_LINES_SHOWN = 20  # of a clip's answers; all of them are in its file


@dataclass(frozen=True)
class Subject:
    """Who is asked."""

    title: str
    preprocess: Preprocess
    weights: Path | None = None  # None: the recipe's base model, as it is
    run: runs.Run | None = None


@dataclass(frozen=True)
class InferRequest:
    """What a user asked of `omni infer`."""

    clips: tuple[str, ...] = ()  # files, folders of files, recording ids
    cameras: Mapping[str, str | Path] | None = None  # the views of one drive, by camera
    tiled: bool = False  # the files are ready mosaics
    data: Path = Path("data")
    out: Path = Path("infer")
    device: str | None = None  # None: a GPU where there is one
    dtype: str | None = None  # None: as trained
    overlay: bool = False
    stride: int | None = None  # frames between the starts of two windows; None: as trained
    batch: int | None = None  # windows answered at a time; None: 8 of a clip, 1 of a live camera
    constrained: bool = True  # hold answers that are a text to their format, so that each can be read


@dataclass(frozen=True)
class Answer:
    """What was said about one window."""

    asked: Asked
    prediction: Prediction

    def line(self, clip: str, plain: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """Return the answer as one line of the clip's JSONL file."""
        values, window = self.prediction.values, self.asked.window
        truth = {"truth": plain(self.asked.truth)} if self.asked.truth else {}
        said = {"text": self.prediction.text, "values": None if values is None else plain(values)}
        held = self.prediction.held.line() if self.prediction.held else {}
        return {"clip": clip, "start_us": window.start_us, "end_us": window.end_us, **said, **held, **truth}

    @property
    def mark(self) -> str:
        """What people must know who read it: nothing of an answer that is the model's own."""
        held = self.prediction.held
        return f" (forced: {held.off_grammar} of {held.tokens} tokens)" if held and held.off_grammar else ""


def subject_of_run(run: runs.Run) -> Subject:
    """Return the trained model of a run."""
    return Subject(f"run {run.folder}", run.manifest.preprocess, run.final, run)


def subject_of_model(model: ModelFolder) -> Subject:
    """Return the model of a model folder."""
    return Subject(f"model {model.folder}", model.card.preprocess, model.folder)


def subject_of_base(recipe: Any) -> Subject:
    """Return a recipe's base model, asked without any training."""
    return Subject(f"base model {recipe.model}", recipe.preprocess())


def infer(recipe: Any, subject: Subject, request: InferRequest, console: Console) -> dict[str, Any]:
    """Ask a model about every window of some clips.

    Of several clips one that fails is named and counted, and the others go on.

    Raises:
        UsageError: a clip or a camera is missing, or the options do not fit the model.
        DataError: the only clip cannot be read, or gives the model less than it was trained on.
        HeldError: another omni takes the raw data of the only clip away.
    """
    inferable: Inferable = require(recipe, Inferable)  # type: ignore[type-abstract]  # a protocol names the capability
    _check_askable(recipe, request)
    views_of = {name: Path(file) for name, file in (request.cameras or {}).items()}
    clips = find_clips(subject.preprocess, request.clips, views_of, request.data, tiled=request.tiled)
    asker = Asker(inferable, load_subject(inferable, subject, request, console), subject.preprocess, request, console)
    if request.tiled:
        console.say(_cells(subject.preprocess))
    done, failures = [], {}
    for clip in clips:
        try:
            with clip.held():
                done.append(asker.ask(clip))
        except OmniError as error:
            if len(clips) == 1:
                raise
            failures[clip.name] = str(error)
            console.warn(f"{clip.name} failed: {error}")
    if failures:
        console.warn(f"{len(failures)} of {len(clips)} clips failed")
    return {"model": subject.title, "clips": done, "failed": len(failures), "failures": failures}


@dataclass(frozen=True)
class Asker:
    """Puts clips to one loaded model."""

    recipe: Inferable
    built: BuiltModel
    preprocess: Preprocess
    request: InferRequest
    console: Console

    def ask(self, clip: Clip) -> dict[str, Any]:
        """Ask about one clip; write its answers, and the overlay where it is wanted; return what was made."""
        recording = clip.open()
        if slow_hz := slow_cameras(recording, self.preprocess):
            self.console.warn(f"{clip.name}: {slow_line(slow_hz, self.preprocess.rate_hz)}")
        stride = self.request.stride or self.recipe.sample.stride
        questions = self.recipe.questions(recording, self.built, self.preprocess, stride)
        answers = self._answers(recording.id, questions)
        path = self.request.out / f"{safe_name(clip.name)}.jsonl"
        lines = [answer.line(clip.name, self.recipe.plain) for answer in answers]
        files.commit(path, _writer(lines), windows=len(lines))
        self._say(clip.name, answers, path)
        for reason, count in questions.dropped.items():
            self.console.say(f"{clip.name}: left out {count} windows: {reason}")
        unreadable = sum(answer.prediction.values is None for answer in answers)
        facts = {"clip": clip.name, "windows": len(lines), "dropped": dict(questions.dropped), "unreadable": unreadable}
        facts |= self._forced(clip.name, answers)
        return {**facts, "file": str(path), "overlay": self._overlay(clip, recording, answers), "answers": lines}

    def _answers(self, name: str, questions: Questions) -> list[Answer]:
        """Return what the model says of each window of a recording."""
        answers: list[Answer] = []
        with self.console.progress(f"infer {name}", questions.count, "windows") as bar:
            while asked := list(islice(questions.asked, self.request.batch or _BATCH)):
                said = self.recipe.predict(self.built, [one.row for one in asked], self.preprocess)
                answers += [Answer(_without_pictures(one), what) for one, what in zip(asked, said, strict=True)]
                bar.advance(len(asked))
        return answers

    def _forced(self, name: str, answers: Sequence[Answer]) -> dict[str, int]:
        """Say and return how many answers are not the model's own; nothing where none was held to its format."""
        held = [answer.prediction.held for answer in answers if answer.prediction.held]
        forced = [one for one in held if one.off_grammar]
        if forced:
            share = sum(one.off_grammar for one in forced) / sum(one.tokens for one in forced)
            self.console.warn(
                f"{name}: {len(forced)} of {counted(len(held), 'answer')} had to be forced into the format, at "
                f"{share:.0%} of their tokens: the model itself would have said something else; see it with "
                "--unconstrained"
            )
        return {"forced": len(forced)} if held else {}

    def _overlay(self, clip: Clip, recording: Recording, answers: Sequence[Answer]) -> str | None:
        if not self.request.overlay:
            return None
        path = self.request.out / f"{safe_name(clip.name)}.mp4"
        camera = views.MOSAIC if views.MOSAIC in recording.cameras else self.preprocess.cameras[0]
        said = [
            Said(answer.asked.window, answer.prediction.values, answer.asked.truth, answer.mark) for answer in answers
        ]
        receipt = write_overlay(path, recording, camera, said, recipe=self.recipe, preprocess=self.preprocess)
        skipped_s = receipt["skipped_us"] / 1e6
        leap = f"; it leaps over {skipped_s:.1f} s that no answer speaks for" if skipped_s else ""
        self.console.say(f"overlay {path}{leap}")
        return str(path)

    def _say(self, name: str, answers: Sequence[Answer], path: Path) -> None:
        for answer in answers[:_LINES_SHOWN]:
            window, caption = answer.asked.window, self.recipe.caption
            span = f"{window.start_us / 1e6:.1f} .. {window.end_us / 1e6:.1f} s"
            truth = f"  (truth: {caption(answer.asked.truth)})" if answer.asked.truth else ""
            self.console.say(f"{name} {span}  model: {caption(answer.prediction.values)}{answer.mark}{truth}")
        shown = f", the first {_LINES_SHOWN} of them above" if len(answers) > _LINES_SHOWN else ""
        self.console.say(f"{len(answers)} answers in {path}{shown}")


def _check_askable(recipe: Any, request: InferRequest) -> None:
    """Refuse plain videos before a model is loaded that they tell too little."""
    given = [name for name, is_given in (("--tiled", request.tiled), ("--camera", request.cameras)) if is_given]
    given += [word for word in request.clips if Path(word).exists()]
    if recipe.instead_of_videos and given:
        expected = f"give it {recipe.instead_of_videos}"
        raise UsageError(f"{given[0]}: recipe {recipe.name} takes no plain videos; {expected}")


def _cells(preprocess: Preprocess) -> str:
    assert isinstance(preprocess, TiledPreprocess)  # others take no plain videos
    cells, cameras = f"{preprocess.rows} x {preprocess.columns} cells", ", ".join(preprocess.cameras)
    return f"of a mosaic of {cells} the model sees, row by row, {cameras}; the rest is black to it"


def load_subject(recipe: Inferable, subject: Subject, request: InferRequest, console: Console) -> BuiltModel:
    """Load a model where it is to be asked, and say which it is.

    Raises:
        DataError: an adapter does not fit its base, or answers cannot be held to their format.
        UsageError: there is no such device, or type of weights.
    """
    if subject.run is not None:
        check_base(recipe, subject.run)
    if subject.weights is None:
        built, note = recipe.load_base_to_ask(subject.preprocess)
        console.warn(f"no training of ours: {note}")
    else:
        built = recipe.load(subject.preprocess, subject.weights)
        console.say(f"asking {subject.title}")
    placed = recipe.place(built, ready_device(request.device), request.dtype)
    if request.constrained and isinstance(recipe, Formatted):
        return recipe.held_to_format(placed, subject.preprocess)
    return placed


def _without_pictures(asked: Asked) -> Asked:
    """Keep of a window only what is small: an hour of answers must fit into memory, its pictures need not."""
    return replace(asked, row={})


def _writer(lines: Sequence[Mapping[str, Any]]) -> Any:
    content = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)

    def write(stream: BinaryIO) -> None:
        stream.write(content.encode())

    return write
