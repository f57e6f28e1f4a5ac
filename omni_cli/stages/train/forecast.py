"""How much memory a training step will take at its peak, found without taking it.

The recipe's own loss and its backward pass run on tensors that have a shape, a type and a device, and no storage
(torch's FakeTensorMode), while every storage that would live is counted. So what is counted is what autograd keeps of
this very code: checkpointed layers, a tower outside autograd, logits of labelled tokens only. torch's own MemTracker
(2.13) counts so too, and fails on frozen weights, on which it puts hooks of gradients.

What cannot be seen is added: what the optimiser keeps (`stages/disk.py`), and weights of 4 bits in place of those that
were walked through. Attention is counted as the fused kernels need it, on a GPU as on a CPU. A GPU's context (about
half a GiB) and what its allocator cannot use come on top, and on a CPU the process itself.
"""

import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omni_cli.models.quantised import DECODER
from omni_cli.recipe import ModelSize, Outlined
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages.disk import optimizer_bytes
from omni_cli.stages.memory import GIB

_CPU = torch.device("cpu")
_WITHOUT_COPIES = ("fused", "8bit", "paged")  # optimisers that need no second copy of the gradients while they step


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # with the batch, and with what the optimiser copies where its step is the peak
    tokens: int = 0  # of the batch; 0 where there are none

    @property
    def peak(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def needs(self, needed_bytes: int) -> str:
        """Say how much that is, with what a process takes beside it."""
        return f"a step needs about {needed_bytes / GIB:.2f} GiB at its peak"

    def remedies(self, recipe: Any, held_bytes: int) -> list[str]:
        """Return the batch that would fit, if any; what a batch takes grows with the number of its windows."""
        a_window = self.activations / recipe.train.batch_size
        fitting = int((held_bytes - self.peak + self.activations) / a_window)
        return [f"--set train.batch_size={fitting} would fit"] if 0 < fitting < recipe.train.batch_size else []


def forecast(recipe: Any, preprocess: Preprocess, *, on_gpu: bool) -> Memory | None:
    """Return the peak of a step of one batch; None of a recipe without an outline, or whose model is cut over ranks.

    Of the latter `forecast_cut` says what is sure.

    Args:
        recipe: what learns, and how.
        preprocess: of the model.
        on_gpu: computing in 16 bit is left to autocast there.
    """
    is_foreseen = recipe.train.sharding == "none" and isinstance(recipe, Outlined)  # what a rank gathers is not walked
    return _foreseen(recipe, preprocess, on_gpu=on_gpu) if is_foreseen else None


def _foreseen(recipe: Any, preprocess: Preprocess, *, on_gpu: bool) -> Memory:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    outline = recipe.outline(preprocess)
    batch = {
        name: _fake(tensor, fake) if tensor.is_meta else tensor
        for name, tensor in recipe.outline_batch(outline, preprocess).items()
    }
    model = _on_fakes(outline, fake)
    if recipe.train.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if recipe.train.accumulation > 1:  # gradients of the first part of a step are there while the next is computed
        for weight in _learning(model):
            weight.grad = _fake(weight, fake)
    is_mixed = on_gpu and recipe.precision != "float32"
    mixing = torch.autocast("cpu", getattr(torch, recipe.precision)) if is_mixed else nullcontext()
    with Living(model, list(batch.values())) as living:
        with mixing:
            loss = recipe.loss(model.train(), batch, preprocess)
        (loss.total / loss.count).backward()
    tokens = batch["input_ids"].numel() if "input_ids" in batch else 0
    return replace(_larger_moment(living, model, recipe), tokens=tokens)


def _larger_moment(living: "Living", model: nn.Module, recipe: Any) -> Memory:
    """Return the larger of two moments: the peak of forward and backward pass, and the optimiser's step after them."""
    size: ModelSize = recipe.size(recipe.preprocess())
    kept = optimizer_bytes(size, recipe.train.optimizer)
    walked = _bytes(list(model.parameters()))
    gradients = _bytes(_learning(model))
    # Weights of 4 bits are written out in full, one matrix at a time, whenever they are multiplied.
    unpacked = size.weights * getattr(torch, recipe.precision).itemsize
    is_packed = size.weight_bytes < unpacked
    weights = walked - unpacked + size.weight_bytes if is_packed else walked
    written_out = max(_bytes([layer.weight]) for layer in _layers(model)) if is_packed else 0
    copies = 0 if any(name in recipe.train.optimizer for name in _WITHOUT_COPIES) else gradients
    at_peak, of_gradients = living.peak
    passes = Memory(weights, of_gradients, kept, at_peak - walked - of_gradients + written_out)
    return max(passes, Memory(weights, gradients, kept, copies), key=lambda moment: moment.peak)


class Living(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the bytes of the storages that live, and notes the most of them and what of those gradients were."""

    def __init__(self, model: nn.Module, inputs: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._held: dict[int, weakref.ref[Any]] = {}
        self._bytes, self._learning = 0, _learning(model)
        self.peak = (0, 0)  # the most bytes, and how many of them were of gradients
        for tensor in [*model.parameters(), *model.buffers(), *inputs, *self._gradients()]:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it made."""
        made = func(*_without_masks(args), **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        if self._bytes > self.peak[0]:
            self.peak = self._bytes, _bytes(self._gradients())
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._held:
            self._held[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self._bytes += size

    def _forget(self, key: int, size: int) -> None:
        del self._held[key]
        self._bytes -= size

    def _gradients(self) -> list[Tensor]:
        return [weight.grad for weight in self._learning if weight.grad is not None]


def _without_masks(args: Any) -> Any:
    """Return what an operation is given with places instead of masks: how many a mask marks no fake can know."""
    return [
        [place for tensor in each for place in _places(tensor)] if isinstance(each, (list, tuple)) else each
        for each in args
    ]


def _places(value: Any) -> tuple[Any, ...]:
    is_mask = isinstance(value, Tensor) and value.dtype == torch.bool and not isinstance(value, FakeTensor)
    return value.nonzero(as_tuple=True) if is_mask else (value,)


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _learning(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def _layers(model: nn.Module) -> list[nn.Linear]:
    return [layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and DECODER in name]


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=_CPU)


def _on_fakes(model: Any, mode: FakeTensorMode) -> Any:
    """Put fakes of a CPU in place of what is on the `meta` device; what was shared stays shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                new = made.setdefault(id(weight), nn.Parameter(_fake(weight, mode), weight.requires_grad))
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _fake(buffer, mode)
    return model
