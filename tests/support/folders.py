"""What a folder holds, to be compared with what it held, or with another."""

from pathlib import Path

from omni_cli.files import sha256_of


def tree(folder: Path) -> dict[str, str]:
    """The hash of every file in a folder."""
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def stamps(folder: Path) -> dict[Path, int]:
    """When everything in a folder was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
