"""Whatever happens to a worker costs one attempt of one item."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from omni_cli.stages.pool import Pool, run_pool
from omni_cli.stages.worker import TAIL_BYTES, begin


def misbehave(item):
    """Does what the item says; `once` items do it on the first attempt only."""
    kind, marker = item
    if marker:
        if Path(marker).exists():
            return f"{kind} later"
        Path(marker).touch()
    match kind:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "hang":
            time.sleep(600)
        case "raise":
            raise ValueError("no good")
        case "grow":
            return len(bytearray(8 << 30))
        case "segfault":
            os.write(2, b"x" * 3 * TAIL_BYTES + b"the end\n")
            ctypes.string_at(0)
        case "garbage":
            os.write(next(fd for fd in range(3, 64) if is_socket(fd)), b"\0\0\0\4\xff\xff\xff\xff")
        case "close stderr":
            os.close(2)
            time.sleep(0.5)
        case "begin":
            begin("a short one", 0.5)
            time.sleep(600)
        case "take long":
            begin("a long one", 60.0)
            time.sleep(5)
    return kind


def is_socket(descriptor):
    try:
        return Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith("socket:")
    except FileNotFoundError:
        return False


def outcomes(items, **settings):
    settings = {"workers": 2, "timeout_s": 4.0, **settings}
    return {outcome.item: outcome for outcome in run_pool(misbehave, items, **settings)}


@pytest.mark.fault("F20")
def test_every_item_has_one_outcome_and_only_the_bad_ones_are_errors():
    good = [(f"good {k}", "") for k in range(20)]
    bad = {
        ("die", ""): "worker died: killed by SIGKILL",
        ("exit", ""): "worker died: exit code 3",
        ("hang", ""): "took longer than 4 s",
        ("raise", ""): "ValueError: no good",
        ("grow", ""): "MemoryError: ",
        ("segfault", ""): "worker died: killed by SIGSEGV",
        ("garbage", ""): "worker sent what cannot be read: invalid load key, '\\xff'.",
        ("begin", ""): "took longer than 0.5 s",
    }
    good += [("take long", ""), ("close stderr", "")]
    found = outcomes([*good[:10], *bad, *good[10:]], memory_bytes=2 << 30)
    assert found.keys() == {*good, *bad}
    assert {item: found[item].error for item in bad} == bad
    assert all(found[item].attempts == 2 for item in bad)
    assert all(found[item].result == item[0] and found[item].attempts == 1 for item in good)


def test_a_passing_failure_costs_one_attempt(tmp_path):
    items = [(kind, str(tmp_path / kind)) for kind in ("die", "hang", "raise")]
    found = outcomes([*items, ("good", "")])
    assert [found[item].result for item in items] == ["die later", "hang later", "raise later"]
    assert [found[item].attempts for item in items] == [2, 2, 2]


@pytest.mark.fault("F20")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_memory_of_attempts_is_told_what_failed_and_decides(workers):
    told = []

    def count(item, failure):
        told.append((item, failure))
        return 7  # of ours, and of those before us

    (outcome,) = run_pool(misbehave, [("raise", "")], workers=workers, attempts=8 - 1, count=count)
    assert (outcome.attempts, outcome.error) == (7, "ValueError: no good")
    ((item, failure),) = told
    assert item == ("raise", "")
    assert failure.trace.endswith('raise ValueError("no good")\nValueError: no good\n')


def test_a_memory_that_starts_anew_each_time_does_not_try_for_ever():
    answers = iter([1] * 5)
    (outcome,) = run_pool(misbehave, [("raise", "")], workers=0, attempts=3, count=lambda *_: next(answers))
    assert (outcome.attempts, list(answers)) == (3, [1, 1])


@pytest.mark.fault("F20")
def test_the_last_that_a_dead_worker_said_is_kept():
    told = []
    failing = [("segfault", ""), ("begin", "")]
    list(run_pool(misbehave, failing, workers=1, count=lambda _, failure: told.append(failure) or 9))
    crash, late = told
    assert len(crash.trace) == TAIL_BYTES
    assert "the end\nFatal Python error: Segmentation fault" in crash.trace
    assert "in misbehave" in crash.trace
    assert (crash.begun, late.begun) == ("", "a short one")


def test_no_workers_run_here(tmp_path):
    items = [("raise", str(tmp_path / "once"))]
    assert outcomes(items, workers=0)[items[0]].result == "raise later"
    assert [outcome.result for outcome in run_pool(os.path.basename, ["a/b", "c"], workers=0)] == ["b", "c"]


def test_nothing_to_do_is_done_at_once():
    assert outcomes([]) == {}


@pytest.mark.fault("F20")
def test_a_worker_that_is_stuck_with_nothing_to_do_holds_up_nobody():
    with Pool(misbehave, 1, 1, 4.0) as pool:
        assert [outcome.error for outcome in pool.run([("good", "")])] == [None]
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGSTOP)
    assert multiprocessing.active_children() == []


SUPERVISOR = """
import ctypes, sys, time
from omni_cli.stages.pool import run_pool

def sleep(seconds):
    time.sleep(seconds)

def hold(seconds):  # as a hung library does that keeps the interpreter's lock
    ctypes.PyDLL(None).sleep(seconds)

def sleep_in_parts(seconds):
    for _ in range(10 * seconds):
        time.sleep(0.1)

if __name__ == "__main__":
    function, items, timeout_s = globals()[sys.argv[1]], map(int, sys.argv[2].split(",")), float(sys.argv[3])
    try:
        settings = {"workers": 2, "attempts": 1, "timeout_s": timeout_s, "memory_bytes": 3 << 30}
        for outcome in run_pool(function, list(items), **settings):
            print(outcome.error or "running", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@contextmanager
def supervisor(folder, *arguments, limits="true"):
    script = folder / "supervisor.py"
    script.write_text(SUPERVISOR)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    command = ["bash", "-c", f'{limits}; exec "$@"', "bash", sys.executable, str(script), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True, cwd=folder
    ) as process:
        yield process


@pytest.mark.fault("F2", "F21")
@pytest.mark.parametrize(
    ("sent", "code", "doing"),
    [(signal.SIGKILL, -signal.SIGKILL, "sleep"), (signal.SIGINT, 130, "sleep"), (signal.SIGKILL, -9, "hold")],
)
def test_no_worker_outlives_its_supervisor(tmp_path, sent, code, doing):
    with supervisor(tmp_path, doing, "0,600,600", "600") as process:
        assert process.stdout.readline() == "running\n"
        workers = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.5)  # both hold what they are to hold
        process.send_signal(sent)
        assert process.wait(timeout=10) == code
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=10)
    for worker in alive:
        worker.kill()
    assert alive == []


@pytest.mark.fault("F12", "F20")
def test_time_in_which_everything_was_stopped_is_no_fault_of_an_item(tmp_path):
    with supervisor(tmp_path, "sleep_in_parts", "0,2", "4") as process:
        assert process.stdout.readline() == "running\n"
        os.killpg(process.pid, signal.SIGSTOP)  # as by Ctrl-Z, or a suspended job
        time.sleep(4.5)
        os.killpg(process.pid, signal.SIGCONT)
        assert process.stdout.readline() == "running\n"
        assert process.wait(timeout=10) == 0


@pytest.mark.fault("F22")
@pytest.mark.parametrize("limits", ["ulimit -d 2000000", 'export TMPDIR="$PWD/{0}"; mkdir -p "$TMPDIR"'])
def test_a_lower_limit_and_a_long_tmpdir_are_no_fault_of_an_item(tmp_path, limits):
    with supervisor(tmp_path, "sleep", "0", "60", limits=limits.format("x" * 90)) as process:
        assert process.stdout.readline() == "running\n"
