"""Layers in a graph of onnx2fx: a convolution or product with constant weights becomes a module of torch's own.

Which functions onnx2fx 0.0.1 calls with which arguments is read from its `ops/convolution.py` and `ops/nn.py`. Whoever
imports a program compares what it says with ONNX Runtime, so a change there is found and not trained on.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

_TOLD_SHAPES = ("Reshape", "Expand", "Slice", "Split", "Squeeze", "Unsqueeze")
_Maker = Callable[[fx.GraphModule, fx.Node], nn.Module | None]


def with_layers(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph in float32 whose convolutions and products with constant weights are layers that learn.

    What stays a function, on buffers that do not learn: a weight that several operators share, a convolution that is
    not 2-D or whose sides are padded differently, a product that scales, and one with an output whose weights are all
    zero: nothing is known there, and DoRA could not scale it.

    Args:
        module: of onnx2fx; it is changed in place.
    """
    module.float()
    for node in list(module.graph.nodes):
        kind = node.meta.get("onnx_op_type", "")
        node.args = fx.node.map_aggregate(node.args, _single_precision)
        node.kwargs = fx.node.map_aggregate(node.kwargs, _single_precision)
        if kind in _TOLD_SHAPES:
            node.args = fx.node.map_aggregate(node.args, partial(_numbers, module))
        layer = _MAKERS.get(kind, _none)(module, node)
        if layer is not None:
            _replace(module, node, layer)
    _drop_unused(module)
    return module


def _single_precision(argument: Any) -> Any:
    return torch.float32 if argument is torch.float16 else argument


def _numbers(module: fx.GraphModule, argument: Any) -> Any:
    """Write a constant shape out: torch's exporter knows numbers in the code, and none in a buffer."""
    value = _constant(module, argument)
    return value.tolist() if value is not None and value.dtype == torch.int64 else argument


def _none(module: fx.GraphModule, node: fx.Node) -> None:
    return None


def _convolution(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    arguments: tuple[Any, ...] = node.args
    _, weight_node, bias_node, strides, dilations, groups, pads, auto_pad, _ = arguments
    weight, pads = _weight(module, weight_node), list(pads or (0, 0, 0, 0))
    if bias_node is not None and _constant(module, bias_node) is None:
        return None
    if weight is None or weight.ndim != 4 or auto_pad != "NOTSET" or pads[:2] != pads[2:]:
        return None
    layer = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        _pair(weight.shape[2:]),
        stride=_pair(strides),
        padding=_pair(pads[:2]),
        dilation=_pair(dilations),
        groups=groups,
        device="meta",
        bias=bias_node is not None,
    )
    return _filled(layer, weight, _constant(module, bias_node))


def _affine(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    arguments: tuple[Any, ...] = node.args
    _, weight_node, bias_node, alpha, beta, transposed_input, transposed_weight = arguments
    weight, bias = _weight(module, weight_node), _constant(module, bias_node)
    if weight is None or (alpha, beta, transposed_input) != (1, 1, 0):
        return None
    weight = weight if transposed_weight else weight.T
    if bias_node is not None and (bias is None or bias.numel() != len(weight)):
        return None
    return _filled(_linear(weight, bias is not None), weight, bias)


def _product(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    weight = _weight(module, node.args[1])
    if weight is None or weight.ndim != 2:
        return None
    return _filled(_linear(weight.T, has_bias=False), weight.T, None)


_MAKERS: Mapping[str, _Maker] = {"Conv": _convolution, "Gemm": _affine, "MatMul": _product}


def _linear(weight: Tensor, has_bias: bool) -> nn.Linear:
    return nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, device="meta")


def _filled(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Module | None:
    """Return a layer with these weights; none where an output has only zeros."""
    if not weight.flatten(1).any(dim=1).all():
        return None
    state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias.flatten()}
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    layer.load_state_dict(own, assign=True)
    return layer


def _constant(module: fx.GraphModule, node: Any) -> Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Tensor = module.get_buffer(str(node.target))
    return value


def _weight(module: fx.GraphModule, node: Any) -> Tensor | None:
    """Return a constant that one operator alone uses."""
    value = _constant(module, node)
    return value if value is not None and len(node.users) == 1 else None


def _pair(values: Any) -> tuple[int, int]:
    return int(values[0]), int(values[-1])  # onnx2fx says one for both axes where the program says nothing


def _replace(module: fx.GraphModule, node: fx.Node, layer: nn.Module) -> None:
    """Call a layer in the place of a function; it is called what its weight was called."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    name = f"{str(weight.target).removesuffix('_weight')}_{type(layer).__name__.lower()}"
    module.add_submodule(name, layer)
    with module.graph.inserting_before(node):
        called = module.graph.call_module(name, (node.args[0],))
    node.replace_all_uses_with(called)
    module.graph.erase_node(node)


def _drop_unused(module: fx.GraphModule) -> None:
    module.graph.eliminate_dead_code()
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in module.named_buffers(recurse=False) if name not in used]:
        delattr(module, name)
    module.recompile()
