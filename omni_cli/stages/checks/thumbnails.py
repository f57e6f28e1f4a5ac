"""A few pictures of one recording for the report, taken in a worker: what is looked at is what was found wanting."""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from omni_cli.errors import DataError, OmniError
from omni_cli.formats.physical_ai_av import FEATURES
from omni_cli.formats.video_check import snapshots
from omni_cli.scene.recording import VideoLocation
from omni_cli.sources import open_source
from omni_cli.sources.zip_members import ZipDirectory
from omni_cli.stages.checks.units import Unit

_SHARES = (0.02, 0.33, 0.66, 0.97)
_QUALITY = 80
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Wanted:
    """Of which recording pictures are wanted, and of which camera first."""

    unit: Unit  # of this recording alone
    camera: str


def strip(wanted: Wanted) -> bytes:
    """Return a JPEG of some pictures side by side.

    Raises:
        DataError: nothing can be shown; the message says why.
    """
    location = _video(wanted)
    size = location.size_bytes if location.size_bytes is not None else location.path.stat().st_size
    if size > MAX_BYTES:
        raise DataError(f"{location.path.name}: {size} bytes, too many to show")
    pictures = snapshots(location, location.path.name, _SHARES)
    if not pictures:
        raise DataError(f"{location.path.name}: no picture can be decoded")
    content = io.BytesIO()
    Image.fromarray(np.hstack(pictures)).save(content, "JPEG", quality=_QUALITY)
    return content.getvalue()


def _video(wanted: Wanted) -> VideoLocation:
    unit = wanted.unit
    if unit.chunk is not None:
        path = unit.chunk.path(wanted.camera)
        return _member(path, FEATURES[wanted.camera].member(unit.recordings[0], "video"))
    try:
        recording = open_source(unit.source, unit.folder).open(unit.recordings[0], unit.cameras)
        return recording.cameras[wanted.camera or next(iter(recording.cameras))].videos[0]
    except (KeyError, StopIteration):
        raise DataError("it holds no camera") from None
    except OmniError as error:
        raise DataError(str(error)) from None


def _member(path: Path, name: str) -> VideoLocation:
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(name)
    except (zipfile.BadZipFile, KeyError, OSError):
        raise DataError(f"{name}: not in the zip, or the zip cannot be read") from None
    return ZipDirectory(path, {name: info}).locate(name)
