"""The contract between the stages and the recipes they drive: one small protocol a stage.

A recipe is a frozen table of settings with the methods that the stages call. It holds no trainer, writes no file and
prints nothing. A recipe that cannot do a stage's work simply lacks the methods, and `require` says so in one line.
"""

from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import pyarrow as pa
from torch import Tensor, nn

from omni_cli.errors import UsageError
from omni_cli.recipe.foreseen import Comparable, Outlined
from omni_cli.recipe.measured import Drawable, Formatted, Stratified, Watchful
from omni_cli.recipe.settings import SampleSettings, SplitSettings, TrainSettings, TuneSettings
from omni_cli.recipe.values import (
    About,
    Asked,
    Batch,
    BuiltModel,
    Held,
    Loading,
    Loss,
    Metric,
    ModelSize,
    OwnRate,
    Pair,
    Prediction,
    Program,
    Questions,
    Rehearsed,
    Row,
    RunProgram,
    StockTraining,
    Stroke,
    TrainerKind,
)
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.windows import TableMaker
from omni_cli.scene.clock import Float64Array, Int64Array
from omni_cli.scene.recording import Recording

__all__ = [
    "About",
    "Asked",
    "Batch",
    "Benchable",
    "BuiltModel",
    "Comparable",
    "Drawable",
    "Evaluable",
    "Exportable",
    "Formatted",
    "Held",
    "Inferable",
    "Loading",
    "Loss",
    "Mergeable",
    "Metric",
    "ModelSize",
    "Outlined",
    "OwnRate",
    "Pair",
    "Prediction",
    "Program",
    "Questions",
    "Rehearsed",
    "Row",
    "RunProgram",
    "SampleSettings",
    "Sampled",
    "SelfTested",
    "SplitSettings",
    "StockTraining",
    "Stratified",
    "Stroke",
    "Taught",
    "Tokenized",
    "TrainSettings",
    "Trainable",
    "TrainerKind",
    "TuneSettings",
    "Watchful",
    "require",
]


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

        It travels to the workers of a pool, so it holds picklable functions of `samples`, never a bound method: whoever
        unpickles the recipe imports its models and trainers, which takes longer than a recording. Only a teacher that
        is itself a model is worth that.
        """

    def notes(self) -> tuple[str, ...]:
        """Return what a user should be told before etl begins.

        Raises:
            OmniError: etl cannot begin.
        """


@runtime_checkable
class Tokenized(Protocol):
    """A recipe whose windows also have a sidecar of tokens."""

    @property
    def max_tokens(self) -> int:
        """A longer sample is refused, and never cut."""

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

    def size(self, preprocess: Preprocess) -> ModelSize:
        """Return how large the model would be, without making one."""

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

    def medians(self, rows: Sequence[Row]) -> Mapping[str, float | tuple[float, ...]]:
        """Return what its constant baseline will say: medians over the windows that are learned from, by name.

        Args:
            rows: of those windows, without pictures; at least one.
        """

    def base_fingerprint(self) -> str:
        """Return what identifies the base weights: a hash of local files, a hub commit, or a seed."""


@runtime_checkable
class SelfTested(Protocol):
    """A recipe whose model is tried on its own windows before it learns."""

    def self_test(self, built: BuiltModel, dataset: WindowDataset) -> str:
        """Return one line on what was found, or none where there is nothing to be tried.

        The model and the random numbers stay as they were.

        Raises:
            OmniError: the model would learn something else than it should.
        """


@runtime_checkable
class Evaluable(Protocol):
    """What `eval` asks of a recipe."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """How wrong answers are, in the order of the table."""

    @property
    def reference(self) -> str:
        """The name of the baseline that every error is shown as a share of."""

    def predict(self, built: BuiltModel, rows: Sequence[Row], preprocess: Preprocess) -> list[Prediction]:
        """Answer windows from their pictures and prompts."""

    def errors(
        self, predictions: Sequence[Prediction], rows: Sequence[Row], medians: Mapping[str, Any]
    ) -> Mapping[str, Float64Array]:
        """Return how wrong each answer is (windows,) by the key of each metric.

        An answer that could not be read counts as if it knew nothing; NaN says that the truth does not reach so far, or
        that the answer does not speak of all of it.

        Args:
            predictions: one a window.
            rows: of the windows, with their targets.
            medians: as `Trainable.medians` gave them, of the windows that were learned from.
        """

    def baselines(self, rows: Sequence[Row], medians: Mapping[str, Any]) -> Mapping[str, Sequence[Prediction]]:
        """Return by name what needs no picture; arguments as for `errors`."""

    def pairs(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> tuple[Pair, ...]:
        """Return what is worth drawing of predicted against true."""


@runtime_checkable
class Mergeable(Trainable, Protocol):
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

    def probe_rows(self, built: BuiltModel, preprocess: Preprocess) -> list[Row]:
        """Return rows of seeded noise, for what a model says before and after."""

    def outputs(self, model: nn.Module, batch: Batch, preprocess: Preprocess) -> Tensor:
        """Return the raw numbers (rows, ..., numbers) that a model gives for a batch."""

    def choices(self, outputs: Tensor) -> Tensor:
        """Return what the model would choose from such numbers, one index each."""

    def of_whole_model(self, model: str) -> Self:
        """Return this recipe with a whole, unquantised model as its base: `load` takes its folder."""

    def about(self, preprocess: Preprocess, form: str, source: str) -> About:
        """Return what a model card tells of its models.

        Args:
            preprocess: of the model.
            form: of its folder: merged, hf, adapter or onnx.
            source: the folder, or its name on a hub, as the code that loads it names it.
        """


@runtime_checkable
class Inferable(Sampled, Trainable, Evaluable, Protocol):
    """What `infer` asks of a recipe."""

    instead_of_videos: str  # what it is asked about where a plain video tells it too little; empty where it tells all

    def load_base_to_ask(self, preprocess: Preprocess) -> tuple[BuiltModel, str]:
        """Return the base model as it is, and what that means for its answers."""

    def place(self, built: BuiltModel, device: str, dtype: str | None) -> BuiltModel:
        """Move the model to a device, its weights to another type where one is named."""

    def questions(self, recording: Recording, built: BuiltModel, preprocess: Preprocess, stride: int) -> Questions:
        """Return the windows of a recording that no shard holds, decoded while they are asked for.

        Args:
            recording: with the cameras of `preprocess`.
            built: what will be asked.
            preprocess: of the model.
            stride: instants between the starts of two windows.

        Raises:
            DataError: the recording cannot give what the model looks at.
        """

    def caption(self, values: Mapping[str, Any] | None, at: int = -1) -> str:
        """Return one line for people: what was said, or what is true, at instant `at` of a window."""

    def plain(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values as JSON knows them."""

    def speaks_for(self, instants_us: Int64Array, spoken_us: Set[int]) -> Sequence[int]:
        """Return at which of a window's instants its answer is drawn.

        Args:
            instants_us: of the window (num_frames,).
            spoken_us: the instants that the windows before it speak for; it takes over those that it returns.
        """

    def strokes(
        self, recording: Recording, values: Mapping[str, Any], at: int, at_us: int, instant_us: int
    ) -> Sequence[Stroke]:
        """Return what to draw over the first camera's picture at instant `at` of a window.

        Args:
            recording: where the picture is from.
            values: of a prediction, or of the truth.
            at: number of the instant.
            at_us: when the picture was taken, which is a little before the instant.
            instant_us: when the instant is.
        """


@runtime_checkable
class Exportable(Mergeable, Protocol):
    """What `export` asks of a recipe."""

    export_formats: tuple[str, ...]  # the first is what is written unless another is asked for

    def programs(self, built: BuiltModel, preprocess: Preprocess, batches: Sequence[int]) -> Sequence[Program]:
        """Return the programs for these numbers of windows."""

    def rehearse(
        self, built: BuiltModel, preprocess: Preprocess, written: Sequence[Program], run: RunProgram, dtype: str
    ) -> Rehearsed:
        """Run the programs as they will be run, and return how far they part from the model.

        As a share of the largest number of its kind: metres and scores are of different kinds.

        Args:
            built: the model.
            preprocess: of its windows.
            written: its programs.
            run: (program's name, inputs) -> its outputs.
            dtype: of the programs.

        Raises:
            OmniError: they part too far.
        """

    def write_processor_files(self, folder: Path, preprocess: Preprocess) -> None:
        """Write what other tools need beside the weights of a model folder."""


@runtime_checkable
class Benchable(Inferable, Protocol):
    """What `bench` asks of a recipe, to say how much a model does."""

    def core(self, built: BuiltModel) -> nn.Module:
        """Return the module whose forward passes are counted while it answers."""

    def answer_units(self, forwards: int, preprocess: Preprocess) -> Mapping[str, float]:
        """Return how much one answer is, by unit."""

    def sample_units(self, dataset: WindowDataset) -> Mapping[str, float]:
        """Return how much one sample is in the mean, by unit."""


@runtime_checkable
class Taught(Protocol):
    """A recipe that may learn from another model's programs, which `bench` measures beside what has learned."""

    def teacher_files(self) -> tuple[Path, ...]:
        """Return the teacher's ONNX files.

        Raises:
            UsageError: the teacher is no program, or its files are not named or not there; the message says which.
        """


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
