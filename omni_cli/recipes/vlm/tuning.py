"""What of a vision-language model learns, how fast, and what a user is told of it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from pydantic import ValidationInfo
from torch import nn

from omni_cli.errors import OmniError
from omni_cli.models import adapters, compiled, parts, quantised, qwen_vl, sharded
from omni_cli.recipe import BuiltModel, ModelSize, OwnRate
from omni_cli.recipes.vlm.settings import VlmTrain, VlmTune

_LET_LEARN = {
    "vision": "tune.vision_targets, or tune.mode = full",
    "merger": "tune.train_merger = true, or tune.mode = full",
}


def can_be_tuned(tune: VlmTune, info: ValidationInfo) -> VlmTune:
    """Refuse weights of 4 bits that are to learn themselves."""
    if tune.mode == "full" and info.data.get("quantization") == "nf4":
        raise ValueError("weights of 4 bits cannot learn; take quantization = none, or tune.mode = lora or dora")
    return tune


def can_be_trained(train: VlmTrain, info: ValidationInfo) -> VlmTrain:
    """Refuse a rate for a part of which nothing learns, and to cut over ranks what is small or not even."""
    if train.sharding != "none":
        _check_cut(train.sharding, info)
    if train.compile:
        _check_compiled(train.sharding, info)
    learning = info.data["tune"].learning if "tune" in info.data else parts.TITLES
    if idle := [part for part in train.own_rates if part not in learning]:
        title = parts.TITLES[idle[0]]
        raise ValueError(
            f"{idle[0]}_learning_rate is set, and {title} does not learn; let it with {_LET_LEARN[idle[0]]}"
        )
    return train


def _check_cut(sharding: str, info: ValidationInfo) -> None:
    if "tune" in info.data and info.data["tune"].mode != "full":
        raise ValueError(
            f"sharding = {sharding} is for tune.mode = full; adapters are small, and learn whole on every rank: leave "
            "it at none"
        )
    if info.data.get("precision") == "float16":
        raise ValueError(f"sharding = {sharding} does not go with precision = float16; take bfloat16 or float32")


def _check_compiled(sharding: str, info: ValidationInfo) -> None:
    """Refuse what nobody tried; and DoRA, whose layers PEFT 0.21 computes so that each shape needs several programs."""
    mode = info.data["tune"].mode if "tune" in info.data else None
    found = {"sharding": sharding, "quantization": info.data.get("quantization"), "tune.mode": mode}
    for name, value in found.items():
        if value in ("fsdp2", "nf4", "dora"):
            raise ValueError(f"compile = true does not go with {name} = {value}; leave it at false")


def cut(precision: str) -> Callable[[Any], Any]:
    """Return what cuts a model over the ranks."""
    return partial(sharded.shard, compute=qwen_vl.DTYPES[precision])


def as_held(recipe: Any) -> Any:
    """Return a recipe whose base is loaded as that is held which learns of it itself: in float32."""
    return recipe.model_copy(update={"precision": "float32"}) if recipe.tune.mode == "full" else recipe


def frozen_type(recipe: Any) -> torch.dtype:
    """Return the type of weights that do not learn; where the model is cut over ranks, before it is cut."""
    is_cut = recipe.train.sharding != "none"
    return torch.float32 if is_cut else qwen_vl.DTYPES[recipe.precision]


def written_type(recipe: Any) -> torch.dtype | None:
    """Return the type that trained weights are published in; None: as they are held."""
    return qwen_vl.DTYPES[recipe.precision] if recipe.tune.mode == "full" else None


def computing(recipe: Any, model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which weights held in float32 are computed with in the precision that was asked for.

    What is cut over ranks is cast as it is gathered, and PEFT casts what goes through an adapter.
    """
    is_cast = recipe.tune.mode == "full" and recipe.train.sharding == "none" and recipe.precision != "float32"
    kind = next(model.parameters()).device.type
    return torch.autocast(kind, qwen_vl.DTYPES[recipe.precision]) if is_cast else nullcontext()


def size(recipe: Any, model: nn.Module) -> ModelSize:
    """Return how large a base would be as it learns.

    Args:
        recipe: what learns, and how.
        model: the base, of shapes alone; it is used up.
    """
    total, precision = adapters.weight_count(model), qwen_vl.DTYPES[recipe.precision]
    held = qwen_vl.weight_bytes(model, precision, recipe.quantization)
    learns = tuned(model, recipe.tune, frozen_type(recipe))
    if recipe.tune.mode == "full":
        held = sum(weight.nbytes for weight in learns.parameters())
    learning = adapters.trainable_count(learns)
    return ModelSize(total, learning, held, total * precision.itemsize, planned_notes(recipe))


def adapter_spec(tune: VlmTune) -> adapters.AdapterSpec:
    """Return what to attach."""
    return adapters.AdapterSpec(
        tune.rank,
        tune.alpha,
        tune.dropout,
        tune.targets,
        use_dora=tune.mode == "dora",
        train_merger=tune.train_merger,
        vision_targets=tune.vision_targets,
        rank_stabilised=tune.rank_stabilised,
    )


def tuned(model: nn.Module, tune: VlmTune, frozen: torch.dtype) -> nn.Module:
    """Return a model of which that learns which is to learn.

    In full tuning what learns is held in float32, as PEFT holds an adapter: of a weight of 0.02 the next in bfloat16 is
    1e-4 away, and a step of 1e-5 would be rounded away, every time.

    Args:
        model: the base.
        tune: what learns.
        frozen: type of the weights of a fully tuned model that do not.

    Raises:
        UsageError: a target is no layer of this model.
        OmniError: what learns is not what was asked for.
    """
    is_full = tune.mode == "full"
    learns = parts.freeze(model, tune.freeze) if is_full else adapters.attach(model, adapter_spec(tune))
    if (found := frozenset(parts.learning_counts(learns))) != tune.learning:
        raise OmniError(f"of the model {_listed(found)} learn; asked for {_listed(tune.learning)}")
    for name, weight in learns.named_parameters() if is_full else ():
        weight.data = weight.data.to(torch.float32 if parts.part_of(name) in _in_float32(tune) else frozen)
    return learns


def _in_float32(tune: VlmTune) -> frozenset[parts.Part]:
    """Return what learns; and the merger under a tower that does: its norm takes no other type than its input has."""
    return tune.learning | ({"merger"} if "vision" in tune.learning else set())


def built(model: nn.Module, tokenizer: Any, recipe: Any) -> BuiltModel:
    """Return what the stages take, with the rates of its parts and what a user should be told."""
    train: VlmTrain = recipe.train
    rates = tuple(OwnRate(part, rate, parts.learning_names(model, part)) for part, rate in train.own_rates.items())
    notes = (*quantised.notes(model), *_held_notes(recipe), *_rate_notes(model, train), *_cut_notes(train))
    notes += compiled.compile_layers(model) if train.compile else ()
    return BuiltModel(model, tokenizer, notes, rates)


def _held_notes(recipe: Any) -> tuple[str, ...]:
    is_cast = recipe.tune.mode == "full" and recipe.precision != "float32"
    return (f"what learns is held in float32, and computed with in {recipe.precision}",) if is_cast else ()


def _cut_notes(train: VlmTrain) -> tuple[str, ...]:
    return (sharded.NOTE,) if train.sharding != "none" else ()


def planned_notes(recipe: Any) -> tuple[str, ...]:
    """Return what a user should be told of a training that is planned."""
    cut = _cut_notes(recipe.train)
    told = tuple(f"{note}; memory is that of all ranks together, without activations" for note in cut)
    return (*_held_notes(recipe), *told)


def _rate_notes(model: nn.Module, train: VlmTrain) -> tuple[str, ...]:
    if not train.own_rates:
        return ()
    told = [
        f"{part} {train.own_rates.get(part, train.learning_rate):g} ({count:,} weights)"
        for part, count in sorted(parts.learning_counts(model).items())
    ]
    return (f"learning rates: {', '.join(told)}",)


def _listed(some: frozenset[parts.Part]) -> str:
    return ", ".join(parts.TITLES[part] for part in parts.TITLES if part in some) or "nothing"
