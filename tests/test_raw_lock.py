"""Nobody takes raw data away under whoever reads them: processes that meet at a folder."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from omni_cli import files
from omni_cli.errors import OmniError
from omni_cli.report import Console
from omni_cli.samples.shards import open_shards
from omni_cli.sources.quarantine import read_quarantine
from omni_cli.stages import raw_lock
from omni_cli.stages.audit import AuditRequest, audit
from omni_cli.stages.bench.inputs import Inputs
from omni_cli.stages.evaluate import EvalRequest, evaluate
from omni_cli.stages.fetch import FetchRequest, PurgeRequest, fetch, purge
from omni_cli.stages.infer import InferRequest, infer, subject_of_run
from omni_cli.stages.raw_lock import HeldError, alone
from omni_cli.stages.train import TrainRequest, train
from tests.support import clips, pai
from tests.support.etl_once import run as etl_here
from tests.support.folders import stamps, tree
from tests.support.injection import needs_strace, run_traced
from tests.support.pipeline import make_run, tiny_recipe, write_synthetic

QUIET = Console(quiet=True)
CLIPS = pai.clip_ids(0)
# its arguments are those of an `omni`, so that it is named as one
HOLD = """
import shutil, sys, time
from pathlib import Path
from omni_cli.stages.raw_lock import alone
raw, seconds, anew = Path(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
with alone(raw):
    print("held", flush=True)
    time.sleep(seconds)
    if anew:
        shutil.rmtree(raw)
        raw.mkdir()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(raw_lock, "_PATIENCE_S", 0.2)


@pytest.fixture
def data(tmp_path):
    data = tmp_path / "data"
    origin = pai.write_repository(tmp_path / "origin")
    fetch(FetchRequest("physical_ai_av", data, "0-0", cameras=pai.CAMERAS, origin=origin), QUIET)
    return data


def raw_of(data):
    return data / "raw" / "physical_ai_av"


def etl(data, name, **options):
    return etl_here(data, data / "shards" / name, camera=pai.FRONT, quiet=True, **{"workers": 0, **options})


@contextmanager
def etl_elsewhere(data, name, tmp_path, clip=CLIPS[0]):
    """An etl in a process of its own, amid its first recording."""
    mark = tmp_path / f"begun-{name}"
    options = {"workers": 2, "quiet": True, "camera": pai.FRONT, "poison": {clip: f"wait tally {mark}"}}
    words = [sys.executable, "-m", "tests.support.etl_once", str(data), str(data / "shards" / name)]
    with subprocess.Popen([*words, json.dumps(options)], start_new_session=True) as process:
        try:
            wait_until(mark.exists)
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_until(is_so):
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def held_elsewhere(raw, *, seconds=60.0, anew=""):
    words = [sys.executable, "-c", HOLD, "omni", "fetch", str(raw), str(seconds), anew, b"\xe4"]  # no UTF-8
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def destroy(data):
    return purge(PurgeRequest(data, "physical_ai_av", data.parent / "runs"), QUIET)


@pytest.mark.fault("F10")
def test_a_purge_leaves_alone_what_an_etl_reads_until_that_is_gone(data, tmp_path):
    before, written = tree(data / "raw"), stamps(data / "raw")
    with etl_elsewhere(data, "first", tmp_path) as process:
        assert stamps(data / "raw") == written  # they may be on a read-only disk: no lock is written there
        with pytest.raises(OmniError, match=rf"process {process.pid}\)? is using {raw_of(data)}; wait for it or end"):
            destroy(data)
        assert tree(data / "raw") == before
        assert etl(data, "second")["recordings"] == 2  # beside it, and so is a fetch that finds all there
        origin = tmp_path / "origin"
        again = fetch(FetchRequest("physical_ai_av", data, "0-0", cameras=pai.CAMERAS, origin=origin), QUIET)
        assert again["fetched"] == 0
        process.kill()  # its workers live on for a moment
        process.wait()
        assert destroy(data)["remaining"] == []
    assert not raw_of(data).exists()


def test_a_quarantine_moves_nothing_that_an_etl_reads(data, tmp_path):
    chunk = pai.zip_path(raw_of(data), pai.REAR)
    request = AuditRequest(raw_of(data), quarantine=True)
    with etl_elsewhere(data, "first", tmp_path) as process:
        chunk.write_bytes(chunk.read_bytes()[:1000])
        page = tmp_path / "report.html"  # what was found in hours of looking is told all the same
        with pytest.raises(OmniError, match=f"process {process.pid}"):
            audit(replace(request, report=page), QUIET)
        assert chunk.exists()
        assert "unreadable-zip" in page.read_text()
    assert audit(request, QUIET)["moved"] == [str(chunk)]


def test_a_recording_is_listed_beside_an_etl(data, tmp_path):
    chunk = pai.zip_path(raw_of(data), pai.REAR)
    with etl_elsewhere(data, "first", tmp_path):
        pai.edit_zip(chunk, {pai.member(pai.REAR, "video", CLIPS[1]): b"no video"})
        files.write_receipt(chunk)
        result = audit(AuditRequest(raw_of(data), quarantine=True), QUIET)
    assert (result["moved"], list(read_quarantine(raw_of(data)))) == ([], [CLIPS[1]])


def test_two_that_read_stop_a_purge_and_both_are_named(data, tmp_path):
    with etl_elsewhere(data, "one", tmp_path) as one, etl_elsewhere(data, "two", tmp_path) as two:
        with pytest.raises(OmniError) as raised:
            destroy(data)
        assert all(f"process {process.pid}" in str(raised.value) for process in (one, two))
        assert " are using " in str(raised.value)


READERS = {
    "etl": lambda data: etl(data, "shards"),
    "etl --dry-run": lambda data: etl(data, "shards", dry_run=True),
    "audit": lambda data: audit(AuditRequest(data), QUIET),
    "bench": lambda data: Inputs(tiny_recipe(cameras="1-cam"), data, data, data, console=QUIET).found,
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_being_taken_away_is_not_read(data, reader):
    with held_elsewhere(raw_of(data)) as process:
        told = rf"omni fetch \(process {process.pid}\) is taking files away from {raw_of(data)}; wait for it, then run"
        with pytest.raises(OmniError, match=told):
            READERS[reader](data)
    assert not (data / "shards").exists()


def test_bench_holds_the_data_that_it_found_until_its_end(data):
    with Inputs(tiny_recipe(cameras="1-cam"), data, data, data, console=QUIET) as inputs:
        assert inputs.found.folder == raw_of(data)
        with pytest.raises(OmniError, match=f"process {os.getpid()}"):
            destroy(data)
    assert destroy(data)["remaining"] == []


def test_an_instant_is_waited_for(data, monkeypatch):
    monkeypatch.setattr(raw_lock, "_PATIENCE_S", 30.0)
    with held_elsewhere(raw_of(data), seconds=0.3):
        assert etl(data, "shards")["recordings"] == 2


def test_a_folder_that_was_made_anew_meanwhile_is_not_taken_for_the_one_that_was_held(data, monkeypatch):
    monkeypatch.setattr(raw_lock, "_PATIENCE_S", 30.0)
    with (
        held_elsewhere(raw_of(data), seconds=0.3, anew="anew"),
        pytest.raises(OmniError, match="was just taken away by another omni; run the same command again"),
        raw_lock.reading(raw_of(data)),
    ):
        pass


class Watch(Console):
    """Tries at every progress bar whether a folder could be taken away just then."""

    def of(self, folder):
        self.folder, self.told = folder, {}
        return self

    def progress(self, label, total, unit):
        with pytest.raises(HeldError) as raised, alone(self.folder):
            pass
        self.told[label] = str(raised.value)
        return super().progress(label, total, unit)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on the shards of two small drives; a model of one camera."""
    folder = tmp_path_factory.mktemp("made")
    write_synthetic(folder / "data", cameras=(pai.FRONT,))
    return make_run(folder, tiny_recipe(cameras="1-cam"), data=folder / "data")


def train_anew(made, console):
    return train(made.recipe, TrainRequest(made.shards, made.data, made.run.folder.parent, "other", "test"), console)


def ask(made, console):
    clip = open_shards(made.shards).manifest.recordings[0].id
    request = InferRequest((clip,), data=made.data, out=made.data.parent / "answers")
    return infer(made.recipe, subject_of_run(made.run), request, console)


def bench(made, console):
    here = made.shards.parents[1]
    with Inputs(made.recipe, here, here / "runs", here / "work", console=console) as inputs:
        assert inputs.shards.folder == made.shards
        with console.progress("bench", 1, "parts"):
            pass


LONG_USES = {
    "train": (train_anew, "train"),
    "eval": (lambda made, console: evaluate(made.recipe, made.run, EvalRequest(blind=False), console), "eval: model"),
    "infer": (ask, "infer"),
    "bench": (bench, "bench"),
}


@pytest.mark.fault("F10")
@pytest.mark.parametrize("use", LONG_USES)
def test_what_is_used_for_long_cannot_be_taken_away_meanwhile(made, use):
    act, label = LONG_USES[use]
    folder = made.data / "raw" / "synthetic" if use == "infer" else made.shards
    with held_elsewhere(folder) as process:
        told = rf"omni fetch \(process {process.pid}\) is taking files away from {folder}; wait for it, then run"
        with pytest.raises(OmniError, match=told):
            act(made, QUIET)
    with raw_lock.reading(folder):  # as another of the same kind does
        watch = Watch(quiet=True).of(folder)
        act(made, watch)
    assert any(shown.startswith(label) for shown in watch.told)
    assert all(f"process {os.getpid()} is using {folder}; wait for it" in line for line in watch.told.values())
    with alone(folder):
        pass


@pytest.mark.fault("F10")
def test_a_purge_deletes_nothing_while_shards_are_in_use(data):
    etl(data, "one")
    before = tree(data)
    with raw_lock.reading(data / "shards" / "one"):
        told = rf"process {os.getpid()} is using {data / 'shards' / 'one'}; wait for it or end it"
        with pytest.raises(OmniError, match=told):
            destroy(data)
    assert tree(data) == before
    assert destroy(data)["remaining"] == []


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_a_worker_that_outlives_its_parent_holds_nothing(tmp_path, start):
    with raw_lock.reading(tmp_path):
        worker = multiprocessing.get_context(start).Process(target=time.sleep, args=(60,))
        worker.start()
    with alone(tmp_path):  # as when the parent was killed
        assert worker.is_alive()
    worker.kill()
    worker.join()


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    with (
        pytest.raises(OmniError, match=f"^{tmp_path / 'gone'} was just taken away by another omni; run the same"),
        raw_lock.reading(tmp_path / "gone"),
    ):
        pass


@needs_strace
@pytest.mark.parametrize("error", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_a_disk_without_locks_can_be_read(data, error):
    """As Lustre and NFS are where they are mounted without."""

    def act():
        with raw_lock.reading(raw_of(data)):
            pass

    assert run_traced(act, "trace=flock", f"inject=flock:error={error}") == 0
    assert run_traced(act, "trace=flock", "inject=flock:error=EIO") != 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_data_that_belong_to_someone_else_can_be_read(data):
    for path in [raw_of(data), *raw_of(data).rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert etl(data, "shards")["recordings"] == 2


@pytest.mark.fault("F10")
def test_a_fetch_replaces_no_zip_that_an_etl_reads_and_brings_what_is_new(hub, tmp_path):
    """More clips of a chunk move the members of its zip, and an etl knows where they were."""
    data = tmp_path / "data"
    clips.get(data, clips.CLIPS[1])
    before = {path: path.read_bytes() for path in (clips.zip_of(data), clips.zip_of(data, clips.REAR))}
    with etl_elsewhere(data, "first", tmp_path, clip=clips.CLIPS[1]) as process:
        with pytest.raises(
            OmniError, match=rf"2 of \d+ files failed, the others are kept; .*{process.pid}\)? is using"
        ):
            clips.get(data, clips.CLIPS[0], clips.FAR[0])
        assert {path: path.read_bytes() for path in before} == before
        assert clips.zip_of(data, chunk=1).exists()
    assert clips.get(data, clips.CLIPS[0], clips.FAR[0])["fetched"] == 2
    assert all(path.read_bytes() != content for path, content in before.items())
    assert not (clips.folder_of(data) / ".fetch").exists()
