"""What is measured on: the user's own newest data where they fit, else a small synthetic drive made for the moment."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Self

from omni_cli import files
from omni_cli.errors import DataError, UsageError
from omni_cli.formats.physical_ai_av import CAMERAS
from omni_cli.report import Console
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import ShardSet, open_shards
from omni_cli.scene.clock import MICROSECONDS_PER_SECOND
from omni_cli.scene.recording import Recording
from omni_cli.sources import open_source
from omni_cli.stages import locate, runs
from omni_cli.stages.bench.texture import TextureSpec, texture_video
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.fitting import check_fit
from omni_cli.stages.raw_lock import reading
from omni_cli.world.clip import SyntheticSpec
from omni_cli.world.dataset import render_clip, write_chunk, write_indices

_SYNTHETIC_FPS = 20
_WINDOWS_A_CLIP, _WINDOWS_A_TEXTURE = 5, 3
_RECORDINGS_TRIED = 3


@dataclass(frozen=True)
class Found:
    """A recording, and where it was found."""

    recording: Recording
    source: str
    folder: Path


class Inputs:
    """Finds or makes what a part needs, when it needs it. To be used in a `with` block: it holds the raw data found."""

    def __init__(
        self,
        recipe: Any,
        data: Path,
        runs_folder: Path,
        work: Path,
        *,
        console: Console,
        teacher: tuple[Path, ...] = (),
        run: runs.Run | None = None,
        texture: TextureSpec | None = None,
        is_beside_stock: bool = True,
    ) -> None:
        self.recipe = recipe
        self.preprocess: Preprocess = recipe.preprocess()
        self.work = work
        self.console = console
        self.teacher = teacher  # ONNX files that the user named
        self.texture = texture  # of the video that stands in where the user's are easier to decode
        self.is_beside_stock = is_beside_stock  # a stock library's training takes turns with ours
        self._data, self._runs, self._named = data, runs_folder, run
        self._held = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @cached_property
    def found(self) -> Found:
        """A recording with the recipe's cameras."""
        try:
            source, folder = locate.raw_folder(self._data, None)
        except UsageError:
            return self._synthetic("no raw data")
        self._held.enter_context(reading(folder))
        reader = open_source(source, folder)
        for ref in islice(reader.recordings(), _RECORDINGS_TRIED):
            try:
                recording = reader.open(ref.id, self.preprocess.cameras)
            except DataError:
                continue
            if all(name in recording.cameras for name in self.preprocess.cameras):
                return Found(recording, source, folder)
        return self._synthetic(f"{folder} lacks a recording with this profile's cameras")

    @cached_property
    def shards(self) -> ShardSet:
        """Shards that fit the recipe."""
        if locate.has_shards(self._data):
            shards = open_shards(locate.newest_shards(self._data))
            try:
                check_fit(self.recipe, shards, "bench")
            except UsageError:
                self.console.say(f"the newest shards, {shards.folder}, do not fit this profile")
            else:
                self._held.enter_context(reading(shards.folder))
                return shards
        return self._cut()

    @cached_property
    def run(self) -> runs.Run | None:
        """The run that was named, or the newest of this very recipe, model and preprocessing; None if there is none."""
        if self._named is not None:
            return self._named
        fitting = (folder for folder in locate.finished_runs(self._runs) if self._fits(runs.open_run(folder)))
        newest = next(fitting, None)
        return runs.open_finished(newest) if newest else None

    def _fits(self, run: runs.Run) -> bool:
        manifest, ours = run.manifest, self.recipe.model_dump(mode="json")
        fits = manifest.recipe == self.recipe.name and manifest.preprocess == self.preprocess
        return fits and all(manifest.settings[key] == ours[key] for key in ("model", "tune"))

    def _cut(self) -> ShardSet:
        found = self.found
        chosen = self.work / "split.json"
        files.write_json(chosen, {found.recording.id: "train"})
        self.console.say(f"cutting {found.recording.id} of {found.folder} into shards")
        request = EtlRequest(found.folder, found.source, self.work / "shards", workers=0, split_file=chosen)
        return open_shards(Path(etl(self.recipe, request, Console(quiet=True))["shards"]))

    def textured(self, texture: TextureSpec, why: str) -> Found | None:
        """Return a synthetic drive whose cameras all show one video of texture; None where it has no such camera."""
        if unknown := [name for name in self.preprocess.cameras if name not in CAMERAS]:
            self.console.say(
                f"{why}; a texture to measure on is left out: the synthetic world has no camera {unknown[0]}"
            )
            return None
        seconds = math.ceil(self._seconds(_WINDOWS_A_TEXTURE))
        self.console.say(f"{why}: measuring on {seconds} s of moving texture too, the same for each camera")
        spec = SyntheticSpec(
            clips_per_chunk=1,
            seconds=seconds,
            fps=texture.fps,
            width_px=texture.width_px,
            height_px=texture.height_px,
            cameras=self.preprocess.cameras,
        )
        return self._written("texture", spec, texture_video(texture, seconds))

    def _synthetic(self, why: str) -> Found:
        preprocess = self.preprocess
        if unknown := [name for name in preprocess.cameras if name not in CAMERAS]:
            raise UsageError(f"{why}, and the synthetic world has no camera {unknown[0]}; name data with --data")
        seconds = round(self._seconds(_WINDOWS_A_CLIP) + 1, 1)
        spec = SyntheticSpec(clips_per_chunk=1, seconds=seconds, fps=_SYNTHETIC_FPS, cameras=preprocess.cameras)
        self.console.say(f"{why}: measuring on a synthetic drive of {seconds:g} s, {spec.width_px}x{spec.height_px} px")
        return self._written("synthetic", spec)

    def _seconds(self, windows: int) -> float:
        """Return how long a drive must be for so many windows, with what their labels reach."""
        instants = self.preprocess.num_frames + (windows - 1) * self.recipe.sample.stride
        first_us, last_us = self.recipe.table_maker().reach.around_us(0)
        return float(instants / self.preprocess.rate_hz + (last_us - first_us) / MICROSECONDS_PER_SECOND)

    def _written(self, name: str, spec: SyntheticSpec, video: bytes | None = None) -> Found:
        folder, preprocess = self.work / name, self.preprocess
        write_chunk(folder, spec, 0, [render_clip(spec, 0, 0, video)])
        write_indices(folder, spec, (0,))
        reader = open_source("synthetic", folder)
        return Found(reader.open(reader.recordings()[0].id, preprocess.cameras), "synthetic", folder)
