"""Checks of a chunk's calibration tables: which rig a clip was driven with, and whether its numbers can be true.

Two rigs are in the wild (cards and readers of 2025-26): the front-wide camera's principal point lies at row 543 of 1080
(A) or 755 (B), so that nothing may be cropped or projected around the middle of a picture.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.polynomial.polynomial import polyval

from omni_cli.errors import DataError
from omni_cli.formats.offline_intrinsics import UnknownLensError, offline_camera_model
from omni_cli.formats.physical_ai_av import EXTRINSIC_COLUMNS, INTRINSIC_COLUMNS
from omni_cli.sources.parquet_tables import read_table
from omni_cli.stages.checks.findings import Finding, refuse, warn
from omni_cli.stages.checks.repository import Chunk

FRONT_WIDE = "camera_front_wide_120fov"
RIG_ROWS = {"A": (500, 600), "B": (710, 800)}  # of 1080
UNKNOWN_RIG = "unknown"
_FULL_HEIGHT_PX = 1080
_MAX_NORM_ERROR = 1e-3
_MAX_INVERSE_ERROR_RAD = 0.01
_MAX_MODELS_APART = 0.1  # share of the focal length, online and offline
_MAX_ROWS_APART = 0.05  # share of the height
Rows = Mapping[tuple[str, str], Mapping[str, Any]]


class Calibrations:
    """The tables of one chunk that are on disk, and what is wrong with those that cannot be read."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.unreadable: list[Finding] = []
        self.intrinsics = self._read("camera_intrinsics", "camera_name", INTRINSIC_COLUMNS)
        self.extrinsics = self._read("sensor_extrinsics", "sensor_name", EXTRINSIC_COLUMNS)
        self.offline = self._read("camera_intrinsics.offline", "camera_name", ("model_type", "model_parameters"))

    def rig(self, clip: str) -> str:
        """Return A, B, unknown, or nothing where no table tells it."""
        row = self.intrinsics.get((clip, FRONT_WIDE))
        return rig_of(row["cy"], row["height"]) if row else ""

    def size_px(self, clip: str, camera: str) -> tuple[int, int] | None:
        """Return the size of picture that a camera is calibrated for, where a table tells it."""
        row = self.intrinsics.get((clip, camera))
        size = np.array([float(row["width"]), float(row["height"])]) if row else np.full(2, np.nan)
        return (round(size[0]), round(size[1])) if np.isfinite(size).all() else None

    def findings(self, clip: str, cameras: Sequence[str]) -> Iterator[Finding]:
        """Check one clip's rows; whether those that must be there are is the reader's to say."""
        for camera in cameras:
            found = [*self._intrinsic(clip, camera), *self._extrinsic(clip, camera), *self._offline(clip, camera)]
            yield from (finding.about(clip, camera) for finding in found)
        if FRONT_WIDE in cameras and self.rig(clip) == UNKNOWN_RIG:
            row = self.intrinsics[clip, FRONT_WIDE]
            detail = f"front-wide cy is {float(row['cy']):.0f} of {float(row['height']):.0f} rows; 543 (A) or 755 (B) "
            yield warn("unknown-rig", f"{detail}of 1080 expected").about(clip, FRONT_WIDE)

    def strangers(self) -> Iterator[Finding]:
        """Name clips that a table has and the index has not: they were withdrawn, or the two are of two revisions."""
        tables = {"camera_intrinsics": self.intrinsics, "camera_intrinsics.offline": self.offline}
        for feature, rows in tables.items():
            for clip in sorted({clip for clip, _ in rows} - set(self.chunk.listed)):
                yield warn("vanished-clip", f"{feature} has rows of it and the clip index lists it no more").about(clip)

    def _intrinsic(self, clip: str, camera: str) -> Iterator[Finding]:
        row = self.intrinsics.get((clip, camera))
        if row is None:
            return
        values = np.array([float(row[name]) for name in INTRINSIC_COLUMNS])
        if not np.isfinite(values).all():
            yield refuse("not-finite", "camera_intrinsics: NaN or infinite")
            return
        width, height, cx, cy = values[:4]
        if not (0 < cx < width and 0 < cy < height):
            yield warn("principal-point", f"({cx:.0f}, {cy:.0f}) lies outside of {width:.0f}x{height:.0f}")
        error = _inverse_error_rad(values[4:9], values[9:14], min(width, height) / 2)
        if not error <= _MAX_INVERSE_ERROR_RAD:  # NaN where a polynomial runs away
            yield warn("lens-disagrees", f"fw_poly and bw_poly are no inverse of each other: off by {error:.3f} rad")

    def _extrinsic(self, clip: str, camera: str) -> Iterator[Finding]:
        row = self.extrinsics.get((clip, camera))
        if row is None:
            return
        values = np.array([float(row[name]) for name in EXTRINSIC_COLUMNS])
        if not np.isfinite(values).all():
            yield refuse("not-finite", "sensor_extrinsics: NaN or infinite")
        elif (error := abs(float(np.linalg.norm(values[:4])) - 1)) > _MAX_NORM_ERROR:
            yield refuse("quaternion-norm", f"sensor_extrinsics: {error:.3g} away from norm 1")

    def _offline(self, clip: str, camera: str) -> Iterator[Finding]:
        """Revision 26.09 corrected the offline calibration of 115 clips and took back that of 25."""
        row = self.offline.get((clip, camera))
        if row is None:
            return
        if clip not in self.chunk.expected("camera_intrinsics.offline"):
            yield warn("withdrawn-calibration", "camera_intrinsics.offline has it, and the presence table says no: it "
                       "was taken back (26.09 did so for 25 clips); fetch the chunk again")  # fmt: skip
        try:
            model = offline_camera_model(row["model_type"], row["model_parameters"], "camera_intrinsics.offline")
        except UnknownLensError as error:
            yield warn("lens-not-applied", str(error))
            return
        except DataError as error:
            yield warn("bad-offline-calibration", str(error))
            return
        online = self.intrinsics.get((clip, camera))
        if online is not None and online["height"] > 0 and online["fw_poly_1"]:
            offline = model.forward_poly[1], model.cy_px / model.height_px
            yield from _apart(*offline, float(online["fw_poly_1"]), online["cy"] / online["height"])

    def _read(self, feature: str, key: str, columns: tuple[str, ...]) -> Rows:
        path = self.chunk.path(feature)
        name = path.relative_to(self.chunk.root).as_posix()
        if not path.is_file():
            return {}
        try:
            table = _as_numbers(read_table(path, name, ("clip_id", key, *columns)), name).to_pandas()
        except DataError as error:
            self.unreadable.append(refuse("unreadable-calibration", str(error), name))
            return {}
        frame = table.reset_index() if "clip_id" not in table.columns else table
        return _rows(frame, key, columns)


def rig_of(cy_px: float, height_px: float) -> str:
    """Return the rig whose front-wide camera looks so."""
    row = (cy_px + 0.5) * _FULL_HEIGHT_PX / max(height_px, 1.0) - 0.5  # resized pixel centres
    return next((rig for rig, (low, high) in RIG_ROWS.items() if low <= row <= high), UNKNOWN_RIG)


def _as_numbers(table: pa.Table, name: str) -> pa.Table:
    """Return the table with its parameters as float64, NaN where one is null."""
    for column in {*INTRINSIC_COLUMNS, *EXTRINSIC_COLUMNS}.intersection(table.column_names):
        try:
            numbers = table[column].cast(pa.float64())
        except pa.ArrowException:
            raise DataError(f"{name}: {column} is {table[column].type}, numbers expected; fetch it again") from None
        table = table.set_column(table.column_names.index(column), column, numbers)
    return table


def _rows(frame: pd.DataFrame, key: str, columns: Sequence[str]) -> Rows:
    keys = zip(frame["clip_id"].astype(str), frame[key].astype(str), strict=True)
    return dict(zip(keys, frame[list(columns)].to_dict("records"), strict=True))


def _inverse_error_rad(backward: np.ndarray, forward: np.ndarray, radius_px: float) -> float:
    """Return how far bw(r) is from the angle whose radius fw gives, inside the picture's smaller half."""
    with np.errstate(over="ignore", invalid="ignore"):
        angles = np.linspace(0, float(polyval(radius_px, backward)), 32)
        return float(np.abs(polyval(polyval(angles, forward), backward) - angles).max())


def _apart(offline_px: float, offline_row: float, online_px: float, online_row: float) -> Iterator[Finding]:
    if abs(offline_px / online_px - 1) > _MAX_MODELS_APART or abs(offline_row - online_row) > _MAX_ROWS_APART:
        yield warn("offline-disagrees", f"focal length {online_px:.0f} px online and {offline_px:.0f} px offline, "
                   f"principal row {online_row:.2f} and {offline_row:.2f} of the height")  # fmt: skip
