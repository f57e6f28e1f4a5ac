"""PEFT adapters, and the proof that they are what was asked for.

PEFT attaches; this module checks. A rank that is silently ignored, a pattern that hits the vision tower, a frozen
weight that learns or a trainable one that never sees a gradient are each an error here, not a strange result later.

What PEFT 0.21 gets wrong with convolutions (`peft/tuners/lora/layer.py`, `dora.py`) is refused. On a grouped one,
depthwise included, the adapter has other groups than its base and cannot be merged, and DoRA's norms are of a matrix
that it does not apply. On a dilated one, or one that pads with anything but zeros, the adapter's first convolution
takes over neither: adapted and merged would be two functions.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights, set_peft_model_state_dict
from torch import nn

from omni_cli.config import nearest
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.models.model_folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, header, read_object

_MERGER = re.compile(r"(visual\.(merger|deepstack_merger_list\.\d+)|multi_modal_projector)$")
_ADAPTABLE = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Place:
    """A part of a model that takes adapters."""

    title: str
    before: str  # pattern of what stands before a target in a layer's full name
    target: str  # pattern of a target: what a user calls the layer, or all layers of that name
    task_type: str | None  # as PEFT's configuration names it

    def pattern(self, targets: Sequence[str]) -> str:
        """Return a full-match pattern for the names of the layers that `targets` mean."""
        return rf"{self.before}({'|'.join(map(re.escape, targets))})"

    def named(self, model: nn.Module) -> list[str]:
        """Return the targets that a model without adapters has, each once."""
        layer = re.compile(rf"{self.before}({self.target})")
        names = [name for name, module in model.named_modules() if isinstance(module, _ADAPTABLE)]
        return list(dict.fromkeys(match[1] for name in names if (match := layer.fullmatch(name))))


# Linear layers of every decoder layer: never the vision tower, never the head.
LANGUAGE_MODEL = Place(
    "the language model", r".*language_model\.layers\.\d+\.(?:self_attn|mlp)\.", r"\w+_proj", "CAUSAL_LM"
)
# Of every layer of a tower; a Qwen-VL's attention projects to query, key and value at once.
_TOWER_LAYER = r".*(?:visual\.blocks|vision_tower\.encoder\.layers?)\.\d+\.(?:attn|self_attn|attention|mlp)\."
VISION_TOWER = Place("the vision tower", _TOWER_LAYER, r"\w+", "CAUSAL_LM")
DRIVING_NET = Place("the driving net", r"(?:base_model\.model\.)?", ".+", None)  # a target is a layer's full name


@dataclass(frozen=True)
class AdapterSpec:
    """What to attach, and to which layers."""

    rank: int
    alpha: int
    dropout: float
    targets: tuple[str, ...]
    use_dora: bool = False
    train_merger: bool = False  # between vision tower and language model: in full, saved with the adapter
    place: Place = LANGUAGE_MODEL
    vision_targets: tuple[str, ...] = ()  # beside `targets`, or instead of them
    rank_stabilised: bool = False  # rsLoRA, arXiv 2312.03732

    @property
    def scale(self) -> float:
        """What the product of an adapter's two matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def sites(self) -> tuple[tuple[Place, tuple[str, ...]], ...]:
        """The places that get adapters, with the targets of each; where none has any, the place without."""
        asked = ((self.place, self.targets), (VISION_TOWER, self.vision_targets))
        return tuple(site for site in asked if site[1]) or asked[:1]

    def pattern(self) -> str:
        """Return a full-match pattern for the names of all the layers that get an adapter."""
        return "|".join(place.pattern(targets) for place, targets in self.sites)


def merger_names(model: nn.Module) -> list[str]:
    """Return the modules that map the vision tower's output to the language model's width."""
    return [name for name, _ in model.named_modules() if _MERGER.search(name)]


def driving_targets(net: nn.Module) -> list[str]:
    """Return the layers of a driving net that an adapter can sit on: dense and recurrent projections, convolutions.

    A layer that is frozen, as the head of something without labels is, is none of them; nor is one of `left_out`.
    """
    layers = [(name, module) for name, module in net.named_modules() if isinstance(module, _ADAPTABLE)]
    return [name for name, module in layers if module.weight.requires_grad and not unfit(module)]


def left_out(net: nn.Module) -> dict[str, str]:
    """Return the layers that learn in full tuning and that no adapter can sit on, with the reason of each."""
    convolutions = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    return {name: unfit(module) for name, module in convolutions if module.weight.requires_grad and unfit(module)}


def left_out_notes(net: nn.Module) -> tuple[str, ...]:
    """Return one line on the layers of `left_out`, counted by their reasons; none where there are none."""
    reasons = Counter(left_out(net).values())
    if not reasons:
        return ()
    counts = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    return (f"no adapter sits on {reasons.total()} layers, which PEFT cannot adapt and merge: {counts}",)


def unfit(layer: nn.Module) -> str:
    """Return why PEFT cannot adapt a layer such that merged and adapted are one function; empty where it can."""
    if not isinstance(layer, nn.Conv2d):
        return ""
    if layer.groups > 1:
        return f"a convolution in {layer.groups} groups"
    if layer.dilation != (1, 1):
        return f"a convolution with dilation {layer.dilation}"
    return "" if layer.padding_mode == "zeros" else f"a convolution that pads with {layer.padding_mode!r}"


def attach(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Freeze a model, attach an adapter to its layers, and verify it.

    Raises:
        UsageError: a target is no layer of this model, or cannot be adapted.
        OmniError: the adapter is not what was asked for.
    """
    check_targets(model, spec)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_dora=spec.use_dora,
        use_rslora=spec.rank_stabilised,
        target_modules=spec.pattern(),
        modules_to_save=merger_names(model) if spec.train_merger else None,
        task_type=spec.place.task_type,
    )
    wrapped: nn.Module = get_peft_model(model, config)
    _learn_mergers_in_float32(wrapped)
    verify(wrapped, spec)
    _check_magnitudes(wrapped)
    return wrapped


def check_targets(model: nn.Module, spec: AdapterSpec) -> None:
    """Check that every target is a layer of its place, and one that PEFT adapts rightly.

    Raises:
        UsageError: one is not, or there is none.
    """
    for place, targets in spec.sites:
        known, key = place.named(model), "tune.vision_targets" if place is VISION_TOWER else "tune.targets"
        if wrong := [name for name in targets if name not in known] or ([] if targets else ["nothing"]):
            raise UsageError(f"{key}: {wrong[0]!r} is no layer of {place.title}; {nearest(wrong[0], known)}")
        wanted = re.compile(place.pattern(targets))
        for name, module in model.named_modules():
            if wanted.fullmatch(name) and (reason := unfit(module)):
                raise UsageError(f"{key}: {name} is {reason}, which PEFT cannot adapt and merge; leave it out")


def load(model: nn.Module, folder: Path, spec: AdapterSpec) -> nn.Module:
    """Attach a saved adapter to its base and verify it.

    Raises:
        DataError: the adapter was made for another base, is damaged, or lacks weights.
    """
    _check_folder(model, folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            wrapped: nn.Module = PeftModel.from_pretrained(model, folder, is_trainable=True)
            if _learn_mergers_in_float32(wrapped):
                set_peft_model_state_dict(wrapped, load_peft_weights(str(folder)))  # what was read into 16 bits
    except Exception as error:  # what a library makes of settings that another hand wrote can be any
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise DataError(f"adapter {folder} does not match its base model: {reason}") from None
    verify(wrapped, spec)
    return wrapped


def _check_folder(model: nn.Module, folder: Path) -> None:
    """Refuse an adapter of another kind or base, and weights that are no safetensors: PEFT would unpickle others.

    Raises:
        DataError: it is one; what was found is named.
    """
    kept, base = check_kind(folder), vars(model).get("name_or_path")
    if (named := kept.get("base_model_name_or_path")) != base and (named or base):
        raise DataError(f"adapter {folder} names the base {named!r}, expected {base!r}; train it again on that")


def check_kind(folder: Path) -> dict[str, Any]:
    """Return an adapter's settings, if it is of the kind that omni makes and has weights that are safe to load.

    Raises:
        DataError: it is not, or has not.
    """
    kept = read_object(folder / ADAPTER_CONFIG)
    if (kind := kept.get("peft_type")) != "LORA":
        raise DataError(f"adapter {folder} is of type {kind!r}, expected 'LORA'; train it again")
    header(folder / ADAPTER_WEIGHTS)
    return kept


def disabled(model: Any) -> AbstractContextManager[None]:
    """Return a context in which an adapted model is its base."""
    context: AbstractContextManager[None] = model.disable_adapter()
    return context


def merge(model: Any) -> Any:
    """Fold an adapter into its base and return the base; the adapted model is used up.

    Raises:
        DataError: a merged weight is not finite.
    """
    for merger in _mergers(model):
        merger.modules_to_save.to(next(merger.original_module.parameters()).dtype)
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise DataError(f"the adapter cannot be merged: {str(error).splitlines()[0]}; train it again") from None


def verify(model: nn.Module, spec: AdapterSpec) -> None:
    """Check hit modules, rank, scale, types and the trainable count against the analytic value.

    Raises:
        OmniError: one of them differs.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    _check_places(model, list(layers), spec)
    for name, layer in layers.items():
        rank, scale = layer.lora_A["default"].weight.shape[0], layer.scaling["default"]
        if rank != spec.rank or scale != spec.scale:
            asked = f"asked for {spec.rank} and {spec.scale}"
            raise OmniError(f"adapter on {name} has rank {rank} and scale {scale}; {asked}")
    mergers = _mergers(model)
    if len(mergers) != (len(merger_names(model)) if spec.train_merger else 0):
        raise OmniError(f"{len(mergers)} mergers learn beside the adapter; asked for train_merger={spec.train_merger}")
    expected = sum(adapter_weights(layer.get_base_layer(), spec) for layer in layers.values())
    expected += sum(weight_count(merger.original_module) for merger in mergers)
    if (found := trainable_count(model)) != expected:
        raise OmniError(f"{found:,} weights are trainable; what was asked for has {expected:,}")
    check_types(model)


def check_types(model: nn.Module) -> None:
    """Check that what learns beside a frozen base does in float32: 16 bits round small updates away (trl#7268).

    Raises:
        OmniError: a tensor does not; it is named.
    """
    for name, weight in model.named_parameters():
        is_beside = "lora_" in name or "modules_to_save" in name
        if is_beside and weight.requires_grad and weight.dtype != torch.float32:
            raise OmniError(f"adapter weight {name} is of type {weight.dtype}; expected float32, in which it learns")


@contextmanager
def types_kept(model: nn.Module) -> Iterator[None]:
    """Give every weight that learns its own values back after the block where it casts them, on the device they are on.

    TRL 1.16 casts the adapters of a quantised model to bfloat16, all but DoRA's magnitudes.
    """
    kept = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, weight in model.named_parameters():
        if name in kept and weight.dtype != kept[name].dtype:
            weight.data = kept[name].to(weight.device)
    check_types(model)


def adapter_weights(layer: nn.Module, spec: AdapterSpec) -> int:
    """Return how many weights an adapter has on a layer: A is as its base but r wide, B pointwise, DoRA's m per output.

    Raises:
        TypeError: neither a dense layer nor a convolution.
    """
    if isinstance(layer, nn.Linear):
        inputs, outputs = layer.in_features, layer.out_features
    elif isinstance(layer, nn.Conv2d):
        inputs, outputs = layer.in_channels * math.prod(layer.kernel_size), layer.out_channels
    else:
        raise TypeError(f"no adapter is counted on {type(layer).__name__}")
    return spec.rank * (inputs + outputs) + (outputs if spec.use_dora else 0)


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


def has_gradient(model: nn.Module) -> bool:
    """Say whether any weight has a gradient that is not zero."""
    return any(weight.grad is not None and bool(weight.grad.any()) for weight in model.parameters())


def _mergers(model: nn.Module) -> list[Any]:
    """Return what learns in full beside an adapter, each with the original."""
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]


def _learn_mergers_in_float32(model: nn.Module) -> bool:
    """Let what learns in full beside an adapter do so in float32, as PEFT lets adapters alone; say whether any does."""
    copies = [merger.modules_to_save["default"] for merger in _mergers(model)]
    for copy in copies:
        copy.float()
        copy.register_forward_pre_hook(_to_own_type)
        copy.register_forward_hook(_to_given_type)
    return bool(copies)


def _to_own_type(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    module.given_type = inputs[0].dtype
    return (inputs[0].to(next(module.parameters()).dtype), *inputs[1:])


def _to_given_type(module: Any, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output.to(module.given_type)


def _check_places(model: nn.Module, found: list[str], spec: AdapterSpec) -> None:
    wanted = re.compile(spec.pattern())
    strangers = [name for name in found if not wanted.fullmatch(name)]
    if strangers or not found:
        asked = spec.targets + spec.vision_targets
        raise OmniError(f"adapter sits on {strangers[0] if strangers else 'nothing'}; expected {asked}")
    names = [name for name, _ in model.named_modules()]
    for place, targets in spec.sites:
        layer = re.compile(place.pattern(targets))
        expected, hits = (Counter(match[1] for n in some if (match := layer.fullmatch(n))) for some in (names, found))
        if short := [name for name in targets if hits[name] != expected[name] or not hits[name]]:
            sits = f"adapter sits on {hits[short[0]]} layers named {short[0]}"
            raise OmniError(f"{sits}; {place.title} has {expected[short[0]]}")


def _check_magnitudes(model: nn.Module) -> None:
    """Refuse DoRA on an output whose weights are all zero: its direction is 0 / 0, and the first forward gives NaN."""
    for name, weight in model.named_parameters():
        if "lora_magnitude_vector" in name and not weight.is_meta and not weight.all():
            layer = name.partition(".lora_magnitude_vector")[0].removeprefix("base_model.model.")
            raise UsageError(
                f"tune.targets: {layer} has an output whose weights are all zero, which DoRA cannot scale; leave it out"
            )
