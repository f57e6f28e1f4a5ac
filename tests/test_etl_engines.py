"""Every engine makes the same bytes, and none is brought down, or held up for ever, by one hostile recording."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.samples.shards import open_shards, recording_folder
from omni_cli.stages.etl.memory import worker_bytes
from omni_cli.stages.memory import GIB, machine_bytes
from tests.support import openpilot as made
from tests.support.etl_once import command, run, undisturbed
from tests.support.folders import tree
from tests.support.openpilot import drive_folder, recording_id

DRIVES = 6
POISON = recording_id(2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return made.write_drives(tmp_path_factory.mktemp("data"), DRIVES)


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory) -> dict[str, str]:
    return undisturbed(data, tmp_path_factory.mktemp("reference"))


def start(data, out, **options):
    return subprocess.Popen(command(data, out, **options), stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(data, out, **options):
    done = subprocess.run(command(data, out, **options), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def crashes(out, recording=POISON):
    return json.loads((recording_folder(out, recording) / "crashes.json").read_text())


def test_any_order_makes_the_same_bytes(data, reference, tmp_path):
    order = random.Random(5).sample(range(1, DRIVES + 1), DRIVES)  # a share a unit
    for share in order:
        run(data, tmp_path / "shards", workers=0, shard=(share, DRIVES), quiet=True)
    assert tree(tmp_path / "shards") == reference


@pytest.mark.fault("F10")
def test_shares_at_once_one_of_them_killed_make_the_same_bytes(data, reference, tmp_path):
    out = tmp_path / "shards"
    waiting = {recording_id(0): f"wait once {tmp_path / 'begun'}"}
    slow = start(data, out, workers=1, shard=[1, 3], poison=waiting)
    others = [start(data, out, workers=0, shard=[share, 3]) for share in (2, 3)]
    wait_for(tmp_path / "begun")
    slow.kill()
    assert [process.wait(timeout=120) for process in (slow, *others)] == [-signal.SIGKILL, 0, 0]
    assert not (out / "manifest.json").exists()
    assert run(data, out, workers=0, shard=(1, 3), quiet=True)["finished"]
    assert tree(out) == reference
    for process in (slow, *others):
        process.stderr.close()


@pytest.mark.fault("F10")
def test_another_etl_of_other_settings_in_the_same_folder_is_named(data, tmp_path):
    out = tmp_path / "shards"
    first = start(data, out, workers=0)
    wait_for(recording_folder(out, recording_id(0)) / "windows.arrow.receipt.json")
    first.send_signal(signal.SIGSTOP)
    run(data, out, workers=0, rate_hz=5.0, quiet=True)
    first.send_signal(signal.SIGCONT)
    told = first.communicate(timeout=120)[1]
    assert (first.returncode, "of other settings or of another version, made" in told) == (1, True), told
    assert not (out / "manifest.json").exists()  # of two kinds of shards


def wait_for(path, seconds=150):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def poisoned(data, tmp_path_factory):
    """One recording that always kills its worker, one that does it once: by a pool, and by Ray."""
    folder, outs = tmp_path_factory.mktemp("poisoned"), {}
    for engine in ("local", "ray"):
        poison = {POISON: f"die tally {folder / engine}-tally", recording_id(4): f"die once {folder / engine}-once"}
        results = ended(data, folder / engine, engine=engine, workers=2, poison=poison)
        outs[engine] = folder / engine, results, Path(f"{folder / engine}-tally")
    return outs


@pytest.mark.fault("F20")
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_recording_that_kills_its_worker_is_tried_three_times_and_listed(poisoned, engine):
    out, result, tally = poisoned[engine]
    assert (result["finished"], result["made"], list(result["refused"])) == (True, DRIVES - 1, [POISON])
    assert tally.read_text() == "xxx"
    noted = crashes(out)
    assert (noted["attempts"], noted["error"]) == (3, "worker died: killed by SIGKILL")
    assert noted["stderr"].endswith("about to die\n")
    reason = open_shards(out).manifest.refused[POISON]
    assert reason.startswith("worker died: killed by SIGKILL, at each of 3 attempts; its crashes.json tells where")
    assert not list(out.rglob("crashes.json"))[1:]  # what crashed once is forgiven


def test_a_pool_and_a_ray_cluster_make_the_same_bytes(poisoned, reference):
    trees = [tree(poisoned[engine][0]) for engine in ("local", "ray")]
    assert trees[0] == trees[1]
    good = {name: content for name, content in trees[1].items() if POISON not in name and "manifest" not in name}
    assert good == {name: reference[name] for name in good}
    assert len(good) == 4 * (DRIVES - 1)


@pytest.mark.fault("F20")
def test_what_crashed_is_tried_again_only_where_that_makes_sense(data, tmp_path):
    out, tally = tmp_path / "shards", tmp_path / "tally"
    poison = {POISON: f"raise tally {tally}"}
    assert list(run(data, out, workers=0, poison=poison)["refused"]) == [POISON]
    assert crashes(out)["stderr"].endswith("ZeroDivisionError: a bug\n")
    before = tree(out)
    result = run(data, out, workers=0, poison=poison)  # it is remembered
    assert (result["made"], result["kept"], len(tally.read_text())) == (0, DRIVES - 1, 3)
    assert tree(out) == before
    run(data, out, workers=0, poison=poison, retry_crashed=True)
    assert len(tally.read_text()) == 6
    assert tree(out) == before
    noted = crashes(out) | {"attempts": 2}  # two by an engine that then died itself
    (recording_folder(out, POISON) / "crashes.json").write_text(json.dumps(noted))
    run(data, out, workers=0, poison=poison)
    assert (len(tally.read_text()), tree(out)) == (7, before)
    with pytest.raises(DataError, match=rf"1 of 6 .* the first is {POISON}: ZeroDivisionError: a bug, at each of 3"):
        run(data, out, workers=0, poison=poison, max_refused=0.1)


def test_changed_inputs_are_tried_again(data, reference, tmp_path):
    for number in (2, 3):
        made.write_segment(drive_folder(tmp_path, number), 40 + 4 * number)
    poison = {POISON: "raise"}
    run(tmp_path, tmp_path / "shards", workers=0, poison=poison)
    made.write_segment(drive_folder(tmp_path, 2), 56)
    assert run(tmp_path, tmp_path / "shards", workers=0)["refused"] == {}
    assert not list((tmp_path / "shards").rglob("crashes.json"))


@pytest.mark.fault("F20")
def test_a_recording_that_needs_too_much_memory_is_refused_alone(data, tmp_path):
    result = run(data, tmp_path / "shards", workers=1, worker_gb=1.5, poison={POISON: "grow"})
    assert (result["made"], list(result["refused"])) == (DRIVES - 1, [POISON])
    assert result["refused"][POISON].startswith("MemoryError: , at each of 3 attempts")
    assert "(more memory: --worker-gb)" in result["refused"][POISON]


def test_workers_share_the_memory_of_the_machine():
    assert worker_bytes(4, 2.5) == round(3.5 * GIB)
    assert 0.8 * machine_bytes() < 2 * (worker_bytes(2, None) - GIB) < machine_bytes()
    assert worker_bytes(10**6, None) == 2 * GIB


@pytest.fixture
def job():
    """A control group with 3 GiB of memory, as Slurm makes one a job, where this system lets us make one."""
    lines = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    folders = {name: Path("/sys/fs/cgroup", name, group.lstrip("/"), "omni") for name, group in lines}
    folder, limit = (folders["memory"], "memory.limit_in_bytes") if "memory" in folders else (folders[""], "memory.max")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this system lets us make no control group")
    try:
        (folder / limit).write_text(str(3 * GIB))
        yield folder
    except OSError:
        pytest.skip("this system lets us limit no memory")
    finally:
        folder.rmdir()


@pytest.mark.fault("F20")
def test_workers_share_the_memory_of_the_job(job):
    script = "from omni_cli.stages.memory import machine_bytes; print(machine_bytes())"
    inside = ["bash", "-c", f'echo $$ > {job}/cgroup.procs; exec "$@"', "bash", sys.executable, "-c", script]
    assert subprocess.run(inside, capture_output=True, text=True, check=True).stdout == f"{3 * GIB}\n"


@pytest.mark.fault("F2", "F21")
@pytest.mark.parametrize("case", [("SIGTERM", 75, os.kill), ("SIGTERM", 75, os.killpg), ("SIGINT", 130, os.killpg)])
def test_a_signal_stops_etl_at_once_and_the_same_command_goes_on(data, reference, tmp_path, case):
    (sent, code, kill), out = case, tmp_path / "shards"
    stopped = start(data, out, workers=2, poison={recording_id(1): f"wait once {tmp_path / 'begun'}"})
    wait_for(tmp_path / "begun")
    workers = psutil.Process(stopped.pid).children(recursive=True)
    kill(stopped.pid, signal.Signals[sent])
    told = stopped.communicate(timeout=30)[1]
    assert (stopped.returncode, bool(workers)) == (code, True)
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    if code == 75:
        assert told.endswith(
            "error: stopped by SIGTERM; every finished recording is kept, run the same command again to go on\n"
        )
    assert not list(out.rglob("crashes.json"))
    run(data, out, workers=0, quiet=True)
    assert tree(out) == reference


@pytest.mark.storm
@pytest.mark.fault("F2", "F21")
def test_a_signal_ends_the_cluster_of_ray_with_it(data, reference, tmp_path):
    out = tmp_path / "shards"
    stopped = start(data, out, engine="ray", workers=2, poison={recording_id(1): f"wait once {tmp_path / 'begun'}"})
    wait_for(tmp_path / "begun")
    cluster = psutil.Process(stopped.pid).children(recursive=True)
    stopped.terminate()
    assert "stopped by SIGTERM" in stopped.communicate(timeout=300)[1]
    assert (stopped.returncode, len(cluster) > 4) == (75, True)
    assert psutil.wait_procs(cluster, timeout=300)[1] == []
    run(data, out, workers=0, quiet=True)
    assert tree(out) == reference


@pytest.mark.storm
@pytest.mark.fault("F20")
def test_an_actor_of_ray_that_is_killed_costs_one_attempt(data, reference, tmp_path):
    out = tmp_path / "shards"
    running = start(data, out, engine="ray", workers=2, poison={recording_id(1): f"wait once {tmp_path / 'begun'}"})
    wait_for(tmp_path / "begun")
    actors = [each for each in psutil.Process(running.pid).children(recursive=True) if "UnitActor" in each.name()]
    for actor in actors:
        actor.kill()
    assert len(actors) == 2
    told = running.communicate(timeout=120)[1]
    assert running.returncode == 0, told
    assert tree(out) == reference


def test_ray_that_is_not_installed_is_told_with_the_remedy(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"--engine ray needs ray; install it with: pip install 'omni-cli\[ray\]'"):
        run(data, tmp_path / "shards", engine="ray")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_cluster_that_is_not_there_is_told_at_once(data, tmp_path, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(
        UsageError, match=rf"^RAY_ADDRESS={address}: no cluster \(.*\); name a cluster that runs, or none$"
    ):
        run(data, tmp_path / "shards", engine="ray")


@pytest.mark.storm
def test_a_worker_of_a_cluster_that_does_not_start_is_no_fault_of_a_recording(data, tmp_path):
    with pytest.raises(OmniError, match=r"does not start \(ValueError: .*NaN.*\); install the same omni-cli on all"):
        run(data, tmp_path / "shards", engine="ray", workers=1, worker_gb=float("nan"))
    assert not list(tmp_path.rglob("crashes.json"))


def test_a_dry_run_foresees_what_the_run_will_say(data, tmp_path, capfd):
    foreseen = run(data, tmp_path / "shards", dry_run=True, rate_hz=40.0)
    said = capfd.readouterr().err
    result = run(data, tmp_path / "shards", workers=0, rate_hz=40.0)
    later = capfd.readouterr().err
    line = "warning: pictures repeat: windows look at 40 Hz, and qcamera at 19.9 Hz sees less often; lower --rate-hz\n"
    assert (said.count(line), later.count(line)) == (1, 1)
    assert said.startswith("a note of the recipe\n")
    for split in ("train", "val"):
        assert foreseen["windows_by_split"][split] == pytest.approx(result["windows"][split], rel=0.35)
    made.write_segment(drive_folder(tmp_path, 0), 40)
    run(tmp_path, tmp_path / "one", dry_run=True)
    assert "warning: no val window: there are too few drives to split; fetch more" in capfd.readouterr().err


def test_a_log_that_was_cut_is_named(tmp_path, capfd):
    for number in range(3):
        made.write_segment(drive_folder(tmp_path, number), 60)
    log = next(drive_folder(tmp_path, 1).glob("qlog*"))
    log.write_bytes(log.read_bytes()[:-5])
    for _ in range(2):  # where the shard is kept, too
        run(tmp_path, tmp_path / "shards", workers=0)
        assert (
            f"warning: {recording_id(1)}: {log.parent.name}/{log.name} ends inside an event; read up to there"
            in capfd.readouterr().err
        )


def test_a_refusal_names_its_recording_once(data, tmp_path, capfd):
    for number in range(3):
        made.write_segment(drive_folder(tmp_path, number), 44)
    (drive_folder(tmp_path, 1) / "qcamera.ts").write_bytes(b"")
    result = run(tmp_path, tmp_path / "shards", workers=0)
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: refused"))
    assert line.count(recording_id(1)) == 1
    assert recording_id(1) not in result["refused"][recording_id(1)]
