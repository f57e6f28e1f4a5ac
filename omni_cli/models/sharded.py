"""Full tuning cut over many ranks by torch's own `fully_shard` (FSDP2): each holds a part of what learns.

Each layer is gathered whole when it is needed and let go after, forward and backward. What is held is float32, and what
is computed with is cast to the precision that was asked for as it is gathered: a step of 1e-5 of a weight, which
bfloat16 would round away, is kept. A vision tower or merger that does not learn is no part of this: every rank holds it
whole, in the precision of the computation, and no rank waits for another where their pictures are of different number.

`TrainingArguments(fsdp=...)` is not used. accelerate 1.15 (`AcceleratorState.__init__`) sets FSDP up on accelerators
alone and on CPUs runs DDP without a word, so that nobody could test it here; and it would cut the frozen tower too.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from omni_cli.models.parts import part_of

NOTE = (
    "the model is cut over the ranks (FSDP2): tried with two ranks on a CPU, where it learns as one process does; omni "
    "has not yet been run so on GPUs"
)
_LOOKS = ("get_video_features", "get_image_features")  # called beside `forward`, and gather what they need as it does
_ON_RANK_0 = StateDictOptions(full_state_dict=True, cpu_offload=True)
_FROM_EVERY_RANK = StateDictOptions(full_state_dict=True)


def is_sharded(model: nn.Module) -> bool:
    """Say whether each rank holds a part of a model."""
    return isinstance(model, FSDPModule)


def shard(model: Any, compute: torch.dtype, mesh: DeviceMesh | None = None) -> Any:
    """Cut a model over the ranks in place; returns it.

    Args:
        model: a vision-language model of transformers, in float32, the same on every rank, on its device.
        compute: the type that layers compute in; gradients are summed over the ranks in float32.
        mesh: of one dimension; all ranks of the default group where it is absent.
    """
    mesh = mesh or init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    whole = _replicated(model, compute)
    cast = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": cast, "ignored_params": whole}
    for layer in _layers(model):
        if not whole.issuperset(layer.parameters()):
            fully_shard(layer, **options)
    _shard_ends(model, options)
    fully_shard(model, **options)
    for look in _LOOKS:
        if hasattr(model, look):
            register_fsdp_forward_method(model, look)
    # It tells of outputs that are views, as the pictures' features are, and that writing into one would lose its hooks:
    # nobody does, and the gradients are those of one process.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return model


def _replicated(model: nn.Module, compute: torch.dtype) -> set[nn.Parameter]:
    """Return what every rank holds whole, cast to the type that is computed in."""
    frozen = [
        weight for name, weight in model.named_parameters() if part_of(name) != "language" and not weight.requires_grad
    ]
    for weight in frozen:
        weight.data = weight.data.to(compute)
    return set(frozen)


def _layers(model: Any) -> list[nn.Module]:
    """Return the layers of the language model and of the tower, by the names that the library must not split."""
    return [module for module in model.modules() if type(module).__name__ in model._no_split_modules]


def _shard_ends(model: Any, options: dict[str, Any]) -> None:
    """Cut embedding and head; where they are one weight it is the root's, which is whole from first use to the step."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is not head.weight:
        fully_shard(embedding, **options)
        fully_shard(head, reshard_after_forward=False, **options)


def gathered(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return a model's weights, whole, on the CPU of rank 0, and nothing elsewhere; every rank must call it.

    Args:
        model: cut or not.
        dtype: to cast them to.
    """
    weights: dict[str, Any] = get_model_state_dict(model, options=_ON_RANK_0)
    if weights and dtype:
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
    return weights | _tied(model, weights) if weights else weights


def _tied(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that are one in the model as one: by that the library knows which not to write twice."""
    first: dict[nn.Parameter, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: weights[first.setdefault(weight, name)] for name, weight in named}


@contextmanager
def as_uncut(model: nn.Module) -> Iterator[None]:
    """Let a model be of its library's own class while it is written.

    `fully_shard` makes a class of its own of it, and transformers 5.23 finds the public names of a model's weights by
    the name of its class: a file of other names would be written, without a word.
    """
    cut: Any = type(model)
    if is_sharded(model):
        model.__class__ = cut.__mro__[cut._orig_cls_mro_index]
    try:
        yield
    finally:
        model.__class__ = cut


def gathered_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what an optimiser keeps of a cut model, by the weights' names, as `gathered` does."""
    return get_optimizer_state_dict(model, optimizer, options=_ON_RANK_0)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimiser of a cut model what `gathered_optimizer` returned; every rank must call it, with all of it.

    The number of ranks may be another than it was.
    """
    set_optimizer_state_dict(model, optimizer, state, options=_FROM_EVERY_RANK)


def whole_norm(norm: Tensor) -> Tensor:
    """Return the norm of a cut gradient as each rank's own number; every rank must call it."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
