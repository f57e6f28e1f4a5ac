"""openpilot's programs as a student: ONNX Runtime's numbers, which layers learn, adapters, merge, what is refused.

The real files are not to be had here. Beside the tests' own pair stands one of the operators that the real graphs are
published to have: a trunk of plain and depthwise convolutions with GELU, squeeze and excite, residual Gemms and a
division by its norm; a transformer over the memory whose reshapes are written for one step at a time.
"""

import copy
from pathlib import Path

import numpy as np
import onnx
import onnx2fx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from omni_cli.errors import DataError, UsageError
from omni_cli.formats.driving_model import POLICY_SLICES, VISION_SLICES
from omni_cli.models import adapters, driving_export, driving_import, driving_net, driving_outputs, qwen_vl
from omni_cli.models.driving_import import ImportedNet
from omni_cli.models.driving_net import HEADS
from omni_cli.recipe import BuiltModel
from omni_cli.stages.export import ExportRequest, export
from omni_cli.stages.merge import MergeRequest, merge
from tests.support.driving import tiny_student, write_drives
from tests.support.driving_onnx import (
    Graph,
    write_2026_02,
    write_policy,
    write_v0_10_0,
    write_v0_10_3,
    write_vision,
)
from tests.support.pipeline import QUIET, make_run
from tests.test_driving_adapters import differences, everything, make_inputs, make_spec, plan_loss, shake

WIDTH, TOKENS = 32, 25


class RealOps(Graph):
    """A graph with layers as torch's exporters write them, in float32 or float16 inside."""

    half = False

    def tensor(self, *shape: int) -> str:
        return self.constant(self.weights(*shape).astype(np.float16 if self.half else np.float32))

    def number(self, value: float) -> str:
        return self.constant(np.asarray(value, np.float16 if self.half else np.float32))

    def take(self, name: str, *shape: int, picture: bool = False) -> str:
        given = super().take(name, *shape, picture=picture)
        return self.op("Cast", given, to=TensorProto.FLOAT16) if self.half else given

    def conv(self, x: str, outputs: int, inputs: int, size: int, *, stride: int = 1, group: int = 1) -> str:
        pads, weight = [size // 2] * 4, self.tensor(outputs, inputs // group, size, size)
        return self.op(
            "Conv", x, weight, self.tensor(outputs), strides=[stride, stride], pads=pads, group=group,
            kernel_shape=[size, size], dilations=[1, 1],
        )  # fmt: skip

    def gemm(self, x: str, outputs: int, inputs: int) -> str:
        return self.op("Gemm", x, self.tensor(outputs, inputs), self.tensor(outputs), transB=1)

    def dense(self, x: str, outputs: int, inputs: int) -> str:
        """A dense layer over tokens is written as a product and a sum."""
        return self.op("Add", self.op("MatMul", x, self.tensor(inputs, outputs)), self.tensor(outputs))

    def gelu(self, x: str) -> str:
        erf = self.op("Erf", self.op("Div", x, self.number(2**0.5)))
        return self.op("Mul", self.op("Mul", x, self.number(0.5)), self.op("Add", erf, self.number(1)))

    def norm(self, x: str, width: int) -> str:
        return self.op("LayerNormalization", x, self.tensor(width), self.tensor(width), axis=-1, epsilon=1e-5)

    def heads(self, x: str, axes: list[int]) -> str:
        split = self.op("Reshape", x, self.constant(np.array([1, TOKENS, 4, WIDTH // 4])))
        return self.op("Transpose", split, perm=axes)


def write_real_vision(path: Path, *, half: bool, batch: int | str) -> Path:
    graph = RealOps(11, batch, TensorProto.FLOAT16 if half else TensorProto.FLOAT)
    graph.half = half
    views = [graph.take(name, 12, 128, 256, picture=True) for name in ("img", "big_img")]
    scaled = graph.op(
        "Mul", graph.op("Sub", graph.op("Concat", *views, axis=1), graph.number(128)), graph.number(1 / 64)
    )
    x = graph.gelu(graph.conv(scaled, 16, 24, 3, stride=4))
    x = graph.conv(x, WIDTH, 16, 7, stride=4, group=16)
    mixed = graph.conv(graph.gelu(graph.conv(graph.conv(x, WIDTH, WIDTH, 7, group=WIDTH), 48, WIDTH, 1)), WIDTH, 48, 1)
    x = graph.op("Add", x, graph.op("Mul", graph.tensor(WIDTH, 1, 1), mixed))
    mean = graph.op("ReduceMean", x, graph.constant(np.array([2, 3])), keepdims=1)
    gate = graph.conv(graph.op("Relu", graph.conv(mean, 8, WIDTH, 1)), WIDTH, 8, 1)
    x = graph.op("GlobalAveragePool", graph.op("Mul", x, graph.op("Sigmoid", gate)))
    x = graph.norm(graph.op("Flatten", x, axis=1), WIDTH)
    x = graph.op("Relu", graph.op("Add", x, graph.gemm(graph.op("Relu", graph.gemm(x, WIDTH, WIDTH)), WIDTH, WIDTH)))
    mu = graph.gemm(x, 512, WIDTH)
    size = graph.op("ReduceL2", mu, graph.constant(np.array([1])), keepdims=1)
    features = graph.op("Div", mu, graph.op("Clip", size, graph.number(1e-3)))
    trunk = graph.op("Elu", graph.gemm(features, WIDTH, 512))
    widths = {
        name: part.stop - part.start for name, part in VISION_SLICES.items() if name not in ("pad", "hidden_state")
    }
    said = [graph.gemm(trunk, width, WIDTH) for width in widths.values()]
    output = graph.op("Concat", *said, features, axis=1)
    return graph.write(path, output, VISION_SLICES, 1576)


def write_real_policy(path: Path, *, half: bool, batch: int | str) -> Path:
    """Written for one step at a time: its reshapes say 1."""
    assert batch == 1
    graph = RealOps(12, batch, TensorProto.FLOAT16 if half else TensorProto.FLOAT)
    graph.half = half
    pulses, traffic = graph.take("desire_pulse", TOKENS, 8), graph.take("traffic_convention", 2)
    told = graph.op("Concat", graph.take("features_buffer", TOKENS, 512), pulses, axis=2)
    x = graph.op("Add", graph.op("Relu", graph.dense(told, WIDTH, 520)), graph.tensor(1, TOKENS, WIDTH))
    joined = graph.dense(graph.norm(x, WIDTH), 3 * WIDTH, WIDTH)
    query, key, value = (f"part_{index}" for index in range(3))
    graph.nodes.append(helper.make_node("Split", [joined], [query, key, value], axis=2, num_outputs=3))
    scores = graph.op("MatMul", graph.heads(query, [0, 2, 1, 3]), graph.heads(key, [0, 2, 3, 1]))
    seen = graph.op("Softmax", graph.op("Div", scores, graph.number(8**0.5)), axis=-1)
    mixed = graph.op("Transpose", graph.op("MatMul", seen, graph.heads(value, [0, 2, 1, 3])), perm=[0, 2, 1, 3])
    flat = graph.op("Reshape", mixed, graph.constant(np.array([1, TOKENS, WIDTH])))
    x = graph.op("Add", x, graph.dense(flat, WIDTH, WIDTH))
    x = graph.op("Add", x, graph.dense(graph.gelu(graph.dense(graph.norm(x, WIDTH), 64, WIDTH)), WIDTH, 64))
    state = graph.op("ReduceSum", x, graph.constant(np.array([1])), keepdims=0)
    hidden = graph.op("Elu", graph.gemm(graph.op("Concat", state, traffic, axis=1), WIDTH, WIDTH + 2))
    said = [graph.gemm(hidden, width, WIDTH) for width in (990, 8, 2)]
    return graph.write(path, graph.op("Concat", *said, axis=1), POLICY_SLICES, 1000)


def write_real_ops(folder: Path, *, half: bool = False) -> Path:
    write_real_vision(folder / "driving_vision.onnx", half=half, batch=1)
    write_real_policy(folder / "driving_policy.onnx", half=half, batch=1)
    return folder


def write_tiny(folder: Path, **options) -> Path:
    write_v0_10_3(folder, **options)
    return folder


PAIRS = {
    "tiny": write_tiny,
    "tiny, free batch": lambda folder: write_tiny(folder, batch="steps"),
    "tiny, float16 outside": lambda folder: write_tiny(folder, float_type=TensorProto.FLOAT16),
    "real operators": write_real_ops,
    "real operators, float16": lambda folder: write_real_ops(folder, half=True),
}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return PAIRS[request.param](tmp_path)


@pytest.fixture
def net(pair: Path) -> ImportedNet:
    found = driving_net.load_net(pair).eval()
    assert isinstance(found, ImportedNet)
    return found


@pytest.fixture
def real(tmp_path: Path) -> ImportedNet:
    found = driving_net.load_net(write_real_ops(tmp_path)).eval()
    assert isinstance(found, ImportedNet)
    return found


def run_as_a_car(folder: Path, pictures, pulses, traffic) -> tuple[list[dict], list[dict]]:
    """Both programs of a folder in ONNX Runtime step by step, one row, with buffers that slide; parsed as openpilot."""
    vision, policy = (onnxruntime.InferenceSession(folder / f"driving_{name}.onnx") for name in ("vision", "policy"))
    dtype = np.float16 if policy.get_inputs()[0].type == "tensor(float16)" else np.float32
    features, desires = np.zeros((1, 25, 512), dtype), np.zeros((1, 25, 8), dtype)
    seen, planned = [], []
    for older, newer, pulse in zip(pictures[:-1], pictures[1:], pulses, strict=True):
        look = torch.cat([older, newer], dim=1).numpy()
        said = vision.run(None, {"img": look[None, 0], "big_img": look[None, 1]})[0]
        features = np.concatenate([features[:, 1:], said[:, None, VISION_SLICES["hidden_state"]].astype(dtype)], axis=1)
        desires = np.concatenate([desires[:, 1:], pulse[None, None].numpy().astype(dtype)], axis=1)
        fed = {"desire_pulse": desires, "traffic_convention": traffic[None].numpy().astype(dtype)}
        seen.append(driving_outputs.parse_outputs(said, {n: p for n, p in VISION_SLICES.items() if n != "pad"}))
        answer = policy.run(None, {**fed, "features_buffer": features})[0]
        planned.append(driving_outputs.parse_outputs(answer, {"plan": POLICY_SLICES["plan"]}))
    return seen, planned


def test_a_drive_is_what_onnx_runtime_and_the_parser_say(net: ImportedNet, pair: Path, request) -> None:
    """Both nets over a row at once against a car's way, one step after the other; scales are openpilot's deviations."""
    pictures, pulses, traffic = make_inputs()
    with torch.no_grad():
        seen, plans = net(pictures, pulses, traffic)
    looks, paths = run_as_a_car(pair, pictures[0], pulses[0], traffic[0])
    expected = {
        "lane": (seen.lane_lines_m, "lane_lines", looks),
        "edge": (seen.road_edges_m, "road_edges", looks),
        "lane probability": (seen.lane_line_logit.sigmoid(), "lane_lines_prob", looks),
        "lead probability": (seen.lead_logit.sigmoid(), "lead_prob", looks),
        "lane deviation": (seen.lane_lines_log_scale.exp() * 2**0.5, "lane_lines_std", looks),
        "features": (seen.features, "hidden_state", looks),
    }
    allowed = 2e-2 if "float16" in request.node.name else 1e-4
    for name, (found, key, answers) in expected.items():
        wanted = np.concatenate([answer[key] for answer in answers])
        assert np.abs(found.numpy() - wanted).max() <= allowed * max(1, np.abs(wanted).max()), name
    leads = np.concatenate([answer["lead"] for answer in looks])[:, :, 0]
    np.testing.assert_allclose(seen.lead.numpy(), leads, atol=allowed * max(1, np.abs(leads).max()))
    plan = np.concatenate([answer["plan"] for answer in paths])[..., :2]
    plan[..., 0] -= plan[:, :1, 0]  # where the camera is
    deviation = np.concatenate([answer["plan_std"] for answer in paths])[..., :2]
    assert plans.mean_m.shape == (2, 1, 33, 2)
    np.testing.assert_allclose(plans.mean_m[:, 0].numpy(), plan, atol=allowed * np.abs(plan).max())
    found = plans.log_scale[:, 0].exp().numpy() * 2**0.5
    np.testing.assert_allclose(found, deviation, atol=allowed * max(1, deviation.max()))


OF_PATH = [0, 1, 3, 4, 6, 7, 11, 14]  # of a plan's 15 numbers: x and y, their derivatives, yaw and its rate
OTHERS = [column for column in range(15) if column not in OF_PATH]


@pytest.fixture
def said(net: ImportedNet, pair: Path) -> dict[str, tuple[np.ndarray, np.ndarray, dict[str, str]]]:
    """By program what its contract says of noise once, what ONNX Runtime says of the original, and its metadata."""
    recipe, noise = tiny_student(), np.random.default_rng(5)
    types = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}
    result = {}
    for program in recipe.programs(BuiltModel(net, None), recipe.preprocess(), [1]):
        session = onnxruntime.InferenceSession(pair / f"{program.name}.onnx")
        inputs = session.get_inputs()
        given = {one.name: (200 * noise.random([1, *one.shape[1:]])).astype(types[one.type]) for one in inputs}
        with torch.no_grad():
            found = program.module(**{name: torch.from_numpy(array) for name, array in given.items()})[0]
        wanted = session.run(None, given)[0].astype(np.float32)
        result[program.name] = found.numpy()[0], wanted[0], dict(program.metadata)
    return result


def assert_same(found: np.ndarray, wanted: np.ndarray, allowed: float) -> None:
    assert np.abs(found - wanted).max() <= allowed * max(1, np.abs(wanted).max())


def test_exported_its_vision_says_all_that_the_original_says(said, request) -> None:
    found, wanted, metadata = said["driving_vision"]
    for name, place in VISION_SLICES.items():
        if name != "pad":
            assert_same(found[place], wanted[place], 2e-2 if "float16" in request.node.name else 1e-4)
    assert metadata["omni_carried"].split("; ")[0] == "meta"
    assert "omni_not_learned" not in metadata


def test_exported_its_plan_differs_in_what_follows_from_its_path_alone(said, request) -> None:
    """x and y begin at the camera as labels do; whatever no label tells of is the original's."""
    found, wanted, metadata = said["driving_policy"]
    allowed = 2e-2 if "float16" in request.node.name else 1e-4
    assert_same(found[POLICY_SLICES["desire_state"]], wanted[POLICY_SLICES["desire_state"]], allowed)
    plan, raw = (numbers[POLICY_SLICES["plan"]].reshape(66, 15) for numbers in (found, wanted))
    path = driving_export.motion(torch.from_numpy(raw[None, :33, :2] - [raw[0, 0], 0]).float())[0].numpy()
    assert_same(plan[:33, OF_PATH], path[:, OF_PATH], allowed)
    assert_same(plan[:33, OTHERS], raw[:33, OTHERS], allowed)
    assert_same(plan[33:], raw[33:], allowed)
    assert np.abs(raw[:33, OTHERS]).max() > 0.1 or "real operators" not in request.node.name
    assert metadata["omni_carried"].split("; ")[0] == "desire_state"
    assert "omni_not_learned" not in metadata


def test_rows_do_not_mix(real: ImportedNet) -> None:
    """A program written for one step is mapped over the steps of several rows."""
    one, two = make_inputs(1), make_inputs(2)
    together = everything_of(real, tuple(torch.cat(parts) for parts in zip(one, two, strict=True)))
    apart = [torch.cat(parts) for parts in zip(everything_of(real, one), everything_of(real, two), strict=True)]
    assert max(differences(together, apart)) < 1e-5


@torch.no_grad()
def everything_of(net: nn.Module, inputs) -> list[torch.Tensor]:
    seen, plans = net(*inputs)
    return [*seen, *plans]


def test_shapes_are_made_where_the_inputs_lie() -> None:
    """A program for any number of steps computes with lengths: on a GPU they must not lie in the host's memory."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["length"]),
        helper.make_node("Cast", ["length"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "number"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 3]) for name in "xy")
    first = helper.make_tensor("first", TensorProto.INT64, [1], [0])
    graph = helper.make_graph(nodes, "lengths", [x], [y], [first])
    body = onnx2fx.convert(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    program = driving_import.ImportedProgram(body, ("x",), is_free=True)
    assert program({"x": torch.ones(5, 3)}).tolist() == [[5.0] * 3] * 5
    assert program.to("meta")({"x": torch.ones(5, 3, device="meta")}).device.type == "meta"


def test_convolutions_and_products_are_layers(real: ImportedNet) -> None:
    vision, policy = (
        [type(module) for module in part.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        for part in (real.vision, real.policy)
    )
    kinds = {
        name: [node.op_type for node in onnx.load_from_string(content).graph.node]
        for name, content in real.sources.items()
    }
    looks, plans = kinds["driving_vision.onnx"], kinds["driving_policy.onnx"]
    assert vision.count(nn.Conv2d) == looks.count("Conv") == 7
    assert vision.count(nn.Linear) == looks.count("Gemm")
    products = plans.count("MatMul") - 2  # attention multiplies what it computed
    assert policy.count(nn.Linear) == plans.count("Gemm") + products
    assert adapters.weight_count(real) > 0.95 * sum(weight.numel() for weight in real.state_dict().values())


@pytest.mark.parametrize("labelled", [(), HEADS, ("leads",)], ids=lambda names: "+".join(names) or "no scene")
def test_only_what_labels_depend_on_learns(real: ImportedNet, labelled: tuple[str, ...]) -> None:
    """Pose, meta, desires and unlabelled heads are Gemms of their own here; a trunk learns through the plan."""
    real.freeze_heads(labelled)
    learns = {
        layer.out_features: layer.weight.requires_grad for layer in real.modules() if isinstance(layer, nn.Linear)
    }
    widths = {"lane_lines": 528, "road_edges": 264, "leads": 144}
    assert {name for name, width in widths.items() if learns[width]} == set(labelled)
    assert learns[990]  # the plan
    assert learns[512]  # the features that it is made from
    assert not any(learns[width] for width in (55, 12))  # meta, pose
    plan_loss(real).backward()
    assert all(weight.grad is None for weight in real.parameters() if not weight.requires_grad)


@pytest.mark.parametrize("mode", ["lora", "dora"])
def test_an_adapter_reaches_dense_layers_and_convolutions(net: ImportedNet, mode: str, request) -> None:
    net.freeze_heads(())
    before = everything(net)
    adapted = adapters.attach(net, make_spec(net, mode)).eval()
    sits_on = {type(module.get_base_layer()) for module in adapted.modules() if hasattr(module, "get_base_layer")}
    assert sits_on == ({nn.Linear, nn.Conv2d} if "real" in request.node.name else {nn.Linear})
    assert max(differences(everything(adapted), before)) < 1e-6  # at first it changes nothing
    shake(adapted)
    changed = everything(adapted)
    assert differences(changed, before)[-3] > 1e-2  # the plan's mean
    adapted.train().zero_grad()
    plan_loss(adapted).backward()
    adapters.check_gradients(adapted)


def test_an_adapted_pair_goes_through_every_stage(tmp_path: Path) -> None:
    """Trained, merged and exported by the recipe; what is exported can be imported, and says the merged one's plan."""
    write_drives(tmp_path, seconds=3.0)
    imported = driving_net.load_net(write_real_ops(tmp_path))
    driving_net.save_net(imported, tmp_path / "base")
    made = make_run(tmp_path, tiny_student(mode="dora", model=str(tmp_path / "base")), data=tmp_path)
    merge(made.recipe, made.run, MergeRequest(), QUIET)
    said = everything(driving_net.load_net(made.run.folder / "merged").eval())
    assert differences(said, everything(imported.eval()))[-3] > 1e-3  # the plan's mean
    export(made.recipe, made.run, ExportRequest(), QUIET)
    exported = driving_net.load_net(made.run.folder / "export" / "onnx").eval()
    assert max(differences(everything(exported), said)) < 1e-4


def test_several_batch_sizes_are_refused_of_programs_that_were_made_for_one(net: ImportedNet, request) -> None:
    recipe = tiny_student()

    def programs(*batches: int) -> list:
        return recipe.programs(BuiltModel(net, None), recipe.preprocess(), batches)

    assert [program.batch for program in programs(3)] == [3, 3]
    if "free batch" in request.node.name:
        assert [program.batch for program in programs(1, 2, 3, 4)] == [None, None]
    else:
        said = r"^--batch 1-4: this student .* fixed batch.*; give one, such as --batch 1,"
        with pytest.raises(UsageError, match=said):
            programs(1, 2, 3, 4)


def test_grouped_convolutions_are_left_out_by_name(real: ImportedNet) -> None:
    left = adapters.left_out(real)
    assert sorted(left.values()) == ["a convolution in 16 groups", f"a convolution in {WIDTH} groups"]
    assert not set(left) & set(adapters.driving_targets(real))


@pytest.mark.parametrize("mode", ["lora", "dora"])
def test_merged_is_adapted_and_comes_back_from_disk(net: ImportedNet, mode: str, tmp_path: Path) -> None:
    net.freeze_heads(HEADS)
    adapted = adapters.attach(net, make_spec(net, mode)).eval()
    shake(adapted)
    said = everything(adapted)
    merged = adapters.merge(copy.deepcopy(adapted)).eval()
    assert max(differences(everything(merged), said)) < 1e-5
    driving_net.save_net(merged, tmp_path / "merged")
    assert driving_net.is_net_folder(tmp_path / "merged")
    assert max(differences(everything(driving_net.load_net(tmp_path / "merged").eval()), said)) < 1e-5


def test_full_tuning_learns(real: ImportedNet) -> None:
    real.freeze_heads(())
    optimiser = torch.optim.AdamW([weight for weight in real.parameters() if weight.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = plan_loss(real.train())
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    adapters.check_gradients(real)
    assert losses[-1] < 0.5 * losses[0]


def test_a_wrong_translation_is_refused_with_its_number(tmp_path: Path) -> None:
    """A tensor of a translated program is changed by a hundredth, as a wrong operator would change what it says."""
    write_tiny(tmp_path)
    graphs = driving_import.open_graphs([tmp_path / name for name in driving_net.PROGRAMS], "cpu")
    program = driving_import.import_net(tmp_path).vision.program
    assert driving_import.parity(program, graphs[0], driving_import.VISION_INPUTS).share < 1e-5
    with torch.no_grad():
        next(program.parameters()).mul_(1.01)
    assert driving_import.parity(program, graphs[0], driving_import.VISION_INPUTS).share > 1e-4


def test_a_small_answer_does_not_hide_behind_a_large_one(tmp_path: Path) -> None:
    """A score that is wrong by 0.05 is nothing beside a plan of a hundred metres."""
    write_tiny(tmp_path)
    graph = driving_import.open_graphs([tmp_path / name for name in driving_net.PROGRAMS], "cpu")[1]
    program = driving_import.import_net(tmp_path).policy.program
    place, forward = graph.slices["desire_state"], program.forward

    def shifted(inputs):
        said = forward(inputs).clone()
        said[:, place.start] += 0.05
        return said

    assert driving_import.parity(program, graph, driving_import.POLICY_INPUTS).share < 1e-5
    program.forward = shifted
    assert driving_import.parity(program, graph, driving_import.POLICY_INPUTS).share > 1e-3


def test_weights_in_another_file_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    path = tmp_path / "driving_policy.onnx"
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="weights.bin")
    with pytest.raises(DataError, match=r"driving_policy\.onnx: \d+ of its weights lie in another file; expected"):
        driving_net.load_net(tmp_path)


def test_it_says_that_torch_and_onnx_runtime_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path)
    monkeypatch.setattr(driving_import, "_TOLERANCE", 0.0)
    said = r"driving_vision\.onnx: in torch it says something else than in ONNX Runtime: .+ by \d\.\de-\d+ of its"
    with pytest.raises(DataError, match=said):
        driving_net.load_net(tmp_path)


def test_an_operator_that_onnx2fx_lacks_is_named(tmp_path: Path) -> None:
    """ONNX Runtime has operators of its own; the checker of ONNX does not know them."""
    write_tiny(tmp_path)
    path = tmp_path / "driving_policy.onnx"
    model = onnx.load(path)
    first = next(node for node in model.graph.node if node.op_type == "Tanh")
    first.op_type, first.domain = "QuickGelu", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    with pytest.raises(DataError, match=r"driving_policy\.onnx: onnx2fx .*QuickGelu.*sample\.teacher"):
        driving_net.load_net(tmp_path)


def test_several_hypotheses_are_refused(tmp_path: Path) -> None:
    write_v0_10_0(tmp_path)
    with pytest.raises(
        DataError, match=r"driving_vision\.onnx: a program with several hypotheses of lead; expected the pair"
    ):
        driving_net.load_net(tmp_path)


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    write_vision(tmp_path / "driving_vision.onnx")
    write_policy(tmp_path / "driving_policy.onnx", others=("lateral_control_params",))
    with pytest.raises(
        DataError, match=r"policy\.onnx: a program with the inputs .*lateral_control_params.*expected the pair"
    ):
        driving_net.load_net(tmp_path)


def test_without_onnx2fx_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path)
    monkeypatch.setattr(driving_import.importlib.util, "find_spec", lambda name: None if name == "onnx2fx" else name)
    with pytest.raises(UsageError, match=r"needs onnx2fx; install it with: pip install 'omni-cli\[onnx\]'"):
        driving_net.load_net(tmp_path)


def test_weights_of_another_pair_are_refused(real: ImportedNet, tmp_path: Path) -> None:
    driving_net.save_net(real, tmp_path / "saved")
    write_tiny(tmp_path / "saved")
    with pytest.raises(DataError, match=r"model\.safetensors: .*take the folder again"):
        driving_net.load_net(tmp_path / "saved")


def test_weights_of_another_type_are_refused(real: ImportedNet) -> None:
    with pytest.raises(UsageError, match="--dtype: an imported program's constants are float32"):
        everything(qwen_vl.place(real, "cpu", "bfloat16"))


@pytest.mark.parametrize("of_file", [True, False])
def test_other_generations_as_a_base_are_explained(tmp_path: Path, of_file: bool) -> None:
    paths = write_2026_02(tmp_path)
    name = str(paths[0] if of_file else tmp_path)
    with pytest.raises(
        UsageError, match=r"an ONNX program is no backbone; .*driving_vision\.onnx and driving_policy\.onnx"
    ):
        driving_net.new_net(name, num_hypotheses=1, hidden=8, seed=0)
