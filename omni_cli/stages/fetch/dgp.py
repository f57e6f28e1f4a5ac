"""Import of DGP scenes, such as those of DDAD (formats/dgp.py).

All become `<scene>/...`; annotations, depth and point clouds, which omni does not read, are left behind.
"""

from pathlib import Path
from typing import Any

from omni_cli.formats.dgp import parse_scene_file
from omni_cli.report import Console
from omni_cli.stages.fetch.openpilot import import_segments
from omni_cli.stages.fetch.request import FetchRequest

_EXPECTED = "scenes like 000150/ with scene_HASH.json, calibration/HASH.json and rgb/CAMERA_01/TIME.jpg"


def import_dgp(request: FetchRequest, origin: Path, console: Console) -> dict[str, Any]:
    """Copy the list, the calibration and the images of every scene under a folder, verified.

    Raises:
        DataError: no scene is there, or two different files claim one place.
        OmniError: too little disk space, or a copy that differs.
    """
    return import_segments(request, origin, console, place_of=_scene_place, expected=_EXPECTED, depth=1)


def _scene_place(path: Path) -> Path | None:
    parsed = parse_scene_file(path.absolute().as_posix())
    return Path(*parsed) if parsed else None
