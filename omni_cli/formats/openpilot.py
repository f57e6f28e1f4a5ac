"""Route folders of comma devices: names of segments and files, compressions, cameras and their events.

Source: openpilot `tools/lib/helpers.py`, `system/loggerd`, `cereal/log.capnp`. A route is one drive of one device
(dongle); it is cut into segments of a minute, each with a log and one video per camera. Event and frame times are
nanoseconds on the device's boot-monotonic clock.
"""

import re
from dataclasses import dataclass

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
