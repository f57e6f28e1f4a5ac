"""Import of comma2k19: unpacked chunks, or routes and segments of them (formats/comma2k19.py).

All become `<dongle>_<log>/<n>/...`, as in the data set without its chunks; what omni does not read is left behind.
"""

from pathlib import Path
from typing import Any

from omni_cli.formats.comma2k19 import parse_segment_file
from omni_cli.report import Console
from omni_cli.stages.fetch.openpilot import import_segments
from omni_cli.stages.fetch.request import FetchRequest

_EXPECTED = "unpacked segments like Chunk_1/<dongle>|<date>--<time>/40/ with global_pose/, processed_log/, video.hevc"


def import_comma2k19(request: FetchRequest, origin: Path, console: Console) -> dict[str, Any]:
    """Copy the video, the poses and the CAN logs of every segment under a folder, verified.

    Raises:
        DataError: no segment is there, or two different files claim one place.
        OmniError: too little disk space, or a copy that differs.
    """
    return import_segments(request, origin, console, place_of=_segment_place, expected=_EXPECTED)


def _segment_place(path: Path) -> Path | None:
    parsed = parse_segment_file(path.absolute().as_posix())
    return Path(parsed[0].route, str(parsed[0].number), parsed[1]) if parsed else None
