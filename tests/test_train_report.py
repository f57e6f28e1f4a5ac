"""What a training leaves for people: its pace, its report, its curves elsewhere; and that none of it moves a weight."""

import json
import os
import re
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from typer.testing import CliRunner

from omni_cli.commands import app
from omni_cli.commands._options import names_in
from omni_cli.errors import OmniError, Preempted, UsageError
from omni_cli.report import Console
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.shards import open_shards
from omni_cli.stages import checkpoints, runs
from omni_cli.stages.audit.artefacts import read_receipts, size_findings, stray_findings
from omni_cli.stages.etl import EtlRequest, ensure_sidecar, etl
from omni_cli.stages.train import TrainRequest, guards, pace, report, reporters, train
from omni_cli.stages.train import telemetry as train_telemetry
from omni_cli.stages.train.curves import telemetry_picture
from omni_cli.stages.train.telemetry import read_telemetry
from tests.support.bad_steps import spoilt
from tests.support.pipeline import QUIET, kill_recipe, tiny_recipe, write_synthetic
from tests.support.trackers import stand_in_wandb

STEPS = 12
NAME = "a <script>alert(1)</script> run"
RECIPE = kill_recipe("qwen2_5_vl", "lora", "cosine", STEPS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_synthetic(folder)
    return folder


@pytest.fixture(scope="module")
def shards(data):
    return Path(etl(tiny_recipe(), EtlRequest(data=data, name="s", workers=0), QUIET)["shards"])


def request(shards: Path, folder: Path, **changes) -> TrainRequest:
    return replace(TrainRequest(shards, folder, folder, NAME.replace("/", "|"), "t"), **changes)


def lose_the_end(run_folder: Path) -> None:
    """Leave a run as a kill does that came late: no weights, not the newest checkpoint, half a line of telemetry."""
    for path in run_folder.glob("final*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in run_folder.glob(f"checkpoints/checkpoint-{STEPS}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with (run_folder / runs.TELEMETRY).open("a") as stream:
        stream.write('{"elapsed_s": 12')


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, shards):
    """A run that was killed after its last step and trained again, with its curves in TensorBoard; and what it was."""
    folder = tmp_path_factory.mktemp("resumed")
    asked = request(shards, folder, report_to=("tensorboard",))
    run = runs.open_run(Path(train(RECIPE, asked, QUIET)["run"]))
    first = checkpoints.read_history(run.folder), (run.folder / "final.receipt.json").read_bytes()
    lose_the_end(run.folder)
    train(RECIPE, asked, QUIET)
    return run, first


def test_the_history_tells_pace_and_peak_and_goes_on_after_a_resume(resumed) -> None:
    """Pain 12: what was learned goes on bit for bit, and what it took goes on too."""
    run, (before, receipt) = resumed
    history = checkpoints.read_history(run.folder)
    exact = ("step", "loss", "learning_rate", "grad_norm", "samples", "tokens")
    assert [[line[key] for key in exact] for line in history] == [[line[key] for key in exact] for line in before]
    assert (run.folder / "final.receipt.json").read_bytes() == receipt
    assert history[-1]["elapsed_s"] > before[-1]["elapsed_s"]  # what the kill lost was paid for
    assert all(line["samples_per_s"] > 0 and 0 <= line["data_wait_share"] <= 1 for line in history)
    assert all(line["peak_memory_bytes"] > 50 << 20 for line in history)
    assert history[-1]["samples"] == STEPS * RECIPE.train.batch_size


def test_every_token_of_every_window_is_counted_once_an_epoch(tmp_path, data, shards) -> None:
    """Whether rows are padded or packed: against the lengths in the sidecar."""
    opened = open_shards(shards)
    windows = WindowDataset(opened, "train", ensure_sidecar(opened, RECIPE, QUIET))
    steps = -(-len(windows) // RECIPE.train.batch_size)
    settings = RECIPE.train.model_copy(update={"max_steps": steps, "log_steps": 1})
    folder = Path(train(RECIPE.model_copy(update={"train": settings}), request(shards, tmp_path), QUIET)["run"])
    last = checkpoints.read_history(folder)[-1]
    assert (last["samples"], last["tokens"]) == (len(windows), sum(windows.token_lengths()))


def test_waiting_is_what_the_loop_waits_for_the_loader(monkeypatch) -> None:
    clock = {"s": 0.0}
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock["s"])

    def loader():
        for _ in range(4):
            clock["s"] += 1.0  # to read
            yield {guards.WINDOWS: [0, 1]}

    measured, batches = pace.Pace(), loader()
    for _ in range(4):
        measured.begin()
        measured.count([next(measured.waited(batches))])
        clock["s"] += 9.0  # to learn
    measured.stop()
    clock["s"] += 1000.0  # to save
    speed, counted = measured.lap()
    assert speed == {"samples_per_s": 0.2, "data_wait_share": 0.1}
    assert counted == {"samples": 8}


def test_the_report_tells_the_run_and_nothing_of_the_machines_folders(resumed, shards) -> None:
    run, _ = resumed
    page, text = ((run.folder / name).read_text() for name in (runs.REPORT_PAGE, runs.REPORT))
    for shown in (page, text):
        assert str(run.folder.parent) not in shown
        assert str(shards.parent) not in shown
        assert "<script" not in shown
        for word in ("tiny:qwen2", "7,168 of 1,427,840", "lora", "made by omni, free to use", "went on at step 9"):
            assert word in shown, word
        assert f"{STEPS * 2}" in shown
        assert "energy, all sessions" in shown
    assert not re.search(r"(src|href)=.?(?!data:)\w+:", page)  # it needs no other file and no net
    assert page.count("data:image/png;base64,") == 1
    assert "&lt;script&gt;" in page
    with Image.open(run.folder / runs.TELEMETRY_PICTURE) as picture:
        assert picture.size == (1705, 924)


def test_telemetry_counts_both_sessions_and_the_steps_that_were_lost(resumed) -> None:
    run, _ = resumed
    lines = read_telemetry(run.folder / runs.TELEMETRY)
    assert [(line["session"], line["step"]) for line in lines if "opened" in line] == [(1, 0), (2, 9)]
    assert report.steps_taken(lines) == STEPS + 3
    elapsed_s = [line["elapsed_s"] for line in lines]
    assert elapsed_s == sorted(elapsed_s)


def test_a_report_is_written_again_from_what_is_there(resumed, tmp_path) -> None:
    run, _ = resumed
    copied = runs.Run(tmp_path / "copied", run.manifest)
    shutil.copytree(run.folder, copied.folder)
    for name in (runs.TELEMETRY, runs.REPORT, runs.REPORT_PAGE, runs.TELEMETRY_PICTURE):
        (copied.folder / name).unlink()
    page = report.write_report(copied).read_text()
    assert "load, memory over time, power and energy were not measured" in page
    before = (copied.folder / runs.REPORT_PAGE).read_bytes()
    assert report.write_report(copied).read_bytes() == before


def test_a_finished_run_gets_the_report_that_it_lacks_and_keeps_the_one_it_has(resumed, shards) -> None:
    run, _ = resumed
    page = run.folder / runs.REPORT_PAGE
    page.unlink()
    train(RECIPE, request(shards, run.folder.parent), QUIET)
    written_ns = page.stat().st_mtime_ns
    train(RECIPE, request(shards, run.folder.parent), QUIET)
    assert page.stat().st_mtime_ns == written_ns


def test_what_the_weights_are_does_not_depend_on_what_watches_them(tmp_path, shards, resumed, monkeypatch) -> None:
    run, (_, receipt) = resumed
    monkeypatch.setattr(train_telemetry, "INTERVAL_S", 0.001)
    train(RECIPE, request(shards, tmp_path), QUIET)
    assert (tmp_path / run.name / "final.receipt.json").read_bytes() == receipt
    lines = read_telemetry(tmp_path / run.name / runs.TELEMETRY)
    assert len(lines) > 2 * len(read_telemetry(run.folder / runs.TELEMETRY))


def test_tensorboards_curves_are_those_of_the_history_also_after_a_resume(resumed) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = resumed
    history = checkpoints.read_history(run.folder)
    curves = EventAccumulator(str(run.folder / runs.TENSORBOARD)).Reload()
    for name in ("loss", "learning_rate", "grad_norm", "validation_loss", "data_wait_share"):
        told = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in history if name in line]
        assert [(event.step, event.value) for event in curves.Scalars(f"train/{name}")] == told
        assert told


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tensorbord", "--report-to tensorbord: no such reporter; did you mean 'tensorboard'?"),
        ("trackio", "--report-to trackio: trackio is not installed; install it with: pip install trackio"),
        ("comet_ml", "comet-ml is not installed; install it with: pip install comet-ml"),
    ],
)
def test_a_reporter_that_is_unknown_or_absent_costs_one_line(tmp_path, shards, name, said) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        train(RECIPE, request(shards, tmp_path, report_to=(name,)), QUIET)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    with stand_in_wandb(tmp_path / "site", monkeypatch) as told:
        yield told


@pytest.mark.parametrize(
    ("key", "error"),
    [
        ("", UsageError("No API key configured. Use `wandb login` to log in")),
        ("unheard", OmniError("Timed out: no such host")),
    ],
)
@pytest.mark.usefixtures("wandb")
def test_a_reporter_that_lets_nobody_in_costs_one_line(tmp_path, shards, monkeypatch, key, error) -> None:
    """Before the model is built."""
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr(type(RECIPE), "build", lambda *_: pytest.fail("the model was built"))
    with pytest.raises(type(error)) as refused:
        train(RECIPE, request(shards, tmp_path, report_to=("wandb",)), QUIET)
    assert (
        str(refused.value) == f"--report-to wandb: {error}; to keep its curves on this machine set WANDB_MODE=offline"
    )


def test_a_session_is_opened_once_and_ended_and_says_nothing_on_stdout(
    tmp_path, shards, wandb, monkeypatch, capfd
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "known")
    run = train(RECIPE, request(shards, tmp_path, report_to=("wandb",)), QUIET)["run"]
    first, *lines, last = [json.loads(line) for line in wandb.read_text().splitlines()]
    assert (first, last) == ({"project": "huggingface", "name": Path(run).name}, {"finished": 0})
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses == [line["loss"] for line in checkpoints.read_history(Path(run))]
    said = capfd.readouterr()
    assert (said.out, "wandb: hello" in said.err, "wandb: goodbye" in said.err) == ("", True, True)


@pytest.mark.parametrize(
    "case",
    [
        ("WANDB_BROKEN", "its session did not end well; last curves may be lost: service is gone"),
        ("WANDB_UPLOADS_S", "its session did not end within 0.1 s; last curves may be lost"),
    ],
)
@pytest.mark.usefixtures("wandb")
def test_a_session_that_does_not_end_hides_nothing(tmp_path, shards, monkeypatch, capsys, case) -> None:
    """Neither that a signal came and all is saved, nor that the training is done."""
    variable, said = case
    monkeypatch.setattr(reporters, "_PATIENCE_S", 0.1)
    monkeypatch.setenv("WANDB_API_KEY", "known")
    monkeypatch.setenv(variable, "3")

    def send(number, batch, made):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return made

    with spoilt(send), pytest.raises(Preempted):
        train(RECIPE, request(shards, tmp_path, report_to=("wandb",)), Console())
    assert f"--report-to wandb: {said}" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_UPLOADS_S", "0")
    run = Path(train(RECIPE, request(shards, tmp_path, report_to=("wandb",)), Console())["run"])
    assert runs.open_run(run).is_done()
    told = (tmp_path / "site" / "wandb" / "told.jsonl").read_text().splitlines()
    ends = [json.loads(line).get("finished") for line in told]
    assert [each for each in ends if each is not None] == [1, 0]


class Comet:
    """A stand-in for the package, as far as a session is opened and ended."""

    ExperimentConfig, exceptions = dict, SimpleNamespace(CometException=RuntimeError)

    def __init__(self) -> None:
        self.modes: list[str | None] = []

    def start(self, mode, experiment_config):
        self.modes.append(mode)
        return SimpleNamespace(alive=True, end=lambda: None)


@pytest.mark.parametrize(
    ("asked", "ours", "callbacks"), [(None, None, None), ("get", "get", "get"), ("Create", "create", "get_or_create")]
)
def test_comet_is_asked_for_one_experiment(tmp_path, monkeypatch, asked, ours, callbacks) -> None:
    """What the callback asks for is what is open already, also where a new one was wanted."""
    comet = Comet()
    monkeypatch.setattr(reporters, "import_module", lambda _: comet)
    monkeypatch.delenv("COMET_MODE", raising=False)
    if asked:
        monkeypatch.setenv("COMET_MODE", asked)
    with reporters._session("comet_ml", SimpleNamespace(name="r"), QUIET):
        assert os.environ.get("COMET_MODE") == callbacks
    assert (comet.modes, os.environ.get("COMET_MODE")) == ([ours], asked)


def test_comet_cannot_be_asked_to_report_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reporters, "import_module", lambda _: Comet())
    monkeypatch.setenv("COMET_MODE", "disabled")
    with (
        pytest.raises(UsageError, match="COMET_MODE is 'disabled', expected one of get, get_or_create, create"),
        reporters._session("comet_ml", SimpleNamespace(name="r"), QUIET),
    ):
        pytest.fail("a session was opened")


def test_reporters_are_named_with_commas_or_one_by_one() -> None:
    assert names_in(["tensorboard,wandb", " trackio ", "wandb"]) == ("tensorboard", "wandb", "trackio")
    assert names_in(None) == ()


def test_the_command_line_names_reporters(tmp_path, shards) -> None:
    words = ["train", "--report-to", "tensorboard,wand", "--runs", str(tmp_path), "--shards", str(shards)]
    result = CliRunner().invoke(app, [*words, "--profile", "cpu-tiny", "--quiet"])
    assert "did you mean 'wandb'?" in str(result.exception)


def test_a_training_that_ends_with_an_error_is_reported_too(tmp_path, shards, monkeypatch, capsys) -> None:
    def fail(*_, **__) -> None:
        raise OmniError("stopped by the test")

    monkeypatch.setattr(train_telemetry.Recorder, "elapsed_s", property(lambda self: 1.0))
    monkeypatch.setattr("omni_cli.stages.train.callbacks.seal_folder", fail)
    with pytest.raises(OmniError, match="stopped by the test"):
        train(RECIPE, request(shards, tmp_path), Console())
    (page,) = tmp_path.glob(f"*/{runs.REPORT_PAGE}")
    assert f"report {page}" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OmniError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("telemetry", ["", '{"elapsed_s": 1, "session": 1, "step": 1, "opened": {"weights": 1}}\n'])
def test_whatever_ends_a_training_is_reported_and_never_hidden_by_the_report(tmp_path, resumed, error, telemetry):
    """The line of telemetry lacks what is written beside it: a damaged file of the run."""
    folder = Path(shutil.copytree(resumed[0].folder, tmp_path / "r"))
    (folder / runs.REPORT_PAGE).unlink()
    line = telemetry or (folder / runs.TELEMETRY).read_text().splitlines()[-1] + "\n"

    def fail() -> None:
        with report.reported(folder, QUIET):
            (folder / runs.TELEMETRY).write_text((folder / runs.TELEMETRY).read_text() + line)
            raise error("the true reason")

    with pytest.raises(error, match="the true reason"):
        fail()
    assert (folder / runs.REPORT_PAGE).is_file() == (not telemetry)


def test_what_a_run_writes_is_known_to_be_its_own(resumed, tmp_path) -> None:
    run, _ = resumed
    written = {path.name for path in run.folder.iterdir()} - {".lock", runs.RUN_FILE, runs.CONFIG}
    assert {runs.TELEMETRY, runs.TELEMETRY_PICTURE, runs.REPORT, runs.REPORT_PAGE, runs.TENSORBOARD} < written
    for name in written:
        folder = tmp_path / name / "r"
        (folder / name).mkdir(parents=True)
        with pytest.raises(UsageError, match=f"holds {re.escape(name)} and no run.json"):
            runs.check_ours(folder, fresh=False)


def curves_of(figure) -> dict[str, list[str]]:
    named = {}
    for axis in figure.axes:
        lines = [line.get_label() for line in axis.get_lines() if not line.get_label().startswith("_")]
        named.setdefault(str(axis.get_subplotspec()), []).extend(lines)
    return named


def test_six_panels_say_what_was_not_measured_and_mark_resumes_and_roll_backs() -> None:
    history = [{"step": step, "loss": 2.0 / step, "learning_rate": 1e-4} for step in range(1, 9)]
    bare = telemetry_picture(history, [])
    said = [text.get_text() for axis in bare.axes for text in axis.texts]
    assert said == ["not measured"] * 4
    gpu = {"utilisation_share": 0.9, "power_w": 300.0, "memory_bytes": 1 << 30}
    samples = [
        {"elapsed_s": 0.5 * at, "session": 1 + at // 4, "step": at, "gpus": [gpu], "gpu_energy_j": 150.0 * at}
        for at in range(8)
    ]
    opened = {"elapsed_s": 2.0, "session": 2, "step": 3, "opened": {}}
    full = telemetry_picture(
        history, [{**opened, "elapsed_s": 0.0, "step": 0}, *samples[:4], opened, *samples[4:]], [5]
    )
    assert [axis.get_title(loc="left") for axis in full.axes][:6] == [
        "Loss",
        "Learning rate and gradient",
        "Throughput and waiting for data",
        "Load",
        "Memory",
        "Power and energy",
    ]
    drawn = [label for labels in curves_of(full).values() for label in labels]
    assert {"training loss", "GPU", "energy so far"} <= set(drawn)
    vertical = [line.get_xdata()[0] for line in full.axes[0].get_lines() if len(set(line.get_xdata())) == 1]
    assert sorted(vertical) == [3, 5]
    (energy,) = [line for axis in full.axes for line in axis.get_lines() if line.get_label() == "energy so far"]
    assert energy.get_ydata()[-1] == pytest.approx(150.0 * 7 / 3600)


def test_a_finished_run_audits_clean(resumed) -> None:
    run, _ = resumed
    receipts = read_receipts(run.folder)
    assert not receipts.findings
    assert [*size_findings(receipts), *stray_findings(receipts)] == []


def test_telemetry_lines_are_json_without_anything_secret(resumed) -> None:
    run, _ = resumed
    text = (run.folder / runs.TELEMETRY).read_text()
    assert str(Path.home()) not in text
    assert all(json.loads(line)["session"] in (1, 2) for line in text.splitlines())


def test_each_step_tells_its_loss_and_how_long_it_waited_for_data(shards, tmp_path, monkeypatch) -> None:
    notes: list[str] = []

    @contextmanager
    def progress(*_):
        yield SimpleNamespace(advance=lambda count=1, note="": notes.append(note))

    console = Console(quiet=True)
    monkeypatch.setattr(console, "progress", progress)
    train(kill_recipe("qwen2_5_vl", "lora", "cosine", 4), request(shards, tmp_path), console)
    assert [bool(re.fullmatch(r"loss \d+\.\d{3}, \d+\.\d% of the time waiting for data", note)) for note in notes] == [
        False,  # nothing is logged before the third
        False,
        False,
        True,
    ]
