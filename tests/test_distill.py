"""The `distill` recipe: kills change nothing, every label that counts is learned from, and no other."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omni_cli.commands._compose import compose_recipe
from omni_cli.errors import DataError, OmniError
from omni_cli.files import read_json, receipt_path
from omni_cli.models.driving_losses import plan_losses
from omni_cli.profiles import load_profile
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.model_frames import unpack_rgb
from omni_cli.samples.shards import MANIFEST_FILE, open_shards
from omni_cli.stages import checkpoints, runs
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.evaluate import EvalRequest, evaluate
from omni_cli.stages.train import TrainRequest, train
from tests.support.driving import KILL_STEPS, kill_recipe, tiny_student, work, write_drives, write_routes
from tests.support.folders import tree
from tests.support.pipeline import QUIET, make_run

MODES = ("full", "dora")
HEADS = "vision.heads."


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("drives")
    write_drives(data, clips_per_chunk=2, seconds=3.0)
    return data


@pytest.fixture(scope="module")
def shards(data) -> Path:
    return Path(etl(tiny_student(), EtlRequest(data=data, workers=0), QUIET)["shards"])


@pytest.fixture(scope="module")
def routes(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("routes")
    write_routes(data)
    return data


@pytest.fixture(scope="module", params=MODES)
def undisturbed(request, data, shards, tmp_path_factory) -> runs.Run:
    folder = tmp_path_factory.mktemp(request.param)
    work(request.param, data, shards, folder)
    return runs.open_finished(folder / "r")


def published(run: Path) -> dict:
    """How a run's weights came to be, and the hash of every file."""
    assert runs.verified_folder(run / runs.FINAL)
    return read_json(receipt_path(run / runs.FINAL))


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in checkpoints.read_history(run)]


def weights(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


# -- killed and run again


@pytest.fixture(scope="module")
def killed(data, shards, tmp_path_factory) -> Path:
    """An etl and two trainings, each killed as soon as something of it was done."""
    out = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.support.driving", str(data), str(shards), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_an_etl_that_was_killed_ends_with_the_same_bytes(killed, data, shards):
    assert not (killed / "etl" / MANIFEST_FILE).exists()
    assert list((killed / "etl").rglob("*.receipt.json"))
    work("etl", data, shards, killed / "etl")
    assert tree(killed / "etl") == tree(shards)


def test_a_training_that_was_killed_ends_with_the_same_weights_history_and_receipts(killed, undisturbed, data, shards):
    mode = undisturbed.manifest.settings["tune"]["mode"]
    run = killed / mode / "r"
    start = checkpoints.find_start(run / runs.CHECKPOINTS, undisturbed.manifest.key())
    assert not runs.open_run(run).is_done()
    assert start.step < KILL_STEPS
    work(mode, data, shards, killed / mode)
    assert published(run) == published(undisturbed.folder)
    assert losses(run) == losses(undisturbed.folder)
    assert len(losses(run)) == KILL_STEPS / 2


def test_killed_before_its_weights_were_published_a_run_publishes_the_same(undisturbed, data, shards):
    expected, run = published(undisturbed.folder), undisturbed.folder
    receipt_path(undisturbed.final).unlink()
    for path in undisturbed.final.iterdir():
        path.write_bytes(b"")
    work(undisturbed.manifest.settings["tune"]["mode"], data, shards, run.parent)
    assert published(run) == expected


# -- what is learned


def test_only_what_has_labels_learns(undisturbed):
    """The car's own motion tells of no lane: those heads stay as they were drawn, and bear no adapter."""
    recipe = kill_recipe(undisturbed.manifest.settings["tune"]["mode"])
    learned = weights(undisturbed.final)
    if recipe.tune.mode == "full":
        before = recipe._base().state_dict()
        assert learned.keys() == before.keys()
        still = {name for name, value in learned.items() if torch.equal(value, before[name])}
        assert still == {name for name in learned if name.startswith(HEADS)}
    else:
        assert not any("heads" in name for name in learned)
        assert any("backbone" in name for name in learned)
        assert any("policy.memory" in name for name in learned)


def test_the_cars_own_model_teaches_the_heads_too(routes, tmp_path):
    recipe = tiny_student(cameras="qcamera", sample={"teacher": "log"})
    made = make_run(tmp_path, recipe, data=routes)
    learned, before = weights(made.run.final), recipe._base().state_dict()
    assert not [name for name in learned if torch.equal(learned[name], before[name])]
    rows = [WindowDataset(open_shards(made.shards), "val").row(0)]
    assert rows[0]["scene_is_known"].tolist() == [1] * 4
    report = evaluate(recipe, made.run, EvalRequest(blind=False), QUIET)
    by_name = {row["name"]: row for row in report["conditions"]}
    assert by_name["model"]["lane_l1"] > by_name["teacher"]["lane_l1"] == 0
    assert by_name["model"]["lane_l1_of_reference"] is None  # a car that keeps its speed knows no lanes
    for horizon in ("2s", "5s"):
        assert by_name["model"][f"teacher_ade_{horizon}"] > by_name["teacher"][f"teacher_ade_{horizon}"] == 0
    assert by_name["constant median"]["lane_l1"] > 0
    check_scales(by_name, recipe, made)


def check_scales(by_name: dict[str, dict], recipe, made) -> None:
    """The mean scale is one of what the student says where it is measured; what states none is not scored."""
    dataset = WindowDataset(open_shards(made.shards), "val")
    rows = [dataset[index] for index in range(len(dataset))]
    preprocess = recipe.preprocess()
    said = recipe.predict(recipe.load(preprocess, made.run.final), rows, preprocess)
    scales = np.concatenate([one.values["scale_m"][recipe.train.warmup_steps :] for one in said])
    assert scales.min() < by_name["model"]["scale_m"] < scales.max()
    assert by_name["model"]["inside_50"] < by_name["model"]["inside_90"] <= 1
    assert by_name["constant velocity"]["scale_m"] is None


def test_accumulated_small_batches_learn_as_one_large_batch(routes, tmp_path):
    """Windows have 2 and 3 steps that count: a mean of means would differ. No layer mixes rows here."""
    base = tiny_student("dinov2", cameras="qcamera", sample={"require_calibrated": True})
    cut = Path(etl(base, EtlRequest(data=routes, out=tmp_path / "s", workers=0), QUIET)["shards"])
    dataset = WindowDataset(open_shards(cut), "train")
    batch = base.collate([dataset[index] for index in range(len(dataset))], base.preprocess())
    assert (batch["labels"] > 0).sum(dim=1).tolist() == [2, 3]
    with torch.no_grad():
        loss = base.loss(base.build(base.preprocess()).model, batch, base.preprocess())
    final = {}
    for name, size, accumulation in (("one", 2, 1), ("two", 1, 2)):
        steps = {"batch_size": size, "accumulation": accumulation, "optimizer": "sgd", "learning_rate": 1e-3}
        recipe = tiny_student(
            "dinov2", cameras="qcamera", sample={"require_calibrated": True}, train={**steps, "log_steps": 1}
        )
        train(recipe, TrainRequest(cut, routes, tmp_path, name, "test"), QUIET)
        assert losses(tmp_path / name)[0] == pytest.approx(float(loss.total / loss.count), rel=1e-5)
        final[name] = weights(tmp_path / name / runs.FINAL)
    before = base._base().state_dict()
    for name, value in final["one"].items():
        torch.testing.assert_close(final["two"][name], value, atol=2e-6, rtol=1e-5)
    moved = {name for name, value in final["one"].items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if not name.startswith(HEADS)}


def test_a_batch_in_which_no_step_counts_teaches_nothing_and_stops_nothing(tmp_path):
    """The car's own model spoke of one frame in 24: in two windows of three that is in the warm-up."""
    write_routes(tmp_path / "data", models_every=24, models_from=4)

    def student(**changes):
        steps = {"batch_size": 1, "max_steps": 6, "log_steps": 1, "learning_rate": 1e-3, **changes}
        return tiny_student(cameras="qcamera", sample={"teacher": "log"}, train=steps)

    def refused(recipe, name: str, message: str) -> None:
        with pytest.raises(
            DataError, match=f"{message} that counts; .*make other shards with omni etl, with fewer fil"
        ):
            train(recipe, TrainRequest(made.shards, tmp_path, tmp_path, name, "test"), QUIET)

    made = make_run(tmp_path, student(), data=tmp_path / "data")
    found = losses(made.run.folder)
    assert found.count(0.0) == 4
    assert found[0] == 0.0
    assert np.isfinite(found).all()
    refused(student(max_steps=1), "r1", "r1: none of the 1 steps met a label")
    refused(student(warmup_steps=3), "r2", "none of its 3 windows has a label")
    assert not (tmp_path / "r2" / runs.RUN_FILE).exists()  # before anything was begun


SHAPES = {"base": (87.7e6, 93e6), "tiny": (27.9e6, 33e6)}  # weights of ConvNeXt V2, and of it with all that is ours


@pytest.mark.parametrize("profile", ["mi300x-bf16", "mi300x-4bit", "h200-bf16", "rtx4090-4bit", "dgx-spark"])
def test_the_plan_of_a_gpu_needs_no_network(profile, tmp_path, monkeypatch):
    """What is loaded does."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    recipe = compose_recipe("distill", load_profile(profile)).value
    plan = train(recipe, TrainRequest(None, tmp_path, tmp_path, None, profile, dry_run=True), QUIET)
    least, most = next(shape for size, shape in SHAPES.items() if size in recipe.model)
    assert least < plan["trainable_parameters"] < plan["parameters"] < most
    with pytest.raises(OmniError, match="cannot read the configuration of backbone 'facebook/convnextv2-"):
        recipe.build(recipe.preprocess())


# -- which steps count

STEPS, WARMUP, UNCOUNTED = 5, 1, 3


def taught_by_a_log(**changes):
    """A recipe with every loss; rows of five steps, the first for the memory alone."""
    return tiny_student(sample={"teacher": "log", "window": STEPS + 1}, train={"warmup_steps": WARMUP, **changes})


def labelled_row(seed: int) -> dict:
    """A window of noise with every label; its fourth step does not count."""
    numbers = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers).flatten()

    counts = torch.ones(STEPS, dtype=torch.int32)
    counts[UNCOUNTED] = 0
    return {
        "pictures": torch.randint(0, 256, (STEPS + 1, 2, 6, 128, 256), dtype=torch.uint8, generator=numbers),
        "desire_pulse": torch.randint(0, 8, (STEPS,), generator=numbers),
        "left_hand_traffic": seed % 2,
        "counts": counts,
        "target_xy_m": 20 * normal(STEPS, 33, 2),
        "target_points": torch.tensor([33, 12, 33, 33, 1], dtype=torch.int32),
        "scene_is_known": torch.ones(STEPS, dtype=torch.int32),
        "scene_lane_lines_m": normal(STEPS, 4, 33, 2),
        "scene_lane_line_prob": torch.rand(STEPS * 4, generator=numbers),
        "scene_road_edges_m": normal(STEPS, 2, 33, 2),
        "scene_lead": normal(STEPS, 3, 4),
        "scene_lead_prob": torch.rand(STEPS * 3, generator=numbers),
    }


def changed(row: dict, step: int, value: float) -> dict:
    """The row with every label of one step replaced."""
    labels = {}
    for name in [name for name in row if name.startswith(("target_xy", "scene_")) and name != "scene_is_known"]:
        labels[name] = row[name].clone().view(STEPS, -1)
        labels[name][step] = value
    return {**row, **{name: label.flatten() for name, label in labels.items()}}


@pytest.fixture(scope="module")
def student():
    recipe = taught_by_a_log()
    return recipe, recipe.build(recipe.preprocess()).model.eval()


def loss_and_gradients(student, rows) -> tuple[Tensor, Tensor]:
    recipe, model = student
    loss = recipe.loss(model, recipe.collate(rows, recipe.preprocess()), recipe.preprocess())
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(loss.total, learning)
    return loss.total.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def test_labels_of_the_warm_up_and_of_steps_that_do_not_count_never_reach_the_loss(student):
    rows = [labelled_row(1), labelled_row(2)]
    total, gradients = loss_and_gradients(student, rows)
    for step in (0, UNCOUNTED):
        for value in (1e4, torch.nan):
            found, moved = loss_and_gradients(student, [changed(rows[0], step, value), rows[1]])
            assert torch.equal(found, total)
            assert torch.equal(moved, gradients)
    for step in (1, 2, 4):
        assert not torch.equal(loss_and_gradients(student, [changed(rows[0], step, 3.0), rows[1]])[0], total)


def test_points_past_the_end_of_a_path_never_reach_the_loss(student):
    row = labelled_row(1)
    path = row["target_xy_m"].clone().view(STEPS, 33, 2)
    path[1, 12:], path[4, 1:] = 1e4, torch.nan
    total, _ = loss_and_gradients(student, [row])
    assert torch.equal(loss_and_gradients(student, [{**row, "target_xy_m": path.flatten()}])[0], total)


def test_the_loss_is_the_weighted_sum_of_its_parts_over_the_steps_that_count(student):
    recipe, model = student
    row = labelled_row(1)
    batch = recipe.collate([row], recipe.preprocess())
    with torch.no_grad():
        loss = recipe.loss(model, batch, recipe.preprocess())
        _, plans = model(batch["pictures"], batch["desire_pulse"], batch["traffic_convention"])
    counted = [1, 2, 4]
    assert loss.count == len(counted)
    assert batch["labels"].tolist() == [[-100, 1, 1, -100, 1]]
    mine = plan_losses(
        type(plans)(*(part[counted] for part in plans)),
        row["target_xy_m"].view(STEPS, 33, 2)[counted],
        row["target_points"][counted],
    )
    torch.testing.assert_close(loss.parts["plan"], mine["plan"].total)
    scene = sum(value for name, value in loss.parts.items() if not name.startswith("plan"))
    weighed = loss.parts["plan"] + recipe.train.choice_weight * loss.parts["plan_choice"]
    torch.testing.assert_close(loss.total, weighed + recipe.train.scene_weight * scene)


def test_pictures_of_the_warm_up_are_remembered(student):
    """What was seen at the first step changes no later look, and every later plan."""
    recipe, model = student
    rows = [labelled_row(1), labelled_row(1)]
    rows[1]["pictures"] = rows[1]["pictures"].clone()
    rows[1]["pictures"][0] //= 2
    batch = recipe.collate(rows, recipe.preprocess())
    with torch.no_grad():
        seen, plans = model(batch["pictures"], batch["desire_pulse"], batch["traffic_convention"])
    features, means = seen.features.view(2, STEPS, -1), plans.mean_m.view(2, STEPS, -1)
    assert not torch.equal(features[0, 0], features[1, 0])
    torch.testing.assert_close(features[0, 1:], features[1, 1:], atol=1e-6, rtol=0)
    assert (means[0] - means[1]).abs().amax(dim=1).min() > 1e-4


def test_a_blind_twin_sees_mid_grey_whatever_there_is(student):
    sighted, model = student
    blind = taught_by_a_log(blind=True)
    planes = torch.tensor([126, 126, 126, 126, 128, 128], dtype=torch.uint8).view(6, 1, 1)
    grey = planes.expand(6, 128, 256).contiguous()
    shown = unpack_rgb(grey.numpy())
    assert shown.min() == shown.max() == 128  # of 255, in each colour
    rows, preprocess = [labelled_row(1), labelled_row(2)], sighted.preprocess()
    covered = [{**row, "pictures": grey.expand_as(row["pictures"])} for row in rows]
    batches = [sighted.collate(some, preprocess) for some in (rows, covered)]
    with torch.no_grad():
        found = [blind.outputs(model, batch, preprocess) for batch in batches]
        expected = sighted.outputs(model, batches[1], preprocess)
        seeing = sighted.outputs(model, batches[0], preprocess)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], expected)
    assert not torch.equal(found[0], seeing)
