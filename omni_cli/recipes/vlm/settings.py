"""What a user can set of the `vlm` recipe beyond what every recipe has."""

from typing import ClassVar

from pydantic import Field, ValidationInfo, field_validator

from omni_cli.formats.video import Decoder
from omni_cli.models.parts import TITLES, Part
from omni_cli.recipe import SampleSettings, TrainSettings, TuneSettings
from omni_cli.samples.tiling import Labels

ADAPTED = ("lora", "dora")


class VlmSample(SampleSettings):
    """Which instants, cameras and labels make a window."""

    cameras: str = "4-cam"  # a set (1-cam, 4-cam, 7-cam) or names with commas between
    window: int = Field(16, ge=1, le=64)  # frames
    canvas_px: int = Field(504, ge=28)  # width of the tiled canvas
    aspect: float = Field(16 / 9, gt=0)  # width / height of one camera's tile
    labels: Labels = "ego-motion"
    past_speed: bool = False  # the speed at the window's start is told in the prompt
    decoder: Decoder = "pyav"


class VlmTune(TuneSettings):
    """Which weights learn: adapters beside a frozen model, or in full tuning every part that is not frozen by name."""

    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # of the language model
    vision_targets: tuple[str, ...] = ()  # layers of the vision tower that get an adapter too, such as qkv
    train_merger: bool = False  # beside an adapter, what joins vision tower and language model learns in full
    freeze: tuple[Part, ...] = ()  # in full tuning: vision, merger, language

    of_full: ClassVar[frozenset[str]] = frozenset({"mode", "freeze"})

    @field_validator("freeze")
    @classmethod
    def _leaves_something(cls, value: tuple[Part, ...], info: ValidationInfo) -> tuple[Part, ...]:
        if value and info.data.get("mode") in ADAPTED:
            raise ValueError("beside an adapter the model is frozen as it is; it is for tune.mode = full")
        if set(value) == set(TITLES):
            raise ValueError("nothing would learn; leave a part out")
        return value

    @property
    def learning(self) -> frozenset[Part]:
        """The parts of a model in which something learns."""
        if self.mode == "full":
            return frozenset(TITLES) - frozenset(self.freeze)
        adapted = {"language": bool(self.targets), "vision": bool(self.vision_targets), "merger": self.train_merger}
        return frozenset(part for part in TITLES if adapted[part])


class VlmTrain(TrainSettings):
    """The optimiser's schedule and the run's habits."""

    max_tokens: int = Field(65_536, ge=1)  # of one sample
    vision_learning_rate: float | None = Field(None, gt=0)  # of what learns in the vision tower; else learning_rate
    merger_learning_rate: float | None = Field(None, gt=0)  # of what joins it to the language model
    compile: bool = False  # layers are trained as programs of torch.compile

    @property
    def own_rates(self) -> dict[Part, float]:
        """The rates of parts that do not learn at `learning_rate`."""
        rates: dict[Part, float | None] = {"vision": self.vision_learning_rate, "merger": self.merger_learning_rate}
        return {part: rate for part, rate in rates.items() if rate is not None}
