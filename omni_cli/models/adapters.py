"""PEFT adapters, and the proof that they are what was asked for.

PEFT attaches; this module checks. A rank that is silently ignored, a pattern that hits the vision tower, a frozen
weight that learns or a trainable one that never sees a gradient are each an error here, not a strange result later.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from omni_cli.config import nearest
from omni_cli.errors import DataError, OmniError, UsageError

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LAYER = re.compile(r"language_model\.layers\.\d+$")
_LINEAR = re.compile(r"language_model\.layers\.\d+\.(?:self_attn|mlp)\.(\w+_proj)$")
_MERGER = re.compile(r"visual\.(merger|deepstack_merger_list\.\d+)$")


@dataclass(frozen=True)
class AdapterSpec:
    """What to attach to every layer of the language model."""

    rank: int
    alpha: int
    dropout: float
    targets: tuple[str, ...]
    use_dora: bool = False
    train_merger: bool = False  # between vision tower and language model: in full, saved with the adapter


def target_pattern(targets: Sequence[str]) -> str:
    """Return a full-match pattern for linear layers of the language model: never the vision tower, never the head."""
    attention = "|".join(name for name in targets if name in _ATTENTION)
    mlp = "|".join(name for name in targets if name not in _ATTENTION)
    parts = [f"self_attn\\.({attention})"] if attention else []
    parts += [f"mlp\\.({mlp})"] if mlp else []
    return rf".*language_model\.layers\.\d+\.({'|'.join(parts)})"


def merger_names(model: nn.Module) -> list[str]:
    """Return the modules that map the vision tower's output to the language model's width."""
    return [name for name, _ in model.named_modules() if _MERGER.search(name)]


def attach(model: PreTrainedModel, spec: AdapterSpec) -> nn.Module:
    """Freeze a model, attach an adapter to its language model, and verify it.

    Raises:
        UsageError: a target is no layer of this model.
        OmniError: the adapter is not what was asked for.
    """
    check_targets(model, spec.targets)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_dora=spec.use_dora,
        target_modules=target_pattern(spec.targets),
        modules_to_save=merger_names(model) if spec.train_merger else None,
        task_type="CAUSAL_LM",
    )
    wrapped: nn.Module = get_peft_model(model, config)
    verify(wrapped, spec)
    return wrapped


def check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Check that every target is a linear layer of the language model.

    Raises:
        UsageError: one is not, or there is none.
    """
    known = {match[1] for name, _ in model.named_modules() if (match := _LINEAR.search(name))}
    if wrong := [name for name in targets if name not in known] or ([] if targets else ["nothing"]):
        raise UsageError(f"tune.targets: {wrong[0]!r} is no layer of the language model; {nearest(wrong[0], known)}")


def load(model: PreTrainedModel, folder: Path, spec: AdapterSpec) -> nn.Module:
    """Attach a saved adapter to its base and verify it.

    Raises:
        DataError: the adapter was made for another base.
    """
    try:
        wrapped: nn.Module = PeftModel.from_pretrained(model, folder, is_trainable=True)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise DataError(f"adapter {folder} does not match its base model: {reason}") from None
    verify(wrapped, spec)
    return wrapped


def disabled(model: Any) -> AbstractContextManager[None]:
    """Return a context in which an adapted model is its base."""
    context: AbstractContextManager[None] = model.disable_adapter()
    return context


def merge(model: Any) -> Any:
    """Fold an adapter into its base and return the base; the adapted model is used up.

    Raises:
        DataError: a merged weight is not finite.
    """
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise DataError(f"the adapter cannot be merged: {str(error).splitlines()[0]}; train it again") from None


def verify(model: nn.Module, spec: AdapterSpec) -> None:
    """Check hit modules, rank, scale and the trainable count against the analytic value.

    Raises:
        OmniError: one of them differs.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    wanted = re.compile(target_pattern(spec.targets))
    strangers = [name for name in layers if not wanted.fullmatch(name)]
    if strangers or not layers:
        raise OmniError(f"adapter sits on {strangers or 'nothing'}; expected layers that match {wanted.pattern}")
    depth = sum(bool(_LAYER.search(name)) for name, _ in model.named_modules())
    for target in spec.targets:
        hits = sum(name.endswith(f".{target}") for name in layers)
        if hits != depth:
            raise OmniError(f"adapter sits on {hits} layers named {target}; the language model has {depth}")
    for name, layer in layers.items():
        rank, scale = layer.lora_A["default"].weight.shape[0], layer.scaling["default"]
        if rank != spec.rank or scale != spec.alpha / spec.rank:
            asked = f"asked for {spec.rank} and {spec.alpha / spec.rank}"
            raise OmniError(f"adapter on {name} has rank {rank} and scale {scale}; {asked}")
    mergers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    if len(mergers) != (len(merger_names(model)) if spec.train_merger else 0):
        raise OmniError(f"{len(mergers)} mergers learn beside the adapter; asked for train_merger={spec.train_merger}")
    expected = sum(_analytic(layer, spec) for layer in layers.values())
    expected += sum(weight_count(merger.original_module) for merger in mergers)
    if (found := trainable_count(model)) != expected:
        raise OmniError(f"{found:,} weights are trainable; what was asked for has {expected:,}")


def trainable_count(model: nn.Module) -> int:
    """Return how many weights learn."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def weight_count(model: nn.Module) -> int:
    """Return how many weights there are."""
    return sum(weight.numel() for weight in model.parameters())


def check_gradients(model: nn.Module) -> None:
    """Check that every trainable tensor has a finite non-zero gradient and no frozen one has any.

    To be called after a backward that follows the first step with a positive rate: before it LoRA's A has an exactly
    zero gradient, since B is zero.

    Raises:
        OmniError: a tensor breaks the rule; it is named.
    """
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            if weight.grad is not None:
                raise OmniError(f"frozen weight {name} received a gradient")
        elif weight.grad is None:
            raise OmniError(f"trainable weight {name} received no gradient: it is not part of the loss")
        elif not torch.isfinite(weight.grad).all():
            raise OmniError(f"gradient of {name} is not finite; lower --set train.learning_rate")
        elif not weight.grad.any():
            raise OmniError(f"gradient of trainable weight {name} is exactly zero: it does not learn")


def _analytic(layer: LoraLayer, spec: AdapterSpec) -> int:
    magnitude = layer.out_features if spec.use_dora else 0
    return int(spec.rank * (layer.in_features + layer.out_features) + magnitude)
