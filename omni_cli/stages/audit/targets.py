"""What lies in a folder that can be audited: sources, shard sets, runs, exports."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from omni_cli.errors import DataError, UsageError
from omni_cli.files import RECEIPT_SUFFIX, receipt_path
from omni_cli.formats import comma2k19, dgp, openpilot, physical_ai_av
from omni_cli.sources import open_source, openpilot_schema, source_names
from omni_cli.sources.physical_ai_av import find_root
from omni_cli.stages.checks.findings import Finding
from omni_cli.stages.checks.repository import read_repository
from omni_cli.stages.checks.revisions import revision_findings
from omni_cli.stages.checks.units import Unit
from omni_cli.stages.runs import RUN_FILE

FETCH = "get data first, for example: omni fetch --source synthetic --chunks 2"
SHARDS, ARTEFACTS = "shards", "artefacts"
_DATA_FOLDERS = ("raw", "shards")


def targets(path: Path) -> list[tuple[str, Path]]:
    """Return (kind, folder) of all that can be audited: a source's name, `shards` or `artefacts`.

    Raises:
        UsageError: the folder does not exist.
        DataError: it holds nothing that omni knows.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: is a file; audit a folder of raw data, shards, runs or exports")
    if not path.is_dir():
        raise UsageError(f"no folder {path} to audit; {FETCH}")
    if is_one(path):
        found = [(_kind(path), path)]
    else:
        inside = [path / name for name in _DATA_FOLDERS if (path / name).is_dir()] or [path]
        children = [child for folder in inside for child in sorted(folder.iterdir()) if child.is_dir()]
        found = [(_kind(child) or _named(child), child) for child in children]
    if known := [(kind, folder) for kind, folder in found if kind]:
        return known
    raise DataError(f"{path}: holds no raw data, shards or runs; {FETCH}")


def is_one(path: Path) -> bool:
    """Say whether a folder is one source, shard set, run or export, rather than a folder of some."""
    return not any((path / name).is_dir() for name in _DATA_FOLDERS) and not _holds_others(path)


def units_of(kind: str, folder: Path, cameras: tuple[str, ...] | None) -> tuple[list[Unit], Sequence[Finding]]:
    """Return the units of a source's folder, and what is found of the folder as a whole.

    Raises:
        DataError: its index cannot be read, or it holds no recording.
    """
    if kind == "openpilot":
        openpilot_schema.log_schema()  # a missing extra is the user's to mend, not a fault of every segment
        return _route_units(kind, folder, known_to(openpilot.CAMERAS, cameras)), ()
    if kind == "comma2k19":
        return _route_units(kind, folder, known_to(comma2k19.CAMERAS, cameras)), ()
    if kind == "dgp":
        return _route_units(kind, folder, known_to(dgp.CAMERAS, cameras)), ()
    root = find_root(folder)
    repository = read_repository(root, known_to(physical_ai_av.CAMERAS, cameras))
    if not repository.chunks:
        raise DataError(f"{folder}: has an index, and no chunk of its clips; {FETCH}")
    units = [Unit(kind, folder, chunk.clips, None, chunk) for chunk in repository.chunks]
    return units, [*repository.findings, *revision_findings(root)]


def known_to(names: Iterable[str], cameras: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the asked cameras that a source has; None where it has none of them: then all of its own are audited."""
    return tuple(camera for camera in cameras or () if camera in set(names)) or None


def _route_units(kind: str, folder: Path, cameras: tuple[str, ...] | None) -> list[Unit]:
    routes: dict[str, list[str]] = {}
    for ref in open_source(kind, folder).recordings():
        routes.setdefault(ref.bundle, []).append(ref.id)
    return [Unit(kind, folder, tuple(segments), cameras) for segments in routes.values()]


def _holds_others(path: Path) -> bool:
    """Say whether a folder holds source folders, shard sets or runs, as DATA/raw, DATA/shards and `runs` do."""
    marks = (*source_names(), "*/recordings", f"*/{RUN_FILE}")
    return any(mark.is_dir() or mark.name == RUN_FILE for pattern in marks for mark in path.glob(pattern))


def _kind(folder: Path) -> str:
    """Tell what a folder holds by what lies in it; empty where it is nothing that omni reads."""
    if (folder / "recordings").is_dir():
        return SHARDS
    with suppress(DataError):
        find_root(folder)
        return "synthetic" if folder.name == "synthetic" else "physical_ai_av"
    if any(folder.rglob(comma2k19.POSES_FOLDER)):
        return "comma2k19"
    if any(dgp.parse_scene_file(path.as_posix()) for path in folder.absolute().rglob("scene_*.json")):
        return "dgp"
    if any(openpilot.parse_segment_file(path.as_posix()) for path in folder.absolute().rglob("*")):
        return "openpilot"
    receipts = (*folder.glob(f"**/*{RECEIPT_SUFFIX}"), receipt_path(folder), folder / RUN_FILE)
    return ARTEFACTS if any(path.is_file() for path in receipts) else ""


def _named(folder: Path) -> str:
    """A source's folder that holds nothing readable is a broken download, not a folder to pass over."""
    return folder.name if folder.parent.name == "raw" and folder.name in source_names() else ""
