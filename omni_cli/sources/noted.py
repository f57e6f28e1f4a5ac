"""What `omni fetch --from` noted of a file that it copied: the bytes are compared with it before they are believed.

The note is the receipt beside the file. A file without one, which lies where its owner put it, is read as it is.
"""

import hashlib
from pathlib import Path

from omni_cli import files
from omni_cli.errors import DataError
from omni_cli.scene.recording import COPY_AGAIN, VideoLocation, require_noted


def located(path: Path, num_frames: int | None = None) -> VideoLocation:
    """Return a video that is a whole file, with the hash that is noted of it; its bytes are not read.

    Args:
        path: the file.
        num_frames: as of `VideoLocation`.

    Raises:
        DataError: the file is of another size, or the note is damaged.
    """
    return VideoLocation(path, num_frames=num_frames, sha256=noted_sha256(path))


def read_noted(path: Path) -> bytes:
    """Return what a file holds.

    Raises:
        DataError: that is not what was noted, or the note is damaged.
    """
    content = path.read_bytes()
    if (noted := noted_sha256(path)) is not None:
        require_noted(path, hashlib.sha256(content).hexdigest(), noted)
    return content


def check_noted(path: Path) -> None:
    """Compare a file, where there is one, with what was noted of it; what reads it next maps it, or checks its size.

    Raises:
        DataError: it differs, or the note is damaged.
    """
    if path.is_file() and (noted := noted_sha256(path)) is not None:
        require_noted(path, files.sha256_of(path), noted)


def noted_sha256(path: Path) -> str | None:
    """Return the hash in a file's receipt; None where it has no receipt.

    Raises:
        DataError: the file is of another size than its receipt says, or the receipt is damaged.
    """
    beside = files.receipt_path(path)
    if not beside.is_file():
        return None
    match files.read_receipt(path):
        case {"size": int() as size, "sha256": str() as sha256}:
            if (found := path.stat().st_size) != size:
                raise DataError(f"{path}: holds {found} bytes, omni fetch noted {size}; {COPY_AGAIN}")
            return sha256
        case _:
            raise DataError(f"{beside}: tells no more what {path.name} must hold; {COPY_AGAIN}")
