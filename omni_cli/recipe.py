"""The contract between the stages and the recipes they drive: one small protocol a stage.

A recipe is a frozen table of settings with the methods that the stages call. It holds no trainer, writes no file and
prints nothing. A recipe that cannot do a stage's work simply lacks the methods, and `require` says so in one line.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar, runtime_checkable

import pyarrow as pa
from pydantic import Field, field_validator
from torch import Tensor, nn

from omni_cli.config import Settings
from omni_cli.errors import UsageError
from omni_cli.formats.video import Decoder
from omni_cli.samples.preprocess import Labels, Preprocess
from omni_cli.samples.windows import TableMaker

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
    train_merger: bool = False  # beside an adapter, what joins vision tower and language model learns in full


class TrainSettings(Settings):
    """The optimiser's schedule and the run's habits."""

    batch_size: int = Field(8, ge=1)
    accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optimizer: str = "adamw_torch_fused"
    epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(-1, ge=-1)  # -1: as many as the epochs take
    max_tokens: int = Field(65_536, ge=1)  # of one sample
    gradient_checkpointing: bool = True
    save_steps: int = Field(50, ge=1)
    log_steps: int = Field(10, ge=1)  # checkpoints are logged too
    workers: int = Field(2, ge=0)
    seed: int = 0
    blind: bool = False  # a control: every picture is replaced by mid grey

    @field_validator("max_steps")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("expected 1 or more, or -1 for as many as the epochs take")
        return value


@dataclass(frozen=True)
class Loss:
    """A loss as a sum and the number of things summed, so that micro-batches and ranks average without bias."""

    total: Tensor
    count: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainerKind:
    """A Trainer class, the class of its arguments, and what this recipe always passes to the latter."""

    trainer: type
    arguments: type
    always: Mapping[str, Any]


@dataclass(frozen=True)
class Quantity:
    """Something a recipe predicts and the windows know: a target column, its name for people, its unit."""

    column: str
    title: str
    unit: str


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

    def table_maker(self) -> TableMaker:
        """Return what decodes one recording and cuts it into windows with targets.

        It travels to the workers of a pool, so it is a picklable function of `samples`, never a bound method: whoever
        unpickles the recipe imports its models and trainers, which takes longer than a recording.
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

    def build(self, preprocess: Preprocess, checkpoint: Path | None = None) -> BuiltModel:
        """Build the model that learns; from `checkpoint` where a fully tuned run resumes."""

    def collate(self, rows: Sequence[Row], preprocess: Preprocess) -> Batch:
        """Stack dataset rows into one batch; pictures stay uint8."""

    def loss(self, model: nn.Module, batch: Batch, preprocess: Preprocess) -> Loss:
        """Return the loss of one batch as a sum and a count of labelled tokens, frames or steps."""

    def trainer(self) -> TrainerKind:
        """Return the Trainer of the Hugging Face family that suits this recipe."""

    def save(self, built: BuiltModel, folder: Path) -> None:
        """Write the trained weights and the tokenizer: an adapter's folder, or a whole model's."""

    def load(self, preprocess: Preprocess, folder: Path) -> BuiltModel:
        """Load what `save` wrote, ready to predict.

        Raises:
            DataError: an adapter does not fit its base.
        """

    def base_fingerprint(self) -> str:
        """Return what identifies the base weights: a hash of local files, a hub commit, or a seed."""


@runtime_checkable
class Evaluable(Protocol):
    """What `eval` and `infer` ask of a recipe."""

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """What an answer states, in the order of its numbers."""

    def predict(self, built: BuiltModel, rows: Sequence[Row], preprocess: Preprocess) -> list[Prediction]:
        """Answer windows from their pictures and prompts."""


@runtime_checkable
class Askable(Evaluable, Protocol):
    """A recipe that can be asked about a window which no shard holds."""

    def prompt_row(self, canvases: Tensor, preprocess: Preprocess, tokenizer: Any, start_speed_mps: float) -> Row:
        """Return a row whose answer is a placeholder.

        Args:
            canvases: (num_frames, height, width, 3) uint8.
            preprocess: how the window was made.
            tokenizer: of the model.
            start_speed_mps: forward speed at the first instant; told only where `preprocess.past_speed` says so.
        """


@runtime_checkable
class Mergeable(Trainable, Askable, Protocol):
    """What `merge` asks of a recipe."""

    def load_to_merge(self, preprocess: Preprocess, folder: Path) -> BuiltModel:
        """Load an adapter over a fresh base in full precision: a quantised one cannot be merged into truly."""

    def adapter_disabled(self, built: BuiltModel) -> AbstractContextManager[None]:
        """Return a context in which the model is its base."""

    def merge(self, built: BuiltModel) -> BuiltModel:
        """Fold the adapter into its base; the adapted model is used up.

        Raises:
            DataError: a merged weight is not finite.
        """

    def logits(self, model: nn.Module, batch: Batch, preprocess: Preprocess) -> Tensor:
        """Return the logits (rows, labelled positions, vocabulary) of a batch."""

    def of_whole_model(self, model: str) -> Self:
        """Return this recipe with a whole, unquantised model as its base: `load` takes its folder."""


@runtime_checkable
class Inferable(Sampled, Trainable, Askable, Protocol):
    """What `infer` asks of a recipe."""

    def load_base_to_ask(self, preprocess: Preprocess) -> tuple[BuiltModel, str]:
        """Return the base model as it is, and what that means for its answers."""

    def place(self, built: BuiltModel, device: str, dtype: str | None) -> BuiltModel:
        """Move the model to a device, its weights to another type where one is named."""


@dataclass(frozen=True)
class ExportedPart:
    """A part of a model as a function of one tensor, with every other input fixed."""

    module: nn.Module
    example: Tensor  # of the input's shape and type
    input_name: str
    output_names: tuple[str, ...]


@runtime_checkable
class Exportable(Mergeable, Protocol):
    """What `export` asks of a recipe."""

    def export_part(self, built: BuiltModel, preprocess: Preprocess, batch: int) -> ExportedPart:
        """Return the part that ONNX runs, for a fixed number of windows."""

    def export_pixels(self, canvases: Tensor, preprocess: Preprocess) -> Tensor:
        """Return what that part takes for windows of canvases (windows, num_frames, height, width, 3) uint8."""

    def write_processor_files(self, folder: Path, preprocess: Preprocess) -> None:
        """Write what `AutoProcessor` and `apply_chat_template` need beside the weights of a model folder."""


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
