"""What recipes and stages hand each other: losses, answers, questions, programs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from omni_cli.samples.sync import PlannedWindow
from omni_cli.scene.clock import Float64Array

Batch = Mapping[str, Tensor]
Row = Mapping[str, Any]


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
class Metric:
    """One number a window that says how wrong an answer is; less is better, unless the title names another aim."""

    key: str  # in reports
    title: str  # for people
    unit: str
    is_shown: bool = True  # in the terminal's table; a report has all


@dataclass(frozen=True)
class Prediction:
    """What a model said about one window; `values` is None where the answer could not be read."""

    text: str
    values: Mapping[str, Any] | None


@dataclass(frozen=True)
class Pair:
    """Something that was predicted and is known, window by window, to be drawn."""

    title: str
    unit: str
    truth: Float64Array  # (n,)
    predicted: Float64Array  # (n,) NaN where there is no answer


@dataclass(frozen=True)
class Stroke:
    """A line to be drawn over a picture."""

    points_px: Float64Array  # (n, 2) in the camera's own pixels
    of_size_px: tuple[int, int]  # width and height of the camera's own picture
    colour: tuple[int, int, int]
    width_px: int = 2


@dataclass(frozen=True)
class Asked:
    """A window that no shard holds, as a row, and what is known of it."""

    window: PlannedWindow
    row: Row
    truth: Mapping[str, Any]  # in the form of a prediction's values; empty where nothing is known


@dataclass(frozen=True)
class Questions:
    """The windows of one recording, one after the other."""

    count: int
    asked: Iterator[Asked]
    dropped: Mapping[str, int]  # why others are not asked about: reason -> windows


@dataclass(frozen=True)
class BuiltModel:
    """A model ready for a stage, and what its tokenizer says."""

    model: nn.Module
    tokenizer: Any
    notes: tuple[str, ...] = ()  # what a user should be told of how it learns


class ModelSize(NamedTuple):
    """How large a model is, known without making one."""

    weights: int
    learning: int  # of the weights
    weight_bytes: int
    notes: tuple[str, ...] = ()  # as of `BuiltModel`


@dataclass(frozen=True)
class Program:
    """A part of a model as ONNX will hold it."""

    name: str  # of its file
    module: nn.Module
    inputs: Mapping[str, Tensor]  # seeded examples, by name
    output_names: tuple[str, ...]
    batch: int | None = None  # windows at once; None: the first axis of every input and output may have any length
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the ONNX file


RunProgram = Callable[[str, Mapping[str, Tensor]], Sequence[Tensor]]
