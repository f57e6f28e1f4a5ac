"""Short real runs of the `distill` recipe: synthetic drives or the real segment -> shards -> a student of a few steps.

As a program it kills such work and lets it lie: `python -m tests.support.driving DATA SHARDS OUT`.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from omni_cli.recipes.distill import Distill
from omni_cli.recipes.distill.settings import DistillSample, DistillSplit, DistillTrain, DistillTune
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.train import TrainRequest, train
from tests.support import openpilot as made
from tests.support.pipeline import QUIET, write_synthetic

FRONT = "camera_front_wide_120fov"
KILL_STEPS = 6
KILLED = {  # what is killed, and the file at whose appearance it is
    "etl": "recordings/*/windows.arrow.receipt.json",
    "full": "r/checkpoints/checkpoint-*",
    "dora": "r/checkpoints/checkpoint-*",
}
REAL_ID = "a2a0ccea32023010_2023-07-27--13-01-19--0"
real_data = pytest.mark.skipif("OMNI_REAL_DATA" not in os.environ, reason="OMNI_REAL_DATA names no folder of real data")


def write_drives(data: Path, **changes) -> None:
    """Write two small synthetic drives of one calibrated camera under DATA/raw/synthetic."""
    write_synthetic(data, **{"cameras": (FRONT,), "seconds": 5.0, **changes})


def write_routes(
    data: Path, count: int = 80, *, settled_after: int = 40, models_every: int = 1, models_from: int = 0
) -> list[str]:
    """Write two drives of a comma device under DATA/raw/openpilot, and return their ids.

    The device knows how it is mounted from frame `settled_after` on, turns left at 0.1 rad/s, and logs what its own
    model said of each `models_every`-th frame from `models_from` on: paths and lanes that no two frames share.
    """
    ids = []
    for number in range(2):
        folder = made.drive_folder(data, number)
        made.write_segment(folder, count)
        extra = [
            made.event("deviceState", {"deviceType": "tici"}),
            made.event("roadCameraState", {"sensor": "ox03c10"}),
        ]
        for frame in range(0, count, 5):
            status = "calibrated" if frame >= settled_after else "uncalibrated"
            at_us = made.BOOT_US + frame * made.FRAME_US
            turn = {"x": 0.0, "y": 0.0, "z": -0.1, "valid": True}
            extra.append(made.event("liveCalibration", made.calibration((0.0, 0.02, 0.01), status), at_us))
            extra.append(made.event("livePose", {"angularVelocityDevice": turn}, at_us))
        for frame in range(models_from, count, models_every):
            seen = made.model(frame, shift=frame / 10) | {"laneLineProbs": [0.9, 0.8, 0.7, 0.6]}
            extra.append(made.event("modelV2", seen, made.BOOT_US + frame * made.FRAME_US + 60_000))
        (folder / "qlog").write_bytes((folder / "qlog").read_bytes() + b"".join(extra))
        ids.append(made.recording_id(number))
    return ids


def real_folder() -> Path:
    """The folder of real data that the environment names."""
    return Path(os.environ["OMNI_REAL_DATA"])


def copy_real_segment(data: Path) -> None:
    """Copy the one real segment into DATA/raw/openpilot."""
    shutil.copytree(real_folder() / "comma_demo_route" / REAL_ID[:16], data / "raw" / "openpilot" / REAL_ID[:16])


def tiny_student(family: str = "resnet", *, cameras: str = FRONT, mode: str = "full", **changes) -> Distill:
    """The smallest recipe that has every part; `sample`, `train` and `tune` may be tables, laid over the smallest."""
    sample = {"cameras": cameras, "window": 5, "stride": 4, **changes.pop("sample", {})}
    steps = {"batch_size": 2, "learning_rate": 1e-2, "max_steps": 2, "warmup_ratio": 0.0, "warmup_steps": 1}
    tune = {"mode": mode, "rank": 2, "alpha": 4, **changes.pop("tune", {})}
    values = {
        "model": f"tiny:{family}",
        "hypotheses": 2,
        "hidden": 16,
        "sample": DistillSample(**sample),
        "split": DistillSplit(validation=0.5),
        "tune": DistillTune(**tune),
        "train": DistillTrain(**{**steps, "workers": 0, **changes.pop("train", {})}),
    }
    return Distill(**{**values, **changes})


def kill_recipe(mode: str) -> Distill:
    """A student whose training saves often and at a constant rate."""
    often = {"max_steps": KILL_STEPS, "save_steps": 2, "log_steps": 2}
    return tiny_student(mode=mode, train={**often, "schedule": "constant_with_warmup", "learning_rate": 1e-3})


def work(job: str, data: Path, shards: Path, out: Path) -> None:
    """Do what is to be killed, or what nobody disturbs; a training's run is OUT/r."""
    if job == "etl":
        etl(tiny_student(), EtlRequest(data=data, out=out, workers=0), QUIET)
    else:
        train(kill_recipe(job), TrainRequest(shards, data, out, "r", "test"), QUIET)


def kill_once(job: str, data: Path, shards: Path, out: Path) -> int:
    """Do it in a process of its own, kill that at the first sign of something finished, and return its exit code."""
    pid = os.fork()
    if pid == 0:
        work(job, data, shards, out)
        os._exit(0)
    while not list(out.glob(KILLED[job])):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return 1  # it ended before anything of it was done
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    of_data, of_shards, target = map(Path, sys.argv[1:])
    ends = {job: kill_once(job, of_data, of_shards, target / job) for job in KILLED}
    sys.exit(0 if set(ends.values()) == {-signal.SIGKILL} else f"not killed: {ends}")
