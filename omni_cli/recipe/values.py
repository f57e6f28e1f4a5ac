"""What recipes and stages hand each other: losses, answers, questions, programs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from omni_cli.models.grammar import Grammar
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
    shard: Callable[[Any], Any] | None = None  # cuts the model that learns over the ranks; None: it cannot be cut


@dataclass(frozen=True)
class Metric:
    """One number a window about an answer: how wrong it is, or something else whose aim the title names."""

    key: str  # in reports
    title: str  # for people
    unit: str
    is_shown: bool = True  # in the terminal's table; a report has all
    is_error: bool = True  # less is better, so that one model can be called better than another by it
    is_drawn: bool = False  # of answers that were drawn by chance, which may be readable where the greedy one is not


class Held(NamedTuple):
    """How far an answer that was held to its format is the model's own."""

    tokens: int  # of the answer, the one that ends it among them
    off_grammar: int  # of them: the model chose another, by which no answer of the format goes on

    def line(self) -> dict[str, Any]:
        """Return it as a line of JSON holds it."""
        return {"forced": self.off_grammar > 0, "tokens": self.tokens, "off_grammar_tokens": self.off_grammar}


@dataclass(frozen=True)
class Prediction:
    """What a model said about one window; `values` is None where the answer could not be read."""

    text: str
    values: Mapping[str, Any] | None
    held: Held | None = None  # None: nothing held it to its format


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
class OwnRate:
    """Weights that learn at a rate of their own."""

    part: str  # of the model, in one word
    learning_rate: float
    weights: frozenset[str]  # their names


@dataclass(frozen=True)
class BuiltModel:
    """A model ready for a stage, and what its tokenizer says."""

    model: nn.Module
    tokenizer: Any
    notes: tuple[str, ...] = ()  # what a user should be told of how it learns
    own_rates: tuple[OwnRate, ...] = ()  # all other weights learn at the settings' rate
    grammar: Grammar | None = None  # that its answers are held to


@dataclass(frozen=True)
class StockTraining:
    """The same training as a stock library does it: its own model with the same weights, and the batches it wants."""

    model: nn.Module
    collate: Callable[[Sequence[Row]], Batch]


@dataclass(frozen=True)
class Loading:
    """How a folder of weights is loaded or served, as a model card shows it."""

    title: str
    language: str  # python or bash
    code: str
    told: str = ""  # before the code, in Markdown


@dataclass(frozen=True)
class About:
    """What a recipe knows of its models for people who did not train them: its part of a model card."""

    does: str  # in one sentence
    base: str  # hub id of the base weights; empty where they come from elsewhere
    base_told: str  # the same for people, never a path
    licence: str  # of the base weights, as the hub spells it; empty: not known
    task: str  # of the hub's list
    library: str
    asked: str  # an example
    answered: str  # in the format of its answers
    loading: tuple[Loading, ...]


class ModelSize(NamedTuple):
    """How large a model is, known without making one."""

    weights: int
    learning: int  # of the weights
    weight_bytes: int  # as they are held in training, without an adapter's
    published_bytes: int  # of the whole model once it is trained
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
    # Where other axes than the first may have any length: what they are called, by input or output, and inputs to
    # trace it with: an axis of length 0 or 1 would be taken for a constant.
    free_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    traced: Mapping[str, Tensor] = field(default_factory=dict)


class Rehearsed(NamedTuple):
    """How far programs part from the model, over answers that were given step by step."""

    apart: Mapping[str, float]  # by what was compared, the largest difference as a share of its kind's largest number
    choices_agree: float | None = None  # share of the answered places; None where nothing is chosen


RunProgram = Callable[[str, Mapping[str, Tensor]], Sequence[Tensor]]
