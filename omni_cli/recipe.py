"""The contract between the stages and the recipes they drive: one small protocol a stage.

A recipe is a frozen table of settings with the methods that the stages call. It holds no trainer, writes no file and
prints nothing. A recipe that cannot do a stage's work simply lacks the methods, and `require` says so in one line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import pyarrow as pa
from pydantic import Field
from torch import Tensor, nn

from omni_cli.config import Settings
from omni_cli.errors import UsageError
from omni_cli.formats.video import Decoder
from omni_cli.samples.preprocess import Labels, Preprocess
from omni_cli.samples.tables import ShardTables
from omni_cli.scene.recording import Recording

Batch = Mapping[str, Tensor]
Row = Mapping[str, Any]


class SampleSettings(Settings):
    """Which instants, cameras and labels make a window."""

    cameras: str = "4-cam"  # a set (1-cam, 4-cam, 7-cam) or names with commas between
    window: int = Field(16, ge=1, le=64)  # frames
    stride: int = Field(8, ge=1)  # frames between the starts of two windows
    rate_hz: float = Field(10.0, gt=0)
    canvas_px: int = Field(504, ge=28)  # width of the tiled canvas
    aspect: float = Field(16 / 9, gt=0)  # width / height of one camera's tile
    labels: Labels = "ego-motion"
    past_speed: bool = False  # the speed at the window's start is told in the prompt
    max_age_ms: float = Field(100.0, gt=0)  # a frame older than this at its instant drops the window
    decoder: Decoder = "pyav"


class SplitSettings(Settings):
    """How windows are kept apart: by recording (hash), or by time inside each recording (for a single drive)."""

    rule: Literal["hash", "time"] = "hash"
    validation: float = Field(0.2, gt=0, lt=1)  # share of recordings (hash) or the last share of the time (time)
    gap_s: float = Field(5.0, ge=0)  # time rule: windows within this of the boundary belong to no split
    seed: int = 0


class TuneSettings(Settings):
    """Which weights learn."""

    mode: Literal["lora", "dora", "full"] = "lora"
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


class TrainSettings(Settings):
    """The optimiser's schedule and the run's habits."""

    batch_size: int = Field(8, ge=1)
    accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optimizer: str = "adamw_torch"
    epochs: float = Field(1.0, gt=0)
    max_steps: int = -1  # over epochs where positive
    max_tokens: int = Field(65_536, ge=1)  # of one sample
    gradient_checkpointing: bool = True
    save_steps: int = Field(50, ge=1)
    log_steps: int = Field(10, ge=1)
    workers: int = Field(2, ge=0)
    seed: int = 0
    blind: bool = False  # a control: every picture is replaced by mid grey


@dataclass(frozen=True)
class Loss:
    """A loss as a sum and the number of things summed, so that micro-batches and ranks average without bias."""

    total: Tensor
    count: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """What a model said about one window; `values` is None where the answer could not be read."""

    text: str
    values: Mapping[str, float] | None


@dataclass(frozen=True)
class BuiltModel:
    """A model ready for a stage, and what its tokenizer says."""

    model: nn.Module
    tokenizer: Any


@runtime_checkable
class Sampled(Protocol):
    """What `etl` asks of a recipe."""

    sample: SampleSettings
    split: SplitSettings

    def preprocess(self) -> Preprocess:
        """Return the frozen preprocessing that these settings ask for."""

    def target_columns(self) -> tuple[pa.Field, ...]:
        """Return the columns that this recipe appends to the windows."""

    def make_tables(self, recording: Recording, preprocess: Preprocess) -> ShardTables:
        """Decode one recording and cut it into windows with targets.

        Raises:
            DataError: the recording cannot give what the settings ask for.
        """


@runtime_checkable
class Tokenized(Protocol):
    """A recipe whose windows also have a sidecar of tokens."""

    def sidecar_key(self, preprocess: Preprocess) -> str:
        """Return the hash of tokenizer, template and preprocessing that names the sidecar."""

    def encode_windows(self, windows: pa.Table, preprocess: Preprocess) -> pa.Table:
        """Return one row a window: input_ids, labels and position ids."""


@runtime_checkable
class Trainable(Protocol):
    """What `train` asks of a recipe."""

    tune: TuneSettings
    train: TrainSettings

    def build(self, checkpoint: Path | None) -> BuiltModel:
        """Build the model with its adapter; from `checkpoint` where a fully tuned run resumes."""

    def collate(self, rows: Sequence[Row], preprocess: Preprocess) -> Batch:
        """Stack dataset rows into one batch; pictures stay uint8."""

    def loss(self, model: nn.Module, batch: Batch, preprocess: Preprocess) -> Loss:
        """Return the loss of one batch as a sum and a count of labelled tokens, frames or steps."""

    def trainer_class(self) -> type:
        """Return the Trainer of the Hugging Face family that suits this recipe."""


R = TypeVar("R")


def require(recipe: object, capability: type[R]) -> R:
    """Return the recipe as a capability.

    Raises:
        UsageError: it cannot do that.
    """
    if not isinstance(recipe, capability):
        name = type(recipe).__name__.lower()
        raise UsageError(f"recipe {name!r} is not {capability.__name__.lower()}: it has no such stage")
    return recipe
