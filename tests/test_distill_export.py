"""A student's adapter merges into one whole student, whose programs take the place of openpilot's."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_cli.errors import DataError, UsageError
from omni_cli.files import read_json
from omni_cli.formats.driving_model import decode_slices, read_metadata
from omni_cli.stages import models
from omni_cli.stages.evaluate import EvalRequest, evaluate
from omni_cli.stages.export import ExportRequest, export, parse_batches
from omni_cli.stages.merge import MergeRequest, merge
from tests.support.driving import real_data, real_folder, tiny_student, write_drives
from tests.support.pipeline import QUIET, Made, make_run

# -- adapters over a base of one's own


@pytest.fixture(scope="module")
def over_a_folder(tmp_path_factory) -> Made:
    """A DoRA run over a student that lies in a folder."""
    folder = tmp_path_factory.mktemp("adapter")
    write_drives(folder, seconds=3.0)
    base = tiny_student()
    base.save(base.build(base.preprocess()), folder / "base")
    return make_run(folder, tiny_student(mode="dora", model=str(folder / "base")), data=folder)


def probed(recipe, model) -> Tensor:
    """Everything that a student says about two windows of a noise that the merge itself was not tried on."""
    preprocess, numbers = recipe.preprocess(), torch.Generator().manual_seed(7)
    rows = recipe.probe_rows(None, preprocess)
    for row in rows:
        row["pictures"] = torch.randint(0, 256, preprocess.window_shape, dtype=torch.uint8, generator=numbers)
    with torch.no_grad():
        return recipe.outputs(model, recipe.collate(rows, preprocess), preprocess)


def test_a_merged_student_is_the_adapted_one(over_a_folder):
    made, preprocess = over_a_folder, over_a_folder.recipe.preprocess()
    merge(made.recipe, made.run, MergeRequest(), QUIET)
    model = models.open_model(made.run.folder / "merged")
    whole = made.recipe.of_whole_model(str(model.folder))
    merged = whole.load(preprocess, model.folder).model
    adapted = made.recipe.load(preprocess, made.run.final)
    expected = probed(made.recipe, adapted.model)
    assert float((probed(whole, merged) - expected).abs().max() / expected.abs().max()) < 1e-5
    with made.recipe.adapter_disabled(adapted):
        base = probed(made.recipe, adapted.model)
    assert float((base - expected).abs().max()) > 0.01
    assert set(merged.state_dict()) == set(made.recipe._base().state_dict())


def test_another_base_is_refused(over_a_folder, tmp_path, request):
    path = Path(over_a_folder.recipe.model) / "model.safetensors"
    content, other = path.read_bytes(), load_file(path)
    request.addfinalizer(lambda: path.write_bytes(content))
    other["policy.plan.0.bias"] += 1
    save_file(other, path)
    made, message = over_a_folder, "adapter does not match its base: run run was trained on "
    for refused in (
        lambda: merge(made.recipe, made.run, MergeRequest(tmp_path / "m"), QUIET),
        lambda: export(made.recipe, made.run, ExportRequest(out=tmp_path / "e"), QUIET),
        lambda: evaluate(made.recipe, made.run, EvalRequest(blind=False), QUIET),
    ):
        with pytest.raises(DataError, match=message):
            refused()
    assert list(tmp_path.iterdir()) == []


# -- programs


@pytest.fixture(scope="module")
def programs(over_a_folder) -> Path:
    """The adapter's programs in half precision, for any number of windows."""
    request = ExportRequest(batches=parse_batches("1-4"), dtype="float16")
    return Path(export(over_a_folder.recipe, over_a_folder.run, request, QUIET)["export"])


INPUTS = {
    "driving_vision": {"img": ("uint8", 12, 128, 256), "big_img": ("uint8", 12, 128, 256)},
    "driving_policy": {
        "desire_pulse": ("float16", 25, 8),
        "traffic_convention": ("float16", 2),
        "features_buffer": ("float16", 25, 512),
    },
}
WIDTHS = {"driving_vision": 1576, "driving_policy": 1000}


@pytest.mark.parametrize("name", INPUTS)
def test_a_program_takes_and_gives_what_openpilots_does(programs, name):
    session = onnxruntime.InferenceSession(str(programs / f"{name}.onnx"))
    found = {one.name: (one.type, *one.shape[1:]) for one in session.get_inputs()}
    assert found == {key: (f"tensor({dtype})", *shape) for key, (dtype, *shape) in INPUTS[name].items()}
    (output,) = session.get_outputs()
    assert (output.name, output.type, output.shape[1:]) == ("outputs", "tensor(float)", [WIDTHS[name]])
    assert {entry.version for entry in onnx.load(str(programs / f"{name}.onnx")).opset_import if not entry.domain} == {
        20
    }


@real_data
@pytest.mark.real_data
@pytest.mark.parametrize("name", INPUTS)
def test_its_metadata_is_that_of_the_real_model(programs, name):
    session = onnxruntime.InferenceSession(str(programs / f"{name}.onnx"))
    folder = real_folder() / "openpilot_model_metadata"
    real = read_metadata(folder / f"v0.10.3_2025-12-12_{name}_metadata.pkl")
    metadata = session.get_modelmeta().custom_metadata_map
    assert decode_slices(metadata["output_slices"]) == dict(real.output_slices)
    assert {one.name: tuple(one.shape[1:]) for one in session.get_inputs()} == {
        key: shape[1:] for key, shape in real.input_shapes.items()
    }
    assert {one.name: one.shape[1] for one in session.get_outputs()} == {
        key: shape[1] for key, shape in real.output_shapes.items()
    }


def test_programs_for_1_to_4_windows_answer_3_as_the_student_does(programs, over_a_folder):
    recipe = over_a_folder.recipe
    student = recipe.merge(recipe.load(recipe.preprocess(), over_a_folder.run.final)).model.eval()
    numbers = torch.Generator().manual_seed(3)
    looks = torch.randint(0, 256, (2, 3, 12, 128, 256), dtype=torch.uint8, generator=numbers)
    vision, policy = (onnxruntime.InferenceSession(str(programs / f"{name}.onnx")) for name in INPUTS)
    (seen,) = vision.run(None, {"img": looks[0].numpy(), "big_img": looks[1].numpy()})
    buffer = torch.randn(3, 25, 512, generator=numbers).half()
    given = {
        "features_buffer": buffer,
        "desire_pulse": torch.zeros(3, 25, 8),
        "traffic_convention": torch.eye(2)[[0, 1, 0]],
    }
    (planned,) = policy.run(None, {name: value.half().numpy() for name, value in given.items()})
    with torch.no_grad():
        features = student.vision(*looks).features
        plans = student.policy(buffer.float(), given["desire_pulse"], given["traffic_convention"])
    best = plans.mean_m[torch.arange(3), plans.logit.argmax(dim=1)]
    assert (seen.shape, planned.shape) == ((3, 1576), (3, 1000))
    np.testing.assert_allclose(seen[:, 1064:].astype(np.float32), features, atol=0.05)
    found = planned[:, :495].reshape(3, 33, 15)[:, :, :2].astype(np.float32)
    np.testing.assert_allclose(found, best, atol=2e-2 * float(best.abs().max()))


def test_a_rehearsed_drive_is_told_in_the_card(programs):
    card = read_json(programs / models.ONNX_CARD)
    assert [program["windows"] for program in card["programs"]] == ["any", "any"]
    assert set(card["rehearsed"]) == {"50 steps of driving_vision", "50 steps of driving_policy"}
    assert all(0 < share < 2e-2 for share in card["rehearsed"].values())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ExportRequest(opset=17), r"--opset 17: expected 18 to \d+"),
        (ExportRequest("hf"), "--format hf: recipe distill is exported as onnx"),
        (ExportRequest(dtype="bfloat16"), "--dtype bfloat16: ONNX programs are float32 or float16"),
    ],
)
def test_what_cannot_be_exported_is_one_line(over_a_folder, tmp_path, request_, message):
    with pytest.raises(UsageError, match=message):
        export(over_a_folder.recipe, over_a_folder.run, request_, QUIET)
