"""What a user means by a clip: a video file, a folder of them, the views of one drive, or the id of a recording."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TypeVar

from omni_cli.config import nearest
from omni_cli.errors import DataError, UsageError
from omni_cli.formats.physical_ai_av import CAMERA_SETS
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.views import MOSAIC
from omni_cli.scene.recording import Recording
from omni_cli.sources import open_source, source_names
from omni_cli.sources.quarantine import QUARANTINE_FILE, read_quarantine
from omni_cli.sources.video_file import video_recording
from omni_cli.stages import locate
from omni_cli.stages.raw_lock import reading

T = TypeVar("T")
_IDS_SHOWN = 5
_COMPARED = 5_000  # ids; to compare a word with every one of 300,000 takes twenty seconds
_ENDS = 4  # characters
_VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".ts")


@dataclass(frozen=True)
class Clip:
    """Something to be asked about; nothing of it is read before it is opened."""

    name: str
    open: Callable[[], Recording]
    raw: Path | None = None  # the raw data that it is a recording of

    def held(self) -> AbstractContextManager[None]:
        """Return a block inside which nobody takes away the raw data that it is read from.

        Raises:
            HeldError: another process is taking files away, or has.
        """
        return nullcontext() if self.raw is None else reading(self.raw)


def find_clips(
    preprocess: Preprocess, words: Sequence[str], cameras: Mapping[str, Path], data: Path, *, tiled: bool
) -> tuple[Clip, ...]:
    """Return the clips that a user named, for a model that looks at the cameras of `preprocess`.

    Args:
        preprocess: of the model.
        words: files, folders of them (of a drive: a file a camera, named after it), or recording ids.
        cameras: the views of one drive, by camera.
        data: where recordings are looked for.
        tiled: each file is a ready mosaic.

    Raises:
        UsageError: nothing is named, a file or recording is not there, or a camera is missing.
        DataError: a recording is in quarantine.
    """
    if bool(words) == bool(cameras):
        raise UsageError("name clips, or the views of one drive with --camera NAME=FILE for each; not both, nor none")
    if cameras:
        return (_named_views(preprocess, cameras, tiled=tiled),)
    clips = [clip for word in words for clip in _clips_of(word, preprocess, data, tiled=tiled)]
    return tuple(_told_apart(clips))


def in_order(preprocess: Preprocess, named: Mapping[str, T], *, tiled: bool, needed: str) -> dict[str, T]:
    """Return the views of a drive as the model looks at them.

    Args:
        preprocess: of the model.
        named: the views, by camera.
        tiled: mosaics were asked about too.
        needed: what to give where a view is missing.

    Raises:
        UsageError: a view is unknown to the model or missing, or mosaics were asked about.
    """
    if tiled:
        raise UsageError("--tiled asks about ready mosaics, --camera about single views; give one of them")
    if unknown := [name for name in named if name not in preprocess.cameras]:
        raise UsageError(
            f"--camera {unknown[0]}: the model does not know it; {nearest(unknown[0], preprocess.cameras)}"
        )
    if missing := [name for name in preprocess.cameras if name not in named]:
        raise UsageError(f"missing {', '.join(missing)}: {needed}")
    return {name: named[name] for name in preprocess.cameras}


def _named_views(preprocess: Preprocess, cameras: Mapping[str, Path], *, tiled: bool) -> Clip:
    ordered = in_order(preprocess, cameras, tiled=tiled, needed=_needed(preprocess))
    for name, path in ordered.items():
        if not path.is_file():
            _check_no_secret(str(path), f"--camera {name}: ")
    return Clip(next(iter(ordered.values())).stem, partial(video_recording, ordered))


def _clips_of(word: str, preprocess: Preprocess, data: Path, *, tiled: bool) -> list[Clip]:
    path = Path(word)
    if path.is_dir():
        if clips := _folder_clips(path, preprocess, tiled=tiled):
            return clips
        raise UsageError(f"{path}: holds no video ({', '.join(_VIDEO_SUFFIXES)}); name files, or another folder")
    if path.is_file():
        return [_file_clip(path, preprocess, tiled=tiled)]
    _check_no_secret(word)
    return [_recording_clip(word, preprocess, data, tiled=tiled)]


def _check_no_secret(word: str, option: str = "") -> None:
    """Refuse, without showing it, what is no file and may be a mistyped URL with a password in it."""
    if "@" in word and ("/" in word or ":" in word):
        raise UsageError(f"{option}no such file (a word with an @ is not shown); a live camera is rtsp://HOST/STREAM")


def _folder_clips(folder: Path, preprocess: Preprocess, *, tiled: bool) -> list[Clip]:
    """Return the clips in a folder and in those inside it; files named after cameras are views of one drive."""
    inside = sorted(folder.iterdir())
    found = [path for path in inside if path.suffix.lower() in _VIDEO_SUFFIXES and path.is_file()]
    named = {} if tiled else {path: view for path in found if (view := _view_of(path, preprocess))}
    plain = [_file_clip(path, preprocess, tiled=tiled) for path in found if path not in named]
    nested = [path for path in inside if path.is_dir() and not path.is_symlink()]
    below = [clip for path in nested for clip in _folder_clips(path, preprocess, tiled=tiled)]
    return [*_drives_in(folder, named, preprocess), *plain, *below]


def _view_of(path: Path, preprocess: Preprocess) -> tuple[str, str] | None:
    """Return (drive, camera) of CAMERA.mp4, whose drive has no name, or of DRIVE.CAMERA.mp4; None of another file."""
    drive, _, camera = path.stem.rpartition(".")
    return (drive, camera) if camera in {*preprocess.cameras, *CAMERA_SETS["7-cam"]} else None


def _drives_in(folder: Path, named: Mapping[Path, tuple[str, str]], preprocess: Preprocess) -> list[Clip]:
    """Return the drives whose views lie in a folder, a file a camera; what the model does not look at is left out."""
    drives: dict[str, dict[str, Path]] = {}
    for path, (drive, camera) in named.items():
        drives.setdefault(drive, {})[camera] = path
    return [_drive(drive or folder.name, folder, views, preprocess) for drive, views in drives.items()]


def _drive(name: str, folder: Path, views: Mapping[str, Path], preprocess: Preprocess) -> Clip:
    if missing := [camera for camera in preprocess.cameras if camera not in views]:
        raise UsageError(f"{folder}: of drive {name} it lacks {', '.join(missing)}; {_needed(preprocess)}")
    return Clip(name, partial(video_recording, {camera: views[camera] for camera in preprocess.cameras}))


def _file_clip(path: Path, preprocess: Preprocess, *, tiled: bool) -> Clip:
    if tiled:
        return Clip(path.stem, partial(video_recording, {MOSAIC: path}))
    if len(preprocess.cameras) > 1:
        others = ", ".join(preprocess.cameras[1:])
        raise UsageError(
            f"{path} is one view ({preprocess.cameras[0]}?), missing {others}: {_needed(preprocess)}, "
            "or --tiled where the file is a mosaic of them"
        )
    return Clip(path.stem, partial(video_recording, {preprocess.cameras[0]: path}))


def _recording_clip(recording_id: str, preprocess: Preprocess, data: Path, *, tiled: bool) -> Clip:
    if tiled:
        raise UsageError(f"--tiled: no video file {recording_id}; a mosaic is a file")
    known: list[str] = []
    for source, folder in _raw_folders(data):
        reader = open_source(source, folder)
        ids = [ref.id for ref in reader.recordings()]
        if found := _meant(recording_id, ids):
            _check_not_set_aside(found, folder)
            return Clip(found, partial(reader.open, found, preprocess.cameras), folder)
        known += ids
    raise UsageError(
        f"no video file {recording_id}, and no recording of that id under {data}; {_remedy(recording_id, known)}"
    )


def _meant(word: str, ids: Sequence[str]) -> str | None:
    """Return the id that a word is; a route may be called as openpilot does, or by its log alone if one has it."""
    plain = word.replace("|", "_").replace("/", "_")
    ending = [one for one in ids if one.endswith(f"_{plain}")]
    return plain if plain in ids else ending[0] if len(ending) == 1 else None


def _remedy(word: str, ids: Sequence[str]) -> str:
    if close := get_close_matches(word, _comparable(word, ids), n=1):
        return f"did you mean {close[0]!r}?"
    more = f" and {len(ids) - _IDS_SHOWN} more" if len(ids) > _IDS_SHOWN else ""
    return f"give a file that is there, or an id: {', '.join(sorted(ids)[:_IDS_SHOWN]) or 'there is none'}{more}"


def _comparable(word: str, ids: Sequence[str]) -> Sequence[str]:
    """Return the ids to compare with a word: of very many those that begin or end as it does."""
    if len(ids) <= _COMPARED:
        return ids
    return [one for one in ids if one[:_ENDS] == word[:_ENDS] or one[-_ENDS:] == word[-_ENDS:]]


def _check_not_set_aside(recording_id: str, folder: Path) -> None:
    if reason := read_quarantine(folder).get(recording_id):
        raise DataError(
            f"{recording_id} is in quarantine: {reason}; mend it and delete its line from {folder / QUARANTINE_FILE}, "
            "or ask about another recording"
        )


def _raw_folders(data: Path) -> list[tuple[str, Path]]:
    raw = data / "raw"
    if raw.is_dir():
        return [(name, raw / name) for name in source_names() if (raw / name).is_dir()]
    layout = locate.layout_of(data) if data.is_dir() else None
    return [(layout, data)] if layout else []


def _needed(preprocess: Preprocess) -> str:
    count = len(preprocess.cameras)
    return f"the model looks at {count} cameras; give --camera NAME=FILE for each, or the id of a recording"


def _told_apart(clips: Sequence[Clip]) -> list[Clip]:
    """Number clips that share a name, so that none overwrites another's answers."""
    result: list[Clip] = []
    for clip in clips:
        taken, name, number = {one.name for one in result}, clip.name, 1
        while name in taken:
            number += 1
            name = f"{clip.name}-{number}"
        result.append(replace(clip, name=name))
    return result
