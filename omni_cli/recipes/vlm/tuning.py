"""What of a vision-language model learns, how fast, and what a user is told of it."""

from typing import Any

from pydantic import ValidationInfo
from torch import nn

from omni_cli.errors import OmniError
from omni_cli.models import adapters, parts, quantised
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


def rates_are_used(train: VlmTrain, info: ValidationInfo) -> VlmTrain:
    """Refuse a rate for a part of which nothing learns."""
    learning = info.data["tune"].learning if "tune" in info.data else parts.TITLES
    if idle := [part for part in train.own_rates if part not in learning]:
        title = parts.TITLES[idle[0]]
        raise ValueError(
            f"{idle[0]}_learning_rate is set, and {title} does not learn; let it with {_LET_LEARN[idle[0]]}"
        )
    return train


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
    return BuiltModel(model, tokenizer, (*quantised.notes(model), *_rate_notes(model, train)), rates)


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
