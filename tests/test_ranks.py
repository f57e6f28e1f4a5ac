"""Training in several processes learns what one learns; what one of them meets, all decide on together."""

import shutil
from contextlib import nullcontext
from errno import ENOSPC
from itertools import chain
from math import ceil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.utils import _to_kwargs
from torch.utils.data import BatchSampler

from omni_cli.__main__ import _fail, run
from omni_cli.commands import VERBS
from omni_cli.errors import DataError, OmniError, UsageError, refused_by_machine
from omni_cli.recipes.vlm.settings import VlmTrain
from omni_cli.stages import runs
from omni_cli.stages.checkpoints import read_history
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.train import TrainRequest, train
from omni_cli.stages.train.order import Dealt
from omni_cli.stages.train.plan import _planned_hours, dry_run
from omni_cli.stages.train.ranks import Ranks, Share, _told, check_norms, share_of, through
from omni_cli.stages.train.roll_back import roll_backs
from omni_cli.stages.train.stage import _planned
from tests.support.driving import tiny_student, write_drives
from tests.support.pipeline import QUIET, write_synthetic
from tests.support.ranked import ranked_recipe, ranked_student, seen, train_ranked, windows_of

WINDOWS, PREEMPTED = 14, 75
FRONT = ("camera_front_wide_120fov",)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("ranks")
    write_synthetic(data, seconds=4.5, cameras=FRONT)
    made = etl(ranked_recipe(), EtlRequest(data=data, workers=0), QUIET)
    assert made["windows"]["train"] == WINDOWS
    return Path(made["shards"])


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(warm, shards, runs_folder) -> Path:
    """One process, undisturbed."""
    (process,) = train_ranked(warm, 1, runs_folder, shards, "alone")
    assert process.returncode == 0, process.stderr
    return runs_folder / "alone"


@pytest.fixture(scope="module")
def pair(warm, shards, runs_folder):
    """Two processes, undisturbed."""
    processes = train_ranked(warm, 2, runs_folder, shards, "pair")
    assert [process.returncode for process in processes] == [0, 0], processes[0].stderr + processes[1].stderr
    return processes


def same_losses(folder: Path, other: Path) -> bool:
    of_one, of_other = ([line["loss"] for line in read_history(each)] for each in (folder, other))
    return of_one == pytest.approx(of_other, rel=1e-4)


def check_first_gradients(folder: Path) -> None:
    ours = seen(folder, "alone", 0)["gradients"]
    assert ours
    for rank in (0, 1):
        theirs = seen(folder, "pair", rank)["gradients"]
        assert theirs.keys() == ours.keys()
        for name, gradient in theirs.items():
            assert (gradient - ours[name]).norm() <= 1e-6 * ours[name].norm(), name


def test_two_ranks_learn_what_one_learns(alone, pair, runs_folder) -> None:
    """Pain 18. Windows, first gradients, losses and validation are one's; in an epoch no window counts twice.

    An epoch ends with windows and pictures for one rank, none for the other: neither waits for ever.
    """
    expected, found = windows_of(runs_folder, "alone", 1), windows_of(runs_folder, "pair", 2)
    assert found == expected
    assert [len(found[step]) for step in (1, 2, 3, 4)] == [4, 4, 4, 2]
    assert sorted(chain(*(found[step] for step in (5, 6, 7, 8)))) == list(range(WINDOWS))
    assert seen(runs_folder, "pair", 1)["windows"][4] == []  # the other rank had all that was left
    check_first_gradients(runs_folder)
    assert same_losses(runs_folder / "pair", alone)
    last, same = read_history(runs_folder / "pair")[-1], read_history(alone)[-1]
    assert last["validation_loss"] == pytest.approx(same["validation_loss"], rel=1e-4)
    assert [last[name] for name in ("step", "samples", "tokens")] == [same[n] for n in ("step", "samples", "tokens")]
    assert runs.open_run(runs_folder / "pair").manifest.key() == runs.open_run(alone).manifest.key()


def test_the_first_rank_alone_talks_and_writes(pair, runs_folder) -> None:
    first, other = pair
    assert "2 processes take 1 x 2 windows each in a step, of 4 windows as with one process" in first.stderr
    assert (other.stdout, other.stderr) == ("", "")
    run = runs.open_finished(runs_folder / "pair")
    assert [line["step"] for line in read_history(run.folder)] == list(range(1, 21))
    telemetry = (run.folder / runs.TELEMETRY).read_text()
    assert telemetry.count('"opened"') == 1
    assert '"processes":2' in telemetry


def test_a_run_goes_on_with_another_number_of_ranks(warm, shards, alone, runs_folder) -> None:
    """Pain 12. Stopped in mid-epoch with one, with two after a loss that one of them alone saw, and ended with one."""
    (first,) = train_ranked(warm, 1, runs_folder, shards, "moved", faults={"term": [0, 6]})
    assert first.returncode == PREEMPTED, first.stderr
    steps = windows_of(runs_folder, "moved", 1)
    both = train_ranked(warm, 2, runs_folder, shards, "moved", faults={"nan": [1, 3], "term": [1, 3 + 7]})
    assert [process.returncode for process in both] == [PREEMPTED, PREEMPTED], both[0].stderr
    assert "going on at step 6 of 20" in both[0].stderr
    assert ["stopped at step 13 of 20, saved" in each.stderr for each in both] == [True, False]
    assert roll_backs(runs_folder / "moved") == [
        {"step": 9, "reason": "loss", "found": "loss is nan at step 9", "to_step": 6}
    ]
    steps |= windows_of(runs_folder, "moved", 2)
    (last,) = train_ranked(warm, 1, runs_folder, shards, "moved")
    assert last.returncode == 0, last.stderr
    assert steps | windows_of(runs_folder, "moved", 1) == windows_of(runs_folder, "alone", 1)
    assert same_losses(runs_folder / "moved", alone)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param({"kill": [1, 4]}, "error: process 0 of 2 lost another one", marks=pytest.mark.marathon),
        pytest.param({"full": [0, 1]}, "No space left on device", marks=pytest.mark.marathon),
        pytest.param({"full_at_once": [0, 1]}, "No space left on device", marks=pytest.mark.marathon),
    ],
)
def test_where_one_rank_ends_all_end(fault, said, warm, shards, tmp_path) -> None:
    """Also of a model that is cut, where the others still give their part of the optimiser's state."""
    cut = {"mode": "full", "sharding": "fsdp2"} if "full_at_once" in fault else {}
    first, other = train_ranked(warm, 2, tmp_path, shards, "r", faults=fault, save_steps=2, **cut)
    assert first.returncode == 1, first.stderr
    assert said in first.stderr
    assert other.returncode == (-9 if "kill" in fault else 1)
    assert "Traceback" not in other.stderr


@given(st.integers(1, 90), st.tuples(*[st.integers(1, 6)] * 2), st.integers(1, 8), st.integers(0, 3))
def test_each_step_takes_the_windows_of_one_rank(windows, step_of, count, epoch) -> None:
    """Every rank takes equally many micro-batches."""
    size, accumulation = step_of
    settings = VlmTrain(batch_size=size, accumulation=accumulation)
    if (size * accumulation) % count:
        with pytest.raises(UsageError, match=r"cannot share a step of \d x \d windows .* as divide \d+$"):
            share_of(settings, count)
        return
    share = share_of(settings, count)
    assert share.batch_size * share.accumulation * count == size * accumulation
    dealt = [Dealt(windows, 5, share, Ranks(index, count)) for index in range(count)]
    for each in dealt:
        each.set_epoch(epoch)
    taken = [list(each) for each in dealt]
    assert {len(each) for each in taken} == {len(dealt[0])}
    alone = Dealt(windows, 5, Share(size, accumulation), Ranks())
    alone.set_epoch(epoch)
    whole = list(BatchSampler(list(chain(*alone)), size * accumulation, drop_last=False))
    assert ceil(len(taken[0]) / share.accumulation) == len(whole)
    for step, expected in enumerate(whole):
        turns = [each[step * share.accumulation : (step + 1) * share.accumulation] for each in taken]
        found = [window for turn in turns for batch in turn for window in batch if window != windows]
        assert sorted(found) == sorted(expected)


class OnGpu(nn.Module):
    """Gives a module what DistributedDataParallel gives it on a GPU, in torch's own words."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        (given,), _ = _to_kwargs(inputs, {}, torch.device("cpu"), False)
        return self.module(*given)


def test_a_call_through_a_wrapper_leaves_the_module_as_it_was() -> None:
    """Whether forward is the module's own, or one that accelerate put there."""
    module, rows = nn.Linear(2, 2), torch.ones(1, 2)
    expected = module(rows)
    assert torch.equal(through(OnGpu(module), module, lambda whole: whole(rows)), expected)
    assert "forward" not in vars(module)
    module.forward = lambda given: nn.Linear.forward(module, given) + 1
    assert torch.equal(through(OnGpu(module), module, lambda whole: whole(rows)), expected + 1)
    with pytest.raises(ZeroDivisionError):
        through(OnGpu(module), module, lambda _: 1 / 0)
    assert torch.equal(module(rows), expected + 1)


@pytest.mark.marathon
def test_students_on_two_ranks_learn_what_one_learns(warm, tmp_path) -> None:
    """Another recipe, on transformers' own Trainer; a step's last micro-batches differ in size."""
    write_drives(tmp_path / "data", seconds=6.0)
    shards = Path(etl(ranked_student(), EtlRequest(tmp_path / "data", workers=0), QUIET)["shards"])
    for name, count in (("alone", 1), ("pair", 2)):
        processes = train_ranked(warm, count, tmp_path, shards, name, recipe="distill")
        assert [process.returncode for process in processes] == [0] * count, processes[0].stderr
    assert windows_of(tmp_path, "pair", 2) == windows_of(tmp_path, "alone", 1)
    check_first_gradients(tmp_path)
    assert same_losses(tmp_path / "pair", tmp_path / "alone")


@pytest.mark.marathon
def test_workers_and_smaller_batches_change_no_window(warm, shards, alone, tmp_path, runs_folder) -> None:
    """Workers read ahead; 4 x 1 windows are shared by smaller batches; two ranks go on for two."""
    how = {"batch_size": 4, "accumulation": 1, "workers": 1}
    stopped = train_ranked(warm, 2, tmp_path, shards, "r", faults={"term": [0, 6]}, **how)
    assert [process.returncode for process in stopped] == [PREEMPTED, PREEMPTED], stopped[0].stderr
    steps = windows_of(tmp_path, "r", 2)
    ended = train_ranked(warm, 2, tmp_path, shards, "r", **how)
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr
    assert steps | windows_of(tmp_path, "r", 2) == windows_of(runs_folder, "alone", 1)
    assert same_losses(tmp_path / "r", alone)


FULL = OSError(ENOSPC, "Full", "x")


def failing(error: Exception | None) -> None:
    if error:
        raise error


def outcome(ranks: Ranks, error: Exception | None) -> tuple[type[BaseException] | None, object]:
    try:
        with ranks.alike():
            failing(error)
    except SystemExit as end:
        return SystemExit, end.code
    except Exception as raised:
        return type(raised), str(raised)
    return None, ""


@pytest.mark.parametrize(
    ("errors", "ends"),
    [
        ((None, None), ((None, ""), (None, ""))),
        ((UsageError("a"), UsageError("b")), ((UsageError, "a"), (SystemExit, 2))),
        ((None, DataError("b")), ((DataError, "b"), (SystemExit, 3))),
        ((OmniError("a"), None), ((OmniError, "a"), (SystemExit, 1))),
        ((None, FULL), ((OmniError, refused_by_machine(FULL)), (SystemExit, 1))),
        ((None, KeyError("b")), ((SystemExit, 1), (KeyError, "'b'"))),
        ((DataError("a"), KeyError("b")), ((DataError, "a"), (KeyError, "'b'"))),
    ],
    ids=["none", "both", "other", "first", "disk", "bug", "bug-beside"],
)  # fmt: skip
def test_the_first_rank_says_what_any_met(errors, ends, monkeypatch) -> None:
    """Once, with its own exit code; a bug's traceback is shown where it is."""

    class Met(Ranks):
        def gather(self, value):
            assert value == told[self.index]
            return told

    told = [_told(error) for error in errors]
    monkeypatch.setattr(torch.distributed, "barrier", lambda group: None)
    for index in (0, 1):
        assert outcome(Met(index, 2), errors[index]) == ends[index]


@pytest.mark.parametrize(
    ("ranks", "says", "writes"), [("0 0", True, True), ("1 1", False, False), ("8 0", True, False)]
)
def test_wrong_usage_is_said_once_on_each_machine(ranks, says, writes, monkeypatch, capsys) -> None:
    """The processes are numbered over all machines, and on their own."""
    rank, local = ranks.split()
    for name, value in {"WORLD_SIZE": "16", "RANK": rank, "LOCAL_RANK": local}.items():
        monkeypatch.setenv(name, value)
    assert run(["train", "--profile", "none-such", "--json"]) == UsageError.exit_code
    said = capsys.readouterr()
    assert ("error: " in said.err, '"exit_code": 2' in said.out) == (says, writes)
    assert says or said.err == ""


def test_what_one_process_alone_says_is_said(monkeypatch, capsys) -> None:
    """That it lost another one, where that is the first: there is no line else."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert _fail("OmniError", "process 1 of 2 lost another one", 1, as_json=True) == 1
    assert capsys.readouterr() == ("", "error: process 1 of 2 lost another one\n")


@pytest.mark.parametrize(
    ("family", "mode", "is_refused"),
    [("resnet", "full", True), ("resnet", "lora", False), ("convnextv2", "full", False)],
)
def test_a_model_that_normalises_by_its_batch_is_refused_on_many_ranks(family, mode, is_refused) -> None:
    """Each rank would learn statistics of its own windows. In an adapter's base they stay as they are."""
    student = tiny_student(family, mode=mode)
    model = student.build(student.preprocess()).model.eval()
    check_norms(student, model, Ranks())
    with pytest.raises(UsageError, match=r"BatchNorm layers .* 2 would not stay") if is_refused else nullcontext():
        check_norms(student, model, Ranks(0, 2))
    assert not any(module.training for module in model.modules())


def test_a_dry_run_takes_the_pace_of_as_many_processes(pair, runs_folder, tmp_path) -> None:
    shutil.copytree(runs_folder / "pair", tmp_path / "pair")
    request = TrainRequest(None, tmp_path, tmp_path, "new", "test", dry_run=True)
    hours = [_planned_hours(ranked_recipe(), request, 20, count) for count in (1, 2, 4)]
    assert [isinstance(each, float) for each in hours] == [False, True, False]


def test_a_dry_run_plans_the_memory_of_one_of_the_processes(tmp_path) -> None:
    request = TrainRequest(None, tmp_path, tmp_path, "new", "test", dry_run=True)
    one, all_eight = (dry_run(ranked_recipe(batch_size=8, accumulation=1), request, QUIET, count) for count in (1, 8))
    assert all_eight["memory_gib"]["activations"] < one["memory_gib"]["activations"] / 2
    assert ("processes" in one, all_eight["processes"], all_eight["samples_per_step"]) == (False, 8, 8)
    assert all_eight["tokens_per_sample"] == one["tokens_per_sample"]


def test_a_dry_run_of_many_refuses_what_they_would_not_run(monkeypatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("RANK", "0")
    student = ranked_student(sharding="fsdp2")
    with pytest.raises(UsageError, match="a model of recipe 'distill' is not cut"):
        _planned(student, TrainRequest(None, Path(), Path(), "new", "test", dry_run=True), QUIET, Ranks(0, 2))


def test_processes_that_cannot_share_a_step_and_other_verbs_are_refused_in_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match=r"^WORLD_SIZE = 3 and no RANK: several processes are started by torchrun"):
        train(ranked_recipe(), TrainRequest(None, Path(), Path(), "r", "test"), QUIET)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    for wrong in ("3", "x", "-1"):
        monkeypatch.setenv("RANK", wrong)
        with pytest.raises(UsageError, match=rf"^RANK = '{wrong}' of WORLD_SIZE = 3: expected a number below it"):
            train(ranked_recipe(), TrainRequest(None, Path(), Path(), "r", "test"), QUIET)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match=r"^3 processes cannot share a step of 2 x 2 windows .* as divide 4$"):
        train(ranked_recipe(), TrainRequest(None, Path(), Path(), "r", "test"), QUIET)
    for verb in set(VERBS) - {"train", "doctor", "profiles"}:
        assert run([verb]) == UsageError.exit_code
        said = f"error: WORLD_SIZE = 3: only omni train runs in several processes; run omni {verb} by itself\n"
        assert capsys.readouterr().err == said
