"""The vision-language families that omni knows, and the published shapes of the models its profiles name.

The shapes come from the `config.json` that each model's hub repository publishes. They let a dry run count parameters
and tokens without a network; a real run reads the configuration that comes with the weights.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, Qwen2_5_VLConfig, Qwen3VLConfig

from omni_cli.errors import UsageError
from omni_cli.models.model_folders import check_config, reading

TINY_PREFIX = "tiny:"
RANDOM_PREFIX = "random:"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class VisionFamily:
    """What a family asks of its pixels."""

    name: str
    patch_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    merge: int = 2
    temporal_patch: int = 2
    reads_frames: bool = False  # whole, of one size; the others read patches of any canvas
    closing_tokens: int = 0  # after the last frame of a video


_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
FAMILIES = {
    "qwen2_5_vl": VisionFamily("qwen2_5_vl", 14, _CLIP_MEAN, _CLIP_STD),
    "qwen3_vl": VisionFamily("qwen3_vl", 16, _HALF, _HALF),
    # SigLIP's pixels; a learned new line ends a video (transformers `LlavaOnevisionModel.get_video_features`).
    "llava_onevision": VisionFamily(
        "llava_onevision", 14, _HALF, _HALF, temporal_patch=1, reads_frames=True, closing_tokens=1
    ),
    "internvl": VisionFamily("internvl", 14, _IMAGENET_MEAN, _IMAGENET_STD, temporal_patch=1, reads_frames=True),
}
TINY_SIDE_PX = 112  # of the frames that a tiny model of such a family reads

_SPECIAL_IDS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
_QWEN2_5_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
_QWEN3_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "num_heads": 16,
    "intermediate_size": 4304,
    "patch_size": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}


def _qwen2_5(*, hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int, tied: bool) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
    text = _text(hidden, layers, heads, kv) | {"intermediate_size": inner, "vocab_size": vocab, "rope_parameters": rope}
    vision = {**_QWEN2_5_VISION, "out_hidden_size": hidden}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **_SPECIAL_IDS)


def _qwen3(*, hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int, tied: bool) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = _text(hidden, layers, heads, kv) | {"intermediate_size": inner, "vocab_size": vocab, "rope_parameters": rope}
    vision = {**_QWEN3_VISION, "out_hidden_size": hidden}
    config = {"text_config": {**text, "head_dim": 128}, "vision_config": vision, "tie_word_embeddings": tied}
    return Qwen3VLConfig(**config, **_SPECIAL_IDS)


def _text(hidden: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


def _shape(hidden: int, layers: int, heads: int, kv: int, **rest: Any) -> dict[str, Any]:
    return {"hidden": hidden, "layers": layers, "heads": heads, "kv": kv, **rest}


_PUBLISHED: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": (_qwen2_5, _shape(2048, 36, 16, 2, inner=11008, vocab=151936, tied=True)),
    "Qwen/Qwen2.5-VL-7B-Instruct": (_qwen2_5, _shape(3584, 28, 28, 4, inner=18944, vocab=152064, tied=False)),
    "Qwen/Qwen3-VL-8B-Instruct": (_qwen3, _shape(4096, 36, 32, 8, inner=12288, vocab=151936, tied=False)),
}


def is_tiny(model: str) -> bool:
    """Say whether a model is a small one that is built here from a seed."""
    return model.startswith(TINY_PREFIX)


def is_random(model: str) -> bool:
    """Say whether a model has the architecture of another and weights that are drawn here: to be measured, not used."""
    return model.startswith(RANDOM_PREFIX)


def is_drawn(model: str) -> bool:
    """Say whether a model's weights are drawn here from a seed, and its tokenizer is made here."""
    return is_tiny(model) or is_random(model)


def is_path(model: str) -> bool:
    """Say whether a model's name can only mean a folder; a hub id has one slash, and no dot or tilde before it."""
    model = model.removeprefix(RANDOM_PREFIX)
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith("/")


def is_local(model: str) -> bool:
    """Say whether a model is built here or lies here: its name means nothing elsewhere."""
    return is_drawn(model) or is_path(model) or Path(model).is_dir()


def family_of(model: str) -> VisionFamily:
    """Return the family of a `tiny:FAMILY`, a published id, a local folder, any other hub id, or `random:` of these.

    Raises:
        UsageError: omni cannot preprocess pictures for that family.
    """
    name = model.removeprefix(TINY_PREFIX) if is_tiny(model) else model_config(model).model_type
    if name not in FAMILIES:
        raise UsageError(f"model {model}: family {name!r} is not supported; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def side_px(model: str) -> int | None:
    """Return the side of the square frames that a model reads; None where it reads patches of any canvas.

    Raises:
        UsageError: they are no squares, or are not cut into its family's patches.
    """
    family = family_of(model)
    if not family.reads_frames:
        return None
    if is_tiny(model):
        return TINY_SIDE_PX
    vision = model_config(model).vision_config
    sides, patches = ({*_pair(size)} for size in (vision.image_size, vision.patch_size))
    if len(sides) > 1 or patches != {family.patch_px}:
        raise UsageError(
            f"model {model}: its frames are {sorted(sides)} px in patches of {sorted(patches)}; omni knows "
            f"{family.name} with squares in patches of {family.patch_px}"
        )
    return int(sides.pop())


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size


def model_config(model: str) -> PreTrainedConfig:
    """Return the configuration of a published id, a local folder, another hub id, or `random:` of these.

    Raises:
        UsageError: there is no such folder, or it holds an adapter or a run; or nothing can be drawn by that name.
        DataError: its configuration is damaged.
        OmniError: it is not here and the hub cannot be reached.
    """
    if is_random(model):
        _check_shape_named(model)
    model = model.removeprefix(RANDOM_PREFIX)
    if is_path(model) and not Path(model).is_dir():
        known = f"a hub id such as {next(iter(_PUBLISHED))}, or {TINY_PREFIX}{next(iter(FAMILIES))}"
        raise UsageError(f"model {model}: no such folder; give a folder of weights, {known}")
    if model in _PUBLISHED and not Path(model).is_dir():
        build, shape = _PUBLISHED[model]
        return build(**shape)
    if Path(model).is_dir():
        check_config(Path(model))
    with reading("read the configuration of model", model):
        return AutoConfig.from_pretrained(**hub_arguments(model))


def _check_shape_named(model: str) -> None:
    """Refuse `random:` before anything that is neither a folder nor a hub id, such as nothing or another `random:`."""
    name = model.removeprefix(RANDOM_PREFIX)
    is_folder = bool(name) and (is_path(name) or Path(name).is_dir())
    if not is_folder and not _HUB_ID.fullmatch(split_revision(name)[0]):
        known = f"a hub id such as {next(iter(_PUBLISHED))}, or a folder that holds a config.json"
        raise UsageError(f"model {model!r}: {RANDOM_PREFIX} stands before {known}")


def hub_arguments(model: str) -> dict[str, Any]:
    """Return what `from_pretrained` needs: name, revision; nothing is ever executed from a repository."""
    name, revision = split_revision(model)
    asked = {"revision": revision} if revision else {}
    return {"pretrained_model_name_or_path": name, "trust_remote_code": False, **asked}


def split_revision(model: str) -> tuple[str, str | None]:
    """Return the name and the revision (a branch, tag or commit) of a hub id such as `ORGANISATION/NAME@REVISION`."""
    name, at, revision = model.partition("@")
    return (name, revision) if at and not is_path(name) and not Path(model).is_dir() else (model, None)
