"""Who teaches: the car's own motion, the model that ran in it, or a driving model in ONNX files.

ONNX files are named by path where they are run, at etl, and by their contents everywhere else: shards and runs hold
`onnx:HASH`, so that files may move and a later one of the same name is not taken for them. Training and measuring need
no file. Where settings name files that are not here, their contents are unknown, and shards of any ONNX teacher fit;
a run records which it was.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from omni_cli import files
from omni_cli.config import comma_list, nearest
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.formats.driving_model import DESIRES, NUM_POINTS, TRAFFIC_CONVENTIONS
from omni_cli.formats.video import Uint8Array
from omni_cli.models.onnx_runtime import AUTO
from omni_cli.models.teacher import Teacher, TeacherLabels, open_teacher
from omni_cli.models.teacher_graphs import PAST_STEPS, sidecar_of
from omni_cli.samples.driven_path import DrivenPaths
from omni_cli.samples.step_labels import (
    LOG,
    MOTION,
    Float32Array,
    Labeller,
    Looks,
    Scene,
    StepLabels,
    driven_labels,
    from_the_camera,
    logged_labels,
)
from omni_cli.scene.clock import Int64Array
from omni_cli.scene.driving_log import BoolArray
from omni_cli.scene.recording import Recording

ONNX = "onnx:"  # and the hash of the files
ANY_ONNX = f"{ONNX}*"  # files that are not here
_WITHOUT_FILES: dict[str, Labeller] = {MOTION: driven_labels, LOG: logged_labels}
_HASH_DIGITS = 16
_CHUNK_STEPS = 64  # labelled at once: 25 MB of pictures, however long the drive


@dataclass(frozen=True)
class OnnxLabeller:
    """A driving model in ONNX files, as the workers of a pool know it."""

    paths: tuple[Path, ...]
    device: str  # of models/onnx_runtime; never `auto`, lest one worker fall back to the CPU without a word
    contents: str  # `identity` of the files: a worker opens them later, perhaps on another machine

    def __call__(self, recording: Recording, looks: Looks, driven: DrivenPaths) -> StepLabels:
        """Return what the model says wherever its memory of 5 s is real, and the speed known if it must be told.

        Raises:
            DataError: that is nowhere, or an answer is not finite.
            OmniError: the model cannot be opened in this process, or is not the one that the work began with.
        """
        teacher = _opened(self.paths, self.device, self.contents)
        said = list(_all_said(teacher, looks, driven))
        is_known = np.zeros(len(looks.begins), dtype=bool)
        for rows, labels in said:
            is_known[rows] = labels.warm
        if teacher.needs_speed:
            is_known &= driven.num_points > 0
        if not is_known.any():
            raise _never_warm(recording, looks, needs_speed=teacher.needs_speed)
        return replace(_step_labels(said, is_known), facts={"teacher_provider": teacher.provider})


def check_teacher(teacher: str) -> str:
    """Return the text of a setting.

    Raises:
        ValueError: it names no teacher.
    """
    parts = comma_list(teacher)
    if teacher in _WITHOUT_FILES or teacher.startswith(ONNX) or (parts and all(_is_onnx(part) for part in parts)):
        return teacher
    raise ValueError(f"no such teacher; {nearest(teacher, _WITHOUT_FILES)}, or give .onnx files with commas")


def identity(teacher: str) -> str:
    """Return what names a teacher in shards and runs: `motion`, `log`, or `onnx:` and a hash of its files' contents.

    The slices that lie beside an ONNX file say what its numbers mean, and count as one of its files. Of files that are
    not here `onnx:*` is returned.
    """
    if teacher in _WITHOUT_FILES or teacher.startswith(ONNX):
        return teacher
    return _contents(_paths(teacher))


def program_files(teacher: str) -> tuple[Path, ...]:
    """Return the ONNX files that a setting names.

    Raises:
        UsageError: it names none, or one that is not there.
    """
    if teacher in _WITHOUT_FILES:
        raise UsageError(f"its teacher is {teacher!r}, and no program")
    if teacher.startswith(ONNX):
        raise UsageError(f"its teacher {teacher} is known by its contents only")
    for path in (paths := _paths(teacher)):
        if not path.is_file():
            raise UsageError(f"its teacher's file {path} is not there")
    return paths


def labeller(teacher: str, device: str = AUTO) -> Labeller:
    """Return a teacher for the workers of a pool.

    Args:
        teacher: as a setting names it.
        device: of ONNX files.

    Raises:
        UsageError: it is named by its contents, or as for `open_teacher`.
        DataError: as for `open_teacher`.
    """
    if teacher in _WITHOUT_FILES:
        return _WITHOUT_FILES[teacher]
    if teacher.startswith(ONNX):
        raise UsageError(f"sample.teacher = {teacher!r} says what the files hold, not where they are; etl runs them: "
                         "give them with --teacher FILE.onnx,FILE.onnx")  # fmt: skip
    paths, contents = _paths(teacher), identity(teacher)
    found = _opened(paths, AUTO, contents).provider if device == AUTO else device
    return OnnxLabeller(paths, found, contents)


def teacher_notes(teacher: str, device: str) -> tuple[str, ...]:
    """Open a teacher, and return what runs and where, and why not elsewhere; nothing of one without files.

    Raises:
        UsageError: see `labeller`.
        DataError: likewise.
        OmniError: the device was asked for and does not start.
    """
    ours = labeller(teacher, device)
    if not isinstance(ours, OnnxLabeller):
        return ()
    opened = _opened(ours.paths, device, ours.contents)
    names = ", ".join(filter(None, opened.checkpoints)) or ", ".join(path.name for path in ours.paths)
    return (f"teacher {identity(teacher)} ({names}) runs on {opened.provider}", *opened.notes)


def _is_onnx(name: str) -> bool:
    return Path(name).suffix.lower() == ".onnx"


def _paths(teacher: str) -> tuple[Path, ...]:
    """Return absolute paths: a worker's folder may be another, and a shell expands but the first `~` of a list."""
    return tuple(Path(part).expanduser().absolute() for part in comma_list(teacher))


def _contents(paths: Sequence[Path]) -> str:
    if not all(path.is_file() for path in paths):
        return ANY_ONNX
    found = [path for path in (*paths, *map(sidecar_of, paths)) if path.is_file()]
    hashes = sorted(_sha256(path, path.stat().st_size, path.stat().st_mtime_ns) for path in found)
    return f"{ONNX}{files.hash_json(hashes)[:_HASH_DIGITS]}"


@lru_cache
def _sha256(path: Path, _size: int, _modified_ns: int) -> str:
    return files.sha256_of(path)


@lru_cache(maxsize=1)
def _opened(paths: tuple[Path, ...], device: str, contents: str) -> Teacher:
    """Open a teacher once a process; on the CPU one thread a worker, so that labels do not depend on their number."""
    teacher = open_teacher(paths, device, threads=1)
    if (found := _contents(paths)) != contents:
        named = ", ".join(map(str, paths))
        raise OmniError(f"{named}: the work began with the teacher {contents}, here the files hold {found}; put the "
                        "same files wherever etl runs, leave them alone while it does, and run it again")  # fmt: skip
    return teacher


def _never_warm(recording: Recording, looks: Looks, *, needs_speed: bool) -> DataError:
    longest = max(stop - first for first, stop in _stretches(looks))
    speed = ", and the car's speed" if needs_speed else ""
    return DataError(
        f"{recording.id}: its teacher can label none of {len(looks.begins)} frames: it needs {PAST_STEPS + 1} unbroken "
        f"ones before{speed}, and the longest stretch has {longest}; take longer drives, or a smaller --stride"
    )


def _stretches(looks: Looks) -> list[tuple[int, int]]:
    """Return the first look and the one past the last of each stretch of consecutive looks."""
    first = np.flatnonzero(looks.begins).tolist()
    return list(zip(first, [*first[1:], len(looks.begins)], strict=True))


def _all_said(teacher: Teacher, looks: Looks, driven: DrivenPaths) -> Iterator[tuple[Int64Array, TeacherLabels]]:
    """Yield looks and what the teacher says at the steps that end there; it remembers nothing from before a stretch."""
    desire = np.eye(DESIRES, dtype=np.float32)[looks.desire_pulse]
    desire[:, 0] = 0  # no desire is no pulse
    traffic = np.eye(TRAFFIC_CONVENTIONS, dtype=np.float32)[int(looks.is_left_hand_traffic)]
    for first, stop in _stretches(looks):
        state = None
        for start in range(first + 1, stop, _CHUNK_STEPS):
            rows = np.arange(start, min(start + _CHUNK_STEPS, stop))
            speed = driven.speed_mps[rows].astype(np.float32)
            pictures = _pictures(looks, start - 1, int(rows[-1]) + 1)
            said = teacher.label(pictures, desire[rows], traffic, speed_mps=speed, state=state)
            state = said.state
            yield rows, said


def _pictures(looks: Looks, first: int, stop: int) -> Uint8Array:
    """Return the pictures (looks, views, 6, 128, 256) of looks first ... stop - 1."""
    views = enumerate(looks.pictures)
    return np.stack([pictures[looks.rows[first:stop, view]] for view, pictures in views], axis=1)


def _step_labels(said: Sequence[tuple[Int64Array, TeacherLabels]], is_known: BoolArray) -> StepLabels:
    """Return what was said at the looks that are known (n,), and zeros at the others."""
    rows = np.concatenate([rows for rows, _ in said])
    kept = is_known[rows]

    def placed(parts: Iterable[Float32Array]) -> Float32Array:
        values = np.concatenate(list(parts))
        result = np.zeros((len(is_known), *values.shape[1:]), dtype=np.float32)
        result[rows[kept]] = values[kept]
        return result

    labels = [labels for _, labels in said]
    scene = Scene(
        is_known,
        placed(one.lane_lines_m for one in labels),
        placed(one.lane_line_prob for one in labels),
        placed(one.road_edges_m for one in labels),
        placed(one.lead for one in labels),
        placed(one.lead_prob for one in labels),
    )
    xy_m = placed(from_the_camera(one.path_m) for one in labels)
    return StepLabels(xy_m, np.where(is_known, NUM_POINTS, 0), scene)
