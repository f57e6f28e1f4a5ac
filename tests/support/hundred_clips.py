"""A whole chunk, 100 clips of four cameras, from a loopback hub through fetch, audit and etl, with the peak memory.

    python -m tests.support.hundred_clips FOLDER [SECONDS WIDTHxHEIGHT]

The hub's repository is drawn by the synthetic world; each verb runs as a process of its own, as a user starts it.
"""

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from omni_cli.formats.physical_ai_av import CAMERA_SETS
from omni_cli.stages.pool import run_pool
from omni_cli.world.clip import SyntheticSpec
from omni_cli.world.dataset import render_clip, write_chunk, write_indices
from tests.support.hub import serve_hub

CLIPS = 100
VERBS = (
    "fetch --chunks 1 --cameras 4-cam",
    "audit",
    "etl --profile cpu-tiny --set split.validation=0.1",
)
OMNI = Path(sys.executable).with_name("omni")
_SAMPLE_S = 0.05


@dataclass(frozen=True)
class Done:
    """What one verb did, and the most memory that its processes held at once (USS: what is theirs alone)."""

    line: str
    returncode: int
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int  # all processes together
    peak_process_bytes: int  # the largest one

    def told(self) -> str:
        """Return the numbers in one line."""
        peak, one = self.peak_bytes / 2**20, self.peak_process_bytes / 2**20
        return (
            f"omni {self.line}: exit {self.returncode}, {self.seconds:.1f} s, {peak:.0f} MiB in all, {one:.0f} in one"
        )


def draw_repository(root: Path, *, seconds: float, width_px: int, height_px: int) -> None:
    """Draw one chunk of 100 clips, two at a time."""
    spec = SyntheticSpec(
        clips_per_chunk=CLIPS,
        seconds=seconds,
        fps=20,
        width_px=width_px,
        height_px=height_px,
        cameras=CAMERA_SETS["4-cam"],
    )
    drawn = run_pool(partial(render_clip, spec, 0), range(CLIPS), workers=len(os.sched_getaffinity(0)))
    clips = {outcome.item: outcome.result for outcome in drawn}
    write_chunk(root, spec, 0, [clips[index] for index in range(CLIPS)])
    write_indices(root, spec, (0,))


def through_fetch_audit_and_etl(root: Path, work: Path) -> list[Done]:
    """Run the three verbs one after the other in `work`, against a hub that serves `root`."""
    with serve_hub(root) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(work / "hf"), "PATH": os.environ["PATH"]}
        return [run_verb(line, work, environment) for line in VERBS]


def run_verb(line: str, folder: Path, environment: dict[str, str]) -> Done:
    """Run one line of omni and watch the memory of all its processes."""
    began = time.monotonic()
    process = subprocess.Popen(
        [str(OMNI), *line.split()],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watch = _Watch(psutil.Process(process.pid))
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    stdout, stderr = process.communicate(timeout=1800)
    watch.is_over.set()
    thread.join()
    seconds = time.monotonic() - began
    return Done(line, process.returncode, stdout, stderr, seconds, watch.peak_bytes, watch.peak_process_bytes)


class _Watch:
    def __init__(self, process: psutil.Process) -> None:
        self.process, self.peak_bytes, self.peak_process_bytes = process, 0, 0
        self.is_over = threading.Event()

    def run(self) -> None:
        while not self.is_over.wait(_SAMPLE_S):
            try:
                sizes = [_own_bytes(one) for one in (self.process, *self.process.children(recursive=True))]
            except psutil.NoSuchProcess:
                continue
            self.peak_bytes = max(self.peak_bytes, sum(sizes))
            self.peak_process_bytes = max(self.peak_process_bytes, *sizes)


def _own_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().uss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def main(folder: Path, seconds: float = 5.0, size: str = "320x180") -> None:
    """Draw, run, and tell."""
    root, work = folder / "hub", folder / "user"
    width_px, height_px = map(int, size.split("x"))
    if not root.exists():
        draw_repository(root, seconds=seconds, width_px=width_px, height_px=height_px)
    work.mkdir(parents=True)
    for done in through_fetch_audit_and_etl(root, work):
        sys.stdout.write(f"{done.told()}\n{done.stderr.strip()}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(kind(word) for kind, word in zip((float, str), sys.argv[2:], strict=False)))
