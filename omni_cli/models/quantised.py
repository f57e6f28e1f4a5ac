"""Four-bit language models: which layers are quantised, and whether this machine multiplies by them rightly.

Two things have gone wrong for others without a word. A name that spares nothing quantises the vision tower too
(transformers 5.23 with "visual" alone). And a kernel that is wrong on one kind of GPU gives about half of a product's
elements wrong (ROCm/bitsandbytes#93). So the list of quantised layers is compared with the one that was meant, and
products are compared with those of the dequantised matrix before anything learns from them.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig

from omni_cli.errors import OmniError, UsageError

_KIND = "nf4"
# Towers, what joins them to the language model, and the head; "visual" alone would spare nothing (transformers 5.23).
_NOT_QUANTISED = ["model.visual", "model.vision_tower", "model.multi_modal_projector", "lm_head"]
DECODER = ".language_model.layers."
# Inputs and outputs of the matrices to multiply by: neither square nor powers of two alone, as a model's are. All are
# multiples of 32, as every published model's are and as the kernel for CPUs asks for.
_SHAPES = ((256, 64), (1024, 160), (896, 96), (64, 1184))
_ROWS = (1, 4, 64, 256)  # one alone takes the path of a matrix and a vector
# Of the typical (root mean square) number: in bfloat16 every weight and result is rounded by up to 0.4 % of itself,
# and a result can be four times the typical one. Measured on a CPU: at most 1.5 %. A block of 64 weights that is left
# out of the longest rows here changes a result by 25 %.
_TOLERANCE = 0.05
# Half of the widest gap between two levels of NF4 is 0.152 of a block's largest weight; the scale itself is kept in 8
# bits. Measured: at most 0.158.
_WIDEST = 0.2


@dataclass(frozen=True)
class _Deviation:
    """How far a result is from what it should be."""

    size: float  # as a share of the typical number; infinite where one is not a number
    of: str


def nf4(dtype: torch.dtype) -> Any:
    """Return how transformers is to quantise: the language model's layers, computing in `dtype`.

    Raises:
        UsageError: bitsandbytes is not installed.
    """
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        remedy = "pip install 'omni-cli[bnb]', or --set quantization=none"
        raise UsageError(f"quantization = {_KIND!r}: bitsandbytes cannot be imported ({error}); {remedy}") from None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=_KIND,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_NOT_QUANTISED,
    )


def quantised_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that hold weights of 4 bits, by name; an adapter on one is called alike, and is none."""
    kind = ("bitsandbytes.nn.modules", "Linear4bit")
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module).__module__, type(module).__qualname__) == kind
    }


def notes(model: nn.Module) -> tuple[str, ...]:
    """Return one line on what of a model is quantised; none where nothing is."""
    count = len(quantised_layers(model))
    said = f"4-bit: {count} linears of the language model; vision tower, merger, embeddings and head stay as they were"
    return (said,) if count else ()


def ready(model: nn.Module, dtype: torch.dtype) -> None:
    """Check a model that was just loaded in 4 bits, and the products of the machine that it is on.

    Args:
        model: a Qwen-VL model on the device that will use it.
        dtype: that it computes in.

    Raises:
        OmniError: a layer is quantised that should not be, or is not and should be, or products are wrong.
    """
    check_layers(model)
    for layer in quantised_layers(model).values():
        never_repack(layer)
    check_products(next(model.parameters()).device.type, dtype)


def check_layers(model: nn.Module) -> None:
    """Check that every linear layer of the decoder is quantised, and nothing else.

    Raises:
        OmniError: the first that breaks the rule is named.
    """
    found = quantised_layers(model).keys()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wanted = {name for name in linears if DECODER in name}
    if strangers := sorted(found - wanted):
        raise OmniError(
            f"{strangers[0]} was quantised, one of {len(strangers)} layers that should stay as they are; expected the "
            "language model's linears alone; use another version of transformers, or --set quantization=none"
        )
    if missing := sorted(wanted - found):
        raise OmniError(
            f"{missing[0]} was not quantised, one of {len(missing)}; expected every linear of the language model; use "
            "a base whose weights are not quantised yet, or --set quantization=none"
        )


def never_repack(layer: Any) -> None:
    """Keep a layer's weights as they were loaded.

    On a CPU with AVX512 the first forward pass in eval mode would pack them anew, in place: dequantised after that they
    are noise, and a later step of training has no gradient through the layer (bitsandbytes 0.50.2).
    """
    layer.support_avx512bf16_for_cpu = False


@cache
def check_products(device: str, dtype: torch.dtype) -> float:
    """Multiply by seeded matrices of 4 bits, forward and backward, and compare with the dequantised ones in float32.

    A kind of device is checked once in a process. The matrices are thrown away: no weight of a model is touched.

    Args:
        device: kind of device, such as `cuda`.
        dtype: that products are computed in.

    Returns:
        The largest deviation, as a share of the typical number.

    Raises:
        OmniError: a product is wrong, or cannot be computed.
    """
    version = importlib.import_module("bitsandbytes").__version__
    remedy = "use --set quantization=none, or another version of bitsandbytes"
    try:
        found = [each for shape in _SHAPES for each in _deviations(shape, device, dtype)]
    except Exception as error:  # what a build for another device raises can be any
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OmniError(f"bitsandbytes {version} cannot multiply in 4 bits on {device}: {said}; {remedy}") from None
    if wrong := [each for each in found if not each.size <= _TOLERANCE]:
        raise OmniError(
            f"bitsandbytes {version} multiplies wrongly in 4 bits on {device}: {wrong[0].of} is off by "
            f"{wrong[0].size:.0%} of the typical number, {_TOLERANCE:.0%} allowed; {remedy}"
        )
    return max(each.size for each in found)


def _deviations(shape: tuple[int, int], device: str, dtype: torch.dtype) -> Iterator[_Deviation]:
    """Yield how far the dequantised matrix and its products are from what they should be."""
    inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(outputs, inputs, generator=generator).to(dtype)
    layer = _four_bit(matrix).to(device)
    dequantised = importlib.import_module("bitsandbytes").functional.dequantize_4bit(
        layer.weight.data, layer.weight.quant_state
    )
    dequantised = dequantised.float().cpu()
    yield _Deviation(_beyond_levels(dequantised, matrix.float(), layer.weight.blocksize), f"a matrix {shape}")
    for rows in _ROWS:
        given, back = (torch.randn(rows, width, generator=generator).to(dtype) for width in (inputs, outputs))
        named = f"of {rows} rows by a matrix {shape}"
        product, learning, gradient = _products(layer, given.to(device), back.to(device))
        expected = linear(given.float(), dequantised)
        yield _Deviation(_difference(product, expected), f"a product {named}")
        yield _Deviation(_difference(learning, expected), f"a product in training {named}")
        yield _Deviation(_difference(gradient, back.float() @ dequantised), f"the gradient of a product {named}")


def _four_bit(matrix: Tensor) -> Any:
    """Return a layer (outputs, inputs) as a model has it; it is quantised where it is moved to."""
    layers = importlib.import_module("bitsandbytes").nn
    outputs, inputs = matrix.shape
    how = {"quant_type": _KIND, "compress_statistics": True}
    layer = layers.Linear4bit(inputs, outputs, bias=False, compute_dtype=matrix.dtype, **how)
    layer.weight = layers.Params4bit(matrix, requires_grad=False, module=layer, **how)
    never_repack(layer)
    return layer


def _products(layer: Any, given: Tensor, back: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a product outside autograd, the same inside, and the gradient of its input."""
    with torch.no_grad():
        product = layer(given)
    with torch.enable_grad():
        learning = given.clone().requires_grad_(True)
        output = layer(learning)
        output.backward(back)
    assert learning.grad is not None
    return product, output.detach(), learning.grad


def _beyond_levels(dequantised: Tensor, matrix: Tensor, block: int) -> float:
    """Return 0 where each weight lies within the width of a level of what it was, else by how much more it is off."""
    blocks = matrix.flatten().view(-1, block)
    off = (dequantised.flatten().view(-1, block) - blocks).abs() / blocks.abs().amax(1, keepdim=True)
    worst = float(off.nan_to_num(nan=float("inf")).max())
    return 0.0 if worst <= _WIDEST else worst


def _difference(found: Tensor, expected: Tensor) -> float:
    off = (found.detach().float().cpu() - expected).abs().max() / expected.square().mean().sqrt()
    return float(off.nan_to_num(nan=float("inf")))
