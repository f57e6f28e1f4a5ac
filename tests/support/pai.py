"""A tiny folder in the PhysicalAI-AV layout, written by hand so that tests can break any part of it."""

import csv
import io
import zipfile
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omni_cli.formats.physical_ai_av import (
    CLIP_INDEX_FILE,
    EGOMOTION_COLUMNS,
    EXTRINSIC_COLUMNS,
    FEATURES,
    FEATURES_FILE,
    INTRINSIC_COLUMNS,
    PRESENCE_FILE,
)
from omni_cli.formats.video import encode_h264

FRONT, REAR = "camera_front_wide_120fov", "camera_rear_left_70fov"
CAMERAS = (FRONT, REAR)
FRAMES, FPS = 20, 10
WIDTH, HEIGHT = 64, 48
SPEED_MPS = 10.0


def clip_ids(chunk: int, count: int = 2) -> tuple[str, ...]:
    return tuple(f"00000000-0000-4000-8000-{chunk:04d}{i:08d}" for i in range(count))


def parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


def frame_times_us(phase_us: int = 0) -> np.ndarray:
    return np.arange(FRAMES, dtype=np.int64) * 100_000 + phase_us


def timestamps(times_us: np.ndarray) -> bytes:
    return parquet(pa.table({"timestamp": pa.array(times_us), "frame_index": np.arange(len(times_us))}))


@cache
def mp4(frames: int = FRAMES, first: int = 20) -> bytes:
    stream = io.BytesIO()
    pictures = (np.full((HEIGHT, WIDTH, 3), 10 * i + first, np.uint8) for i in range(frames))
    encode_h264(stream, pictures, rate_hz=Fraction(FPS), gop=10)
    return stream.getvalue()


def ego_columns() -> dict[str, np.ndarray]:
    """Straight ahead at a constant speed, from before the first frame until after the last."""
    times_us = np.arange(-200_000, FRAMES * 100_000 + 200_000, 10_000, dtype=np.int64)
    columns = {name: np.zeros(len(times_us)) for name in EGOMOTION_COLUMNS}
    return columns | {
        "timestamp": times_us,
        "qw": np.ones(len(times_us)),
        "x": SPEED_MPS * times_us / 1e6,
        "vx": np.full(len(times_us), SPEED_MPS),
    }


def egomotion(change: Callable[[dict[str, np.ndarray]], None] = lambda _: None) -> bytes:
    columns = ego_columns()
    change(columns)
    return parquet(pa.table(columns))


def write_zip(path: Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)


def edit_zip(path: Path, changes: dict[str, bytes | None], extra: tuple[tuple[str, bytes], ...] = ()) -> None:
    """Rewrite a zip with some members replaced (None: left out) and others appended."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    kept = [(name, changes.get(name, content)) for name, content in members]
    write_zip(path, [(name, content) for name, content in kept if content is not None] + list(extra))


def zip_path(root: Path, feature: str, chunk: int = 0) -> Path:
    return root / FEATURES[feature].chunk_path(chunk)


def member(feature: str, alias: str, clip: str) -> str:
    return FEATURES[feature].member(clip, alias)


def write_repository(root: Path, chunks: int = 1, clips: int = 2) -> Path:
    """Write indices, two cameras, egomotion and calibration."""
    ids = {chunk: clip_ids(chunk, clips) for chunk in range(chunks)}
    _write_indices(root, ids)
    for chunk, names in ids.items():
        write_zip(
            zip_path(root, "egomotion", chunk), [(member("egomotion", "egomotion", c), egomotion()) for c in names]
        )
        for camera in CAMERAS:
            parts = [
                part for number, c in enumerate(names) for part in _camera_members(camera, c, number + chunk * clips)
            ]
            write_zip(zip_path(root, camera, chunk), parts)
        _write_calibration(root, chunk, names)
    return root


def _camera_members(camera: str, clip: str, number: int) -> list[tuple[str, bytes]]:
    boxes = pa.table({name: pa.array([], pa.int64()) for name in ("frame_index", "x1", "y1", "x2", "y2")})
    times_us = frame_times_us(7_000 * CAMERAS.index(camera))
    return [
        (member(camera, "video", clip), mp4(first=20 + 2 * number + CAMERAS.index(camera))),  # none is another's
        (member(camera, "frame_timestamps", clip), timestamps(times_us)),
        (member(camera, "blurred_boxes", clip), parquet(boxes)),
    ]


def _write_indices(root: Path, ids: dict[int, tuple[str, ...]]) -> None:
    names = [clip for found in ids.values() for clip in found]
    chunk = [number for number, found in ids.items() for _ in found]
    index = {"clip_id": names, "clip_is_valid": [True] * len(names), "chunk": chunk, "split": ["train"] * len(names)}
    there = {"egomotion", *CAMERAS, "camera_intrinsics", "sensor_extrinsics"}
    presence = {"clip_id": names} | {name: [name in there] * len(names) for name in FEATURES}
    for path, table in ((CLIP_INDEX_FILE, index), (PRESENCE_FILE, presence)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(parquet(pa.table(table)))
    with (root / FEATURES_FILE).open("w", newline="") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(("feature", "directory", "chunk_path", "clip_files_in_zip"))
        rows.writerows(feature.csv_row() for feature in FEATURES.values())


def _write_calibration(root: Path, chunk: int, names: tuple[str, ...]) -> None:
    keys = [(clip, camera) for clip in names for camera in CAMERAS]
    lens = {"width": WIDTH, "height": HEIGHT, "cx": 32.0, "cy": 24.0, "fw_poly_1": 30.0, "bw_poly_1": 1 / 30.0}
    pose = {"qx": -0.5, "qy": 0.5, "qz": -0.5, "qw": 0.5, "x": 1.7, "z": 1.4}
    for feature, key, columns, values in (
        ("camera_intrinsics", "camera_name", INTRINSIC_COLUMNS, lens),
        ("sensor_extrinsics", "sensor_name", EXTRINSIC_COLUMNS, pose),
    ):
        table = {"clip_id": [clip for clip, _ in keys], key: [camera for _, camera in keys]}
        table |= {column: [float(values.get(column, 0.0))] * len(keys) for column in columns}
        path = zip_path(root, feature, chunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(parquet(pa.table(table)))
