"""Where a clip's cameras sit and how they see: a chunk's tables, the corrected offline ones before the online ones.

NVIDIA's own converter (ncore, tools/data_converter/pai) prefers the offline calibration. So does omni, camera by
camera, where it may be trusted and can be applied:

    both of its tables are here      a lens and its mount were fitted together: they are not mixed with the other pair's
    the presence table promises it   revision 26.09 took that of 25 clips back; tables of before still hold it
    it is an f-theta lens alone      a windshield that bends its rays, or another lens, omni cannot apply

Everywhere else the online calibration is used. Which one it is, and why, is told for a recording's provenance.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.spatial.transform import Rotation

from omni_cli.errors import DataError
from omni_cli.formats import physical_ai_av as layout
from omni_cli.formats.offline_intrinsics import UnknownLensError, offline_camera_model
from omni_cli.scene.cameras import Calibration, FTheta
from omni_cli.scene.poses import Pose
from omni_cli.sources.parquet_tables import numbers, read_table

_ONLINE = ("camera_intrinsics", "sensor_extrinsics")
_MAX_NORM_ERROR = 1e-3
_Rows = Mapping[tuple[str, str], Mapping[str, Any]]  # (clip id, sensor) -> row


@dataclass(frozen=True)
class Calibrated:
    """A camera's calibration, None where no table of it is here, and which one it is."""

    calibration: Calibration | None
    origin: str


class CalibrationTables:
    """Reads the tables of one folder. They are kept once read, until `forget`; it can be pickled."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[Path, _Rows] = {}

    def of_camera(self, clip_id: str, chunk: int, camera: str) -> Calibrated:
        """Return the calibration of one camera of a clip.

        Raises:
            DataError: a table cannot be read, lacks the row that it must have, or a number in it cannot be.
        """
        barred = self._why_not_offline(clip_id, chunk)
        if barred is None:
            try:
                return Calibrated(self._offline(clip_id, chunk, camera), "offline")
            except UnknownLensError as error:
                barred = f": the offline one is {error.kind}, which omni does not apply"
        online = self._online(clip_id, chunk, camera)
        return Calibrated(online, f"{'online' if online else 'its tables were not fetched'}{barred}")

    def forget(self) -> None:
        """Let go of the chunks' tables."""
        self._read.clear()

    def _why_not_offline(self, clip_id: str, chunk: int) -> str | None:
        """Return why the offline calibration is not to be used, empty where there is none; None where it is."""
        away = [feature for feature in layout.OFFLINE_CALIBRATION if not self._path(feature, chunk).is_file()]
        if len(away) == len(layout.OFFLINE_CALIBRATION):
            return ""
        if away:
            return f": {away[0]} is not here"
        if not (self.root / layout.PRESENCE_FILE).is_file():
            return f": {layout.PRESENCE_FILE}, which would promise the offline one, is not here"
        return None if clip_id in self._promised else ": the presence table promises no offline one"

    @cached_property
    def _promised(self) -> frozenset[str]:
        """The clips that have an offline calibration."""
        path = self.root / layout.PRESENCE_FILE
        table = read_table(path, str(path), ("clip_id", *layout.OFFLINE_CALIBRATION)).to_pydict()
        rows = zip(*(table[name] for name in ("clip_id", *layout.OFFLINE_CALIBRATION)), strict=True)
        return frozenset(clip for clip, has_lens, has_mount in rows if has_lens is True and has_mount is True)

    def _offline(self, clip_id: str, chunk: int, camera: str) -> Calibration:
        lens_of, mount_of = layout.OFFLINE_CALIBRATION
        lens = self._row(lens_of, chunk, clip_id, camera)
        name = f"{self._path(lens_of, chunk)}: {camera} of clip {clip_id}"
        model = offline_camera_model(lens["model_type"], lens["model_parameters"], name)
        return self._mounted(model, mount_of, chunk, clip_id, camera)

    def _online(self, clip_id: str, chunk: int, camera: str) -> Calibration | None:
        """Return the online calibration, or None where its tables were not fetched."""
        if not all(self._path(feature, chunk).is_file() for feature in _ONLINE):
            return None
        lens_of, mount_of = _ONLINE
        model = layout.camera_model(self._row(lens_of, chunk, clip_id, camera))
        return self._mounted(model, mount_of, chunk, clip_id, camera)

    def _mounted(self, model: FTheta, feature: str, chunk: int, clip_id: str, camera: str) -> Calibration:
        row = self._row(feature, chunk, clip_id, camera)
        quaternion = np.array([row[name] for name in ("qx", "qy", "qz", "qw")])
        if not abs(np.linalg.norm(quaternion) - 1) <= _MAX_NORM_ERROR:
            raise DataError(f"{self._path(feature, chunk)}: quaternion of {camera} of clip {clip_id} is off unit norm; "
                            "fetch this chunk again, or quarantine the clip")  # fmt: skip
        place_m = np.array([row[name] for name in ("x", "y", "z")])
        return Calibration(model, Pose(Rotation.from_quat(quaternion), place_m))

    def _path(self, feature: str, chunk: int) -> Path:
        return self.root / layout.FEATURES[feature].chunk_path(chunk)

    def _row(self, feature: str, chunk: int, clip_id: str, camera: str) -> Mapping[str, Any]:
        path = self._path(feature, chunk)
        rows = self._rows(path, *layout.CALIBRATION_COLUMNS[feature])
        if (clip_id, camera) not in rows:
            raise DataError(f"{path}: no row for {camera} of clip {clip_id}; fetch this chunk again")
        return rows[clip_id, camera]

    def _rows(self, path: Path, sensor_key: str, columns: tuple[str, ...]) -> _Rows:
        if path not in self._read:
            table = read_table(path, str(path), ("clip_id", sensor_key, *columns))
            keys = list(zip(table.column("clip_id").to_pylist(), table.column(sensor_key).to_pylist(), strict=True))
            rows = dict(zip(keys, _values(table, columns, str(path)), strict=True))
            if len(rows) < len(keys):
                raise DataError(f"{path}: {len(keys) - len(rows)} cameras have two rows; fetch this chunk again")
            self._read[path] = rows
        return self._read[path]


def _values(table: pa.Table, columns: tuple[str, ...], name: str) -> list[dict[str, Any]]:
    """Return a table's rows: texts where it holds lenses as texts, else finite numbers."""
    if columns == layout.LENS_COLUMNS:
        return list(table.select(columns).to_pylist())
    return [dict(zip(columns, row, strict=True)) for row in numbers(table, columns, name).tolist()]
