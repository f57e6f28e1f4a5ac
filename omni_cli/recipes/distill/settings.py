"""What a user can set of the `distill` recipe beyond what every recipe has."""

from typing import Literal

from pydantic import Field, field_serializer, field_validator

from omni_cli.formats.driving_model import T_IDXS_S
from omni_cli.recipe import SampleSettings, SplitSettings, TrainSettings, TuneSettings
from omni_cli.recipes.distill import teaching
from omni_cli.samples.model_frames import Sampling
from omni_cli.samples.model_steps import STEP_RATE_HZ
from omni_cli.samples.step_labels import MOTION


class DistillSample(SampleSettings):
    """Which cameras, steps and teacher make a window."""

    cameras: str = "fcamera,ecamera"  # the road camera, and the wide one where there is one
    window: int = Field(50, ge=2, le=400)  # frames: one more than steps
    stride: int = Field(25, ge=1)  # frames between the starts of two windows
    rate_hz: float = Field(STEP_RATE_HZ, ge=STEP_RATE_HZ, le=STEP_RATE_HZ)  # a step's two frames are 0.2 s apart
    teacher: str = MOTION  # motion (the path truly driven), log (the car's own model), or ONNX files with commas
    teacher_device: Literal["auto", "cuda", "tensorrt", "rocm", "cpu"] = "auto"  # that ONNX files run on
    sampling: Sampling = "bilinear"  # how model frames are taken; openpilot took the nearest pixel from 2026 on
    require_calibrated: bool = False  # count only steps at which the device knew its mount
    require_fix: bool = False  # count only steps with a satellite fix

    @field_validator("teacher")
    @classmethod
    def _known_teacher(cls, teacher: str) -> str:
        return teaching.check_teacher(teacher)

    @field_serializer("teacher", when_used="json")
    def _by_contents(self, teacher: str) -> str:
        """Write ONNX files by what they hold: shards and runs depend on that, and not on where the files lie."""
        return teaching.identity(teacher)


class DistillSplit(SplitSettings):
    """How windows are kept apart; the path to learn at a window's last step goes on beyond the window."""

    gap_s: float = Field(10.0, ge=0)  # time rule: as SplitSettings; a path reaches so far ahead

    def notes(self, teacher: str) -> tuple[str, ...]:
        """Say so where training would be told where the car goes in the drive's last share, which measures it.

        A teacher that is a model looks at no later picture: its paths are forecasts, and tell nothing of that share.
        """
        reach_s = float(T_IDXS_S[-1])
        if self.rule != "time" or teacher != MOTION or self.gap_s >= reach_s:
            return ()
        return (
            f"split.gap_s = {self.gap_s:g}: paths to learn from reach {reach_s:g} s ahead, into the stretch that is "
            f"measured on, and its numbers will flatter; {reach_s:g} or more keeps the two apart",
        )


class DistillTune(TuneSettings):
    """Which weights learn; without targets an adapter sits on every layer that can bear one."""

    mode: Literal["lora", "dora", "full"] = "full"


class DistillTrain(TrainSettings):
    """The optimiser's schedule, what losses weigh, and which steps of a window are learned from."""

    gradient_checkpointing: bool = False
    warmup_steps: int = Field(24, ge=0)  # of a window, not learned from or measured: the memory is not yet full
    choice_weight: float = Field(10.0, ge=0)  # of which plan is taken: one number beside a likelihood that sums 66
    scene_weight: float = Field(0.5, ge=0)  # of lanes, edges and leads

    @field_validator("gradient_checkpointing")
    @classmethod
    def _is_never_recomputed(cls, value: bool) -> bool:
        if value:
            raise ValueError("a driving net's layers cannot be recomputed; leave it at false")
        return value
