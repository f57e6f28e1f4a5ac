"""Teachers of every known generation, against a loop that runs them as openpilot's `modeld.py` does, at 20 Hz."""

import base64
import itertools
import pickle

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.formats.driving_model import FEATURE_LEN, OUTPUT_NAME, SLICES_KEY, VISION_SLICES
from omni_cli.models.onnx_runtime import check_provider, open_session
from omni_cli.models.teacher import TeacherLabels, open_teacher
from tests.support import driving_onnx
from tests.support.hostile import Hostile

CPU = ["CPUExecutionProvider"]
GENERATIONS = {
    "v0.10.3": driving_onnx.write_v0_10_3,
    "v0.10.0": driving_onnx.write_v0_10_0,
    "2026-02": driving_onnx.write_2026_02,
    "2026-06": driving_onnx.write_2026_06,
    "2024-10": driving_onnx.write_2024_10,
}
FIELDS = ("path_m", "lane_lines_m", "lane_line_prob", "road_edges_m", "lead", "lead_prob")
RIGHT_HAND = np.array([1, 0], np.float32)


def drive(steps, seed=0):
    """Pictures whose planes' brightness wanders, a few desires, a speed."""
    rng = np.random.default_rng(seed)
    coarse = np.cumsum(rng.normal(0, 12, (steps + 1, 2, 6, 4, 8)), axis=0) + 128
    pictures = np.clip(coarse, 0, 255).astype(np.uint8).repeat(32, axis=3).repeat(32, axis=4)
    desire = np.zeros((steps, 8), np.float32)
    desire[rng.integers(0, steps, max(1, steps // 5)), rng.integers(1, 8)] = 1
    return pictures, desire, rng.uniform(5, 25, steps).astype(np.float32)


def open_generation(name, tmp_path, **options):
    paths = GENERATIONS[name](tmp_path, **options)
    return open_teacher(paths[::-1], "cpu", threads=1), paths


def label(teacher, pictures, desire, speed, **options):
    return teacher.label(pictures, desire, RIGHT_HAND, speed_mps=speed, **options)


def assert_same(one: TeacherLabels, other: TeacherLabels, rows=slice(None), atol=1e-6):
    for name in FIELDS:
        np.testing.assert_allclose(getattr(one, name)[rows], getattr(other, name)[rows], atol=atol, err_msg=name)


class Deployed:
    """What runs in the car, at 20 Hz with queues of 100 frames; written from openpilot's `InputQueues` and queues of
    `compile_modeld.py`, and sharing nothing with the teacher but ONNX Runtime."""

    def __init__(self, paths):
        self.sessions = [onnxruntime.InferenceSession(str(path), providers=CPU) for path in paths]
        self.slices = [self.read_slices(session) for session in self.sessions]
        self.images = np.zeros((5, 2, 6, 128, 256), np.uint8)
        self.features = np.zeros((100, 512), np.float32)
        self.desire = np.zeros((100, 8), np.float32)

    @staticmethod
    def read_slices(session):
        return pickle.loads(base64.b64decode(session.get_modelmeta().custom_metadata_map["output_slices"]))

    def step(self, picture, pulse, speed):
        self.images = np.concatenate([self.images[1:], picture[None]])
        self.desire = np.concatenate([self.desire[1:], pulse[None]])
        views = [np.concatenate([self.images[0, view], self.images[-1, view]])[None] for view in (0, 1)]
        given = {
            "desire": self.desire.reshape(25, 4, 8).max(axis=1)[None],
            "traffic_convention": RIGHT_HAND[None],
            "lateral_control_params": np.array([[speed, 0.3]], np.float32),
            # `0. * self.prev_desired_curv_20hz[-4, :]`: e442425c9 (2024-10) and likewise 64fd3f986 (2025-07)
            "prev_desired_curv": np.zeros((1, 25, 1), np.float32),
            "action_t": np.array([[0.3 + 0.05 + 0.025, 0.45 + 0.05 + 0.025]], np.float32),
        }
        given |= {"img": views[0], "big_img": views[1], "input_imgs": views[0], "big_input_imgs": views[1]}
        given["desire_pulse"] = given["desire"]
        said = {}
        for session, slices in zip(self.sessions, self.slices, strict=True):
            wanted = {node.name: node.shape for node in session.get_inputs()}
            if wanted.get("features_buffer") == [1, 24, 512]:  # past only: frames t - 96 ... t - 4
                given["features_buffer"] = self.features[-96::4][None]
            else:
                given["features_buffer"] = self.features[np.arange(-1, -100, -4)[::-1]][None]
            raw = session.run(None, {name: given[name] for name in wanted})[0]
            if "hidden_state" in slices:
                self.features = np.concatenate([self.features[1:], raw[:, slices["hidden_state"]]])
            said |= {name: raw[0, part] for name, part in slices.items()}
        return said


@pytest.mark.parametrize("name", GENERATIONS)
def test_at_5_hz_a_teacher_says_what_the_car_says_at_20_hz(name, tmp_path):
    steps = 30
    teacher, paths = open_generation(name, tmp_path)
    pictures, desire, speed = drive(steps)
    between = np.random.default_rng(9).integers(0, 256, (3, 2, 6, 128, 256), np.uint8)  # what only 20 Hz sees
    found = label(teacher, pictures, desire, speed)

    car = Deployed(paths)
    for step in range(-1, steps):
        for part in range(4 if step >= 0 else 1):  # the pulse falls on one of the step's four frames
            is_last = part == 3 or step < 0
            pulse = desire[step] if step >= 0 and part == step % 4 else np.zeros(8, np.float32)
            said = car.step(pictures[step + 1] if is_last else between[part], pulse, speed[max(step, 0)])
        if step < 24:
            continue
        assert found.warm[step]
        plan = said["plan"]
        if plan.size == 990:
            np.testing.assert_allclose(found.path_m[step], plan[:495].reshape(33, 15)[:, :3], atol=1e-5)
        else:
            five = plan.reshape(5, 991)
            best = five[five[:, -1].argmax()]
            np.testing.assert_allclose(found.path_m[step], best[:495].reshape(33, 15)[:, :3], atol=1e-5)
        np.testing.assert_allclose(found.lane_lines_m[step], said["lane_lines"][:264].reshape(4, 33, 2), atol=1e-5)
        np.testing.assert_allclose(
            found.lane_line_prob[step], 1 / (1 + np.exp(-said["lane_lines_prob"][1::2])), atol=1e-6
        )
        if said["lead"].size == 144:
            np.testing.assert_allclose(found.lead[step], said["lead"][:72].reshape(3, 6, 4)[:, 0], atol=1e-5)
    assert not found.warm[:24].any()


@pytest.mark.parametrize(("name", "memory_steps"), [("v0.10.3", 25), ("2026-06", 24)])
def test_before_the_start_the_memory_is_zero(name, memory_steps, tmp_path):
    steps = 5
    teacher, paths = open_generation(name, tmp_path)
    pictures, desire, speed = drive(steps)
    found = label(teacher, pictures, desire, speed)
    first, last = (onnxruntime.InferenceSession(str(path), providers=CPU) for path in (paths[0], paths[-1]))
    remembered = [np.zeros(FEATURE_LEN, np.float32)] * memory_steps
    for step in range(steps):
        pair = np.concatenate([pictures[step], pictures[step + 1]], axis=1)
        given = {"img": pair[None, 0], "big_img": pair[None, 1], "traffic_convention": RIGHT_HAND[None]}
        given["action_t"] = np.array([[0.375, 0.525]], np.float32)
        given["desire_pulse"] = np.zeros((1, 25, 8), np.float32)
        given["desire_pulse"][0, 24 - step :] = desire[: step + 1]
        given["features_buffer"] = np.stack(remembered)[None]
        seen = first.run(None, {node.name: given[node.name] for node in first.get_inputs()})[0]
        remembered = [*remembered[1:], seen[0, VISION_SLICES["hidden_state"]]]
        if len(paths) == 2:
            given["features_buffer"] = np.stack(remembered)[None]
        said = last.run(None, {node.name: given[node.name] for node in last.get_inputs()})[0]
        plan = said[0, -1000:-505].reshape(33, 15)
        np.testing.assert_allclose(found.path_m[step], plan[:, :3], atol=1e-5)
        assert not found.warm[step]


@pytest.mark.parametrize("name", GENERATIONS)
def test_nothing_crosses_recordings(name, tmp_path):
    teacher, _ = open_generation(name, tmp_path)
    one, other = drive(8, seed=1), drive(8, seed=2)
    alone = label(teacher, *other)
    label(teacher, *one)
    assert_same(label(teacher, *other), alone, atol=0)
    crossed = label(teacher, *other, state=label(teacher, *one).state)
    assert np.abs(crossed.path_m - alone.path_m).max() > 0.1  # the memory matters: a mix-up would show


@pytest.mark.parametrize("name", GENERATIONS)
def test_a_recording_in_pieces_is_the_recording_in_one(name, tmp_path):
    teacher, _ = open_generation(name, tmp_path)
    pictures, desire, speed = drive(40)
    whole, state, pieces = label(teacher, pictures, desire, speed), None, []
    for start, stop in [(0, 7), (7, 8), (8, 33), (33, 40)]:
        piece = label(teacher, pictures[start : stop + 1], desire[start:stop], speed[start:stop], state=state)
        pieces, state = [*pieces, piece], piece.state
    for field in (*FIELDS, "warm"):
        joined = np.concatenate([getattr(piece, field) for piece in pieces])
        np.testing.assert_array_equal(joined, getattr(whole, field))
    assert state.steps == 40


def test_a_free_batch_axis_runs_many_steps_at_once_and_says_the_same(tmp_path):
    fixed, _ = open_generation("v0.10.3", tmp_path)
    one = label(fixed, *drive(37))
    free, _ = open_generation("v0.10.3", tmp_path, batch="batch")
    assert [graph.batch for graph in free.graphs] == [16, 16]
    assert_same(label(free, *drive(37)), one, atol=2e-5)


@pytest.mark.parametrize("picture_type", [TensorProto.UINT8, TensorProto.FLOAT16, TensorProto.FLOAT])
def test_floats_and_pictures_come_as_the_model_says(picture_type, tmp_path):
    exact, _ = open_generation("v0.10.0", tmp_path)
    expected = label(exact, *drive(6))
    half, _ = open_generation("v0.10.0", tmp_path, float_type=TensorProto.FLOAT16, picture_type=picture_type)
    assert half.graphs[1].session.inputs["features_buffer"].dtype == np.float16
    found = label(half, *drive(6))
    assert found.path_m.dtype == np.float32
    same = np.abs(found.path_m - expected.path_m).max(axis=(1, 2)) < 0.15  # 120 m in float16
    assert same.mean() > 0.5  # near a tie another of the five hypotheses may win


def test_the_order_of_the_files_says_nothing_and_the_on_policys_plan_counts(tmp_path):
    paths = driving_onnx.write_2026_02(tmp_path)
    expected = label(open_teacher(paths, "cpu"), *drive(4))
    for order in itertools.permutations(paths):
        assert_same(label(open_teacher(order, "cpu"), *drive(4)), expected, atol=0)
    lanes = driving_onnx.widths_to_slices({"plan": 990, **driving_onnx.lane_widths()})
    off = driving_onnx.write_policy(tmp_path / "a.onnx", lanes, seed=3)  # says a plan of its own
    found = label(open_teacher([off, paths[2], paths[0]], "cpu"), *drive(4))
    np.testing.assert_array_equal(found.path_m, expected.path_m)


def test_v0_10_0_needs_the_speed_and_uses_it(tmp_path):
    teacher, _ = open_generation("v0.10.0", tmp_path)
    assert teacher.needs_speed
    pictures, desire, speed = drive(3)
    with pytest.raises(ValueError, match="None"):
        teacher.label(pictures, desire, RIGHT_HAND)
    slow = label(teacher, pictures, desire, 0 * speed)
    assert np.abs(slow.path_m - label(teacher, pictures, desire, speed).path_m).max() > 0.1
    with pytest.raises(DataError, match="'plan' is not finite at step 1"):
        label(teacher, pictures, desire, np.where(np.arange(3) == 1, np.nan, speed).astype(np.float32))
    teacher, _ = open_generation("v0.10.3", tmp_path)
    assert not teacher.needs_speed
    with pytest.raises(ValueError, match=r"\(3, 2, 6, 128, 256\)"):
        teacher.label(pictures[:-1], desire, RIGHT_HAND)


def test_slices_beside_the_file_serve_as_well_as_slices_in_it(tmp_path):
    teacher, paths = open_generation("v0.10.3", tmp_path)
    expected = label(teacher, *drive(3))
    sidecars = [driving_onnx.move_slices_to_sidecar(path) for path in paths]
    assert_same(label(open_teacher(paths, "cpu"), *drive(3)), expected, atol=0)
    sidecars[1].unlink()
    with pytest.raises(
        DataError, match=r"driving_policy.onnx: its metadata has no 'output_slices' and there is no dri"
    ):
        open_teacher(paths, "cpu")


@pytest.mark.fault("F24")
def test_code_in_the_slices_never_runs(tmp_path):
    pwned = tmp_path / "pwned"
    text = base64.b64encode(pickle.dumps({"plan": Hostile(pwned)})).decode()
    paths = driving_onnx.write_v0_10_3(tmp_path, metadata={SLICES_KEY: text})
    with pytest.raises(
        DataError, match=r"driving_vision.onnx: output_slices: a pickle that is refused: it asks for \w+.mkdir"
    ):
        open_teacher(paths, "cpu")
    paths = driving_onnx.write_v0_10_3(tmp_path)
    driving_onnx.move_slices_to_sidecar(paths[0]).write_bytes(pickle.dumps(Hostile(pwned)))
    with pytest.raises(DataError, match=r"driving_vision_metadata.pkl: a pickle that is refused"):
        open_teacher(paths, "cpu")
    assert not pwned.exists()


def test_slices_of_another_model_are_refused(tmp_path):
    text = driving_onnx.encode_slices(driving_onnx.V0_10_0_VISION_SLICES)
    paths = driving_onnx.write_v0_10_3(tmp_path, metadata={SLICES_KEY: text})
    with pytest.raises(DataError, match=r"driving_policy.onnx: 'lead' is 83 wide in a vector of 1000, expected 102"):
        open_teacher(paths, "cpu")


def write_silent(path, inputs, outputs=1):
    """A program that has these inputs and says zeros."""
    names = [f"{OUTPUT_NAME}{index or ''}" for index in range(outputs)]
    value = helper.make_tensor("zeros", TensorProto.FLOAT, (1, 2), [0.0, 0.0])
    graph = helper.make_graph(
        [helper.make_node("Constant", [], [name], value=value) for name in names],
        "silent",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 2)) for name in names],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


OLD_PICTURES = {"input_imgs": (1, 12, 128, 256), "big_input_imgs": (1, 12, 128, 256)}
V0_9_8 = {**OLD_PICTURES, "desire": (1, 100, 8), "traffic_convention": (1, 2), "lateral_control_params": (1, 2),
          "prev_desired_curv": (1, 100, 1), "features_buffer": (1, 99, 512)}  # fmt: skip
NAV = {**V0_9_8, "nav_features": (1, 256), "nav_instructions": (1, 150)}
IN_GRAPH = {"warped": (2, 6, 128, 256), "desire": (8,), "traffic_convention": (1, 2), "state_feat_q": (96, 1, 512)}


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (V0_9_8, r"desire \[100, 8\].*features_buffer \[99, 512\]: it remembers features at 20 Hz"),
        (NAV, "it remembers features at 20 Hz"),
        (IN_GRAPH, r"state_feat_q \[1, 512\]: it keeps a memory of 20 Hz inside the graph"),
        ({"input_img": (1, 1382400), "calib": (1, 3)}, "it watches the driver, not the road"),
        ({"pixel_values": (1, 3, 224, 224)}, "no driving model that omni knows has them; known are the vision"),
        ({**OLD_PICTURES, "img": (1, 12, 128, 256)}, "no driving model that omni knows"),
        ({"img": (4, 12, 128, 256), "big_img": (4, 12, 128, 256)}, "no driving model that omni knows"),
    ],
)
def test_what_cannot_be_fed_truly_is_refused_by_name(inputs, reason, tmp_path):
    path = write_silent(tmp_path / "driving_supercombo.onnx", inputs)  # the name of the file says nothing
    with pytest.raises(DataError, match=reason) as caught:
        open_teacher([path], "cpu")
    assert "\n" not in str(caught.value)


def test_files_that_are_not_one_model_are_refused(tmp_path):
    vision, policy = driving_onnx.write_v0_10_3(tmp_path)
    other = driving_onnx.write_policy(tmp_path / "other.onnx")
    with pytest.raises(DataError, match="found vision; expected the files of one model"):
        open_teacher([vision], "cpu")
    with pytest.raises(DataError, match=r"found policy \+ supercombo; expected"):
        open_teacher([*driving_onnx.write_2026_06(tmp_path), policy], "cpu")
    with pytest.raises(DataError, match="found nothing"):
        open_teacher([], "cpu")
    with pytest.raises(DataError, match="0 of the two policies say lanes; expected 1"):
        open_teacher([vision, policy, other], "cpu")
    triple = driving_onnx.write_2026_02(tmp_path)
    with pytest.raises(
        DataError, match="together they say no lane_lines, lane_lines_prob, road_edges, lead, lead_prob;"
    ):
        open_teacher([triple[0], triple[2]], "cpu")
    old = [driving_onnx.write_vision(tmp_path / "v.onnx", names=tuple(OLD_PICTURES)),
           driving_onnx.write_policy(tmp_path / "p.onnx", desire="desire", others=("prev_desired_curv",))]  # fmt: skip
    with pytest.raises(DataError, match=r"reads back the curvature that it said 0.05 s ago"):
        open_teacher(old, "cpu")
    two = write_silent(tmp_path / "two.onnx", {"img": (1, 12, 128, 256), "big_img": (1, 12, 128, 256)}, outputs=2)
    with pytest.raises(DataError, match=r"two.onnx: answers with .*expected one vector for each step"):
        open_teacher([two], "cpu")


def test_a_damaged_file_is_one_line(tmp_path):
    vision, policy = driving_onnx.write_v0_10_3(tmp_path)
    whole = policy.read_bytes()
    for content in (b"", b"version https://git-lfs.github.com/spec/v1", whole[: len(whole) // 2]):
        policy.write_bytes(content)
        with pytest.raises(DataError, match=r"driving_policy.onnx: ONNX Runtime cannot load it on cpu: \w") as caught:
            open_teacher([vision, policy], "cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"gone.onnx: no such file; expected an ONNX program"):
        open_teacher([vision, tmp_path / "gone.onnx"])


def test_the_provider_is_the_one_asked_for_or_the_run_is_refused(tmp_path):
    vision, _ = driving_onnx.write_v0_10_3(tmp_path)
    available = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in available:
        with pytest.raises(
            UsageError, match=r"providers cuda: this onnxruntime [\d.]+ has cpu; install the onnxruntime"
        ):
            open_session(vision, "cuda")
        assert open_session(vision, "auto").provider == "cpu"
    with pytest.raises(UsageError, match="providers gpu: expected auto, cuda, tensorrt, rocm, cpu"):
        open_session(vision, "gpu")
    session = open_session(vision, "cpu", threads=1)
    assert (session.provider, session.note) == ("cpu", "")
    assert session.session.get_session_options().intra_op_num_threads == 1
    check_provider("rocm", ["MIGraphXExecutionProvider", "CPUExecutionProvider"], vision)
    with pytest.raises(OmniError, match=r"asked ONNX Runtime for cuda, it runs on CPUExecutionProvider"):
        check_provider("cuda", ["CPUExecutionProvider"], vision)
    with pytest.raises(OmniError, match="asked ONNX Runtime for tensorrt, it runs on CUDAExecutionProvider, CPU"):
        check_provider("tensorrt", ["CUDAExecutionProvider", "CPUExecutionProvider"], vision)


def test_a_teacher_says_who_it_is(tmp_path):
    teacher, _ = open_generation("2026-02", tmp_path)
    assert teacher.checkpoints == ("tiny/1", "tiny/3", "tiny/2")
    assert (teacher.provider, teacher.notes) == ("cpu", ())


def test_the_tiny_teachers_can_be_learned_from(tmp_path):
    """Their path follows the pictures, smoothly and differently; their files are the same at each writing."""
    teacher, paths = open_generation("v0.10.3", tmp_path)
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in driving_onnx.write_v0_10_3(tmp_path)] == before
    pictures, desire, speed = drive(60)
    found = label(teacher, pictures, desire, speed)
    ends = found.path_m[24:, -1]
    assert ends[:, 0].std() > 5
    assert ends[:, 1].std() > 1
    jump = np.abs(np.diff(found.path_m[24:, 20, 0])).max()
    assert jump < 0.5 * np.ptp(found.path_m[24:, 20, 0])
    nudged = np.clip(pictures.astype(int) + 1, 0, 255).astype(np.uint8)
    assert 0 < np.abs(label(teacher, nudged, desire, speed).path_m - found.path_m).max() < 3
