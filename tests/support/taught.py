"""Drives whose pictures say where a tiny ONNX teacher wants to drive, and a student small enough to learn it."""

import io
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd

from omni_cli.formats.physical_ai_av import EGOMOTION_COLUMNS
from omni_cli.formats.video import encode_h264
from omni_cli.recipes.distill import Distill
from omni_cli.samples.shards import ShardSet, open_shards
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.world.dataset import ClipFiles, SyntheticSpec, render_clip, write_chunk, write_indices
from tests.support.drives import circle
from tests.support.driving import FRONT, tiny_student
from tests.support.pipeline import QUIET

FPS = 5  # as often as a driving model looks


def comma(paths: Iterable[Path | str]) -> str:
    return ",".join(map(str, paths))


def write_bright_drives(data: Path, *, clips: int, seconds: float) -> Path:
    """Write 2 x `clips` drives in PhysicalAI-AV's layout: pictures that brighten and darken within 5 to 10 s.

    The car creeps along the same bend in all of them: only the pictures differ. Returns DATA.
    """
    spec = SyntheticSpec(clips_per_chunk=clips, seconds=seconds, fps=FPS, width_px=32, height_px=18, cameras=(FRONT,))
    root = data / "raw" / "synthetic"
    for chunk in (0, 1):
        made = [_bright(render_clip(spec, chunk, index), spec, (chunk, index)) for index in range(clips)]
        write_chunk(root, spec, chunk, made)
    write_indices(root, spec, (0, 1))
    return data


def student_of(paths: Iterable[Path | str], **changes) -> Distill:
    """A student whose windows hold eight steps; `changes` are of its training."""
    sample = {"teacher": comma(paths), "window": 9, "stride": 8, "max_age_ms": 1000 / FPS}
    steps = {"learning_rate": 2e-3, "max_steps": 80, "warmup_steps": 3, "weight_decay": 0.0, "log_steps": 40}
    steps |= {"save_steps": 1000, "warmup_ratio": 0.05, **changes}
    return tiny_student("convnextv2", hidden=64, sample=sample, train=steps)


def cut(recipe: Distill, data: Path, out: Path, workers: int = 0) -> ShardSet:
    etl(recipe, EtlRequest(data=data, out=out, workers=workers), QUIET)
    return open_shards(out)


def _bright(clip: ClipFiles, spec: SyntheticSpec, seed: tuple[int, int]) -> ClipFiles:
    """Shade the pictures from left to right, so that a norm in a net leaves it how bright they are."""
    rng, times_s = np.random.default_rng(seed), np.arange(round(spec.seconds * FPS)) / FPS
    brightness = 128 + 50 * np.sin(2 * np.pi * (times_s / rng.uniform(5, 10) + rng.random()))
    shade = brightness[:, None, None, None] + np.linspace(-60, 60, spec.width_px)[:, None]
    pictures = np.broadcast_to(np.clip(shade, 0, 255), (len(times_s), spec.height_px, spec.width_px, 3))
    video, log = io.BytesIO(), io.BytesIO()
    encode_h264(video, pictures.astype(np.uint8), rate_hz=Fraction(FPS), gop=FPS)
    ego = circle(spec.seconds + 1, speed_mps=1.0, yaw_rate=0.02)
    motion = [ego.quaternion_xyzw, ego.position_m, ego.velocity_mps, ego.acceleration_mps2, ego.curvature_per_m]
    table = pd.DataFrame(np.column_stack([ego.timestamp_us, *motion]), columns=list(EGOMOTION_COLUMNS))
    table.astype({EGOMOTION_COLUMNS[0]: np.int64}).to_parquet(log, index=False)
    (name, _), *others = clip.members[FRONT]
    motion_name = clip.members["egomotion"][0][0]
    members = {FRONT: ((name, video.getvalue()), *others), "egomotion": ((motion_name, log.getvalue()),)}
    return replace(clip, members=members)
