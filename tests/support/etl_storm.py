"""Kill `etl`, or fail its disk, again and again, each time in a fork: no import is paid for twice.

python -m tests.support.etl_storm kills DATA OUT KILLS WORKERS SEED      SIGKILL at random moments
python -m tests.support.etl_storm calls DATA OUT PLACES SEED             SIGKILL, ENOSPC, EIO at random system calls
python -m tests.support.etl_storm pairs DATA OUT ROUNDS WORKERS LIES     two at once on one folder
"""

import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

from omni_cli.report import Console
from omni_cli.stages.etl import EtlRequest, etl
from tests.support.injection import CRASHED, REFUSED, count_calls, run_traced
from tests.support.plain_recipe import Plain

_OURS = ("write", "fsync", "rename", "openat", "close", "unlink", "read")


def run(data: Path, out: Path, workers: int) -> None:
    etl(Plain(), EtlRequest(data=data, out=out, workers=workers, max_refused=0.5), Console(quiet=True))


def forked(data: Path, out: Path, workers: int) -> int:
    """Run etl in a process of its own; return its number."""
    pid = os.fork()
    if pid == 0:
        try:
            run(data, out, workers)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def survives(data: Path, out: Path, workers: int, delay_s: float | None = None) -> bool:
    """Say whether an etl in a process of its own ended before it was killed after `delay_s`."""
    pid = forked(data, out, workers)
    if delay_s is not None:
        time.sleep(delay_s)
        os.kill(pid, signal.SIGKILL)
    code = code_of(pid)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"etl failed with exit code {code}")
    return code == 0


def kills(data: Path, out: Path, count: int, workers: int, seed: int) -> None:
    """A folder is killed at until a run in it ends; then another folder begins."""
    chance = random.Random(seed)
    started = time.monotonic()
    survives(data, out / "0", workers)
    longest_s = time.monotonic() - started
    killed, folder = 0, 1
    while killed < count:
        if survives(data, out / f"{folder}", workers, chance.uniform(0.0, longest_s)):
            folder += 1
        else:
            killed += 1
    survives(data, out / f"{folder}", workers)
    sys.stdout.write(f"{killed} kills in {folder} folders\n")


def calls(data: Path, out: Path, places: int, seed: int) -> None:
    """A folder meets a fault at each run, until one ends; then it is finished, and another begins."""
    chance, ends, folder = random.Random(seed), Counter[int](), 1
    counts = count_calls(partial(run, data, out / "0", 0), out.parent / "calls")
    for _ in range(places):
        call = chance.choice([name for name in _OURS if counts[name]])
        fault = "error=EIO" if call == "read" else chance.choice(("signal=SIGKILL", "error=ENOSPC", "error=EIO"))
        place = chance.randint(1, counts[call])
        code = run_traced(partial(run, data, out / f"{folder}", 0), f"inject={call}:{fault}:when={place}")
        ends[code] += 1
        if code == CRASHED:
            raise SystemExit(f"{call} {fault} {place}: a traceback")
        if code == 0 or ends.total() % 4 == 0:
            survives(data, out / f"{folder}", 0)
            folder += 1
    survives(data, out / f"{folder}", 0)
    sys.stdout.write(f"{ends[-signal.SIGKILL]} killed, {ends[REFUSED]} refused, {ends[0]} ended\n")


def pairs(data: Path, out: Path, rounds: int, workers: int) -> None:
    """Two runs on each folder at once. Neither takes a lock: one that lies, as on some shared disks, harms nothing."""
    for number in range(rounds):
        codes = [code_of(pid) for pid in [forked(data, out / f"{number}", workers) for _ in range(2)]]
        if codes != [0, 0]:
            raise SystemExit(f"round {number}: exit codes {codes}")
    sys.stdout.write(f"{rounds} rounds\n")


if __name__ == "__main__":
    modes = {"kills": kills, "calls": calls, "pairs": pairs}
    modes[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
