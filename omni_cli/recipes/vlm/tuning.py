"""What of a vision-language model learns, how fast, and what a user is told of it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pydantic import ValidationInfo
from torch import nn

from omni_cli.errors import OmniError
from omni_cli.models import adapters, parts, quantised, qwen_vl, sharded
from omni_cli.recipe import BuiltModel, OwnRate
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


def cut(precision: str) -> Callable[[Any], Any]:
    """Return what cuts a model over the ranks."""
    return partial(sharded.shard, compute=qwen_vl.DTYPES[precision])


def as_held(recipe: Any) -> Any:
    """Return a recipe whose model is held as it learns: in float32 where it is cut over ranks."""
    is_cut = recipe.train.sharding != "none"
    return recipe.model_copy(update={"precision": "float32"}) if is_cut else recipe


def held_type(recipe: Any) -> torch.dtype:
    """Return the type of the weights of such a model, in memory and in a checkpoint."""
    return qwen_vl.DTYPES[as_held(recipe).precision]


def written_type(recipe: Any) -> torch.dtype | None:
    """Return the type that trained weights are written in; None: as they are held."""
    return qwen_vl.DTYPES[recipe.precision] if recipe.train.sharding != "none" else None


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


def tuned(model: nn.Module, tune: VlmTune) -> nn.Module:
    """Return a model of which that learns which is to learn.

    Raises:
        UsageError: a target is no layer of this model.
        OmniError: what learns is not what was asked for.
    """
    learns = parts.freeze(model, tune.freeze) if tune.mode == "full" else adapters.attach(model, adapter_spec(tune))
    if (found := frozenset(parts.learning_counts(learns))) != tune.learning:
        raise OmniError(f"of the model {_listed(found)} learn; asked for {_listed(tune.learning)}")
    return learns


def built(model: nn.Module, tokenizer: Any, train: VlmTrain) -> BuiltModel:
    """Return what the stages take, with the rates of its parts and what a user should be told."""
    rates = tuple(OwnRate(part, rate, parts.learning_names(model, part)) for part, rate in train.own_rates.items())
    notes = (*quantised.notes(model), *_rate_notes(model, train), *_cut_notes(train))
    return BuiltModel(model, tokenizer, notes, rates)


def _cut_notes(train: VlmTrain) -> tuple[str, ...]:
    return (sharded.NOTE,) if train.sharding != "none" else ()


def planned_notes(train: VlmTrain) -> tuple[str, ...]:
    """Return what a user should be told of a training that is planned."""
    return tuple(f"{note}; memory is that of all ranks together, without activations" for note in _cut_notes(train))


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
