"""Vision backbones of a driving net: transformers' own ResNet, ConvNeXt V2 and DINOv2, looking at 24 channels at once.

The 24 channels of one look are four packed YUV420 pictures: the narrow view 0.2 s ago and now, then the wide one. A
published backbone looks at three, red, green and blue. Its stem is *inflated*: YUV to RGB is linear, so three-colour
kernels become six-channel kernels that answer a packed picture exactly as they answered its colours. They are put on
the newest narrow picture and the other three begin at zero: what was learned holds from the first step, and how the
pictures differ is learned on top.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    ConvNextV2Config,
    ConvNextV2Model,
    Dinov2Config,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
)

from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.formats.driving_model import PICTURE_SHAPE
from omni_cli.models.families import TINY_PREFIX, hub_arguments, is_tiny
from omni_cli.models.model_folders import check_config, check_weights, reading

CHANNELS = 4 * PICTURE_SHAPE[0]
HEIGHT, WIDTH = PICTURE_SHAPE[1:]
_RGB_CHANNELS = 3
_NEWEST_NARROW = slice(PICTURE_SHAPE[0], 2 * PICTURE_SHAPE[0])
_BRIGHTNESS_PLANES = 4  # of a packed picture: each holds every second pixel of every second row
_GREY, _SPREAD = 128.0, 64.0  # pixels become (x - 128) / 64: U and V are centred there, and brightness nearly so
# ConvNeXt V2 as Meta publishes it: blocks of each of its four stages, and channels of the first, doubled at each of the
# others. Source: Woo et al. 2023 (arXiv:2301.00808), appendix A.
_CONVNEXT_V2 = {
    "atto": ((2, 2, 6, 2), 40),
    "femto": ((2, 2, 6, 2), 48),
    "pico": ((2, 2, 6, 2), 64),
    "nano": ((2, 2, 8, 2), 80),
    "tiny": ((3, 3, 9, 3), 96),
    "base": ((3, 3, 27, 3), 128),
    "large": ((3, 3, 27, 3), 192),
    "huge": ((3, 3, 27, 3), 352),
}
_PUBLISHED_CONVNEXT_V2 = re.compile(rf"facebook/convnextv2-({'|'.join(_CONVNEXT_V2)})-(?:1k|22k)-(?:224|384|512)")
_OF_A_CLASSIFIER = ("_name_or_path", "architectures", "id2label", "label2id", "problem_type")
_IMAGENET_STD = (0.229, 0.224, 0.225)  # of red, green and blue in 0..1: what published weights expect
# Rows: R, G, B; columns: Y, U, V, all in 0..255. Source: ITU-R BT.601-7, limited range.
_RGB_FROM_YUV = ((1.164, 0.0, 1.596), (1.164, -0.392, -0.813), (1.164, 2.017, 0.0))


@dataclass(frozen=True)
class _Family:
    config: type[PreTrainedConfig]
    model: Callable[[Any], PreTrainedModel]
    stem: str  # the weight that meets the pixels
    width: Callable[[Any], int]  # channels of the feature map
    stride: Callable[[Any], int]  # pixels per cell of the feature map
    tiny: Mapping[str, Any]
    always: Mapping[str, Any]


# The tiny ones draw their weights with a standard deviation that keeps signals alive in their narrow layers; the
# library's 0.02 suits widths of hundreds. One look, forward and backward, takes one core of a Xeon 16, 11 and 12 ms.
_FAMILIES = {
    "resnet": _Family(
        ResNetConfig,
        ResNetModel,
        "embedder.embedder.convolution.weight",
        lambda config: config.hidden_sizes[-1],
        lambda config: 4 * 2 ** (len(config.depths) - 1) * (1 + config.downsample_in_first_stage),
        {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"},
        {},
    ),
    "convnextv2": _Family(
        ConvNextV2Config,
        ConvNextV2Model,
        "embeddings.patch_embeddings.weight",
        lambda config: config.hidden_sizes[-1],
        lambda config: config.patch_size * 2 ** (len(config.depths) - 1),
        {"patch_size": 8, "num_stages": 2, "hidden_sizes": [32, 64], "depths": [1, 1], "initializer_range": 0.1},
        {},
    ),
    "dinov2": _Family(
        Dinov2Config,
        Dinov2Model,
        "embeddings.patch_embeddings.projection.weight",
        lambda config: config.hidden_size,
        lambda config: config.patch_size,
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "patch_size": 16,
            "image_size": HEIGHT,  # positions are square, and interpolated to the picture's shape
            "initializer_range": 32**-0.5,
        },
        {"use_mask_token": False},  # of its pre-training alone; a weight that nothing reads would never learn
    ),
}


class Backbone(nn.Module):
    """A backbone of transformers as a function from raw pixels to a feature map.

    Args:
        config: a configuration of transformers as a dict, as `backbone_config` returns it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        family = _FAMILIES[config["model_type"]]
        whole = family.config.from_dict(dict(config))
        self.family: str = config["model_type"]
        self.width = family.width(whole)  # channels
        self.grid = (HEIGHT // family.stride(whole), WIDTH // family.stride(whole))  # cells: rows, columns
        self.model = family.model(whole)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return a feature map (b, width, *grid) of pictures (b, 24, 128, 256), 0..255."""
        dtype = next(self.model.parameters()).dtype
        # Channels last makes convolutions on a CPU 1.3 to 1.6 times as fast (measured); one pass over this many numbers
        # instead of four takes half as long, and powers of two keep the result the same to the bit.
        numbers = pixels.to(torch.float32, memory_format=torch.channels_last)
        scaled = torch.add(numbers.new_tensor(-_GREY / _SPREAD), numbers, alpha=1 / _SPREAD).to(dtype)
        features: Tensor = self.model(scaled).last_hidden_state
        if self.family == "convnextv2":  # the library applies its last norm to the mean over the map only
            features = self.model.layernorm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.family == "dinov2":  # its first token stands for no place
            features = features[:, 1:].transpose(1, 2).reshape(-1, self.width, *self.grid)
        return features


def backbone_config(name: str) -> dict[str, Any]:
    """Return the configuration of `tiny:FAMILY`, of a folder or of a hub id, told to look at 24 channels.

    Raises:
        UsageError: it is of no known family, or looks neither at 3 nor at 24 channels.
        OmniError: it is not here and the hub cannot be reached.
    """
    return _facts(name, _tiny_config(name) if is_tiny(name) else _published_config(name))


def planned_config(name: str) -> dict[str, Any]:
    """Return the same for a plan, which needs no network where the shape is known here: a ConvNeXt V2 of Meta's.

    What is loaded has the configuration that comes with its weights.

    Raises:
        UsageError: see `backbone_config`.
        OmniError: likewise.
    """
    known = _PUBLISHED_CONVNEXT_V2.fullmatch(name)
    if known is None or Path(name).is_dir():
        return backbone_config(name)
    depths, width = _CONVNEXT_V2[known[1]]
    hidden_sizes = [width * 2**stage for stage in range(len(depths))]
    return _facts(name, ConvNextV2Config(depths=list(depths), hidden_sizes=hidden_sizes))


def _facts(name: str, config: Any) -> dict[str, Any]:
    if config.num_channels not in (_RGB_CHANNELS, CHANNELS):
        raise UsageError(f"backbone {name}: it looks at {config.num_channels} channels; expected 3 (RGB) or {CHANNELS}")
    config.update({"num_channels": CHANNELS, **_FAMILIES[config.model_type].always})
    facts = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in facts.items() if name not in _OF_A_CLASSIFIER}


def load_pretrained(backbone: Backbone, name: str) -> None:
    """Fill a backbone with the safetensors of a folder or of the hub; a stem for RGB is inflated.

    Raises:
        OmniError: they are not there, or the hub cannot be reached.
        DataError: some are missing, or have other shapes: the library would draw them at random.
    """
    if Path(name).is_dir():
        check_weights(Path(name))
    with reading("load backbone", name):
        source, found = AutoModel.from_pretrained(
            **hub_arguments(name), dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    if absent := sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"]):
        raise DataError(f"backbone {name!r} lacks {len(absent)} of its weights, first {absent[0]}; fetch it again")
    weights, stem = source.state_dict(), _FAMILIES[backbone.family].stem
    weights.pop("embeddings.mask_token", None)
    if source.config.num_channels == _RGB_CHANNELS:
        weights[stem] = inflate_stem(weights[stem])
    backbone.model.load_state_dict(weights)


def inflate_stem(rgb: Tensor) -> Tensor:
    """Return kernels (n, 24, k, k) that answer a look as `rgb` (n, 3, k, k) answers its newest narrow picture.

    Equal up to a constant per kernel: the offset between our grey level and ImageNet's mean, which the bias or norm
    behind a stem takes up. Brightness comes in four planes, so each carries a quarter.
    """
    per_colour = rgb * (_SPREAD / 255 / torch.tensor(_IMAGENET_STD, dtype=rgb.dtype)).view(1, -1, 1, 1)
    yuv = torch.einsum("nckl,cd->ndkl", per_colour, torch.tensor(_RGB_FROM_YUV, dtype=rgb.dtype))
    brightness = yuv[:, :1].repeat(1, _BRIGHTNESS_PLANES, 1, 1) / _BRIGHTNESS_PLANES
    inflated = rgb.new_zeros(len(rgb), CHANNELS, *rgb.shape[2:])
    inflated[:, _NEWEST_NARROW] = torch.cat([brightness, yuv[:, 1:]], dim=1)
    return inflated


def _tiny_config(name: str) -> Any:
    family = name.removeprefix(TINY_PREFIX)
    if family not in _FAMILIES:
        raise UsageError(f"backbone {name}: no such tiny model; {_known()}")
    known = _FAMILIES[family]
    return known.config(num_channels=CHANNELS, **known.tiny)


def _published_config(name: str) -> Any:
    if name.lower().endswith(".onnx") or (any(Path(name).glob("*.onnx")) and not Path(name, "config.json").is_file()):
        raise UsageError(
            f"backbone {name}: an ONNX program is no backbone; to adapt openpilot's own model give the folder that "
            "holds its driving_vision.onnx and driving_policy.onnx (v0.10.1 to v0.10.3)"
        )
    if Path(name).is_dir():
        check_config(Path(name))
    try:
        with reading("read the configuration of backbone", name):
            config = AutoConfig.from_pretrained(**hub_arguments(name))
    except OmniError as error:
        raise type(error)(f"{error}; {_known()}") from None
    if config.model_type not in _FAMILIES:
        raise UsageError(f"backbone {name}: family {config.model_type!r} is not supported; {_known()}")
    return config


def _known() -> str:
    return f"expected {TINY_PREFIX}({'|'.join(_FAMILIES)}), or a folder or hub id of one of these families"
