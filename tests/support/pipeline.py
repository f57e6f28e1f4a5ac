"""A short real run of the whole pipeline on synthetic drives: raw data -> shards -> a model trained for a few steps."""

from dataclasses import dataclass
from pathlib import Path

import torch

from omni_cli.formats.physical_ai_av import CAMERA_SETS
from omni_cli.recipe import SplitSettings
from omni_cli.recipes.vlm import Vlm
from omni_cli.recipes.vlm.settings import VlmSample, VlmTrain, VlmTune
from omni_cli.report import Console
from omni_cli.stages import runs
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.train import TrainRequest, train
from omni_cli.world.dataset import SyntheticSpec, render_clip, write_chunk, write_indices

QUIET = Console(quiet=True)
# Tiny models gain nothing from a second thread, and on a busy machine threads that wait for each other cost tenfold.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Made:
    """What a run left behind."""

    recipe: Vlm
    data: Path
    shards: Path
    run: runs.Run


def write_synthetic(data: Path, **changes) -> SyntheticSpec:
    """Write two chunks of one small clip each under DATA/raw/synthetic, in PhysicalAI-AV's layout."""
    small = {"clips_per_chunk": 1, "seconds": 2.5, "fps": 20, "width_px": 96, "height_px": 54}
    spec = SyntheticSpec(**{**small, "cameras": CAMERA_SETS["4-cam"], **changes})
    root = data / "raw" / "synthetic"
    for chunk in (0, 1):
        clips = [render_clip(spec, chunk, index) for index in range(spec.clips_per_chunk)]
        write_chunk(root, spec, chunk, clips)
    write_indices(root, spec, (0, 1))
    return spec


def tiny_recipe(family: str = "qwen2_5_vl", *, cameras: str = "4-cam", mode: str = "full", **changes) -> Vlm:
    """The smallest recipe that has every part; `changes` are other fields of the recipe."""
    values = {
        "model": f"tiny:{family}",
        "precision": "float32",
        "sample": VlmSample(cameras=cameras, window=4, stride=4, rate_hz=10.0, canvas_px=112),
        "split": SplitSettings(validation=0.5),
        "tune": VlmTune(mode=mode, rank=4, alpha=8),
        "train": VlmTrain(
            batch_size=2, learning_rate=1e-2, max_steps=2, gradient_checkpointing=False, warmup_ratio=0.0, workers=0
        ),
    }
    return Vlm(**{**values, **changes})


def make_run(folder: Path, recipe: Vlm, *, data: Path, name: str = "run") -> Made:
    """Cut the raw data in `data` into shards, and train on them."""
    shards = Path(etl(recipe, EtlRequest(data=data, out=folder / "shards" / name, workers=0), QUIET)["shards"])
    request = TrainRequest(shards, data, folder / "runs", name, "test")
    trained = train(recipe, request, QUIET)
    return Made(recipe, data, shards, runs.open_finished(Path(trained["run"])))


def kill_recipe(family: str, mode: str, schedule: str, steps: int, workers: int = 0) -> Vlm:
    """A recipe whose training takes long enough to be killed, and saves often."""
    train_settings = VlmTrain(
        batch_size=2,
        learning_rate=1e-3,
        schedule=schedule,
        max_steps=steps,
        gradient_checkpointing=False,
        save_steps=3,
        log_steps=3,
        workers=workers,
    )
    tune = VlmTune(mode=mode, rank=4, alpha=8, dropout=0.1 if mode == "lora" else 0.0)
    return tiny_recipe(family, mode=mode, train=train_settings, tune=tune)
