"""The steps of an openpilot driving model: two model frames an instant, 0.2 s apart, of any calibrated camera."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from omni_cli.config import Settings
from omni_cli.formats.driving_model import PICTURE_SHAPE
from omni_cli.formats.video import Decoder, Uint8Array
from omni_cli.samples.model_frames import Sampling, unpack_rgb
from omni_cli.scene.model_frame import MODEL_VIEWS

STEP_RATE_HZ = 5.0  # the two pictures of a step are 0.2 s apart


class ModelFramePreprocess(Settings):
    """Cameras, warp, time grid and teacher of one shard set and of every student trained on it.

    A window of n + 1 instants holds n steps: step i looks at instants i and i + 1.
    """

    # of `omni etl`: the option that each field follows from, and the setting that gives its value
    etl_options: ClassVar[Mapping[str, tuple[str, str]]] = {
        "cameras": ("--cameras ", "sample.cameras"),
        "num_frames": ("--window ", "sample.window"),
        "sampling": ("--set sample.sampling=", "sample.sampling"),
        "teacher": ("--teacher ", "sample.teacher"),
        "require_calibrated": ("--set sample.require_calibrated=", "sample.require_calibrated"),
        "require_fix": ("--set sample.require_fix=", "sample.require_fix"),
    }
    # which of the steps count: what measures a model may choose others than what it learned from
    filters: ClassVar[tuple[str, ...]] = ("require_calibrated", "require_fix")

    kind: Literal["model-frames"] = "model-frames"
    cameras: tuple[str, ...]  # the road camera, and the wide one where there is one
    num_frames: int
    rate_hz: float = STEP_RATE_HZ
    sampling: Sampling
    teacher: str  # whose paths are the targets: motion, log, onnx:HASH of files; asked for, onnx:* is any files
    require_calibrated: bool = False  # only steps count at which the device knew its mount
    require_fix: bool = False  # only steps count with a satellite fix
    decoder: Decoder = "pyav"
    decoder_id: str

    @property
    def steps(self) -> int:
        """Steps of one window."""
        return self.num_frames - 1

    @property
    def views(self) -> tuple[str, ...]:
        """What is stored at each instant: the narrow and the wide model frame."""
        return tuple(view.name for view in MODEL_VIEWS)

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """Shape of a stored picture: (6, 128, 256), planes that are half as wide and high as the model frame."""
        return PICTURE_SHAPE

    @property
    def window_shape(self) -> tuple[int, ...]:
        """Shape of a window's pictures: (num_frames, 2 views, 6, 128, 256)."""
        return self.num_frames, len(MODEL_VIEWS), *PICTURE_SHAPE

    def facts(self) -> dict[str, Any]:
        """Return what a window is, for a dry run."""
        return {
            "cameras": list(self.cameras),
            "window_frames": self.num_frames,
            "window_steps": self.steps,
            "bytes_per_window": math.prod(self.window_shape),
            "teacher": self.teacher,
        }

    def described(self) -> list[tuple[str, object]]:
        """Return the same for people, as rows of a table."""
        _, height, width = PICTURE_SHAPE
        return [
            ("cameras", ", ".join(self.cameras)),
            ("model frames", f"{len(MODEL_VIEWS)} an instant, {2 * width}x{2 * height} px, {self.sampling}"),
            ("window", f"{self.steps} steps at {self.rate_hz:g} Hz"),
            ("teacher", self.teacher),
        ]

    def shown(self, instant: Uint8Array) -> Uint8Array:
        """Return a picture for people (height, width, 3) of one instant of a window: the views, one below the other."""
        return np.concatenate([unpack_rgb(picture) for picture in instant])

    def titles(self) -> list[tuple[int, int, str]]:
        """Return (x, y) in that picture, and the view that begins there."""
        return [(0, number * 2 * PICTURE_SHAPE[1], view.name) for number, view in enumerate(MODEL_VIEWS)]
