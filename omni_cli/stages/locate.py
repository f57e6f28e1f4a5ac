"""Where the input of a verb lies: the folder that the user names, or the newest output of the verb before it."""

import re
from pathlib import Path

from omni_cli.config import nearest
from omni_cli.errors import UsageError
from omni_cli.files import RECEIPT_SUFFIX, receipt_path
from omni_cli.formats import dgp
from omni_cli.formats.comma2k19 import POSES_FOLDER
from omni_cli.formats.openpilot import parse_segment_file
from omni_cli.formats.physical_ai_av import CLIP_INDEX_FILE, FEATURES_FILE
from omni_cli.sources import source_names
from omni_cli.stages.run_file import FINAL, RUN_FILE

SHARDS_MARK = "manifest.json"  # a folder without it is unfinished
_MODEL_MARK, _TINY = "config.json", "tiny:"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")  # ORGANISATION/NAME@REVISION
_LONGEST_NAME_BYTES = 200  # a file system's 255, less what stands around it in the names of hidden siblings
_SEGMENT_DEPTHS = ("*", "*/*", "*/*/*")


def raw_folder(data: Path, source: str | None) -> tuple[str, Path]:
    """Return the name of a source and the folder of its raw data.

    Args:
        data: omni's data folder (raw data in DATA/raw/SOURCE), or a folder in a source's own layout.
        source: which one; None takes the only one, or the newest.

    Raises:
        UsageError: it is not there, or no source; the message says what is, and how to get it.
    """
    if source not in (None, *source_names()):
        raise UsageError(f"unknown source {source!r}; {nearest(str(source), source_names())}")
    if not data.is_dir():
        raise UsageError(f"no data folder {data}; {_fetch_hint(source)}")
    raw = data / "raw"
    if not raw.is_dir():
        if layout := layout_of(data):
            return source or layout, data
        raise UsageError(f"{data}: holds no raw data and is no known layout; {_fetch_hint(source)}")
    found = {path.name: path for path in sorted(raw.iterdir()) if path.is_dir() and path.name in source_names()}
    if source is None and found:
        return max(found.items(), key=lambda item: item[1].stat().st_mtime_ns)
    if source not in found or source is None:
        raise UsageError(
            f"{raw}: holds {', '.join(found) or 'nothing'}, not {source or 'a source'}; {_fetch_hint(source)}"
        )
    return source, found[source]


def layout_of(folder: Path) -> str | None:
    """Return the source whose layout a folder has: of PhysicalAI-AV or a hub cache, comma2k19, DGP, or comma routes."""
    marks = (FEATURES_FILE, CLIP_INDEX_FILE, "snapshots", "datasets--*/snapshots")
    if any(path for mark in marks for path in folder.glob(mark)):
        return "physical_ai_av"
    if any(path for depth in _SEGMENT_DEPTHS for path in folder.glob(f"{depth}/{POSES_FOLDER}")):
        return "comma2k19"  # before routes: its videos and raw logs are named as theirs
    paths = [path for depth in _SEGMENT_DEPTHS for path in folder.absolute().glob(depth)]
    if any(dgp.parse_scene_file(path.as_posix()) for path in paths):
        return "dgp"
    return "openpilot" if any(parse_segment_file(path.as_posix()) for path in paths) else None


def has_shards(data: Path) -> bool:
    """Say whether there is a finished shard folder under DATA/shards."""
    return any((data / "shards").glob(f"*/{SHARDS_MARK}"))


def newest_shards(data: Path) -> Path:
    """Return the newest finished shard folder under DATA/shards.

    Raises:
        UsageError: there is none.
    """
    return finished_shards(data)[0]


def finished_shards(data: Path) -> list[Path]:
    """Return the finished shard folders under DATA/shards, the newest first.

    Raises:
        UsageError: there is none.
    """
    folder = data / "shards"
    found = [path for path in folder.glob(f"*/{SHARDS_MARK}") if path.is_file()]
    if not found:
        raise UsageError(
            f"{folder}: holds no finished shards; make some with: omni etl, or name a folder with --shards"
        )
    return [path.parent for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)]


def choose_run(run: Path | None, runs: Path) -> Path:
    """Return the folder of the run that a user named (a path, or a name in `runs`), or of the newest finished one.

    Raises:
        UsageError: there is none.
    """
    if run is not None:
        return _named_run(run, runs)
    if not (finished := finished_runs(runs)):
        raise UsageError(f"no finished run in {runs}; train one with: omni train")
    return finished[0]


def names_model(word: str, runs: Path) -> bool:
    """Say whether a word means a model (its folder, its id on the hub, or a tiny one), and not a run.

    A path that leads nowhere in a folder that is there is a mistyped run.
    """
    folder = Path(word)
    if folder.is_dir() or (runs / word).is_dir():
        return folder.is_dir() and not (folder / RUN_FILE).is_file() and (folder / _MODEL_MARK).is_file()
    return word.startswith(_TINY) or (bool(_HUB_ID.fullmatch(word)) and not folder.parent.is_dir())


def is_hub_id(word: str, runs: Path) -> bool:
    """Say whether a word means a model on the hub."""
    return names_model(word, runs) and not Path(word).is_dir() and not word.startswith(_TINY)


def _named_run(run: Path, runs: Path) -> Path:
    for folder in (run, runs / run):
        if folder.is_dir():
            return folder
    known = [path.parent.name for path in runs.glob(f"*/{RUN_FILE}")]
    found = nearest(run.name, known) if known else "there is none; train one with: omni train"
    raise UsageError(f"no run {run}, neither a folder nor a name in {runs}; {found}")


def finished_runs(runs: Path) -> list[Path]:
    """Return the folders of finished runs, the newest first."""
    found = [folder.parent for folder in runs.glob(f"*/{FINAL}{RECEIPT_SUFFIX}")]
    return sorted(found, key=lambda folder: receipt_path(folder / FINAL).stat().st_mtime_ns, reverse=True)


def _fetch_hint(source: str | None) -> str:
    match source:
        case "openpilot":
            return "get it with: omni fetch --source openpilot --from ROUTES"
        case "comma2k19":
            return "get it with: omni fetch --source comma2k19 --from CHUNKS"
        case "dgp":
            return "get it with: omni fetch --source dgp --from SCENES"
        case None | "synthetic":
            return "get some with: omni fetch --source synthetic --chunks 2"
        case _:
            return f"get it with: omni fetch --source {source} --chunks 5"


def named_folder(runs: Path, name: str) -> Path:
    """Return the folder of a run by its name.

    Raises:
        UsageError: the name could lead out of `runs`, or a file has it.
    """
    plain = name.isprintable() and not name.startswith(".") and not set(name) & set("/\\")
    if not (plain and 0 < len(name.encode()) <= _LONGEST_NAME_BYTES):
        raise UsageError(
            f"--run {name!r}: expected a plain name, without slashes and without a dot in front; "
            f"it names a folder in {runs}, and --runs DIR chooses another place"
        )
    if (runs / name).exists() and not (runs / name).is_dir():
        raise UsageError(f"--run {name}: {runs / name} is a file; choose another name")
    return runs / name
