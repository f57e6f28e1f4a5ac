"""The student as the two programs of openpilot v0.10.3: what they say, derive, leave out, and say in ONNX."""

import numpy as np
import onnx
import pytest
import torch
from scipy import stats
from torch import nn

from omni_cli.formats.driving_model import (
    PLAN_COLUMNS,
    POLICY_INPUTS,
    POLICY_SLICES,
    T_IDXS_S,
    VISION_INPUTS,
    VISION_SLICES,
    decode_slices,
)
from omni_cli.models.driving_export import (
    OUTPUT_NAMES,
    POLICY_NAME,
    VISION_NAME,
    PolicyContract,
    VisionContract,
    derivative_matrix,
    drive,
    example_inputs,
    motion,
    policy_metadata,
    vision_metadata,
)
from omni_cli.models.driving_net import new_net
from omni_cli.models.driving_outputs import parse_outputs
from omni_cli.models.onnx_runtime import open_session
from omni_cli.models.onnx_write import write_onnx
from omni_cli.models.teacher import open_teacher
from tests.support.driving import real_data, real_folder
from tests.support.full_rate import real_events

OPSET = 20


@pytest.fixture(scope="module")
def net():
    """A student whose every head says something of its own."""
    net = new_net("tiny:resnet", num_hypotheses=3, hidden=24, seed=3).eval().requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(4)
    for weight in net.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    return net


@pytest.fixture(scope="module")
def written(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    parts = {
        VISION_NAME: (VisionContract(net.vision), VISION_INPUTS, vision_metadata("omni/7")),
        POLICY_NAME: (PolicyContract(net.policy), POLICY_INPUTS, policy_metadata("omni/7")),
    }
    for name, (module, specs, metadata) in parts.items():
        inputs = example_inputs(specs, 2, seed=1)
        path = folder / f"{name}.onnx"
        free_axes = {name: {0: "batch"} for name in (*inputs, *OUTPUT_NAMES)}
        write_onnx(module, inputs, OUTPUT_NAMES, path, opset=OPSET, free_axes=free_axes, metadata=metadata)
    return folder


def a_drive(steps, seed=5):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((steps + 1, 2, 6, 4, 8), generator=generator).mul(255).to(torch.uint8)
    pictures = coarse.repeat_interleave(32, 3).repeat_interleave(32, 4)
    desire = torch.zeros(steps, 8)
    desire[steps // 3, 3] = 1
    return pictures, desire, torch.tensor([1.0, 0.0])


def say(module: nn.Module):
    return lambda inputs: module(**inputs)[0]


def test_the_vision_program_says_what_the_net_sees(net):
    inputs = example_inputs(VISION_INPUTS, 3, seed=2)
    seen = net.vision(**inputs)
    (raw,) = VisionContract(net.vision)(**inputs)
    assert (raw.shape, raw.dtype) == ((3, 1576), torch.float32)
    found = parse_outputs(raw.numpy(), VISION_SLICES)
    np.testing.assert_array_equal(found["hidden_state"], seen.features)
    np.testing.assert_array_equal(found["lane_lines"], seen.lane_lines_m)
    np.testing.assert_array_equal(found["road_edges"], seen.road_edges_m)
    np.testing.assert_allclose(found["lane_lines_prob"], torch.sigmoid(seen.lane_line_logit), rtol=1e-5)
    np.testing.assert_allclose(found["lead_prob"], torch.sigmoid(seen.lead_logit), rtol=1e-5)
    spread = stats.laplace(scale=seen.lane_lines_log_scale.exp().numpy()).std()
    np.testing.assert_allclose(found["lane_lines_std"], spread, rtol=1e-4)
    spread = stats.laplace(scale=seen.road_edges_log_scale.exp().numpy()).std()
    np.testing.assert_allclose(found["road_edges_std"], spread, rtol=1e-4)


def test_a_lead_goes_on_at_constant_speed(net):
    inputs = example_inputs(VISION_INPUTS, 2, seed=2)
    seen = net.vision(**inputs)
    found = parse_outputs(VisionContract(net.vision)(**inputs)[0].numpy(), VISION_SLICES)
    np.testing.assert_array_equal(found["lead"][:, :, 0], seen.lead)
    np.testing.assert_allclose(found["lead"][:, :, 4, 0], seen.lead[..., 0] + 8 * seen.lead[..., 2], rtol=1e-5)
    np.testing.assert_array_equal(found["lead"][:, :, 5, 1:], seen.lead[..., 1:])
    spread = stats.laplace(scale=seen.lead_log_scale.exp().numpy()).std()
    np.testing.assert_allclose(found["lead_std"][:, :, 3], spread, rtol=1e-4)


def test_the_policy_program_says_the_likeliest_plan(net):
    inputs = example_inputs(POLICY_INPUTS, 16, seed=2)
    inputs["features_buffer"] = 4 * inputs["features_buffer"] - 2
    plans = net.policy(**inputs)
    (raw,) = PolicyContract(net.policy)(**inputs)
    assert (raw.shape, raw.dtype) == ((16, 1000), torch.float32)
    found = parse_outputs(raw.numpy(), POLICY_SLICES)
    winners = [max(range(3), key=lambda k: float(logit[k])) for logit in plans.logit]
    assert len(set(winners)) > 1
    for row, winner in enumerate(winners):
        np.testing.assert_array_equal(found["plan"][row, :, :2], plans.mean_m[row, winner])
        spread = stats.laplace(scale=plans.log_scale[row, winner].exp().numpy()).std()
        np.testing.assert_allclose(found["plan_std"][row, :, :2], spread, rtol=1e-4)


def test_what_is_not_learned_is_zero_and_named(net):
    (seen,) = VisionContract(net.vision)(**example_inputs(VISION_INPUTS, 2, seed=2))
    named = vision_metadata("x")["omni_not_learned"].split("; ")
    for name in VISION_SLICES.keys() - {"pad"}:
        assert (seen[:, VISION_SLICES[name]] == 0).all() == (name in named), name
    (planned,) = PolicyContract(net.policy)(**example_inputs(POLICY_INPUTS, 2, seed=2))
    assert policy_metadata("x")["omni_not_learned"].split("; ")[0] == "desire_state"
    assert (planned[:, 990:] == 0).all()
    plan, log_std = planned[:, :990].reshape(2, 2, 33, 15).unbind(1)
    silent = [2, 5, 8, 9, 10, 12, 13]  # z of position, velocity, acceleration; roll and pitch and their rates
    assert (plan[:, :, silent] == 0).all()
    assert (plan[:, 1:, [0, 1, 3, 4, 6, 7, 11, 14]] != 0).any(dim=(0, 1)).all()
    assert (log_std[:, :, 2:] == 0).all()


def test_the_derivative_is_exact_for_constant_acceleration_and_calm():
    matrix = derivative_matrix(T_IDXS_S)
    path = 3.0 + 12.0 * T_IDXS_S + 0.7 * T_IDXS_S**2
    np.testing.assert_allclose(matrix @ path, 12.0 + 1.4 * T_IDXS_S, atol=1e-9)
    wavy = 10 * T_IDXS_S - np.cos(0.6 * T_IDXS_S) / 0.6
    assert np.abs(matrix @ wavy - (10 + np.sin(0.6 * T_IDXS_S))).max() < 0.13
    noise = np.random.default_rng(0).normal(0, 0.01, (33, 4000))  # 1 cm in every point
    neighbours = np.gradient(noise, T_IDXS_S, axis=0)
    assert 1.2 < neighbours[0].std() < 1.6
    assert 40 < np.gradient(neighbours, T_IDXS_S, axis=0)[0].std() < 50
    assert (matrix @ noise).std(axis=1).max() < 0.04
    assert (matrix @ matrix @ noise).std(axis=1).max() < 0.1


@pytest.mark.parametrize("curvature", [0.01, -0.01, 0.002])
def test_the_motion_on_a_circle(curvature):
    """Right is positive, for y as for yaw; openpilot steers by a curvature that it reads back from yaw."""
    speed = 12.0
    angle = speed * curvature * T_IDXS_S
    near = angle[np.abs(angle) < 1].size
    circle = np.stack([np.sin(angle), 1 - np.cos(angle)], axis=1) / curvature
    plan = motion(torch.from_numpy(circle)[None].float())[0].numpy().astype(np.float64)
    columns = {name: plan[:near, part] for name, part in PLAN_COLUMNS.items()}
    np.testing.assert_allclose(plan[:, :2], circle, rtol=1e-6)
    np.testing.assert_allclose(columns["velocity"][:, 0], speed, atol=0.15)
    np.testing.assert_allclose(columns["velocity"][:, 1], 0, atol=0.01)
    np.testing.assert_allclose(columns["euler"][:, 2], angle[:near], atol=0.01)
    np.testing.assert_allclose(columns["euler_rate"][:, 2], speed * curvature, atol=0.012)
    np.testing.assert_allclose(columns["acceleration"][:, 0], 0, atol=0.2)
    np.testing.assert_allclose(columns["acceleration"][:, 1], speed**2 * curvature, atol=0.2)
    ahead_s = 0.3  # openpilot's `get_curvature_from_plan`
    psi = np.interp(ahead_s, T_IDXS_S, plan[:, 11])
    assert 2 * psi / (speed * ahead_s) - plan[0, 14] / speed == pytest.approx(curvature, rel=0.05)


@real_data
@pytest.mark.real_data
def test_what_follows_from_a_real_plan_is_what_the_model_itself_says():
    """The frame of each column, against openpilot's model: 31 plans of the real log, two of them into a bend."""
    (log,) = real_folder().glob("comma_demo_route/**/qlog.bz2")
    plans = [event.modelV2 for event in real_events(log.parent) if event.which() == "modelV2"]
    path = np.array([[plan.position.x, plan.position.y] for plan in plans], np.float32).swapaxes(1, 2)
    derived = motion(torch.from_numpy(path)).numpy()[:, 20:31]  # from 3.9 s to 8.8 s ahead
    bends = np.abs(derived[:, :, 11]).max(axis=1) > 0.1
    assert (len(plans), bends.sum()) == (31, 2)
    said = {
        3: ([plan.velocity.x for plan in plans], 0.15),
        4: ([plan.velocity.y for plan in plans], 0.15),  # its car drifts a little outwards
        6: ([plan.acceleration.x for plan in plans], 0.1),
        7: ([plan.acceleration.y for plan in plans], 0.05),
        11: ([plan.orientation.z for plan in plans], 0.01),
        14: ([plan.orientationRate.z for plan in plans], 0.01),
    }
    for column, (numbers, allowed) in said.items():
        apart = np.abs(derived[:, :, column] - np.array(numbers)[:, 20:31])
        assert apart[bends].mean() < allowed, column
        assert apart.mean() < allowed, column


def test_a_turn_round_a_roundabout_is_no_braking():
    """3 quarters of a circle of 12 m: yaw goes on past 90 degrees, and speed stays what it is."""
    speed, radius = 5.0, 12.0
    angle = speed * T_IDXS_S / radius
    circle = radius * np.stack([np.sin(angle), 1 - np.cos(angle)], axis=1)
    plan = motion(torch.from_numpy(circle)[None].float())[0].numpy().astype(np.float64)
    assert angle[-1] > 1.3 * np.pi
    np.testing.assert_allclose(plan[:-4, 11], angle[:-4], atol=0.05)
    np.testing.assert_allclose(plan[:, 3], speed, atol=0.5)
    np.testing.assert_allclose(plan[:, 4], 0, atol=0.01)


def test_a_car_that_stops_in_a_bend_keeps_its_heading():
    distance = 10 * T_IDXS_S - T_IDXS_S**2
    distance[T_IDXS_S > 5] = 25.0
    angle = distance / 25.0
    path = 25.0 * np.stack([np.sin(angle), 1 - np.cos(angle)], axis=1)
    plan = motion(torch.from_numpy(path)[None].float())[0].numpy()
    np.testing.assert_allclose(plan[-3:, 11], 1.0, atol=0.05)
    np.testing.assert_allclose(plan[-3:, 3:5], 0, atol=0.1)


def test_a_standing_car_has_no_heading():
    path = torch.randn(64, 33, 2, generator=torch.Generator().manual_seed(0)) * 0.01
    plan = motion(path)
    assert plan[..., 11].abs().max() < 0.15
    assert plan.isfinite().all()


def test_over_50_steps_the_programs_agree_with_the_net(net, written):
    pictures, desire, traffic = a_drive(50)
    sessions = {path.stem: open_session(path, "cpu", threads=1) for path in written.glob("*.onnx")}

    def onnx_says(name):
        return lambda inputs: torch.from_numpy(sessions[name].run({key: x.numpy() for key, x in inputs.items()})[0])

    found = drive(onnx_says(VISION_NAME), onnx_says(POLICY_NAME), pictures, desire, traffic)
    modules = say(VisionContract(net.vision)), say(PolicyContract(net.policy))
    expected = drive(*modules, pictures, desire, traffic)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-4 * other.abs().max()
    seen, plans = net(pictures[None], desire[None], traffic[None])  # the unrolling that training uses
    best = plans.logit.argmax(dim=1)
    np.testing.assert_allclose(expected[0][:, 1064:], seen.features, atol=1e-4)
    path = expected[1][:, :495].reshape(50, 33, 15)[:, :, :2]
    np.testing.assert_allclose(path, plans.mean_m[torch.arange(50), best], atol=1e-3)


def test_the_programs_have_the_real_ones_contract(written):
    for name, specs, slices, width in (
        (VISION_NAME, VISION_INPUTS, VISION_SLICES, 1576),
        (POLICY_NAME, POLICY_INPUTS, POLICY_SLICES, 1000),
    ):
        path = written / f"{name}.onnx"
        session = open_session(path, "cpu", threads=1)
        assert {key: (spec.shape[1:], np.dtype(spec.dtype).name) for key, spec in session.inputs.items()} == {
            key: (spec.shape[1:], spec.dtype) for key, spec in specs.items()
        }
        assert [(key, spec.shape) for key, spec in session.outputs.items()] == [("outputs", (None, width))]
        assert decode_slices(session.metadata["output_slices"]) == dict(slices)
        assert session.metadata["model_checkpoint"] == "omni/7"
        model = onnx.load(str(path))
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
        for batch in (1, 5):
            inputs = {key: value.numpy() for key, value in example_inputs(specs, batch, seed=3).items()}
            assert session.run(inputs)[0].shape == (batch, width)


def test_the_student_can_be_the_next_teacher(net, written):
    teacher = open_teacher([written / f"{name}.onnx" for name in (POLICY_NAME, VISION_NAME)], "cpu", threads=1)
    pictures, desire, traffic = a_drive(30, seed=6)
    labels = teacher.label(pictures.numpy(), desire.numpy(), traffic.numpy())
    seen, plans = net(pictures[None], desire[None], traffic[None])
    best = plans.mean_m[torch.arange(30), plans.logit.argmax(dim=1)]
    np.testing.assert_allclose(labels.path_m[..., :2], best, atol=1e-3)
    np.testing.assert_allclose(labels.lane_lines_m, seen.lane_lines_m, atol=1e-3)
    np.testing.assert_allclose(labels.lead, seen.lead, atol=1e-3)
    np.testing.assert_allclose(labels.lead_prob, torch.sigmoid(seen.lead_logit), atol=1e-5)
