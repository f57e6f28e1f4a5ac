"""`omni bench export`: latency of a student and its teacher, by provider and batch size, in one run."""

import itertools
import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from omni_cli.errors import DataError, UsageError
from omni_cli.models.onnx_runtime import available, open_on_each, open_session
from omni_cli.report import Console
from omni_cli.stages.bench import BenchRequest, bench
from omni_cli.stages.bench.latency import ROUNDS, SIZES, WARMUPS
from omni_cli.stages.bench.timing import Timing, measure, summed
from omni_cli.stages.export import ExportRequest, export, parse_batches
from tests.support import driving_onnx
from tests.support.driving import tiny_student, write_drives
from tests.support.pipeline import QUIET, make_run
from tests.support.taught import comma

PROGRAMS = ("driving_vision", "driving_policy")
ON_THE_HOST = "device only (cpu, the host)"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A student's run, exported for any number of steps."""
    folder = tmp_path_factory.mktemp("latency")
    write_drives(folder, seconds=3.0)
    made = make_run(folder, tiny_student(), data=folder)
    export(made.recipe, made.run, ExportRequest(batches=parse_batches("1-4")), QUIET)
    return made


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Two ONNX files of the real models' contract, for one step."""
    return tuple(driving_onnx.write_v0_10_3(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def measured(made, teacher):
    """The latency part, with a teacher."""
    return part(made, teacher=teacher)


def part(made, console=QUIET, **changes):
    request = BenchRequest("export", made.data, made.run.folder.parent, "test", **{"repeats": 1, **changes})
    return bench(made.recipe, request, console)["parts"]["export"]


def test_every_program_is_timed_at_every_size_on_every_provider_in_both_places(measured):
    runners = ["torch cpu", *(f"ONNX {name}" for name in available())]
    places = ("host to host", ON_THE_HOST)
    ours = itertools.product(("model",), (*PROGRAMS, "whole"), runners, SIZES, places)
    theirs = itertools.product(("teacher",), (*PROGRAMS, "whole"), runners[1:], (1,), places)
    expected = {f"{of} {name}: {runner} b{size}, {place}" for of, name, runner, size, place in (*ours, *theirs)}
    assert set(measured["lines"]) == expected


def test_a_row_says_how_many_samples_it_is_of_and_where_its_outputs_were(measured):
    for name, line in measured["lines"].items():
        assert line["repeats"] == measured["rounds"] == ROUNDS
        assert 0 < line["min_s"] <= line["median_s"] <= line["p95_s"] <= line["p99_s"] <= line["max_s"]
        assert f" b{line['samples']}, {line['path']}" in name
        assert line["per_second"]["samples"] == pytest.approx(line["samples"] / line["median_s"])
        assert line["device"] == {"host to host": "host", "device only": "cpu, the host"}[line["path"]]
    assert measured["warmups"] == WARMUPS > 0


def test_a_model_of_two_programs_takes_as_long_as_both(measured):
    lines = measured["lines"]
    for setting in ("model {}: ONNX cpu b8, host to host", f"teacher {{}}: ONNX cpu b1, {ON_THE_HOST}"):
        whole, *parts = (lines[setting.format(name)] for name in ("whole", *PROGRAMS))
        assert whole["min_s"] >= sum(one["min_s"] for one in parts) * (1 - 1e-9)
        assert whole["max_s"] <= sum(one["max_s"] for one in parts) * (1 + 1e-9)


def test_every_ratio_is_to_the_student_in_torch_at_batch_1(measured):
    lines, ratios = measured["lines"], measured["ratios"]
    assert measured["baseline"] == "model whole: torch cpu b1, host to host"
    wholes = [name for name in lines if " whole: " in name and name != measured["baseline"]]
    assert list(ratios) == [f"{name} / baseline" for name in wholes]
    base = lines[measured["baseline"]]["per_second"]["samples"]
    for name in wholes:
        assert ratios[f"{name} / baseline"] == pytest.approx(lines[name]["per_second"]["samples"] / base)


# -- the teacher


def test_a_teacher_that_is_no_program_is_said_to_be_missing(made, capsys):
    found = part(made, Console())
    said = (
        "no teacher is measured: its teacher is 'motion', and no program; name its files with --teacher A.onnx,B.onnx"
    )
    assert said in " ".join(capsys.readouterr().err.split())
    assert found["teacher"] == said
    assert not [name for name in found["lines"] if name.startswith("teacher")]


def test_a_teacher_of_the_settings_is_found_where_they_say(teacher, tmp_path):
    assert tiny_student(sample={"teacher": comma(teacher)}).teacher_files() == teacher
    gone = tmp_path / "gone.onnx"
    with pytest.raises(UsageError, match=re.escape(f"its teacher's file {gone} is not there")):
        tiny_student(sample={"teacher": f"{teacher[0]},{gone}"}).teacher_files()
    with pytest.raises(UsageError, match="its teacher onnx:0123 is known by its contents only"):
        tiny_student(sample={"teacher": "onnx:0123"}).teacher_files()


def test_files_that_cannot_be_a_teacher_are_one_line(made, teacher, tmp_path):
    text, gone = tmp_path / "text.onnx", tmp_path / "gone.onnx"
    text.write_text("no program")
    with pytest.raises(DataError, match=r"text.onnx: ONNX Runtime cannot load it on cpu"):
        part(made, teacher=(text,))
    with pytest.raises(UsageError, match=r"gone.onnx: no such file; expected an ONNX program"):
        part(made, teacher=(gone,))
    with pytest.raises(
        UsageError, match=r"--teacher: names two files called driving_vision; expected the files of one"
    ):
        part(made, teacher=(teacher[0], teacher[0]))


def write_relus(path, *shapes):
    """A program that takes arrays of these shapes, and gives each of them back."""
    names = [(f"x{number}", f"y{number}") for number in range(len(shapes))]
    nodes = [helper.make_node("Relu", [taken], [given]) for taken, given in names]
    taken, given = (
        [
            helper.make_tensor_value_info(pair[side], TensorProto.FLOAT, shape)
            for pair, shape in zip(names, shapes, strict=True)
        ]
        for side in (0, 1)
    )
    graph = helper.make_graph(nodes, "g", taken, given)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_a_teacher_with_a_second_free_axis_is_refused(made, tmp_path):
    path = write_relus(tmp_path / "free.onnx", ["b", "t"])
    with pytest.raises(DataError, match=r"'x0' is \[None, None\]; only its first axis may have any length"):
        part(made, teacher=(path,))


def test_a_free_number_of_samples_beside_a_fixed_one_is_that(made, tmp_path):
    lines = part(made, teacher=(write_relus(tmp_path / "mixed.onnx", ["b", 4], [3, 4]),))["lines"]
    assert {line["samples"] for name, line in lines.items() if name.startswith("teacher")} == {3}


def test_two_fixed_numbers_of_samples_are_refused(made, tmp_path):
    path = write_relus(tmp_path / "two.onnx", [2, 4], [3, 4])
    with pytest.raises(DataError, match=r"its inputs are of \[2, 3\] samples at once; expected one number for all"):
        part(made, teacher=(path,))


# -- providers


def test_a_provider_that_does_not_run_it_is_told_and_not_counted(teacher):
    absent = next(name for name in ("tensorrt", "rocm", "cuda") if name not in available())
    sessions, failures = open_on_each(teacher[0], (absent, "cpu"))
    assert list(sessions) == ["cpu"]
    assert len(failures) == 1
    assert failures[0].startswith(f"providers {absent}: this onnxruntime ")


def test_a_bound_program_says_what_it_says_otherwise_and_where(teacher):
    session = open_session(teacher[0], "cpu")
    pictures = np.random.default_rng(1).integers(0, 256, (2, 1, 12, 128, 256), dtype=np.uint8)
    inputs = {"img": pictures[0], "big_img": pictures[1]}
    bound = session.bind(inputs)
    bound.run()
    (found,), (expected,) = bound.outputs(), session.run(inputs)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(expected).max() > 0
    assert bound.devices == ("cpu",)


# -- timing


def test_each_piece_of_work_is_warmed_up_as_often_as_asked():
    calls = []
    measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=1, warmups=3)
    assert calls == ["a", "b"] * 4


def test_timings_add_up_round_by_round():
    assert summed([Timing((1.0, 2.0)), Timing((10.0, 20.0))]) == Timing((11.0, 22.0))
