"""Layers of a vision-language model as programs of `torch.compile`, made once and used by all layers of a kind.

Only layers that learn are replaced, while they are in training: answering, validation and export run the library's own
code. Nothing is wrapped, so that the names of weights, and with them checkpoints, are those of a model that is not
compiled. Attention stays out of the programs: it is one kernel already, and a program of it would hold for the lengths
of one batch alone (measured with transformers 5.23 and torch 2.13 on a CPU: over a minute of compiling for each batch
of new lengths). What is left does not depend on how rows are packed, and any number of tokens is one program.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.runtime.cache_dir_utils import cache_dir
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from omni_cli.errors import OmniError, UsageError, first_line
from omni_cli.models import batched_vision, packing, quantised

BACKEND = "inductor"
_LENGTHS = "sample_lengths"
_outside: Any = torch.compiler.disable  # which torch 2.13 leaves without types


class _Sealed:
    """Lengths of packed rows, which a program is not to look at: it would be made anew for every number of rows."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths


def compile_layers(model: nn.Module, backend: str = BACKEND) -> tuple[str, ...]:
    """Let the layers of decoder and vision tower run as programs while they are trained; changes the model in place.

    Args:
        model: a vision-language model of transformers, with or without adapters.
        backend: of `torch.compile`.

    Returns:
        What a user should be told.

    Raises:
        UsageError: torch cannot compile here, or the base holds weights of 4 bits, with which nobody tried it.
    """
    if quantised.quantised_layers(model):
        raise UsageError("train.compile = true was never tried on a base of 4 bits; leave it at false")
    if backend == BACKEND:
        _check_compiler("cuda" if torch.cuda.is_available() else "cpu")
    # What torch 2.13 asks each tensor that goes on after attention, and warns itself of; nobody reads the answer.
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
    AttentionInterface.register(packing.BY_SAMPLE, _outside(_attend_unsealed))
    AttentionInterface.register(batched_vision.BATCHED, _outside(batched_vision.attend_by_length))
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    # The library's `forward` checkpoints what it wraps. What is computed again must be the program too.
    kinds = {type(layer): torch.compile(_unwrapped(type(layer)), backend=backend, dynamic=True) for layer in layers}
    for layer in layers:
        layer.forward = MethodType(_forward_of(kinds[type(layer)]), layer)
    return (f"{len(layers)} layers are compiled while the first steps run, which take minutes longer",)


class CompilerFailed(OmniError):
    """A layer could not be compiled, or its program not be loaded."""


@contextmanager
def in_words() -> Iterator[None]:
    """Say in one line that a compiler failed; it is killed with us where a signal is sent to all processes at once.

    Raises:
        CompilerFailed: it did.
    """
    try:
        yield
    except BackendCompilerFailed as error:
        inner = error.inner_exception
        if isinstance(inner, torch.OutOfMemoryError | MemoryError):
            raise inner from error
        raise CompilerFailed(
            f"train.compile = true: a layer could not be compiled ({first_line(inner)}); a compiler that was "
            f"killed leaves halves of programs: delete {cache_dir()} and run the same command again, or leave "
            "train.compile at false"
        ) from error


def _unwrapped(kind: Any) -> Callable[..., Any]:
    """Return what a layer computes, without the checkpointing around it."""
    forward: Callable[..., Any] = kind.forward.__wrapped__
    return forward


def _forward_of(program: Callable[..., Any]) -> Callable[..., Any]:
    def forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return type(layer).forward(layer, *args, **kwargs)
        if kwargs.get(_LENGTHS) is not None:
            kwargs[_LENGTHS] = _Sealed(kwargs[_LENGTHS])
        if layer.gradient_checkpointing:
            return layer._gradient_checkpointing_func(partial(program, layer, **kwargs), *args)
        return program(layer, *args, **kwargs)

    return forward


def _attend_unsealed(*args: Any, sample_lengths: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
    lengths = sample_lengths.lengths if isinstance(sample_lengths, _Sealed) else sample_lengths
    return packing.attend(*args, sample_lengths=lengths, **kwargs)


def _check_compiler(device: str) -> None:
    """Compile something small, before a model is trained on what cannot be done."""
    try:
        torch.compile(_doubled)(torch.zeros(2, device=device))
    except RuntimeError as error:
        raise UsageError(
            f"train.compile = true: torch cannot compile here ({first_line(error)}); it needs a C++ compiler, on a GPU "
            "Triton too; or leave it at false"
        ) from None


def _doubled(values: Tensor) -> Tensor:
    return values + values
