"""Small drives in closed form: cars on a circle, cameras whose pictures say which frame they are."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from urllib.parse import quote

import numpy as np
from scipy.spatial.transform import Rotation

from omni_cli.formats.video import encode_h264
from omni_cli.samples.tiling import TiledPreprocess, VisionGrid
from omni_cli.scene.poses import EgoMotion
from omni_cli.scene.recording import CameraStream, Recording, VideoLocation

CAMERAS = ("front", "tele", "left", "right")
PHASES_US = (0, 7_311, 15_902, 24_477)  # one camera starts later than another, as in a car
GRID = VisionGrid(
    family="qwen2_5_vl", patch_px=14, merge=2, temporal_patch=2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)


def preprocess(**changes) -> TiledPreprocess:
    values = {
        "cameras": CAMERAS,
        "columns": 2,
        "canvas_width_px": 112,
        "canvas_height_px": 56,
        "num_frames": 8,
        "rate_hz": 10.0,
        "labels": "ego-motion",
        "past_speed": False,
        "decoder": "pyav",
        "decoder_id": "pyav",
        "vision": GRID,
    }
    return TiledPreprocess(**{**values, **changes})


def tile(pictures: Sequence[np.ndarray], layout: TiledPreprocess) -> np.ndarray:
    """The canvas of one instant."""
    return layout.shown([layout.in_cell(picture) for picture in pictures])


def circle(seconds: float, *, speed_mps: float, yaw_rate: float, start_us: int = 0, hz: int = 100) -> EgoMotion:
    """A constant speed and yaw rate; positive turns left, a negative speed drives backward."""
    t = np.arange(round(seconds * hz) + 1) / hz
    yaw, zeros = yaw_rate * t, np.zeros_like(t)
    direction = np.stack([np.cos(yaw), np.sin(yaw), zeros], axis=1)
    radius = speed_mps / yaw_rate if yaw_rate else 0.0
    arc = np.stack([radius * np.sin(yaw), radius * (1 - np.cos(yaw)), zeros], axis=1)
    line = np.stack([speed_mps * t, zeros, zeros], axis=1)
    return EgoMotion(
        timestamp_us=start_us + np.round(t * 1e6).astype(np.int64),
        position_m=arc if yaw_rate else line,
        quaternion_xyzw=Rotation.from_rotvec(np.stack([zeros, zeros, yaw], axis=1)).as_quat(),
        velocity_mps=speed_mps * direction,
        acceleration_mps2=np.zeros((len(t), 3)),
        curvature_per_m=np.full(len(t), yaw_rate / speed_mps if speed_mps else 0.0),
    )


def grey_of(frame: int, camera: int) -> int:
    """The grey level that a frame shows."""
    return 30 + (frame * 7 + camera * 50) % 190


def write_video(path: Path, camera: int, num_frames: int, *, width: int = 64, height: int = 36) -> None:
    greys = (grey_of(frame, camera) for frame in range(num_frames))
    pictures = (np.full((height, width, 3), grey, dtype=np.uint8) for grey in greys)
    with path.open("wb") as stream:
        encode_h264(stream, pictures, rate_hz=Fraction(30), crf=10)


def drive(
    folder: Path,
    name: str = "drive",
    *,
    seconds: float = 3.0,
    speed_mps: float = 10.0,
    yaw_rate: float = 0.2,
    cameras: Sequence[str] = CAMERAS,
) -> Recording:
    """Four 30 Hz cameras with phases of their own, 100 Hz ego motion that started earlier."""
    folder.mkdir(parents=True, exist_ok=True)
    num_frames = round(seconds * 30)
    streams = {}
    for number, camera in enumerate(cameras):
        path = folder / f"{number}.{quote(name, safe='')}.mp4"
        write_video(path, number, num_frames)
        times = 100_000 + PHASES_US[number] + np.round(np.arange(num_frames) * 1e6 / 30).astype(np.int64)
        streams[camera] = CameraStream(camera, (VideoLocation(path),), times)
    ego = circle(seconds + 1, speed_mps=speed_mps, yaw_rate=yaw_rate, start_us=-3_217)
    return Recording(name, "test", streams, ego=ego)
