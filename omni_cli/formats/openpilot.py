"""Route folders of comma devices: names of segments and files, compressions, cameras, their lenses, kinds of events.

Source: openpilot `tools/lib/helpers.py`, `system/loggerd`, `cereal/log.capnp`, `common/transformations/camera.py`. A
route is one drive of one device (dongle); it is cut into segments of a minute, each with a log and one video per
camera. Event and frame times are nanoseconds on the device's boot-monotonic clock.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from omni_cli.scene.cameras import Pinhole

NANOSECONDS_PER_MICROSECOND = 1_000
# MPEG-TS counts 90 kHz in 33 bits, so that its times start again after 26.5 hours of uptime.
TS_WRAP_US = 2**33 * 1_000_000 / 90_000

_DONGLE = r"[a-f0-9]{16}"
_LOG_ID = r"(?:\d{4}-\d\d-\d\d--\d\d-\d\d-\d\d|[a-f0-9]{8}--[a-z0-9]{10})"
_FILE = r"[a-z_]+(?:\.[a-z0-9]+)?"
# One pattern for every layout in use: <dongle>/<log>--<n>/FILE, <dongle>|<log>--<n>/FILE, <dongle>_<log>--<n>/FILE,
# <dongle>|<log>/<n>/FILE, <log>--<n>/FILE (on the device), and flat <dongle>_<log>--<n>--FILE.
SEGMENT_FILE = re.compile(
    rf"(?:^|/)(?:(?P<dongle>{_DONGLE})[|_/])?(?P<log>{_LOG_ID})(?:--|/)(?P<number>\d{{1,4}})(?:/|--)(?P<file>{_FILE})$"
)

# Best first: an rlog has every event, a qlog one of ten.
LOG_FILES = ("rlog.zst", "rlog.bz2", "rlog", "raw_log.bz2", "qlog.zst", "qlog.bz2", "qlog")

BZIP2_MAGIC = b"BZh"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class Camera:
    """One camera of a segment."""

    name: str
    files: tuple[str, ...]  # the names its video had over the years
    index_event: str  # the event that gives each encoded frame its time
    has_own_times: bool  # the container carries true times (MPEG-TS does, raw HEVC does not)


CAMERAS: dict[str, Camera] = {
    camera.name: camera
    for camera in (
        Camera("qcamera", ("qcamera.ts",), "qRoadEncodeIdx", has_own_times=True),
        Camera("fcamera", ("fcamera.hevc", "video.hevc"), "roadEncodeIdx", has_own_times=False),
        Camera("ecamera", ("ecamera.hevc",), "wideRoadEncodeIdx", has_own_times=False),
    )
}
# The kinds of event that omni reads, with their ordinals in the union of `log.capnp`. A release may rename one
# (liveLocationKalman became liveLocationKalmanDEPRECATED, pathPlan lateralPlan), the ordinal stays.
EVENT_ORDINALS: Mapping[str, int] = {
    "initData": 1,
    "roadCameraState": 2,
    "deviceState": 6,
    "roadEncodeIdx": 15,
    "liveCalibration": 19,
    "gpsLocation": 21,
    "carState": 22,
    "gpsLocationExternal": 48,
    "cameraOdometry": 63,
    "lateralPlan": 64,
    "carParams": 69,
    "driverMonitoringState": 71,
    "liveLocationKalman": 72,
    "modelV2": 75,
    "wideRoadEncodeIdx": 77,
    "qRoadEncodeIdx": 90,
    "drivingModelData": 128,
    "livePose": 129,
}
DEFAULT_HEIGHT_M = 1.22  # of the camera above the road, where a log does not say it; `common/transformations/model.py`

FILES = frozenset(LOG_FILES) | {name for camera in CAMERAS.values() for name in camera.files}


@dataclass(frozen=True, order=True)
class SegmentName:
    """One segment of one route."""

    dongle: str  # empty where a device's own folder does not say it
    log_id: str
    number: int

    @property
    def route(self) -> str:
        """Return the name of the drive."""
        return f"{self.dongle}_{self.log_id}" if self.dongle else self.log_id

    def __str__(self) -> str:
        return f"{self.route}--{self.number}"


def parse_segment_file(path: str) -> tuple[SegmentName, str] | None:
    """Return the segment and the file name that a path ends in, or None where it is no file of a segment.

    Args:
        path: an absolute or relative path with `/` between its parts, in any layout of comma's tools.
    """
    match = SEGMENT_FILE.search(path)
    if match is None or match["file"] not in FILES:
        return None
    return SegmentName(match["dongle"] or "", match["log"], int(match["number"])), match["file"]


def lens(camera: str, device: str, sensor: str, *, width_px: int, height_px: int) -> Pinhole | None:
    """Return how one camera of one device maps rays to the pixels of its video, or None where comma gives no lens.

    openpilot puts the principal point at (w / 2, h / 2) and counts pixels from the centre of the first, as we do
    (scene/cameras.py). A qcamera's video is the road camera's whole frame made smaller, its aspect not kept.

    Args:
        camera: a name of `CAMERAS`.
        device: `deviceState.deviceType`.
        sensor: `roadCameraState.sensor`; `unknown` before there was the field.
        width_px: of the video.
        height_px: of the video.
    """
    frames = _LENSES.get((device, sensor), {})
    whole = frames.get("fcamera" if camera == "qcamera" else camera)
    return whole.resized(width_px, height_px) if whole else None


def _centred(width_px: int, height_px: int, focal_px: float) -> Pinhole:
    return Pinhole(width_px, height_px, focal_px, focal_px, width_px / 2, height_px / 2)


# Source: `DEVICE_CAMERAS` in `common/transformations/camera.py`; by device, sensor.
_NEO = {"fcamera": _centred(1164, 874, 910.0)}
_AR_OX = {"fcamera": _centred(1928, 1208, 2648.0), "ecamera": _centred(1928, 1208, 567.0)}
_OS = {"fcamera": _centred(1344, 760, 1522.0 * 3 / 4), "ecamera": _centred(1344, 760, 567.0 * 3 / 4)}
_SENSORS = {"ar0231": _AR_OX, "ox03c10": _AR_OX, "os04c10": _OS}
_LENSES: Mapping[tuple[str, str], Mapping[str, Pinhole]] = {
    ("neo", "unknown"): _NEO,
    ("tici", "unknown"): _AR_OX,  # logged before there was a second sensor
    ("pc", "unknown"): _AR_OX,  # the simulator
    ("unknown", "ar0231"): _AR_OX,  # logged before there was a second device
    ("unknown", "ox03c10"): _AR_OX,
    **{(device, sensor): _SENSORS[sensor] for device, sensor in itertools.product(("tici", "tizi", "mici"), _SENSORS)},
}
