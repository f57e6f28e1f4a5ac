"""The v0.10.3 contract against the real files, and metadata that no file can turn into code."""

import base64
import codecs
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from omni_cli.errors import DataError
from omni_cli.formats import driving_model as model

real_data = pytest.mark.skipif("OMNI_REAL_DATA" not in os.environ, reason="OMNI_REAL_DATA names no folder of real data")


class Hostile:
    """What it would do on loading is told by the file that appears."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def text_of(value: object) -> str:
    return base64.b64encode(pickle.dumps(value)).decode()


def metadata_path(name: str) -> Path:
    return Path(os.environ["OMNI_REAL_DATA"]) / "openpilot_model_metadata" / f"{name}_metadata.pkl"


def test_points_are_dense_near_the_car():
    assert model.T_IDXS_S[[0, 1, 2, 31, 32]] == pytest.approx([0, 0.009765625, 0.0390625, 9.384765625, 10])
    assert model.X_IDXS_M[[0, 1, 2, 3, 32]] == pytest.approx([0, 0.1875, 0.75, 1.6875, 192])
    with pytest.raises(ValueError, match="read-only"):
        model.T_IDXS_S[0] = 1


def test_the_parts_tile_the_vectors_and_hold_what_their_shapes_say():
    for slices, width in ((model.VISION_SLICES, model.VISION_WIDTH), (model.POLICY_SLICES, model.POLICY_WIDTH)):
        covered = np.zeros(width, int)
        for name, part in slices.items():
            if name != "pad":
                covered[part] += 1
        padding = 0 if slices is model.VISION_SLICES else 2
        assert covered.tolist() == [1] * (width - padding) + [0] * padding
        for name in model.MEAN_SHAPES.keys() & slices.keys():
            assert 2 * np.prod(model.MEAN_SHAPES[name]) == slices[name].stop - slices[name].start
    columns = np.arange(model.PLAN_WIDTH)
    assert [*np.concatenate([columns[part] for part in model.PLAN_COLUMNS.values()])] == [*columns]


@real_data
@pytest.mark.real_data
def test_the_tables_are_those_of_the_released_models():
    for slices, inputs, width, name in (
        (model.VISION_SLICES, model.VISION_INPUTS, model.VISION_WIDTH, "v0.10.3_2025-12-12_driving_vision"),
        (model.POLICY_SLICES, model.POLICY_INPUTS, model.POLICY_WIDTH, "v0.10.3_2025-12-12_driving_policy"),
    ):
        found = model.read_metadata(metadata_path(name))
        assert dict(found.output_slices) == slices
        assert list(found.output_slices) == list(slices)
        assert found.input_shapes == {key: spec.shape for key, spec in inputs.items()}
        assert found.output_shapes == {model.OUTPUT_NAME: (1, width)}
        assert found.model_checkpoint.endswith(("/400", "/500"))


@real_data
@pytest.mark.real_data
def test_other_generations_are_read_too():
    policy = model.read_metadata(metadata_path("v0.10.0_2025-08-19_driving_policy"))
    assert policy.output_slices["plan"] == slice(0, 5 * (2 * 33 * 15 + 1))
    assert policy.input_shapes["prev_desired_curv"] == (1, 25, 1)


def test_slices_travel_as_openpilot_reads_them():
    text = model.encode_slices(model.VISION_SLICES)
    theirs = pickle.loads(codecs.decode(text.encode(), "base64"))  # get_model_metadata.py
    assert theirs == model.VISION_SLICES == model.decode_slices(text)
    wrapped = codecs.encode(pickle.dumps(dict(model.POLICY_SLICES)), "base64").decode()  # base64 in lines
    assert model.decode_slices(wrapped) == model.POLICY_SLICES


def test_a_hostile_pickle_runs_nothing(tmp_path):
    text = text_of({"plan": Hostile(tmp_path / "ran")})
    with pytest.raises(
        DataError, match=r"output_slices: a pickle that is refused: it asks for pathlib.*Path"
    ) as caught:
        model.decode_slices(text)
    assert not (tmp_path / "ran").exists()
    assert "\n" not in str(caught.value)
    pickle.loads(base64.b64decode(text))  # that it was hostile
    assert (tmp_path / "ran").exists()


def test_a_hostile_sidecar_runs_nothing(tmp_path):
    path = tmp_path / "driving_vision_metadata.pkl"
    path.write_bytes(
        pickle.dumps({"input_shapes": {}, "output_shapes": {}, "output_slices": Hostile(tmp_path / "ran")})
    )
    with pytest.raises(DataError, match=r"driving_vision_metadata\.pkl: a pickle that is refused: it asks for pathlib"):
        model.read_metadata(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", "asks for builtins.eval"),
        (b"\x80\x04Nr\xff\xff\xff\xff.", "its memo reaches to 4294967295"),  # 64 GB, in ten bytes
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fx.", "refused: "),  # a byte string of 2^63
        (pickle.dumps({"plan": slice(0, 990)})[:-9], "refused: "),
        (b"", "refused: "),
        (b"P" * 99, "refused: "),
        (pickle.dumps(bytes(1 << 15)), "at most 16384 are read"),
        (pickle.dumps({"plan": (0, 990)}), "expected a dict of names and slices"),
        (pickle.dumps({"plan": slice("0", 990)}), "expected a dict of names and slices"),
        (pickle.dumps({7: slice(0, 990)}), "expected a dict of names and slices"),
        (pickle.dumps([slice(0, 990)]), "expected a dict of names and slices"),
    ],
)
def test_anything_else_is_refused_in_one_line(content, message):
    with pytest.raises(DataError, match=message) as caught:
        model.decode_slices(base64.b64encode(content).decode(), "a.onnx")
    assert str(caught.value).startswith("a.onnx: ")
    assert "\n" not in str(caught.value)


def test_what_is_no_base64_or_no_metadata_is_refused(tmp_path):
    with pytest.raises(DataError, match="output_slices: found no base64"):
        model.decode_slices("{'plan': slice(0, 990)}")
    with pytest.raises(DataError, match="found no base64"):
        model.decode_slices("plän")
    path = tmp_path / "x_metadata.pkl"
    for value in ({}, [1], {"input_shapes": {"img": (1, None)}, "output_shapes": {}, "output_slices": {}}):
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(DataError, match="expected a dict with input_shapes"):
            model.read_metadata(path)
