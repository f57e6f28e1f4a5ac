"""TRI's DGP scenes: where their files lie, and what of their JSON omni reads.

Sources: TRI-ML/dgp (`dgp/proto/*.proto` and the README beside them) and TRI-ML/DDAD (README), checked against DGP's own
test scenes. A scene is a folder with one `scene_HASH.json`; an image, a sweep of the lidar are a *datum* each.

Frames: extrinsics are `vehicle_T_sensor`, poses are `world_T_sensor` at the time of the datum. The vehicle's frame
is omni's rig: x forward, y left, z up, its origin on the ground below the middle of the rear axle.

Times: `timestamp` should be POSIX time, to the microsecond. In the test scenes it is ten times that, and files are
named by it: dates lie in the year 2464, and images that the README calls taken at 10 Hz lie a second apart.
"""

import datetime
import re
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from omni_cli.errors import DataError

CAMERAS = ("CAMERA_01", "CAMERA_05", "CAMERA_06", "CAMERA_07", "CAMERA_08", "CAMERA_09")  # of DDAD; 01 looks ahead
MAX_JSON_BYTES = 1 << 26
MAX_IMAGE_BYTES = 1 << 26
_AGAIN = "copy the whole scene and fetch again"
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_FIRST_YEAR, _LAST_YEAR = 2000, 2100  # in which a scene can have been recorded
_PINHOLE = frozenset(("fx", "fy", "cx", "cy", "fov"))  # the field of view follows from the others

_HASH = r"[0-9a-f]{40}"
_SCENE_FILE = re.compile(
    rf"(?:^|/)(?P<scene>[\w-]{{1,80}})/"
    rf"(?P<file>scene_{_HASH}\.json|calibration/{_HASH}\.json|rgb/[\w-]{{1,80}}/[\w-]{{1,80}}\.(?:jpg|jpeg|png))$",
    re.ASCII,
)


class _Read(BaseModel):
    """What omni reads of a message; protobuf leaves out what is zero, and messages hold more."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Vector(_Read):
    """Metres."""

    x: float = 0.0
    y: float = 0.0
    z: float = 0.0


class Quaternion(_Read):
    """Of length one."""

    qw: float = 0.0
    qx: float = 0.0
    qy: float = 0.0
    qz: float = 0.0


class RigidPose(_Read):
    """A rotation, then a translation."""

    translation: Vector
    rotation: Quaternion


class Image(_Read):
    """A picture of one camera."""

    filename: str  # inside the scene's folder
    width: int
    height: int
    pose: RigidPose


class DatumId(_Read):
    """Which sensor, and when."""

    name: str
    timestamp: str


class DatumValue(_Read):
    """One of several; omni reads images."""

    image: Image | None = None


class Datum(_Read):
    """What one sensor gave at one instant."""

    id: DatumId
    datum: DatumValue


class Sample(_Read):
    """What the sensors gave at about one instant."""

    calibration_key: str


class Scene(_Read):
    """`scene_HASH.json`."""

    data: tuple[Datum, ...]
    samples: tuple[Sample, ...]


class Calibration(_Read):
    """`calibration/HASH.json`: three lists, sensor by sensor."""

    names: tuple[str, ...]
    extrinsics: tuple[RigidPose, ...]
    intrinsics: tuple[dict[str, float], ...]


M = TypeVar("M", bound=BaseModel)


def parse_scene_file(path: str) -> tuple[str, str] | None:
    """Return the scene that a path belongs to and its name inside it, or None where omni does not read it.

    Args:
        path: an absolute or relative path with `/` between its parts.
    """
    match = _SCENE_FILE.search(path)
    return (match["scene"], match["file"]) if match else None


def is_scene_json(file: str) -> bool:
    """Say whether a file of a scene is the one that lists the others."""
    return "/" not in file


def read_json(path: Path, schema: type[M]) -> M:
    """Read a document.

    Raises:
        DataError: it is missing, too large, or not of this schema.
    """
    if not path.is_file():
        raise DataError(f"{path}: is missing; {_AGAIN}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise DataError(
            f"{path}: holds {path.stat().st_size} bytes, more than the {MAX_JSON_BYTES} of any scene; {_AGAIN}"
        )
    try:
        return schema.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise DataError(f"{path}: no {schema.__name__.lower()} of DGP ({where}: {first['msg']}); {_AGAIN}") from None


def is_tenfold(timestamp: str) -> bool:
    """Say whether a time is too late to be POSIX time, and so is stated tenfold."""
    return int(timestamp[:4]) > _LAST_YEAR


def microseconds(timestamp: str) -> int:
    """Return POSIX time in microseconds; a date too late to be one is taken for tenths of them.

    Raises:
        DataError: it is no time at which a scene can have been recorded, either way.
    """
    try:
        told = datetime.datetime.fromisoformat(timestamp)
        told = told if told.tzinfo else told.replace(tzinfo=datetime.UTC)  # not the zone of this machine
        found_us = (told - _EPOCH) // datetime.timedelta(microseconds=1)
        true_us = (found_us + 5) // 10 if is_tenfold(timestamp) else found_us
        year = (_EPOCH + datetime.timedelta(microseconds=true_us)).year
    except (ValueError, OverflowError):
        year = 0
    if not _FIRST_YEAR <= year <= _LAST_YEAR:
        raise DataError(f"timestamp {timestamp!r}: no time since {_FIRST_YEAR}, nor ten times one; {_AGAIN}")
    return true_us


def pinhole(intrinsics: dict[str, float]) -> tuple[float, float, float, float]:
    """Return fx, fy, cx, cy.

    Raises:
        DataError: the camera is no pinhole, or has a distortion.
    """
    if bent := sorted(name for name, value in intrinsics.items() if value and name not in _PINHOLE):
        raise DataError(f"intrinsics have {bent[0]} {intrinsics[bent[0]]:g}; only plain pinhole cameras are read")
    fx, fy, cx, cy = (intrinsics.get(name, 0.0) for name in ("fx", "fy", "cx", "cy"))
    if not (fx > 0 and fy > 0):
        raise DataError(f"intrinsics have focal lengths {fx:g} and {fy:g}; expected two above zero")
    return fx, fy, cx, cy
