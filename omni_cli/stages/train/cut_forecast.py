"""How much memory each of several processes is sure to hold that train a model together, cut over them by FSDP2.

It is what `models/sharded.py` makes of a model, found from the model's shapes. What autograd keeps of a batch comes on
top, and is not foreseen, so all of this is a lower bound: what it refuses cannot be.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from omni_cli.models.parts import part_of
from omni_cli.recipe import Outlined
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages.disk import optimizer_bytes
from omni_cli.stages.memory import GIB

_CUT_BYTES = 4  # of a number that is cut: float32
_MOST_PROCESSES = 1024


@dataclass(frozen=True)
class CutMemory:
    """Bytes on one of the processes at least, of a model that is cut over them.

    Attributes:
        processes: that share the model.
        uncut: the model as each process puts it on its device, whole and in float32, before it is cut.
        whole: of what does not learn beside the language model, and is not cut.
        cut: of all other weights, on all processes together, in float32.
        of_gradients: of what learns, likewise.
        of_optimizer: likewise.
        gathered: of the largest layer, embedding or head, in the type that is computed in.
        accumulates: the gradients of one micro-batch are there while the next is computed.
    """

    processes: int
    uncut: int
    whole: int
    cut: int
    of_gradients: int
    of_optimizer: int
    gathered: int
    accumulates: bool

    @property
    def weights(self) -> int:
        """Of the weights of one process."""
        return self.whole + self.cut // self.processes

    @property
    def gradients(self) -> int:
        """Of its gradients."""
        return self.of_gradients // self.processes

    @property
    def optimizer(self) -> int:
        """Of what its optimiser keeps."""
        return self.of_optimizer // self.processes

    @property
    def peak(self) -> int:
        """The largest of three moments: before it is cut, while a layer is computed, and at the optimiser's step."""
        kept = self.weights + self.optimizer
        computing = kept + self.gathered + (self.gradients if self.accumulates else 0)
        return max(self.uncut, computing, kept + self.gradients)

    def needs(self, needed_bytes: int) -> str:
        """Say how much that is, with what a process takes beside it."""
        why = "to hold the model in float32 until it is cut" if self.peak == self.uncut else "without its activations"
        return f"each of {self.processes} processes needs at least {needed_bytes / GIB:.2f} GiB, {why}"

    def remedies(self, recipe: Any, held_bytes: int) -> list[str]:
        """Return what would take less: of more processes each holds less."""
        more = range(self.processes + 1, _MOST_PROCESSES + 1)
        fitting = next((count for count in more if replace(self, processes=count).peak <= held_bytes), None)
        return [f"no fewer than {fitting} processes could hold it"] if fitting else []


def forecast_cut(recipe: Any, preprocess: Preprocess, processes: int) -> CutMemory | None:
    """Return what each process holds at least; None of a model that is not cut, or of which there is no outline.

    Args:
        recipe: what learns, and how.
        preprocess: of the model.
        processes: that share the model.
    """
    is_foreseen = recipe.train.sharding != "none" and isinstance(recipe, Outlined)
    return _of_outline(recipe, preprocess, processes) if is_foreseen else None


def _of_outline(recipe: Any, preprocess: Preprocess, processes: int) -> CutMemory:
    model, computed_bytes = recipe.outline(preprocess), getattr(torch, recipe.precision).itemsize
    whole = {
        weight for name, weight in model.named_parameters() if part_of(name) != "language" and not weight.requires_grad
    }
    cut = set(model.parameters()) - whole
    return CutMemory(
        processes,
        uncut=_count(cut | whole) * _CUT_BYTES,
        whole=_count(whole) * computed_bytes,
        cut=_count(cut) * _CUT_BYTES,
        of_gradients=_count({weight for weight in cut if weight.requires_grad}) * _CUT_BYTES,
        of_optimizer=optimizer_bytes(recipe.size(preprocess), recipe.train.optimizer),
        gathered=max(map(_count, _units(model, cut))) * computed_bytes,
        accumulates=recipe.train.accumulation > 1,
    )


def _units(model: Any, cut: set[nn.Parameter]) -> list[set[nn.Parameter]]:
    """Return what is gathered at once: each layer, embedding and head where they are two, and all the rest."""
    modules = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules += [embedding, head] if embedding.weight is not head.weight else []
    units = [cut.intersection(module.parameters()) for module in modules]
    return [*units, cut.difference(*units)]


def _count(weights: set[nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights)
