"""Kill `etl` at random moments and start it again: `python -m tests.support.etl_storm DATA OUT KILLS WORKERS SEED`."""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from omni_cli.report import Console
from omni_cli.stages.etl import EtlRequest, etl
from tests.support.plain_recipe import Plain


def run(data: Path, out: Path, workers: int) -> None:
    etl(Plain(), EtlRequest(data=data, out=out, workers=workers, max_refused=0.5), Console(quiet=True))


def survives(data: Path, out: Path, workers: int, delay_s: float | None = None) -> bool:
    """Run etl in a process of its own; say whether it ended before it was killed after `delay_s`."""
    pid = os.fork()
    if pid == 0:
        try:
            run(data, out, workers)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if delay_s is not None:
        time.sleep(delay_s)
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"etl failed with exit code {code}")
    return code == 0


def main(data: Path, out: Path, kills: int, workers: int, seed: int) -> None:
    """A folder is killed at until a run in it ends; then another folder begins."""
    chance = random.Random(seed)
    started = time.monotonic()
    survives(data, out / "0", workers)
    longest_s = time.monotonic() - started
    killed, folder = 0, 1
    while killed < kills:
        if survives(data, out / f"{folder}", workers, chance.uniform(0.0, longest_s)):
            folder += 1
        else:
            killed += 1
    survives(data, out / f"{folder}", workers)
    sys.stdout.write(f"{killed} kills in {folder} folders\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
