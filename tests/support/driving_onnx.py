"""Small driving models with exactly the real ones' names, types, shapes and metadata, and weights drawn from a seed.

What they say is a smooth function of the pictures: features are a fixed projection of pooled planes, a plan is a speed,
an acceleration and a curve read from the features of the whole history. So a student can learn them, and a history
that is fed wrongly shows.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from omni_cli.formats.driving_model import (
    CHECKPOINT_KEY,
    FEATURE_LEN,
    OUTPUT_NAME,
    POLICY_SLICES,
    SLICES_KEY,
    T_IDXS_S,
    VISION_SLICES,
    X_IDXS_M,
    decode_slices,
    encode_slices,
)

OPSET = 20
_RANK, _MOODS, _KNOBS = 16, 8, 4  # of the features, of the history, of a plan
_PICTURE = (12, 128, 256)

# v0.10.0 as released (its metadata pickles): five plans, two hypotheses for the leads.
V0_10_0_VISION_SLICES = {
    **{name: part for name, part in VISION_SLICES.items() if part.start < 917 and name != "pad"},
    "lead": slice(917, 1019),
    "lead_prob": slice(1019, 1022),
    "hidden_state": slice(1022, 1534),
    "pad": slice(-2, None),
}
V0_10_0_POLICY_SLICES = {
    "plan": slice(0, 4955),
    "desire_state": slice(4955, 4963),
    "desired_curvature": slice(4963, 4965),
    "pad": slice(-3, None),
}
_LANE_NAMES = ("lane_lines", "lane_lines_prob", "road_edges", "lead", "lead_prob")


def widths_to_slices(widths: Mapping[str, int], start: int = 0) -> dict[str, slice]:
    """Lay parts one after another."""
    ends = start + np.cumsum(list(widths.values()))
    return {name: slice(int(end) - width, int(end)) for (name, width), end in zip(widths.items(), ends, strict=True)}


def _width(part: slice) -> int:
    return part.stop - part.start


@dataclass
class Graph:
    """One program under construction; floats inside are 32 bits wide."""

    seed: int
    batch: int | str = 1
    float_type: int = TensorProto.FLOAT
    picture_type: int = TensorProto.UINT8
    contrast: float = 1 / 32  # how strongly it reacts to the brightness of pixels
    memory: float = 0.93  # how much less a step weighs than the one after it
    nodes: list = field(default_factory=list)
    constants: list = field(default_factory=list)
    inputs: dict[str, tuple] = field(default_factory=dict)

    def op(self, kind: str, *inputs: str, **attributes) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, values) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def weights(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        rng = np.random.default_rng((self.seed, len(self.constants)))
        return (rng.normal(0, scale / np.sqrt(shape[0]), shape)).astype(np.float32)

    def linear(self, x: str, *shape: int, scale: float = 1.0) -> str:
        return self.op("MatMul", x, self.constant(self.weights(*shape, scale=scale)))

    def take(self, name: str, *shape: int, picture: bool = False) -> str:
        """Declare an input (batch, *shape) and return it as float32."""
        self.inputs[name] = (self.picture_type if picture else self.float_type, (self.batch, *shape))
        return self.op("Cast", name, to=TensorProto.FLOAT)

    def write(self, path: Path, output: str, slices: Mapping[str, slice], width: int, **metadata: str) -> Path:
        self.op("Cast", output, to=self.float_type)
        self.nodes[-1].output[0] = OUTPUT_NAME
        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [helper.make_tensor_value_info(name, *what) for name, what in self.inputs.items()],
            [helper.make_tensor_value_info(OUTPUT_NAME, self.float_type, (self.batch, width))],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        props = {CHECKPOINT_KEY: f"tiny/{self.seed}", SLICES_KEY: encode_slices(slices), **metadata}
        helper.set_model_props(model, {name: value for name, value in props.items() if value})
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, str(path))
        assert path.stat().st_size < 1_000_000
        return path


def _features(graph: Graph, names: tuple[str, str] = ("img", "big_img")) -> str:
    """Return (b, 512) in (-1, 1) from the planes' means over 32 x 32 pixels."""
    pooled = [
        graph.op("AveragePool", graph.take(name, *_PICTURE, picture=True), kernel_shape=[32, 32], strides=[32, 32])
        for name in names
    ]
    flat = graph.op("Flatten", graph.op("Concat", *pooled, axis=1))
    centred = graph.op("Sub", flat, graph.constant(np.float32(128)))
    small = graph.op("Mul", centred, graph.constant(np.float32(graph.contrast)))
    return graph.op("Tanh", graph.linear(graph.linear(small, 768, _RANK), _RANK, FEATURE_LEN, scale=2.0))


def _say(graph: Graph, knobs: str, count: int, parts: Mapping[str, int]) -> str:
    """Return (b, sum of widths): of each part a typical value and what the knobs add to it."""
    bias, basis = zip(*(_part(graph, name, width, count) for name, width in parts.items()), strict=True)
    moved = graph.op("MatMul", knobs, graph.constant(np.concatenate(basis, axis=1).astype(np.float32)))
    return graph.op("Add", moved, graph.constant(np.concatenate(bias).astype(np.float32)))


def _part(graph: Graph, name: str, width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    if name == "plan":
        return _plans(graph, width)
    rng = np.random.default_rng((graph.seed, width, count))
    bias, basis = np.zeros(width), rng.normal(0, 0.5, (count, width))
    if name in ("lane_lines", "road_edges"):
        lines = [-5.4, -1.8, 1.8, 5.4] if name == "lane_lines" else [-7.2, 7.2]
        half = width // 2
        bias[:half] = np.stack([np.full((33, 2), (y, 1.2)) for y in lines]).ravel()
        bias[half:] = np.log(0.2)
        basis[:] = 0
        sideways = np.stack([np.ones(33), (X_IDXS_M / 192) ** 2 * 10])  # the lane's place and its curve
        for row, shape in enumerate(sideways):
            basis[row, :half] = np.tile(np.stack([shape, 0 * shape], axis=1).ravel(), len(lines))
    return bias, basis


def _plans(graph: Graph, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Speed 12 m/s + 6 k0, acceleration k1, curve 0.3 k2 m/s^2 to the right, scale e^(0.3 k3)."""
    t = T_IDXS_S
    bias, basis = np.zeros((2, 33, 15)), np.zeros((_KNOBS, 2, 33, 15))
    bias[0, :, 0], bias[0, :, 3] = 12 * t, 12
    basis[0, 0, :, 0], basis[0, 0, :, 3] = 6 * t, 6
    basis[1, 0, :, 0], basis[1, 0, :, 3], basis[1, 0, :, 6] = t**2 / 2, t, 1
    basis[2, 0, :, 1], basis[2, 0, :, 4], basis[2, 0, :, 7] = 0.15 * t**2, 0.3 * t, 0.3
    bias[1] = np.log(0.3 + 0.2 * t)[:, None]
    basis[3, 1] = 0.3
    if width == 990:
        return bias.ravel(), basis.reshape(_KNOBS, -1)
    return _hypotheses(graph, bias, basis, count=width // 991)


def _hypotheses(graph: Graph, bias: np.ndarray, basis: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    biases, bases = [], []
    for index in range(count):
        shifted = bias.copy()
        shifted[0, :, 1] += 0.2 * (index - count // 2) * T_IDXS_S
        biases.append(np.append(shifted.ravel(), 0.0))
        score = graph.weights(_KNOBS, count, scale=10.0)[:, index : index + 1]
        bases.append(np.concatenate([basis.reshape(_KNOBS, -1), score], axis=1))
    return np.concatenate(biases), np.concatenate(bases, axis=1)


def _parts(slices: Mapping[str, slice]) -> dict[str, int]:
    return {name: _width(part) for name, part in slices.items() if name not in ("pad", "hidden_state")}


def _vision(graph: Graph, features: str, slices: Mapping[str, slice], padding: int) -> str:
    moods = graph.op("Tanh", graph.linear(features, FEATURE_LEN, _MOODS, scale=2.0))
    said = _say(graph, moods, _MOODS, _parts(slices))
    silent = [graph.op("MatMul", moods, graph.constant(np.zeros((_MOODS, padding), np.float32)))] if padding else []
    return graph.op("Concat", said, features, *silent, axis=1)


def _knobs(graph: Graph, history: str, others: list[str], count: int) -> str:
    """Return (b, 4) in (-1, 1) from features (b, 25, 512), the newest weighing most, and the other inputs."""
    weight = graph.memory ** np.arange(24, -1, -1, dtype=np.float32)[:, None]
    moods = graph.op("Tanh", graph.linear(history, FEATURE_LEN, _MOODS, scale=2.0))
    weighted = graph.op("Mul", moods, graph.constant(weight / weight.sum()))
    summed = graph.op("ReduceSum", weighted, graph.constant(np.array([1])), keepdims=0)
    joined = graph.op("Concat", summed, *others, axis=1)
    return graph.op("Tanh", graph.linear(joined, _MOODS + count, _KNOBS, scale=2.0))


def _over_time(graph: Graph, name: str, width: int) -> str:
    """A pulse counts less the older it is."""
    decay = np.linspace(0, 1, 25, dtype=np.float32)[:, None]
    weighted = graph.op("Mul", graph.take(name, 25, width), graph.constant(decay))
    return graph.op("ReduceSum", weighted, graph.constant(np.array([1])), keepdims=0)


def write_vision(path: Path, slices=VISION_SLICES, padding=0, names=("img", "big_img"), *, seed=1, **options) -> Path:
    metadata = options.pop("metadata", {})
    graph = Graph(seed, **options)
    output = _vision(graph, _features(graph, names), slices, padding)
    return graph.write(path, output, slices, sum(_parts(slices).values()) + FEATURE_LEN + padding, **metadata)


def write_policy(
    path: Path, slices=POLICY_SLICES, padding=2, desire="desire_pulse", others=(), *, seed=2, **options
) -> Path:
    """`others`: further inputs (batch, 2) that the generation has."""
    metadata = options.pop("metadata", {})
    graph = Graph(seed, **options)
    extra = [_over_time(graph, desire, 8), graph.take("traffic_convention", 2)]
    extra += [_over_time(graph, name, 1) if name == "prev_desired_curv" else graph.take(name, 2) for name in others]
    count = 10 + sum(1 if name == "prev_desired_curv" else 2 for name in others)
    knobs = _knobs(graph, graph.take("features_buffer", 25, FEATURE_LEN), extra, count)
    said = _say(graph, knobs, _KNOBS, _parts(slices))
    silent = graph.op("MatMul", knobs, graph.constant(np.zeros((_KNOBS, padding), np.float32)))
    output = graph.op("Concat", said, silent, axis=1)
    return graph.write(path, output, slices, sum(_parts(slices).values()) + padding, **metadata)


def write_v0_10_3(folder: Path, **options) -> list[Path]:
    """Vision and policy, one plan: v0.10.1 to v0.10.3."""
    return [
        write_vision(folder / "driving_vision.onnx", **options),
        write_policy(folder / "driving_policy.onnx", **options),
    ]


def write_v0_10_0(folder: Path, **options) -> list[Path]:
    """Vision and policy, five plans; the policy also knows the speed and is told its own last curvature."""
    return [
        write_vision(folder / "driving_vision.onnx", V0_10_0_VISION_SLICES, 2, **options),
        write_policy(
            folder / "driving_policy.onnx",
            V0_10_0_POLICY_SLICES,
            3,
            "desire",
            ("lateral_control_params", "prev_desired_curv"),
            **options,
        ),
    ]


def lane_widths() -> dict[str, int]:
    """What the off-policy of 2026-02 says."""
    return {name: _width(VISION_SLICES[name]) for name in _LANE_NAMES}


def write_2026_02(folder: Path, **options) -> list[Path]:
    """Vision, off-policy (lanes and leads) and on-policy (plan); where each part lies is ours, its width is theirs."""
    seen = {name: width for name, width in _parts(VISION_SLICES).items() if name not in _LANE_NAMES}
    lanes = widths_to_slices(lane_widths())
    return [
        write_vision(
            folder / "driving_vision.onnx", widths_to_slices({**seen, "hidden_state": FEATURE_LEN}), **options
        ),
        write_policy(folder / "driving_off_policy.onnx", lanes, seed=3, **options),
        write_policy(folder / "driving_on_policy.onnx", **options),
    ]


def write_supercombo(path: Path, slices: Mapping[str, slice], *, padding, names, desire, others, **options) -> Path:
    """One graph that is told the features of the 24 steps before this one."""
    graph = Graph(options.pop("seed", 5), **options)
    features = _features(graph, names)
    extra = [_over_time(graph, desire, 8), graph.take("traffic_convention", 2)]
    extra += [_over_time(graph, name, 1) if name == "prev_desired_curv" else graph.take(name, 2) for name in others]
    count = 10 + sum(1 if name == "prev_desired_curv" else 2 for name in others)
    newest = graph.op("Unsqueeze", features, graph.constant(np.array([1])))
    history = graph.op("Concat", graph.take("features_buffer", 24, FEATURE_LEN), newest, axis=1)
    knobs = _knobs(graph, history, extra, count)
    before = {name: part for name, part in slices.items() if name not in ("plan", "desire_state")}
    seen = _vision(graph, features, before, 0)
    said = _say(graph, knobs, _KNOBS, _parts({name: slices[name] for name in ("plan", "desire_state")}))
    silent = graph.op("MatMul", knobs, graph.constant(np.zeros((_KNOBS, padding), np.float32)))
    width = max(part.stop or 0 for part in slices.values()) + padding
    return graph.write(path, graph.op("Concat", seen, said, silent, axis=1), slices, width)


def write_2026_06(folder: Path, **options) -> list[Path]:
    """The supercombo of June 2026: (1, 2576), both vectors of v0.10.3 in one."""
    shift = VISION_SLICES["hidden_state"].stop
    plan = {name: slice(part.start + shift, part.stop + shift) for name, part in POLICY_SLICES.items() if name != "pad"}
    slices = {**VISION_SLICES, **plan}
    path = folder / "driving_supercombo.onnx"
    contract = {"padding": 2, "names": ("img", "big_img"), "desire": "desire_pulse", "others": ("action_t",)}
    return [write_supercombo(path, slices, **contract, **options)]


def write_2024_10(folder: Path, **options) -> list[Path]:
    """The supercombo of October 2024: its history lies at 5 Hz; five plans."""
    seen = {**_parts(V0_10_0_VISION_SLICES), "hidden_state": FEATURE_LEN, "plan": 4955, "desire_state": 8}
    contract = {
        "padding": 3,
        "names": ("input_imgs", "big_input_imgs"),
        "desire": "desire",
        "others": ("lateral_control_params", "prev_desired_curv"),
    }
    return [write_supercombo(folder / "supercombo.onnx", widths_to_slices(seen), **contract, **options)]


def move_slices_to_sidecar(path: Path) -> Path:
    """Take the slices out of the ONNX file and put them beside it, as `get_model_metadata.py` writes them."""
    model = onnx.load(str(path))
    props = {entry.key: entry.value for entry in model.metadata_props}
    sidecar = path.with_name(f"{path.stem}_metadata.pkl")
    shape = [tuple(d.dim_value for d in value.type.tensor_type.shape.dim) for value in model.graph.output]
    content = {
        CHECKPOINT_KEY: props[CHECKPOINT_KEY],
        SLICES_KEY: decode_slices(props.pop(SLICES_KEY)),
        "input_shapes": {
            value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim) for value in model.graph.input
        },
        "output_shapes": {OUTPUT_NAME: shape[0]},
    }
    sidecar.write_bytes(pickle.dumps(content))
    del model.metadata_props[:]
    helper.set_model_props(model, props)
    onnx.save(model, str(path))
    return sidecar
