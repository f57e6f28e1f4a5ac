"""comma2k19: where its files lie, what they hold, and the camera that all of them were recorded with.

Source: commaai/comma2k19 (README, `utils/camera.py`), checked against the arrays of its Example_1. A segment is one
minute of a route; every array is a NumPy file without a suffix. Times are seconds on the device's boot clock, lengths
are metres, positions are ECEF. The README says that an orientation turns ECEF into the device's frame (x forward,
y right, z down); the data, and the code beside it, say the opposite: it turns the device's frame into ECEF.
"""

import re

from omni_cli.formats.openpilot import DEFAULT_HEIGHT_M, SegmentName
from omni_cli.scene.cameras import Pinhole

CAMERA, VIDEO_FILE = "video", "video.hevc"
CAMERAS = (CAMERA,)
INTRINSICS = Pinhole(1164, 874, 910.0, 910.0, 582.0, 437.0)  # of the EON, all that was used
CAMERA_HEIGHT_M = DEFAULT_HEIGHT_M  # the data do not say it

POSES_FOLDER = "global_pose"
FRAME_TIMES = f"{POSES_FOLDER}/frame_times"  # (n,)
POSITIONS = f"{POSES_FOLDER}/frame_positions"  # (n, 3)
VELOCITIES = f"{POSES_FOLDER}/frame_velocities"  # (n, 3)
ORIENTATIONS = f"{POSES_FOLDER}/frame_orientations"  # (n, 4) w, x, y, z: ecef_R_device
SPEED_TIMES, SPEEDS = (f"processed_log/CAN/speed/{name}" for name in ("t", "value"))  # (k,), (k, 1)
STEERING_TIMES, STEERING_ANGLES = (f"processed_log/CAN/steering_angle/{name}" for name in ("t", "value"))  # deg, left +
POSES = (FRAME_TIMES, POSITIONS, VELOCITIES, ORIENTATIONS)
CAN_LOGS = (SPEED_TIMES, SPEEDS, STEERING_TIMES, STEERING_ANGLES)
FILES = frozenset((VIDEO_FILE, *POSES, *CAN_LOGS))  # what omni reads; IMU, GNSS, radar and raw logs stay where they are

# <dongle>|<log>/<n>/FILE; `_` replaces `|` where a file system forbids it (`utils/unzip_msft_fs.py`).
_SEGMENT_FILE = re.compile(
    r"(?:^|/)(?P<dongle>[a-f0-9]{16})[|_](?P<log>\d{4}-\d\d-\d\d--\d\d-\d\d-\d\d)/(?P<number>\d{1,4})/"
    r"(?P<file>(?:global_pose|processed_log)/[\w/]+|video\.hevc)$"
)


def parse_segment_file(path: str) -> tuple[SegmentName, str] | None:
    """Return the segment that a path belongs to and its name inside it, or None where omni does not read it.

    Args:
        path: an absolute or relative path with `/` between its parts.
    """
    match = _SEGMENT_FILE.search(path)
    if match is None or match["file"] not in FILES:
        return None
    return SegmentName(match["dongle"], match["log"], int(match["number"])), match["file"]
