"""Synthetic clips as files, in exactly the layout of PhysicalAI-Autonomous-Vehicles.

`render_clip` is the unit that workers run; the writers turn finished clips into chunk files and indices. Same spec,
same bytes, on one machine and one set of pins.
"""

import csv
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from omni_cli import files
from omni_cli.formats import physical_ai_av as layout
from omni_cli.formats.video import encode_h264
from omni_cli.scene.cameras import Calibration, FTheta
from omni_cli.scene.poses import EgoMotion
from omni_cli.world.clip import NO_LINEAR_TERM, Clip, LinearTerm, SyntheticSpec, build_clip, clip_id, generator, rig_of
from omni_cli.world.reasons import reasoning_events
from omni_cli.world.rig import VEHICLES

CAMERAS = layout.CAMERAS
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_SPLITS, _SPLIT_SHARES = ("train", "val", "test"), (0.7, 0.15, 0.15)
_ORIGIN = "omni synthetic world"
LICENCE = "made by omni, free to use"
_COUNTRIES = ("Germany", "Japan", "Sweden", "United States")
_CALIBRATION_FEATURES = ("camera_intrinsics", "sensor_extrinsics", "vehicle_dimensions")


@dataclass(frozen=True)
class ClipFiles:
    """A rendered clip: the content of its zip members and its rows of the calibration tables."""

    clip_id: str
    rig: str
    members: Mapping[str, tuple[tuple[str, bytes], ...]]  # feature -> (member name, content), in the order written
    intrinsics: Mapping[str, Mapping[str, float]]  # camera -> row
    extrinsics: Mapping[str, Mapping[str, float]]
    lenses: Mapping[str, Mapping[str, Any]]  # of the offline table, which alone can tell a linear term


def render_clip(
    spec: SyntheticSpec, chunk: int, index: int, video: bytes | None = None, linear_cde: LinearTerm = NO_LINEAR_TERM
) -> ClipFiles:
    """Render one clip; deterministic, independent of every other clip.

    Args:
        spec: of the data set.
        chunk: the clip's chunk.
        index: its place there.
        video: what every camera is to show instead of the world; of the spec's size, rate and length.
        linear_cde: of every lens; the online calibration cannot tell it, the offline one does.
    """
    clip, name = build_clip(spec, chunk, index, linear_cde), clip_id(spec, chunk, index)
    members = {
        camera: _camera_members(clip, name, camera, _rendered(clip, camera, spec.fps) if video is None else video)
        for camera in spec.cameras
    }
    log = _parquet(_ego_table(clip.drive.log()))
    members["egomotion"] = ((layout.FEATURES["egomotion"].member(name, "egomotion"), log),)
    intrinsics = {camera: _intrinsics_row(calibration) for camera, calibration in clip.calibrations.items()}
    extrinsics = {camera: _extrinsics_row(calibration) for camera, calibration in clip.calibrations.items()}
    lenses = {camera: _lens_row(calibration) for camera, calibration in clip.calibrations.items()}
    return ClipFiles(name, clip.rig, members, intrinsics, extrinsics, lenses)


def write_chunk(
    root: Path, spec: SyntheticSpec, chunk: int, clips: Sequence[ClipFiles], *, with_offline: bool = False
) -> list[Path]:
    """Write a chunk's zips and calibration tables with a receipt each; return their paths.

    Args:
        root: the repository folder.
        spec: what the clips were rendered from.
        chunk: the chunk's number.
        clips: all clips of the chunk, in any order.
        with_offline: write the offline calibration, too.
    """
    by_name = {clip.clip_id: clip for clip in clips}
    ordered = [by_name[clip_id(spec, chunk, index)] for index in range(spec.clips_per_chunk)]
    written = []
    for feature in (*spec.cameras, "egomotion"):
        members = [member for clip in ordered for member in clip.members[feature]]
        written.append(_commit(root / layout.FEATURES[feature].chunk_path(chunk), _stored_zip(members)))
    tables = {
        "camera_intrinsics": _calibration_table({c.clip_id: c.intrinsics for c in ordered}, "camera_name"),
        "sensor_extrinsics": _calibration_table({c.clip_id: c.extrinsics for c in ordered}, "sensor_name"),
        "vehicle_dimensions": _clip_table({c.clip_id: asdict(VEHICLES[c.rig]) for c in ordered}),
    }
    if with_offline:
        offline = _calibration_table({c.clip_id: c.lenses for c in ordered}, "camera_name"), tables["sensor_extrinsics"]
        tables |= dict(zip(layout.OFFLINE_CALIBRATION, offline, strict=True))
    for feature, table in tables.items():
        written.append(_commit(root / layout.FEATURES[feature].chunk_path(chunk), _parquet(table)))
    return written


def write_indices(root: Path, spec: SyntheticSpec, chunks: Sequence[int], *, with_offline: bool = False) -> list[Path]:
    """Write features.csv, the clip index, metadata, reasons and the origin of these chunks; return their paths."""
    clips = [(chunk, index) for chunk in sorted(chunks) for index in range(spec.clips_per_chunk)]
    rows = {clip_id(spec, chunk, index): (chunk, index) for chunk, index in clips}
    made = {*spec.cameras, "egomotion", *_CALIBRATION_FEATURES, *(layout.OFFLINE_CALIBRATION if with_offline else ())}
    presence = {feature: feature in made for feature in layout.FEATURES}
    contents = {
        layout.FEATURES_FILE: _features_csv(),
        layout.CLIP_INDEX_FILE: _parquet(_clip_table({name: _index_row(spec, *row) for name, row in rows.items()})),
        layout.PRESENCE_FILE: _parquet(_clip_table(dict.fromkeys(rows, presence))),
        layout.COLLECTION_FILE: _parquet(_clip_table({n: _collection_row(spec, *row) for n, row in rows.items()})),
        layout.REASONING_FILE: _parquet(_clip_table({n: _reasoning_row(spec, *row) for n, row in rows.items()})),
        layout.REVISION_FILE: files.canonical_json(
            {"repository": _ORIGIN, "revision": files.hash_json(asdict(spec)), "licence": LICENCE}
        ).encode(),
    }
    return [_commit(root / path, content) for path, content in contents.items()]


def _rendered(clip: Clip, camera: str, fps: int) -> bytes:
    video = io.BytesIO()
    encode_h264(video, clip.frames(camera), rate_hz=Fraction(fps), gop=fps)
    return video.getvalue()


def _camera_members(clip: Clip, name: str, camera: str, video: bytes) -> tuple[tuple[str, bytes], ...]:
    feature, times = layout.FEATURES[camera], clip.timestamp_us[camera]
    timestamps = pd.DataFrame({"timestamp": times}, index=pd.RangeIndex(len(times), name="frame_index"))
    boxes = pd.DataFrame({column: np.zeros(0, np.int64) for column in ("frame_index", "x1", "y1", "x2", "y2")})
    return (
        (feature.member(name, "video"), video),
        (feature.member(name, "frame_timestamps"), _parquet(timestamps)),
        (feature.member(name, "blurred_boxes"), _parquet(boxes)),
    )


def _ego_table(ego: EgoMotion) -> pd.DataFrame:
    values = np.column_stack(
        [ego.quaternion_xyzw, ego.position_m, ego.velocity_mps, ego.acceleration_mps2, ego.curvature_per_m]
    )
    table = pd.DataFrame(values, columns=list(layout.EGOMOTION_COLUMNS[1:]))
    table.insert(0, layout.EGOMOTION_COLUMNS[0], ego.timestamp_us)
    return table


def _intrinsics_row(calibration: Calibration) -> dict[str, float]:
    model = calibration.model
    assert isinstance(model, FTheta)
    numbers = (model.width_px, model.height_px, model.cx_px, model.cy_px, *model.backward_poly, *model.forward_poly)
    return dict(zip(layout.INTRINSIC_COLUMNS, map(float, numbers), strict=True))


def _lens_row(calibration: Calibration) -> dict[str, Any]:
    """Return what camera_intrinsics.offline says of a camera; rays are cast by the backward polynomial."""
    model = calibration.model
    assert isinstance(model, FTheta)
    parameters = {
        "resolution": [model.width_px, model.height_px],
        "shutter_type": "GLOBAL",
        "shutter_delay_us": 0,
        "principal_point": [model.cx_px, model.cy_px],
        "reference_poly": "PIXELDIST_TO_ANGLE",
        "pixeldist_to_angle_poly": model.backward_poly,
        "angle_to_pixeldist_poly": model.forward_poly,
        "max_angle": model.max_angle_rad,
        "linear_cde": model.linear_cde,
        "external_distortion_parameters": None,
    }
    return {"model_type": "ftheta", "model_parameters": json.dumps(parameters), "ego_mask_image_png": b""}


def _extrinsics_row(calibration: Calibration) -> dict[str, float]:
    pose = calibration.rig_T_camera
    numbers = (*pose.rotation.as_quat(), *pose.translation_m)
    return dict(zip(layout.EXTRINSIC_COLUMNS, map(float, numbers), strict=True))


def _index_row(spec: SyntheticSpec, chunk: int, index: int) -> dict[str, Any]:
    split = generator(spec, chunk, index, "split").choice(_SPLITS, p=_SPLIT_SHARES)
    return {"clip_is_valid": True, "chunk": chunk, "split": str(split)}


def _collection_row(spec: SyntheticSpec, chunk: int, index: int) -> dict[str, Any]:
    rng = generator(spec, chunk, index, "metadata")
    country, month, hour = str(rng.choice(_COUNTRIES)), int(rng.integers(1, 13)), int(rng.integers(8, 18))
    platform = "hyperion_8" if rig_of(spec, chunk, index) == "a" else "hyperion_8.1"
    return {
        "country": country,
        "month": month,
        "hour_of_day": hour,
        "platform_class": platform,
        "radar_config": None,
    }


def _reasoning_row(spec: SyntheticSpec, chunk: int, index: int) -> dict[str, Any]:
    events = reasoning_events(spec, chunk, index)
    return {
        "feature": "camera_front_wide_120fov",
        "event_cluster": "SYNTHETIC_ROAD",
        "events": None if events is None else json.dumps(events),
        "split": _index_row(spec, chunk, index)["split"],
    }


def _clip_table(rows: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows.values()), index=pd.Index(list(rows), name="clip_id"))


def _calibration_table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], sensor_key: str) -> pd.DataFrame:
    keys = [(clip, sensor) for clip, sensors in rows.items() for sensor in sensors]
    index = pd.MultiIndex.from_tuples(keys, names=["clip_id", sensor_key])
    return pd.DataFrame([rows[clip][sensor] for clip, sensor in keys], index=index)


def _parquet(table: pd.DataFrame) -> bytes:
    stream = io.BytesIO()
    table.to_parquet(stream)
    return stream.getvalue()


def _features_csv() -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("feature", "directory", "chunk_path", "clip_files_in_zip"))
    writer.writerows(feature.csv_row() for feature in layout.FEATURES.values())
    return stream.getvalue().encode()


def _stored_zip(members: Sequence[tuple[str, bytes]]) -> bytes:
    """Return a zip whose bytes depend on nothing but its members: stored, and of a fixed date."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name, _ZIP_TIME), content)
    return stream.getvalue()


def _commit(path: Path, content: bytes) -> Path:
    files.write_bytes(path, content)
    files.write_receipt(path)
    return path
