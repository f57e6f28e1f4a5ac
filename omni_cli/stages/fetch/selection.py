"""Which cameras, chunks and files a user asks for. Pure functions."""

import re
from collections.abc import Iterable, Mapping, Sequence

from omni_cli.config import comma_list, nearest
from omni_cli.errors import DataError, UsageError
from omni_cli.formats.physical_ai_av import (
    CAMERA_SETS,
    CAMERAS,
    FEATURE_SETS,
    FEATURES,
    REASONING,
    expand_cameras,
)

CHUNK_TABLES = ("egomotion", "camera_intrinsics", "sensor_extrinsics", "vehicle_dimensions")
IMPORTED_WHOLE = ("openpilot", "comma2k19", "dgp")
_EXAMPLES = "for example --chunks 5 (the first five), --chunks 0-4 (a range) or --chunks 3,7"


def camera_names(text: str, source: str = "physical_ai_av") -> tuple[str, ...]:
    """Return the cameras that `4-cam`, or a comma list of names and sets, stands for; each once, in order.

    Raises:
        UsageError: a name is unknown; the message gives the nearest right spelling.
    """
    names = expand_cameras(text)
    if source in IMPORTED_WHOLE:
        return names  # for the import to refuse
    if unknown := [name for name in names if name not in CAMERAS]:
        raise UsageError(f"unknown camera {unknown[0]!r}; {nearest(unknown[0], (*CAMERA_SETS, *CAMERAS))}")
    if not names:
        raise UsageError("no camera named; give 1-cam, 4-cam, 7-cam or a comma list of camera names")
    return names


def feature_names(text: str) -> tuple[str, ...]:
    """Return the features in a comma list of names and sets (`radar`, `lidar`, ...), or `reasoning`; each once.

    Raises:
        UsageError: a name is unknown; the message gives the nearest right spelling.
    """
    names = tuple(dict.fromkeys(name for word in comma_list(text) for name in FEATURE_SETS.get(word, (word,))))
    known = (REASONING, *FEATURE_SETS, *FEATURES)
    if unknown := [name for name in names if name not in FEATURES and name != REASONING]:
        raise UsageError(f"--features: unknown feature {unknown[0]!r}; {nearest(unknown[0], known)}")
    return names


def parse_size(text: str) -> tuple[int, int]:
    """Read `320x180` as (width, height) in pixels.

    Raises:
        UsageError: it is not two whole numbers with an x between.
    """
    if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise UsageError(f"size {text}: expected WIDTHxHEIGHT in pixels, for example 320x180")
    return int(match[1]), int(match[2])


def parse_chunks(text: str, known: Sequence[int]) -> tuple[int, ...]:
    """Return the chunk ids that `5` (the first five of `known`), `0-4` (inclusive) or `3,7` stands for.

    Raises:
        UsageError: the text is none of these, or names a chunk that is not in `known`.
    """
    text = text.strip()
    if text.isdecimal():
        return _first(int(text), known)
    wanted: set[int] = set()
    for first, last in _spans(text):
        if last > max(known, default=-1):
            raise UsageError(f"--chunks {text}: there is no chunk {last}; known: {_range_of(known)}")
        wanted.update(range(first, last + 1))
    if unknown := sorted(wanted - set(known)):
        raise UsageError(f"--chunks {text}: there is no chunk {unknown[0]}; known: {_range_of(known)}")
    return tuple(sorted(wanted))


def _spans(text: str) -> list[tuple[int, int]]:
    """Return the first and last chunk of each part of `0-4,7`.

    Raises:
        UsageError: a part is neither a number nor a rising range.
    """
    spans = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise UsageError(f"--chunks {text}: cannot read {part!r}; {_EXAMPLES}")
        spans.append((int(match[1]), int(match[2] or match[1])))
    return spans


def chunks_of_clips(clips: Sequence[str], chunk_of_clip: Mapping[str, int]) -> tuple[int, ...]:
    """Return the chunks that hold the named clips.

    Raises:
        UsageError: a clip is not in the index.
    """
    unknown = [clip for clip in clips if clip not in chunk_of_clip]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UsageError(
            f"no clip {unknown[0]!r}{more} in the index of {len(chunk_of_clip)}; check --clips, --revision"
        )
    return tuple(sorted({chunk_of_clip[clip] for clip in clips}))


def require_choice(chunks: str | None, clips: Sequence[str]) -> None:
    """Refuse, before anything is asked of a hub, a request that says nothing, or two things, or chunks unreadably.

    Raises:
        UsageError: both or neither of `--chunks` and `--clips` are given, or the chunks cannot be read.
    """
    if bool(chunks) == bool(clips):
        raise UsageError(f"give either --chunks or --clips; {_EXAMPLES}")
    if chunks:
        _spans(chunks.strip())


def select_chunks(chunks: str | None, clips: Sequence[str], chunk_of_clip: Mapping[str, int]) -> tuple[int, ...]:
    """Return the chunks that `--chunks` or `--clips` stands for.

    Raises:
        UsageError: a chunk or clip is not in the index.
        DataError: the index is empty.
    """
    if not chunk_of_clip:
        raise DataError("the clip index lists no clip; expected clip_id and chunk columns with rows: fetch it again")
    if clips:
        return chunks_of_clips(clips, chunk_of_clip)
    return parse_chunks(str(chunks), sorted(set(chunk_of_clip.values())))


def chunk_paths(chunks: Iterable[int], cameras: Sequence[str], features: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the repository paths of chunks: what omni reads (tables, egomotion, cameras), and more features."""
    return tuple(FEATURES[name].chunk_path(chunk) for chunk in chunks for name in _names(cameras, features))


def clips_by_path(
    clips: Sequence[str], chunk_of_clip: Mapping[str, int], cameras: Sequence[str], features: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Return, for each zip that holds a part of the named clips, those of them that are in its chunk."""
    of_chunk: dict[int, list[str]] = {}
    for clip in sorted(set(clips)):
        of_chunk.setdefault(chunk_of_clip[clip], []).append(clip)
    zips = [name for name in _names(cameras, features) if FEATURES[name].suffix == "zip"]
    return {FEATURES[name].chunk_path(chunk): tuple(found) for chunk, found in of_chunk.items() for name in zips}


def _names(cameras: Sequence[str], features: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in dict.fromkeys((*CHUNK_TABLES, *cameras, *features)) if name != REASONING)


def _first(count: int, known: Sequence[int]) -> tuple[int, ...]:
    if not 1 <= count <= len(known):
        raise UsageError(f"--chunks {count}: there are {len(known)} chunks; {_EXAMPLES}")
    return tuple(known[:count])


def _range_of(known: Sequence[int]) -> str:
    return f"{min(known)}-{max(known)}" if known else "none"
