"""A model that is cut over two ranks by FSDP2's `fully_shard` learns what it learns in one process.

Pain 18 of facts/vlm-finetuning.md (batches with and without pictures hang FSDP), with pains 11, 12 and 15.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omni_cli.errors import UsageError
from omni_cli.recipes.distill import Distill
from omni_cli.recipes.vlm import Vlm
from omni_cli.stages import runs
from omni_cli.stages.checkpoints import read_history
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.train import TrainRequest, train
from omni_cli.stages.train.cut_forecast import forecast_cut
from omni_cli.stages.train.sharding import check_sharding
from tests.support.cut import CASES, RATE, SPEEDS, built, case_recipe, cut_recipe, labels_of, stepped
from tests.support.pipeline import QUIET, write_synthetic
from tests.support.ranked import start_ranks
from tests.test_models import make_rows

NAMES = ["-".join((family, *(freeze or ("all",)), precision)) for family, freeze, precision in CASES]
EXACT = [number for number, case in enumerate(CASES) if case[2] == "float32"]


def ended(processes):
    for process in processes:
        process.wait(300)
    assert [process.returncode for process in processes] == [0] * len(processes), processes[0].stderr
    return processes


@pytest.fixture(scope="module")
def found(warm, tmp_path_factory):
    """What each of two ranks found in each case."""
    folder = tmp_path_factory.mktemp("cut")
    ended(start_ranks(warm, 2, "tests.support.cut", "cases", str(folder)))
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    """What one process finds in a case of float32, with all the rows."""
    held = {}

    def find(number):
        if number not in held:
            vlm = case_recipe(*CASES[number][:2], "float32", sharding="none")
            rows, model = make_rows(vlm, SPEEDS), built(vlm)
            before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
            held[number] = vlm, model, before, stepped(vlm, model, rows, 1 / labels_of(rows))
        return held[number]

    return find


def apart(ours, theirs):
    """The largest distance of two tensors of one name, as a share of its length."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


@pytest.mark.parametrize("number", EXACT, ids=[NAMES[number] for number in EXACT])
def test_two_ranks_take_the_step_of_one(found, alone, number) -> None:
    """Pain 18, 11: two windows here, one there, of other lengths: loss, gradients, norm and step are those of all."""
    _, model, _, (total, norm, gradients, optimizer) = alone(number)
    ours = found[0][number]
    assert float(ours["total"]) == pytest.approx(float(total), rel=1e-6)
    assert float(ours["norm"]) == pytest.approx(float(norm), rel=1e-6)
    assert apart(ours["gradients"], gradients) < 1e-6
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in weights.items():  # Adam divides by the gradient's size: by noise where it is nearly zero
        assert float((ours["weights"][name] - weight.detach()).abs().max()) <= 0.05 * RATE, name
    moments = {name: optimizer.state[weights[name]]["exp_avg"] for name in gradients}
    assert apart(ours["moments"], moments) < 1e-6


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_what_does_not_learn_beside_the_language_model_is_whole_on_every_rank(found, number) -> None:
    """Pain 18: a frozen tower is a plain tensor, in the type that is computed in; what learns is cut, in float32."""
    family, freeze, precision = CASES[number]
    vlm = case_recipe(family, freeze, precision, sharding="none")
    frozen = {name for name, each in built(vlm).named_parameters() if not each.requires_grad}
    for rank in (0, 1):
        ours = found[rank][number]
        assert ours["plain"] == frozen
        assert {ours["types"][name] for name in frozen} <= {f"torch.{precision}"}
        assert {kind for name, kind in ours["types"].items() if name not in frozen} == {"torch.float32"}
        assert ours["held"] == pytest.approx(ours["cut"] / 2, rel=0.01)
        assert found[rank][number]["weights"].keys() == (ours["weights"].keys() if rank == 0 else set())


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_what_each_of_two_ranks_holds_is_foreseen(found, number) -> None:
    """The plan's outline has one weight as embedding and head, where `built` makes two of them."""
    family, _, precision = CASES[number]
    vlm, bytes_each = case_recipe(*CASES[number]), getattr(torch, precision).itemsize
    memory = forecast_cut(vlm, vlm.preprocess(), 2)
    assert memory is not None
    model = vlm.outline(vlm.preprocess())
    embedding = model.get_input_embeddings().weight.numel()
    ours = found[0][number]
    second = embedding if family == "qwen2_5_vl" else 0
    assert memory.cut == 4 * (ours["cut"] - second)
    assert memory.weights - memory.whole == pytest.approx(4 * (ours["held"] - second / 2), rel=0.01)
    frozen = sum(weight.numel() for name, weight in model.named_parameters() if name in ours["plain"])
    assert memory.whole == frozen * bytes_each
    learning = sum(each.numel() for name, each in ours["gradients"].items()) - second
    assert (memory.of_gradients, memory.of_optimizer) == (4 * learning, 8 * learning)
    assert embedding * bytes_each <= memory.gathered <= memory.uncut // 4 * bytes_each


def test_a_step_that_bfloat16_would_round_away_is_kept(found, alone) -> None:
    """Computed in bfloat16, held in float32: nearly every weight moves by the rate of the first step of Adam."""
    number = next(number for number, case in enumerate(CASES) if case[2] == "bfloat16")
    _, _, before, (total, _, gradients, _) = alone(number)
    ours = found[0][number]
    assert float(ours["total"]) == pytest.approx(float(total), rel=1e-2)
    assert apart(ours["gradients"], gradients) < 0.2
    moved = torch.cat([(ours["weights"][name] - before[name]).flatten() for name in gradients])
    large = torch.cat([before[name].flatten() for name in gradients]).abs() > 0.1  # whose neighbours are 2^-11 away
    assert float((moved[large].abs() > 0.5 * RATE).double().mean()) > 0.9
    assert RATE < 2**-11 / 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("raw")
    write_synthetic(data)
    return Path(etl(cut_recipe(), EtlRequest(data=data, workers=0), QUIET)["shards"])


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def trained(warm, ranks, runs_folder, shards, name, **changes):
    words = ("train", str(runs_folder), str(shards), name, json.dumps(changes))
    return ended(start_ranks(warm, ranks, "tests.support.cut", *words))


@pytest.fixture(scope="module")
def pair(warm, runs_folder, shards):
    """Two ranks, trained as `omni train` does."""
    return trained(warm, 2, runs_folder, shards, "pair", publish="best")


def test_a_training_over_two_ranks_is_that_of_one_process(pair, runs_folder, shards) -> None:
    """Pain 15: also the names in the file, which transformers would write otherwise under FSDP2's class."""
    request = TrainRequest(shards, runs_folder, runs_folder, "one", "test")
    train(cut_recipe(sharding="none", publish="best"), request, QUIET)
    one, two = (read_history(runs_folder / name) for name in ("one", "pair"))
    for number in ("loss", "validation_loss", "grad_norm"):
        expected = [line[number] for line in one if number in line]
        assert len(expected) == (2 if number == "validation_loss" else 4)
        assert [line[number] for line in two if number in line] == pytest.approx(expected, rel=1e-4)
    for part in ("final", "checkpoints/checkpoint-2"):
        weights = [load_file(runs_folder / name / part / "model.safetensors") for name in ("pair", "one")]
        assert apart(*weights) < 1e-3
    assert (runs_folder / "pair" / "final" / "config.json").read_text() == (
        runs_folder / "one" / "final" / "config.json"
    ).read_text()


def test_it_is_said_what_nobody_has_tried(pair) -> None:
    assert "omni has not yet been run so on GPUs" in pair[0].stdout + pair[0].stderr
    assert "returned a view tensor" not in pair[0].stderr


def go_back(runs_folder, name):
    """Copy a finished run, as it was when step 2 was saved."""
    folder = shutil.copytree(runs_folder / "pair", runs_folder / name)
    for path in (*folder.glob("final*"), *folder.glob("checkpoints/checkpoint-4*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def test_it_goes_on_from_a_checkpoint_bit_for_bit(warm, pair, runs_folder, shards) -> None:
    """Pain 12: weights, optimiser and schedule are cut again from what was saved whole."""
    folder = go_back(runs_folder, "again")
    trained(warm, 2, runs_folder, shards, "again", publish="best")
    assert (folder / "final" / "model.safetensors").read_bytes() == (
        runs_folder / "pair" / "final" / "model.safetensors"
    ).read_bytes()


@pytest.mark.marathon
def test_it_goes_on_over_another_number_of_ranks(warm, pair, runs_folder, shards) -> None:
    """Pain 12: four ranks go on from what two have saved."""
    folder = go_back(runs_folder, "four")
    trained(warm, 4, runs_folder, shards, "four", publish="best")
    losses = [[line["loss"] for line in read_history(each)] for each in (folder, runs_folder / "pair")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tune": {"mode": "lora"}}, "is for tune.mode = full; adapters are small"),
        ({"tune": {"mode": "full"}, "precision": "float16"}, "does not go with precision = float16"),
        (
            {"tune": {"mode": "full"}, "optimizer": "paged_adamw_8bit"},
            "not known to work on parts of weights; take one",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(changes, said) -> None:
    settings = {"sharding": "fsdp2", "optimizer": changes.pop("optimizer", "adamw_torch")}
    with pytest.raises(ValueError, match=said):
        Vlm(model="tiny:qwen2_5_vl", train=settings, **changes)


def test_there_must_be_ranks_to_cut_over() -> None:
    with pytest.raises(UsageError, match="and there is one; start several: torchrun --nproc-per-node N -m -- omni_cli"):
        check_sharding(cut_recipe(), 1)
    with pytest.raises(UsageError, match="a model of recipe 'distill' is not cut"):
        check_sharding(Distill(train={"sharding": "fsdp2"}), 2)
    check_sharding(cut_recipe(), 2)
    check_sharding(cut_recipe(sharding="none"), 1)


def test_a_setting_without_effect_makes_no_other_run(pair, runs_folder) -> None:
    """A run of 0.6 knows nothing of `sharding`; one that is cut is another, since it learns in float32."""
    held = runs.open_run(runs_folder / "pair").manifest
    none = held.model_copy(update={"settings": cut_recipe(sharding="none").model_dump(mode="json")})
    older = none.model_copy(update={"settings": json.loads(json.dumps(none.settings))})
    del older.settings["train"]["sharding"]
    assert older.key() == none.key()
    cut = none.model_copy(update={"settings": cut_recipe().model_dump(mode="json")})
    assert cut.key() != none.key()
