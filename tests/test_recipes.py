"""The contract: every recipe goes through every stage that it claims, and no stage knows which recipe it drives."""

import ast
import inspect
import math
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnxruntime
import pytest
import torch

import omni_cli
from omni_cli import recipe as contract
from omni_cli.errors import UsageError
from omni_cli.files import read_json, verified_receipt
from omni_cli.models.adapters import trainable_count, weight_count
from omni_cli.recipe import (
    Benchable,
    Evaluable,
    Exportable,
    Inferable,
    Mergeable,
    Sampled,
    SelfTested,
    Taught,
    Tokenized,
    Trainable,
    require,
)
from omni_cli.recipes import recipe_class, recipe_names
from omni_cli.recipes.vlm.settings import VlmSample
from omni_cli.report import Console
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.shards import open_shards, tokens_path
from omni_cli.samples.tables import windows_schema
from omni_cli.stages import models, runs
from omni_cli.stages.bench import PARTS, BenchRequest, bench
from omni_cli.stages.etl import EtlRequest, ensure_sidecar, etl
from omni_cli.stages.evaluate import EvalRequest, evaluate
from omni_cli.stages.export import ExportRequest, export
from omni_cli.stages.infer import InferRequest, infer, subject_of_base, subject_of_model, subject_of_run
from omni_cli.stages.merge import MergeRequest, merge
from omni_cli.stages.train import TrainRequest, train
from tests.support.driving import tiny_student, write_drives
from tests.support.folders import stamps, tree
from tests.support.pipeline import QUIET, tiny_recipe

RECORDINGS = 4
STEPS = 2
ONE_CAMERA = VlmSample(cameras="1-cam", window=4, stride=12, rate_hz=10.0, canvas_px=112)
# How a tiny one of each recipe is made in a mode of tuning, and which mode has an adapter.
MAKERS = MappingProxyType(
    {
        "vlm": (lambda mode: tiny_recipe(cameras="1-cam", mode=mode, sample=ONE_CAMERA), "lora"),
        "distill": (lambda mode: tiny_student(mode=mode), "dora"),
    }
)
DRIVEN: set[type] = set()


def capabilities() -> list[type]:
    """The protocols of recipe.py."""
    classes = [one for _, one in inspect.getmembers(contract, inspect.isclass) if one.__module__ == contract.__name__]
    return [one for one in classes if getattr(one, "_is_protocol", False)]


def claimed_by(protocol: type) -> list[str]:
    return [name for name, (make, _) in MAKERS.items() if isinstance(make("full"), protocol)]


def drives(protocol: type):
    """Run a test for each recipe that claims a protocol."""
    DRIVEN.add(protocol)
    return pytest.mark.parametrize("made", claimed_by(protocol), indirect=True)


class Case:
    """One recipe on its way through the stages; each thing is made when a test first asks for it."""

    def __init__(self, name: str, data: Path, folder: Path) -> None:
        make, mode = MAKERS[name]
        self.folder, self.data = folder, folder / "data"
        self.recipe, self.adapting = make("full"), make(mode)
        self.data.mkdir()
        (self.data / "raw").symlink_to(data / "raw")

    @cached_property
    def cut(self) -> dict:
        return etl(self.recipe, EtlRequest(data=self.data, workers=0), QUIET)

    @property
    def shards(self) -> Path:
        return Path(self.cut["shards"])

    @cached_property
    def run(self) -> runs.Run:
        return self.trained(self.recipe, "runs")

    @cached_property
    def adapter(self) -> runs.Run:
        return self.trained(self.adapting, "adapters")

    def trained(self, recipe, runs_name: str) -> runs.Run:
        return runs.open_finished(Path(train(recipe, self.train_request(runs_name), QUIET)["run"]))

    def train_request(self, runs_name: str, **changes) -> TrainRequest:
        return TrainRequest(self.shards, self.data, self.folder / runs_name, "r", "test", **changes)

    def dataset(self, split: str) -> WindowDataset:
        return WindowDataset(
            open_shards(self.shards), split, ensure_sidecar(open_shards(self.shards), self.recipe, QUIET)
        )


@pytest.fixture(scope="module")
def drives_data(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("drives")
    write_drives(data, clips_per_chunk=RECORDINGS // 2, seconds=3.0)
    return data


@pytest.fixture(scope="module")
def made(request, drives_data, tmp_path_factory) -> Case:
    return Case(request.param, drives_data, tmp_path_factory.mktemp(request.param))


def numbers(values) -> dict[str, np.ndarray]:
    """Values as JSON knows them, as arrays; null is NaN."""
    return {name: np.array(value, dtype=float) for name, value in values.items()}


def check_same_answers(found, expected) -> None:
    """Texts are equal, numbers to the two millimetres that a batch of another size and rounding may change."""
    for line, prediction in zip(found, expected, strict=True):
        assert line.text == prediction.text
        assert (line.values is None) == (prediction.values is None)
        if line.values is not None:
            one, other = numbers(line.values), numbers(prediction.values)
            assert one.keys() == other.keys()
            for name in one:
                np.testing.assert_allclose(one[name], other[name], atol=2e-3)


# -- what each stage does with it


@drives(Sampled)
def test_shards_verify_and_a_second_etl_keeps_them_all(made):
    shards = open_shards(made.shards)
    assert (made.cut["made"], made.cut["kept"], made.cut["refused"]) == (RECORDINGS, 0, {})
    assert shards.damaged() == []
    assert shards.manifest.recipe == made.recipe.name
    assert shards.manifest.preprocess == made.recipe.preprocess()
    for entry in shards.manifest.recordings:
        assert shards.windows(entry.id).schema == windows_schema(made.recipe.target_columns())
    before = stamps(made.data)
    again = etl(made.recipe, EtlRequest(data=made.data, workers=0), QUIET)
    assert (again["made"], again["kept"]) == (0, RECORDINGS)
    assert again["fingerprint"] == made.cut["fingerprint"]
    assert stamps(made.data) == before


@drives(Sampled)
def test_shares_are_one_go_byte_for_byte(made, tmp_path):
    shares = [
        etl(made.recipe, EtlRequest(data=made.data, out=tmp_path / "s", workers=0, shard=(share, 2)), QUIET)
        for share in (2, 1)
    ]
    assert [share["finished"] for share in shares] == [False, True]
    assert tree(tmp_path / "s") == tree(made.shards)


@drives(Sampled)
def test_dry_runs_touch_nothing_and_say_what_would_happen(made, capsys):
    windows = sum(made.cut["windows"].values())
    before = stamps(made.folder)
    cut = etl(made.recipe, EtlRequest(data=made.data, workers=0, dry_run=True, profile="test"), Console())
    assert (cut["recordings"], cut["cameras"]) == (RECORDINGS, list(made.recipe.preprocess().cameras))
    assert cut["windows"] >= windows
    assert "plan for test" in capsys.readouterr().err
    plan = train(made.recipe, made.train_request("absent", dry_run=True), Console())
    assert plan["steps"] == STEPS
    assert plan["shards"] == str(made.shards)
    assert f"{plan['parameters']:,}" in capsys.readouterr().err
    assert stamps(made.folder) == before


@drives(Tokenized)
def test_each_window_has_its_tokens_and_a_lost_sidecar_is_made_again(made):
    shards, key = open_shards(made.shards), made.cut["sidecar"]
    assert key == made.recipe.sidecar_key(shards.manifest.preprocess)
    for entry in shards.manifest.recordings:
        tokens = shards.tokens(entry.id, key)
        assert tokens.num_rows == shards.windows(entry.id).num_rows
        assert 0 < max(len(ids) for ids in tokens["input_ids"].to_pylist()) <= made.recipe.max_tokens
    lost = tokens_path(made.shards, shards.manifest.recordings[0].id, key)
    content = lost.read_bytes()
    lost.unlink()
    ensure_sidecar(shards, made.recipe, QUIET)
    assert lost.read_bytes() == content


@drives(Trainable)
def test_two_steps_are_trained_once(made):
    run, receipt = made.run, runs.verified_folder(made.run.final)
    assert receipt["steps"] == receipt["gradients_checked_at_step"] + 1 == STEPS
    assert math.isfinite(receipt["loss"])
    assert run.recipe_settings(recipe_class(run.manifest.recipe)) == made.recipe
    dataset = made.dataset("train")
    assert run.learned().windows == len(dataset) == made.cut["windows"]["train"]
    assert run.learned().medians == made.recipe.medians([dataset.row(index) for index in range(len(dataset))])
    files, weights = tree(run.folder), stamps(run.final)
    assert made.trained(made.recipe, "runs").folder == run.folder
    assert (tree(run.folder), stamps(run.final)) == (files, weights)


@drives(Trainable)
def test_the_size_that_a_dry_run_states_is_that_of_the_model(made):
    for recipe in (made.recipe, made.adapting):
        preprocess = recipe.preprocess()
        built = recipe.build(preprocess)
        total, trainable, weight_bytes, *_ = recipe.size(preprocess)
        extra = trainable_count(built.model) if recipe is made.adapting else 0
        assert (total + extra, trainable) == (weight_count(built.model), trainable_count(built.model))
        assert weight_bytes == 4 * total


@drives(Evaluable)
def test_eval_puts_the_model_beside_controls_baselines_and_its_reference(made):
    blind_twin = made.run.folder / "blind"
    sighted = evaluate(made.recipe, made.run, EvalRequest(blind=False), QUIET)
    assert not blind_twin.exists()
    report = evaluate(made.recipe, made.run, EvalRequest(), QUIET)
    rows = {row["name"]: row for row in report["conditions"]}
    dataset = made.dataset("val")
    known = [dataset.row(index) for index in range(len(dataset))]
    baselines = list(made.recipe.baselines(known, made.run.learned().medians))
    controls = ["pictures swapped", "first frame repeated"]
    if len(made.recipe.preprocess().views) > 1 and made.recipe.name == "vlm":
        controls.append("cameras shuffled")
    assert list(rows) == ["model", *controls, "time shuffled", "trained blind", *baselines]
    assert [row for row in rows.values() if row["name"] != "trained blind"] == sighted["conditions"]
    assert report["reference"] in baselines
    assert report["windows"] == len(dataset)
    check_metrics(made.recipe, rows, report["reference"])
    page = (made.run.folder / "eval" / "report.html").read_text()
    assert all(metric.title in page for metric in made.recipe.metrics)
    assert rows["constant median"][made.recipe.metrics[0].key] > 0


def check_metrics(recipe, rows: dict[str, dict], reference: str) -> None:
    """Every row has every metric; some are known; where the reference knows one, its share of itself is 1."""
    for metric in recipe.metrics:
        assert all(metric.key in row and f"{metric.key}_interval" in row for row in rows.values())
        if rows[reference][metric.key]:
            assert rows[reference][f"{metric.key}_of_reference"] == pytest.approx(1)
            expected = rows["model"][metric.key] / rows[reference][metric.key]
            assert rows["model"][f"{metric.key}_of_reference"] == pytest.approx(expected)
    shown = [metric for metric in recipe.metrics if metric.is_shown]
    assert any(rows[reference][metric.key] for metric in shown)


@drives(Mergeable)
def test_an_adapter_is_merged_with_parity_and_answers_as_before(made):
    parity = merge(made.adapting, made.adapter, MergeRequest(), QUIET)["parity"]
    assert parity["adapter_moves"] > 10 * parity["merged"]
    assert parity["merged"] <= parity["allowed"]
    assert (parity["changed_weights"], parity["choices_agree"]) == (0, 1)
    model = models.open_model(made.adapter.folder / "merged")
    merged = model.recipe_settings(recipe_class(model.card.recipe))
    preprocess, dataset = model.card.preprocess, made.dataset("val")
    rows = [dataset[index] for index in range(2)]
    adapted = made.adapting.load(preprocess, made.adapter.final)
    expected = made.adapting.predict(adapted, rows, preprocess)
    check_same_answers(merged.predict(merged.load(preprocess, model.folder), rows, preprocess), expected)
    assert subject_of_model(model).preprocess == preprocess


@drives(Mergeable)
def test_a_run_in_full_has_nothing_to_merge(made):
    with pytest.raises(UsageError, match="run r was tuned in full: nothing to merge, its weights are whole; use: omni"):
        merge(made.recipe, made.run, MergeRequest(), QUIET)
    assert not (made.run.folder / "merged").exists()


@drives(Exportable)
def test_it_is_exported_in_each_of_its_formats_once(made):
    for form in made.recipe.export_formats:
        result = export(made.recipe, made.run, ExportRequest(form), QUIET)
        folder = made.run.folder / "export" / form
        assert result["export"] == str(folder)
        assert runs.verified_folder(folder)
        check_programs(folder)
        before = stamps(folder)
        assert export(made.recipe, made.run, ExportRequest(form), QUIET) == result
        assert stamps(folder) == before
    formats = " or ".join(made.recipe.export_formats)
    with pytest.raises(UsageError, match=f"--format tflite: recipe {made.recipe.name} is exported as {formats}$"):
        export(made.recipe, made.run, ExportRequest("tflite"), QUIET)


def check_programs(folder: Path) -> None:
    """What a card of programs says is what onnxruntime finds."""
    card = folder / models.ONNX_CARD
    programs = read_json(card)["programs"] if card.is_file() else []
    assert len(programs) == len(list(folder.glob("*.onnx")))
    for program in programs:
        session = onnxruntime.InferenceSession(str(folder / program["file"]))
        assert {one.name: one.shape for one in session.get_inputs()} == program["inputs"]
        assert {one.name: one.shape for one in session.get_outputs()} == program["outputs"]


@drives(Inferable)
def test_infer_answers_what_eval_measures(made, tmp_path):
    dataset, preprocess = made.dataset("all"), made.run.manifest.preprocess
    rows = [dataset[index] for index in range(len(dataset))]
    built = made.recipe.load(preprocess, made.run.final)
    expected = made.recipe.predict(built, rows, preprocess)
    names = tuple(dict.fromkeys(row["recording"] for row in rows))
    request = InferRequest(names, data=made.data, out=tmp_path, constrained=False)  # as eval asks
    result = infer(made.recipe, subject_of_run(made.run), request, QUIET)
    lines = [line for clip in result["clips"] for line in clip["answers"]]
    for line, row in zip(lines, rows, strict=True):
        assert (line["clip"], line["start_us"], line["end_us"]) == (row["recording"], row["start_us"], row["end_us"])
        assert line["truth"]
    said = [contract.Prediction(line["text"], line["values"]) for line in lines]
    plain = made.recipe.plain
    check_same_answers(said, [contract.Prediction(one.text, one.values and plain(one.values)) for one in expected])


@drives(Inferable)
def test_without_training_the_base_answers_and_an_overlay_shows_it(made, tmp_path, capsys):
    name = open_shards(made.shards).manifest.recordings[0].id
    request = InferRequest((name,), data=made.data, out=tmp_path, overlay=True)
    (clip,) = infer(made.recipe, subject_of_base(made.recipe), request, Console())["clips"]
    assert f"warning: no training of ours: {made.recipe.model}, untrained: " in capsys.readouterr().err
    assert verified_receipt(tmp_path / f"{name}.jsonl", expect={"windows": clip["windows"]})
    assert verified_receipt(tmp_path / f"{name}.mp4")


@drives(Benchable)
def test_every_part_is_measured_on_its_own_data_and_run(made):
    export(made.recipe, made.run, ExportRequest("onnx"), QUIET)
    request = BenchRequest(None, made.data, made.run.folder.parent, "test", repeats=1)
    parts = bench(made.recipe, request, QUIET)["parts"]
    assert list(parts) == list(PARTS)
    assert str(made.data / "raw" / "synthetic") in parts["etl"]["on"]
    assert str(made.shards) in parts["loader"]["on"]
    assert parts["infer"]["on"].startswith(f"run {made.run.folder}")
    lines = [line for part in parts.values() for line in part["lines"].values()]
    assert all(line["median_s"] > 0 for line in lines)
    units = made.recipe.sample_units(made.dataset("train"))
    for part in ("train", "infer"):
        rates = next(iter(parts[part]["lines"].values()))["per_second"]
        assert units.keys() < rates.keys()


@drives(SelfTested)
def test_a_model_is_tried_on_its_own_windows_and_stays_as_it_was(made):
    built, dataset = made.adapting.build(made.recipe.preprocess()), made.dataset("train")
    modes = {name: number % 2 == 0 for number, (name, _) in enumerate(built.model.named_modules())}
    for name, module in built.model.named_modules():
        module.training = modes[name]
    state = torch.get_rng_state()
    assert made.adapting.self_test(built, dataset)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in built.model.named_modules()} == modes
    alone = made.adapting.train.model_copy(update={"batch_size": 1})
    assert made.adapting.model_copy(update={"train": alone}).self_test(built, dataset) == ""


@drives(Taught)
def test_a_recipe_that_learns_from_no_program_says_so(made):
    with pytest.raises(UsageError, match="its teacher is 'motion', and no program"):
        made.recipe.teacher_files()


# -- what holds for all


def test_every_recipe_and_every_capability_is_driven():
    assert set(MAKERS) == set(recipe_names())
    assert set(capabilities()) == DRIVEN
    assert all(claimed_by(protocol) for protocol in DRIVEN)


@pytest.mark.parametrize("name", MAKERS)
def test_what_a_recipe_cannot_do_is_one_line(name):
    recipe = MAKERS[name][0]("full")
    for protocol in capabilities():
        if name in claimed_by(protocol):
            assert require(recipe, protocol) is recipe
        else:
            with pytest.raises(
                UsageError, match=f"^recipe '{name}' is not {protocol.__name__.lower()}: it has no such"
            ):
                require(recipe, protocol)


def modules_below_the_recipes() -> list[Path]:
    root = Path(omni_cli.__file__).parent
    below = ("stages", "recipe", "samples", "models", "scores", "sources", "world", "formats", "scene")
    return [path for folder in below for path in sorted((root / folder).rglob("*.py"))]


def words_of(tree_: ast.AST) -> set[str]:
    """Names that code uses and strings that it holds, docstrings apart."""
    names = {node.id for node in ast.walk(tree_) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree_) if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in ast.walk(tree_) if isinstance(node, ast.ImportFrom) for alias in node.names}
    strings = {node.value for node in ast.walk(tree_) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return names | strings


def test_nothing_below_the_recipes_names_one():
    """An `if recipe ==` or an isinstance of a recipe's class would be where the seam leaks."""
    classes = {recipe_class(name).__name__ for name in recipe_names()}
    forbidden = classes | set(recipe_names())
    found = {
        path.name: sorted(words)
        for path in modules_below_the_recipes()
        if (words := words_of(ast.parse(path.read_text())) & forbidden)
    }
    assert found == {}
    leaky = "if recipe.name == 'vlm' or isinstance(recipe, Distill): pass"
    assert words_of(ast.parse(leaky)) & forbidden == {"vlm", "Distill"}
