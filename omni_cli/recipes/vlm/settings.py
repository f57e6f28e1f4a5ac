"""What a user can set of the `vlm` recipe beyond what every recipe has."""

from pydantic import Field

from omni_cli.formats.video import Decoder
from omni_cli.recipe import SampleSettings, TrainSettings, TuneSettings
from omni_cli.samples.tiling import Labels


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
    """Which weights learn."""

    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    train_merger: bool = False  # beside an adapter, what joins vision tower and language model learns in full


class VlmTrain(TrainSettings):
    """The optimiser's schedule and the run's habits."""

    max_tokens: int = Field(65_536, ge=1)  # of one sample
