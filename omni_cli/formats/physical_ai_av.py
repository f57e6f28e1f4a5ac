"""The PhysicalAI-Autonomous-Vehicles repository: names, templates and columns.

Source: NVIDIA's `physical_ai_av` devkit 0.2.3 and the dataset card. Times are integer microseconds relative to the
start of the clip; lengths are metres; quaternions are (x, y, z, w).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.polynomial.polynomial import polyval

from omni_cli.config import comma_list
from omni_cli.scene.cameras import FTheta

REPOSITORY = "nvidia/PhysicalAI-Autonomous-Vehicles"
LICENCE = "NVIDIA Autonomous Vehicle Dataset License Agreement"

CAMERAS = (
    "camera_cross_left_120fov",
    "camera_cross_right_120fov",
    "camera_front_tele_30fov",
    "camera_front_wide_120fov",
    "camera_rear_left_70fov",
    "camera_rear_right_70fov",
    "camera_rear_tele_30fov",
)
# Camera sets in the row-major order of their tiles.
CAMERA_SETS = {
    "1-cam": ("camera_front_wide_120fov",),
    "4-cam": (
        "camera_front_wide_120fov",
        "camera_front_tele_30fov",
        "camera_rear_left_70fov",
        "camera_rear_right_70fov",
    ),
    "7-cam": (
        "camera_front_wide_120fov",
        "camera_front_tele_30fov",
        "camera_cross_left_120fov",
        "camera_cross_right_120fov",
        "camera_rear_left_70fov",
        "camera_rear_right_70fov",
        "camera_rear_tele_30fov",
    ),
}


def expand_cameras(text: str) -> tuple[str, ...]:
    """Return the names in a comma list of cameras and camera sets; each once, in order."""
    return tuple(dict.fromkeys(name for word in comma_list(text) for name in CAMERA_SETS.get(word, (word,))))


_LABELS = ("egomotion", "egomotion.offline", "obstacle.offline")
_CALIBRATIONS = (
    "camera_intrinsics",
    "camera_intrinsics.offline",
    "lidar_intrinsics.offline",
    "sensor_extrinsics",
    "sensor_extrinsics.offline",
    "vehicle_dimensions",
)
_LIDARS = ("lidar_top_360fov",)
_RADARS = (
    *(f"radar_corner_{corner}_srr_{kind}" for corner in ("front_left", "front_right") for kind in (0, 3)),
    *(f"radar_corner_{corner}_srr_{kind}" for corner in ("rear_left", "rear_right") for kind in (0, 3)),
    *("radar_front_center_imaging_lrr_1", "radar_front_center_mrr_2", "radar_front_center_srr_0"),
    *("radar_rear_left_mrr_2", "radar_rear_left_srr_0", "radar_rear_right_mrr_2", "radar_rear_right_srr_0"),
    *(f"radar_side_{side}_srr_{kind}" for side in ("left", "right") for kind in (0, 3)),
)
REASONING = "reasoning"  # one table of the whole dataset, not a feature of its chunks
FEATURE_SETS = {"labels": _LABELS, "calibration": _CALIBRATIONS, "lidar": _LIDARS, "radar": _RADARS}

MOST_CHUNKS = 10_000  # a chunk's number has four digits
FEATURES_FILE = "features.csv"
CLIP_INDEX_FILE = "clip_index.parquet"
PRESENCE_FILE = "metadata/feature_presence.parquet"
LEGACY_PRESENCE_FILE = "metadata/sensor_presence.parquet"
COLLECTION_FILE = "metadata/data_collection.parquet"
SPLIT_FILE = "splits/default.parquet"  # where it exists it overrides the clip index
REASONING_FILE = "reasoning/ood_reasoning.parquet"
REVISION_FILE = "revision.json"  # ours, not the hub's: repository, revision and licence of what a folder holds
MANIFEST_FILE = "manifest.json"  # ours: every file that came, with hash and date, and what is absent upstream

EGOMOTION_COLUMNS = (
    "timestamp",
    "qx",
    "qy",
    "qz",
    "qw",
    "x",
    "y",
    "z",
    "vx",
    "vy",
    "vz",
    "ax",
    "ay",
    "az",
    "curvature",
)
EXTRINSIC_COLUMNS = ("qx", "qy", "qz", "qw", "x", "y", "z")  # rig_T_sensor, indexed by (clip_id, sensor_name)
INTRINSIC_COLUMNS = (  # indexed by (clip_id, camera_name); theta = bw_poly(r px), r px = fw_poly(theta rad)
    *("width", "height", "cx", "cy"),
    *(f"bw_poly_{i}" for i in range(5)),
    *(f"fw_poly_{i}" for i in range(5)),
)
LENS_COLUMNS = ("model_type", "model_parameters")  # of camera_intrinsics.offline: a name, and a JSON text
OFFLINE_CALIBRATION = ("camera_intrinsics.offline", "sensor_extrinsics.offline")
CALIBRATION_COLUMNS = {  # table -> the key beside clip_id, and its columns
    "camera_intrinsics": ("camera_name", INTRINSIC_COLUMNS),
    "camera_intrinsics.offline": ("camera_name", LENS_COLUMNS),
    "sensor_extrinsics": ("sensor_name", EXTRINSIC_COLUMNS),
    "sensor_extrinsics.offline": ("sensor_name", EXTRINSIC_COLUMNS),
}


@dataclass(frozen=True)
class Feature:
    """One row of features.csv. Member names belong to clips inside a chunk's zip; none for a parquet table."""

    name: str
    directory: str
    suffix: str  # zip or parquet
    members: tuple[tuple[str, str], ...]  # (alias, file name after the clip id)

    def chunk_path(self, chunk: int) -> str:
        """Return the repository path of one chunk."""
        return f"{self.directory}/{self.name}/{self.name}.chunk_{chunk:04d}.{self.suffix}"

    def member(self, clip_id: str, alias: str) -> str:
        """Return the name of one of a clip's members."""
        return f"{clip_id}.{dict(self.members)[alias]}"

    def csv_row(self) -> tuple[str, str, str, str]:
        """Return the row of features.csv, with its literal `{chunk_id:04d}` and `{clip_id}` templates."""
        path = f"{self.directory}/{self.name}/{self.name}.chunk_{{chunk_id:04d}}.{self.suffix}"
        names = {alias: f"{{clip_id}}.{file}" for alias, file in self.members}
        return self.name, self.directory, path, json.dumps(names) if names else ""


def _features() -> tuple[Feature, ...]:
    camera = (("video", "mp4"), ("frame_timestamps", "timestamps.parquet"), ("blurred_boxes", "blurred_boxes.parquet"))
    return (
        *(Feature(n, "labels", "zip", ((n, f"{n}.parquet"),)) for n in _LABELS),
        *(Feature(n, "calibration", "parquet", ()) for n in _CALIBRATIONS),
        *(Feature(n, "camera", "zip", tuple((alias, f"{n}.{end}") for alias, end in camera)) for n in CAMERAS),
        *(Feature(n, "lidar", "zip", (("pointclouds", f"{n}.parquet"),)) for n in _LIDARS),
        *(Feature(n, "radar", "zip", (("scans", f"{n}.parquet"),)) for n in _RADARS),
    )


def is_chunk(number: object) -> bool:
    """Return whether something may be a chunk's number: it becomes a part of paths."""
    return type(number) is int and 0 <= number < MOST_CHUNKS


FEATURES: dict[str, Feature] = {feature.name: feature for feature in _features()}


def camera_model(row: Mapping[str, float]) -> FTheta:
    """Return the camera that a row of camera_intrinsics describes.

    The table states no maximal angle, so it is the one at the corner of the image that is farthest from the principal
    point: what the polynomials were fitted for.
    """
    width, height, cx, cy = (row[name] for name in INTRINSIC_COLUMNS[:4])
    backward = tuple(row[f"bw_poly_{i}"] for i in range(5))
    forward = tuple(row[f"fw_poly_{i}"] for i in range(5))
    corner_px = np.hypot(max(cx + 0.5, width - 0.5 - cx), max(cy + 0.5, height - 0.5 - cy))
    return FTheta(round(width), round(height), cx, cy, forward, backward, float(polyval(corner_px, backward)))
