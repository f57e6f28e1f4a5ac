"""A bad step moves no weight: what is found, and what follows."""

import json
import math
import os
import re
import signal
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from omni_cli.errors import OmniError, Preempted
from omni_cli.files import receipt_path
from omni_cli.recipe import TrainSettings
from omni_cli.recipes.distill import Distill
from omni_cli.recipes.vlm import Vlm
from omni_cli.report import Console
from omni_cli.stages import checkpoints, runs
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.train import TrainRequest, guards, train
from omni_cli.stages.train.guards import OVERFLOWS, BadStep, Finding, Guard
from omni_cli.stages.train.roll_back import _first_to_go, _why_not
from tests.support.bad_steps import night_recipe, spoilt, times
from tests.support.driving import tiny_student, write_drives
from tests.support.folders import tree
from tests.support.pipeline import QUIET, write_synthetic

NAN = float("nan")
SETTINGS = TrainSettings(spike_window=8)


def judge(guard: Guard, step: int, loss: float, norm: float = 1.0, labels: int = 5, **how) -> None:
    """One step of two micro-batches."""
    for part, window in ((0.25, 7), (0.75, 9)):
        guard.note(torch.tensor(loss * part), torch.tensor([window]), torch.tensor(labels))
    guard.judge(torch.tensor(norm), step, **how)


def first_bad(losses, settings=SETTINGS, norms=None, guard=None, start=1):
    """The first finding in a row of steps, None where all are good."""
    guard = guard or Guard(settings, {})
    for step, loss in enumerate(losses, start=start):
        try:
            judge(guard, step, loss, 1.0 if norms is None else norms[step - start])
        except BadStep as bad:
            return bad.found
    return None


@pytest.mark.parametrize("number", [NAN, math.inf, -math.inf])
def test_a_number_that_is_none_is_found_at_its_step_with_its_windows(number):
    found = first_bad([1.0, 1.0, number])
    assert (found.reason, found.said, found.since, found.windows) == ("loss", f"loss is {number} at step 3", 3, (7, 9))
    found = first_bad([1.0, 1.0], norms=[1.0, number])
    assert (found.reason, found.said) == ("gradient", f"the gradient's norm is {number} at step 2")


def test_a_gradient_that_float16_skips_is_bad_only_if_it_goes_on():
    guard = Guard(SETTINGS, {})
    for step in range(1, OVERFLOWS + 1):
        judge(guard, step, 1.0, math.inf, may_overflow=True)
        assert guard.is_skipped
    with pytest.raises(BadStep, match="norm is inf at step 21"):
        judge(guard, OVERFLOWS + 1, 1.0, math.inf, may_overflow=True)
    judge(guard, OVERFLOWS + 2, 1.0, may_overflow=True)
    assert not guard.is_skipped
    with pytest.raises(BadStep, match="loss is nan"):
        judge(guard, OVERFLOWS + 3, NAN, math.inf, may_overflow=True)


def test_a_gradient_of_zero_is_dead_after_three_labelled_steps_that_had_something_to_learn():
    guard = Guard(SETTINGS, {})
    for step, loss, labels in ((1, 2.0, 5), (2, 2.0, 5), (3, 0.0, 0), (4, 0.0, 0)):
        judge(guard, step, loss, 0.0, labels)
    with pytest.raises(BadStep, match="exactly zero at step 5, the 3rd in a row") as caught:
        judge(guard, 5, 2.0, 0.0)
    assert (caught.value.found.reason, caught.value.found.since) == ("dead", 1)
    assert first_bad([2.0] * 9, norms=[0.0, 0.0, 0.1] * 3) is None
    assert first_bad([0.0] * 9, norms=[0.0] * 9) is None  # nothing is left to learn


def spike_by_hand(losses, window=8, factor=3.0):
    """The rule as the docstring states it, with numpy over the whole past."""
    calm, high = [], 0
    for step, loss in enumerate(losses, start=1):
        recent = np.float64(calm[-window:])
        is_high = False
        if len(recent) == window:
            middle = np.median(recent)
            stray = np.median(np.abs(recent - middle))
            is_high = loss > middle + 10 * stray and loss > middle + (factor - 1) * abs(middle)
        high = high + 1 if is_high else 0
        calm += [] if is_high else [loss]
        if high == 3:
            return step
    return None


@pytest.mark.parametrize("seed", range(20))
def test_spikes_are_those_of_the_rule(seed):
    rng = np.random.default_rng(seed)
    losses = rng.choice([1.0, -1.0]) + 0.1 * rng.standard_normal(80)
    for at in rng.integers(8, 80, size=6):
        losses[at : at + rng.integers(1, 5)] += rng.choice([0.5, 1.9, 2.6, 40.0])
    losses = np.float32(losses).astype(float)
    found = first_bad(losses)
    assert (found and found.step) == spike_by_hand(losses)
    if found:
        assert (found.reason, found.since) == ("spike", found.step - 2)
        assert f"loss is {losses[found.step - 1]:.4g} at step {found.step}, the 3rd in a row above" in found.said
    assert first_bad(losses, TrainSettings(spike_window=0)) is None


@pytest.mark.parametrize("kind", ["falls", "noisy", "negative", "level"])
def test_losses_of_an_ordinary_training_are_no_spike(kind):
    """Falling from its start, with batches that differ tenfold, through zero as likelihoods do, or without change."""
    rng, steps = np.random.default_rng(7), np.arange(2000)
    of = {
        "falls": 7 * np.exp(-steps / 40) + 0.1 * rng.gamma(2, 1, 2000),
        "noisy": rng.lognormal(0, 1.0, 2000),
        "negative": 60 - steps / 10 + 8 * rng.standard_normal(2000),
        "level": np.ones(2000),
    }
    assert first_bad(of[kind], TrainSettings()) is None


def test_a_guard_that_goes_on_from_a_checkpoint_judges_as_one_that_was_never_stopped():
    losses = [1.0 + 0.01 * (step % 5) for step in range(20)] + [9.0, 9.5, 10.0]
    undisturbed = first_bad(losses)
    assert undisturbed.step == 23
    for stop in range(1, 23):
        before = Guard(SETTINGS, {})
        assert first_bad(losses[:stop], guard=before) is None
        resumed = Guard(SETTINGS, json.loads(json.dumps(before.facts)))
        assert first_bad(losses[stop:], guard=resumed, start=stop + 1) == undisturbed, stop
    assert median(before.facts["guard"]["recent_losses"]) < 2  # high losses are not what is usual


# -- what follows


@pytest.fixture(scope="module")
def vlm_shards(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("guards")
    write_synthetic(data, cameras=("camera_front_wide_120fov",))
    return Path(etl(short(), EtlRequest(data=data, workers=0), QUIET)["shards"])


def short(mode: str = "full", **changes) -> Vlm:
    return night_recipe(mode, **{"max_steps": 9, "save_steps": 3, "log_steps": 1, **changes})


def run_train(recipe, shards, folder, console=QUIET):
    return train(recipe, TrainRequest(shards, folder, folder, "r", "test"), console)


@pytest.fixture(scope="module")
def undisturbed(vlm_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_train(short(), vlm_shards, folder)
    return folder / "r"


def published(run_folder: Path):
    return tree(run_folder / "final"), receipt_path(run_folder / "final").read_bytes()


def events(run_folder: Path):
    return [(event["step"], event["reason"], event["to_step"]) for event in checkpoints.read_events(run_folder)]


def at(step: int):
    return lambda taken, batch, made: times(made, NAN) if taken == step else made


class Overflow(torch.autograd.Function):
    """A number whose gradient is none."""

    @staticmethod
    def forward(context, number):
        return number.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * math.inf


def overflow_at(step: int):
    def spoil(taken, batch, made):
        return type(made)(Overflow.apply(made.total), made.count) if taken == step else made

    return spoil


@pytest.mark.fault("F27")
@pytest.mark.parametrize(
    "fault",
    [
        (at(5), "loss is nan at step 5", "loss"),
        (overflow_at(5), "the gradient's norm is nan at step 5", "gradient"),
    ],
    ids=["loss", "gradient"],
)
def test_after_a_passing_fault_the_weights_are_those_of_an_undisturbed_run(
    vlm_shards, undisturbed, tmp_path, capsys, fault
):
    """Pain 4, its second half: a gradient that is none is seen before it moves a weight."""
    spoil, said, reason = fault
    with spoilt(spoil):
        result = run_train(short(), vlm_shards, tmp_path, Console())
    told = capsys.readouterr().err
    (line,) = [line for line in told.splitlines() if "going back" in line]
    assert line.startswith(f"warning: {said}, on ")
    assert line.endswith("; going back to the checkpoint of step 3")
    assert [(each["step"], each["reason"], each["to_step"]) for each in result["roll_backs"]] == [(5, reason, 3)]
    assert published(tmp_path / "r") == published(undisturbed)
    (event,) = checkpoints.read_events(tmp_path / "r")
    assert len(event["windows"]) == 2
    assert all(f"{window['recording']} at {window['start_us']} us" in line for window in event["windows"])


@pytest.mark.fault("F27")
def test_a_fault_in_one_of_two_micro_batches_changes_no_weight(vlm_shards, tmp_path):
    recipe = short(batch_size=1, accumulation=2)
    run_train(recipe, vlm_shards, tmp_path / "undisturbed")
    with spoilt(at(9)):  # the first of step 5
        run_train(recipe, vlm_shards, tmp_path)
    assert events(tmp_path / "r") == [(5, "loss", 3)]
    (event,) = checkpoints.read_events(tmp_path / "r")
    assert len(event["windows"]) == 2
    assert published(tmp_path / "r") == published(tmp_path / "undisturbed" / "r")


@pytest.mark.parametrize("log_steps", [1, 3])
def test_a_step_that_float16_skips_is_logged_without_its_gradient(vlm_shards, tmp_path, log_steps):
    """A scaler for the processor stands for a GPU's; step 3, which is saved, overflows."""
    scaler = torch.amp.GradScaler("cpu")
    with spoilt(overflow_at(3)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards.Guarded, "_get_grad_norm", judged_under(scaler))
        run_train(short(max_steps=3, log_steps=log_steps), vlm_shards, tmp_path)
    line = checkpoints.read_history(tmp_path / "r")[-1]
    assert line["step"] == 3
    assert "grad_norm" not in line
    assert math.isfinite(line["loss"])


def judged_under(scaler):
    judge_step = guards.Guarded._get_grad_norm

    def get_grad_norm(self, model, grad_norm=None):
        self.accelerator.scaler = scaler  # accelerate unscales by it where the step is taken: not here
        try:
            return judge_step(self, model, grad_norm)
        finally:
            self.accelerator.scaler = None

    return get_grad_norm


class CannotBegin(TrainerCallback):
    def on_train_begin(self, *_, **__):
        raise OSError("no reporter today")


def test_signals_are_given_back_where_a_reporter_cannot_begin(vlm_shards, tmp_path, monkeypatch):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr("omni_cli.stages.train.fit.reporting", lambda *_: nullcontext([CannotBegin()]))
    with pytest.raises(OSError, match="no reporter today"):
        run_train(short(), vlm_shards, tmp_path)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.fault("F27")
def test_a_student_goes_back_too(tmp_path):
    write_drives(tmp_path, clips_per_chunk=2, seconds=3.0)
    recipe = tiny_student(train={"max_steps": 4, "save_steps": 2, "validation_windows": 2})
    shards = Path(etl(recipe, EtlRequest(data=tmp_path, workers=0), QUIET)["shards"])
    run_train(recipe, shards, tmp_path / "undisturbed")
    with spoilt(at(3), Distill):
        run_train(recipe, shards, tmp_path / "here")
    assert events(tmp_path / "here" / "r") == [(3, "loss", 2)]
    assert published(tmp_path / "here" / "r") == published(tmp_path / "undisturbed" / "r")


@pytest.mark.fault("F27")
def test_a_fault_that_does_not_pass_ends_the_training_with_what_is_good(vlm_shards, tmp_path):
    """The same windows at the same step: once more, and no further; nor once more when it is run again."""
    line = (
        r"^run .*/r: loss is nan at step 5, on \S+ at \d+ us, \S+ at \d+ us; so it was when this step was taken "
        r"before: it does not pass by itself; .*checkpoints/checkpoint-3 is good; look at these windows with omni "
        r"audit, or train with a lower --set train\.learning_rate in a run of another name$"
    )
    with spoilt(lambda taken, batch, made: times(made, NAN if taken in (5, 7, 9) else 1.0)):  # step 5, each time
        for _ in range(2):
            with pytest.raises(OmniError, match=line):
                run_train(short(), vlm_shards, tmp_path)
    assert events(tmp_path / "r") == [(5, "loss", 3)]
    assert not (tmp_path / "r" / "final").exists()


def test_after_a_spike_training_goes_on_from_before_it_began(vlm_shards, undisturbed, tmp_path):
    """A checkpoint between its first step and the third, at which it is found, holds weights that it moved."""
    with spoilt(lambda taken, batch, made: times(made, 100.0 if taken in (5, 6, 7) else 1.0)):
        run_train(short(spike_window=4), vlm_shards, tmp_path)
    assert events(tmp_path / "r") == [(7, "spike", 3)]
    assert published(tmp_path / "r") == published(undisturbed)


@pytest.mark.parametrize(
    ("saved", "since", "kept"), [((3, 6), 5, [3]), ((6, 7), 5, [6]), ((3, 6), 8, [3, 6]), ((), 1, [])]
)
def test_the_oldest_checkpoint_is_never_given_up(tmp_path, saved, since, kept):
    for step in saved:
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoints.discard_from(tmp_path, _first_to_go(tmp_path, since))
    assert checkpoints.steps_saved(tmp_path) == kept


@pytest.mark.fault("F27")
def test_who_asks_for_it_is_stopped_at_once_and_may_change_his_mind(vlm_shards, undisturbed, tmp_path):
    with spoilt(at(5)), pytest.raises(OmniError, match=r"; train\.on_bad_step = stop; .*checkpoint-3 is good; "):
        run_train(short(on_bad_step="stop"), vlm_shards, tmp_path)
    assert [line["step"] for line in checkpoints.read_history(tmp_path / "r")] == [1, 2, 3, 4]
    with spoilt(at(1)):  # the settings that watch a training are not part of what its weights are
        run_train(short(), vlm_shards, tmp_path)
    assert events(tmp_path / "r") == [(4, "loss", 3)]
    assert tree(tmp_path / "r" / "final") == tree(undisturbed / "final")


@pytest.mark.parametrize(
    ("before", "changes", "refusal"),
    [
        ([], {}, None),
        ([(9, "loss", 6), (12, "gradient", 9)], {}, None),
        ([(12, "loss", 9)], {}, "it does not pass by itself"),
        ([(1, "spike", 0), (2, "loss", 0)], {}, None),
        ([(9, "loss", 6)] * 3, {}, r"gone back 3 times, train\.max_roll_backs is 3"),
        ([], {"max_roll_backs": 0}, r"gone back 0 times, train\.max_roll_backs is 0"),
        ([], {"on_bad_step": "stop"}, r"train\.on_bad_step = stop"),
    ],
)
def test_when_training_goes_back_and_when_no_more(before, changes, refusal):
    events = [{"event": "roll back", "step": step, "reason": why, "to_step": to} for step, why, to in before]
    found = Finding("loss", "loss is nan at step 12", 12, 12, (1,))
    said = _why_not(TrainSettings(**changes), found, 9, events)
    assert said is None if refusal is None else re.search(refusal, said)


def test_training_begins_anew_once():
    found, anew = Finding("loss", "", 3, 3, ()), [{"event": "roll back", "step": 1, "reason": "loss", "to_step": 0}]
    assert _why_not(TrainSettings(), found, 0, []) is None
    assert _why_not(TrainSettings(), found, 0, anew) == "training has begun anew once already"


def test_a_signal_is_not_lost_in_a_bad_step(vlm_shards, tmp_path):
    def spoil(taken, batch, made):
        if taken == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return at(5)(taken, batch, made)

    with (
        spoilt(spoil),
        pytest.raises(Preempted, match=r"^stopped at a bad step \(loss is nan at step 5\), unsaved; run the same"),
    ):
        run_train(short(), vlm_shards, tmp_path)
    run = runs.open_run(tmp_path / "r")
    assert checkpoints.find_start(run.folder / "checkpoints", run.manifest.key()).step == 3
    assert events(run.folder) == []
