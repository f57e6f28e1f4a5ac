"""How the families of vision-language models are wired: the one place that tells them apart once they are built.

Qwen's towers read patches of any canvas, hold their merger, and their language models place tokens in time, height and
width. LLaVA-OneVision and InternVL read whole frames of one size, map them by a projector beside the tower, and their
language models count tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Wiring:
    """Where the parts of a family's models are, and how they are asked."""

    tower: str  # in the model without its head
    embedding: str  # in the tower: what its layers read
    look: Callable[[Any, Tensor, Tensor | None], Any]  # model, pixels, grids of patches -> the library's output
    heard_as: str  # under which name the language model takes that output
    has_spatial_rope: bool
    class_tokens: int = 0  # that the tower's layers read beside the patches of a frame
    unread: tuple[str, ...] = ()  # ends of the names of weights of the tower that no output depends on


def _look_at_patches(base: Any, pixel_values: Tensor, grids: Tensor | None) -> Any:
    return base.get_video_features(pixel_values, grids, return_dict=True)


def _look_at_video(base: Any, pixel_values: Tensor, _grids: Tensor | None) -> Any:
    return base.get_video_features(pixel_values, return_dict=True)


def _look_at_frames(base: Any, pixel_values: Tensor, _grids: Tensor | None) -> Any:
    return base.get_image_features(pixel_values.flatten(0, 1), return_dict=True)


# Without rope it adds the same to all the scores of a query, which softmax leaves as they were.
_KEY_BIAS = "k_proj.bias"
_QWEN = Wiring("visual", "patch_embed", _look_at_patches, "video", has_spatial_rope=True)
_WIRINGS = {
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    # The features are those of the last layer, before the norm that follows it.
    "llava_onevision": Wiring(
        "vision_tower",
        "embeddings",
        _look_at_video,
        "video",
        has_spatial_rope=False,
        unread=(_KEY_BIAS, "post_layernorm.weight", "post_layernorm.bias"),
    ),
    "internvl": Wiring(
        "vision_tower",
        "embeddings",
        _look_at_frames,
        "image",
        has_spatial_rope=False,
        class_tokens=1,
        unread=(_KEY_BIAS,),
    ),
}


def wiring_of(base: Any) -> Wiring:
    """Return how a model of transformers, not wrapped, is wired."""
    return _WIRINGS[base.config.model_type]


def placeholder_id(config: Any) -> int:
    """Return the id of the token that stands for a piece of a video, by a model's configuration."""
    heard_as = _WIRINGS[config.model_type].heard_as
    return int(config.image_token_id if heard_as == "image" else config.video_token_id)


def tower_of(base: Any) -> Any:
    """Return the vision tower of a model."""
    return getattr(base.model, wiring_of(base).tower)


def freeze_unread(base: Any) -> Any:
    """Let weights that no output depends on not learn: they would never have a gradient; returns the model."""
    for name, weight in tower_of(base).named_parameters():
        weight.requires_grad_(weight.requires_grad and not name.endswith(wiring_of(base).unread))
    return base


def positions(base: Any, position_ids: Tensor) -> Tensor:
    """Return the position ids (4, n, l) of a batch as a model's language model takes them."""
    return position_ids if wiring_of(base).has_spatial_rope else position_ids[0]


def repeated(features: Any, windows: int) -> Any:
    """Return the output of one window as if each of `windows` had been looked at: exact, and as cheap as one."""
    seen = features.pooler_output  # a tuple of one tensor a window, or one tensor of all
    features.pooler_output = seen.repeat(windows, 1, 1) if isinstance(seen, Tensor) else seen * windows
    if getattr(features, "deepstack_features", None) is not None:
        features.deepstack_features = [level * windows for level in features.deepstack_features]
    return features


def embedding_of(base: Any) -> nn.Module:
    """Return the module of the vision tower whose output its layers read."""
    module: nn.Module = getattr(tower_of(base), wiring_of(base).embedding)
    return module


def detached(output: Any) -> Any:
    """Return a module's output, one tensor or a tuple that holds some, outside autograd."""
    if isinstance(output, tuple):
        return tuple(detached(each) for each in output)
    return output.detach() if isinstance(output, torch.Tensor) else output
