"""What a PhysicalAI-AV folder promises: its clips, which features they have, and which chunk files are here."""

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from omni_cli.errors import DataError
from omni_cli.formats.fetched import absent_upstream, clips_on_disk
from omni_cli.formats.physical_ai_av import (
    CAMERAS,
    CLIP_INDEX_FILE,
    FEATURES,
    FEATURES_FILE,
    LEGACY_PRESENCE_FILE,
    PRESENCE_FILE,
)
from omni_cli.sources.index_names import unsafe_index_names
from omni_cli.stages.checks.findings import Finding, refuse, warn

EGOMOTION = "egomotion"
_CHUNK_FILE = re.compile(r"\.chunk_(\d+)\.(?:zip|parquet)$")


@dataclass(frozen=True)
class Chunk:
    """One chunk as the indices promise it, and what of it is on disk. Small and picklable: the unit of work."""

    root: Path
    number: int
    clips: tuple[str, ...]  # valid ones, sorted
    present: dict[str, frozenset[str]] | None  # feature -> clips that have it; None where no index says so
    cameras: tuple[str, ...]  # the ones to audit
    are_cameras_asked: bool  # by the user: then a camera without a file is refused, and else told
    listed: tuple[str, ...]  # every clip that the index names for it, those that are not valid too
    absent: frozenset[str] = frozenset()  # features whose file omni fetch found to be missing upstream
    parts: dict[str, frozenset[str]] = field(default_factory=dict)  # feature -> clips, of zips fetched by clips

    def path(self, feature: str) -> Path:
        """Return where the chunk file of a feature belongs."""
        return self.root / FEATURES[feature].chunk_path(self.number)

    def expected(self, feature: str) -> tuple[str, ...]:
        """Return the clips that should have a feature: of a zip that was fetched by clips, those alone."""
        part = self.parts.get(feature)
        clips = self.clips if part is None else tuple(clip for clip in self.clips if clip in part)
        if self.present is None or feature not in self.present:
            return clips
        return tuple(clip for clip in clips if clip in self.present[feature])


@dataclass(frozen=True)
class Repository:
    """A folder in the repository's layout."""

    chunks: tuple[Chunk, ...]
    findings: tuple[Finding, ...]  # about the indices

    @property
    def clips(self) -> tuple[str, ...]:
        """Return every clip of the chunks that are here."""
        return tuple(clip for chunk in self.chunks for clip in chunk.clips)


def read_repository(root: Path, cameras: tuple[str, ...] | None) -> Repository:
    """Read the indices and list the chunk files.

    Args:
        root: the folder with `clip_index.parquet`.
        cameras: the ones to audit; None: every camera that has a file.

    Raises:
        DataError: the clip index cannot be read.
    """
    on_disk = _chunk_numbers(root)
    index = _read_index(root / CLIP_INDEX_FILE, ("clip_id", "chunk"))
    rows = _rows(index, on_disk)
    tables = [root / name for name in (PRESENCE_FILE, LEGACY_PRESENCE_FILE) if (root / name).is_file()]
    present = _presence(tables[0]) if tables else None
    wanted = cameras if cameras is not None else tuple(name for name in CAMERAS if _has_files(root, name))
    absent = absent_upstream(root)
    asked = wanted, cameras is not None
    chunks = tuple(_chunk(root, number, found, present, asked) for number, found in rows.items())
    chunks = tuple(replace(chunk, absent=_features(absent, chunk.number)) for chunk in chunks)
    unsafe = (warn("unsafe-name", f"{name}: {reason}; left out") for name, reason in unsafe_index_names(root).items())
    findings = (*unsafe, *_index_findings(root, present is None), *_unlisted(on_disk - rows.keys()), *_repeated(index))
    return Repository(chunks, findings)


def _rows(index: pa.Table, on_disk: set[int]) -> dict[int, list[tuple[str, bool]]]:
    """Return chunk -> its clips and whether each is valid, of the chunks that are here."""
    columns = [index[name].to_pylist() for name in ("clip_id", "chunk")]
    valid = index["clip_is_valid"].to_pylist() if "clip_is_valid" in index.column_names else [True] * len(index)
    rows: dict[int, list[tuple[str, bool]]] = defaultdict(list)
    for clip, chunk, is_valid in zip(*columns, valid, strict=True):
        if chunk in on_disk:
            rows[chunk].append((str(clip), bool(is_valid)))
    return {chunk: found for chunk, found in sorted(rows.items()) if any(is_valid for _, is_valid in found)}


def _chunk(
    root: Path,
    number: int,
    rows: list[tuple[str, bool]],
    present: dict[str, frozenset[str]] | None,
    asked: tuple[tuple[str, ...], bool],
) -> Chunk:
    fetched = clips_on_disk(root, CAMERAS, number) or None  # a part of the chunk: the others were never asked for
    clips = tuple(sorted({clip for clip, is_valid in rows if is_valid and (fetched is None or clip in fetched)}))
    listed = tuple(sorted({clip for clip, _ in rows}))
    parts = {name: part for name in (EGOMOTION, *CAMERAS) if (part := clips_on_disk(root, (name,), number))}
    return Chunk(root, number, clips, _of_clips(present, clips), *asked, listed, parts=parts)


def _repeated(index: pa.Table) -> Iterator[Finding]:
    counts = Counter(index["clip_id"].to_pylist())
    for clip, count in counts.items():
        if count > 1:
            detail = f"{CLIP_INDEX_FILE}: lists it {count} times; fetch it again"
            yield refuse("duplicate-clip", detail).about(str(clip))


def _features(paths: frozenset[str], chunk: int) -> frozenset[str]:
    return frozenset(name for name, feature in FEATURES.items() if feature.chunk_path(chunk) in paths)


def _index_findings(root: Path, has_no_presence: bool) -> Iterator[Finding]:
    if has_no_presence:
        yield warn("missing-index", f"{PRESENCE_FILE}: not there; every clip is taken to have every feature")
    if not (root / FEATURES_FILE).is_file():
        yield warn("missing-index", f"{FEATURES_FILE}: not there; member names are taken from the devkit's")
    else:
        yield from _template_findings(root / FEATURES_FILE)


def _template_findings(path: Path) -> Iterator[Finding]:
    """A repository that renames its members would be misread: say so before anything looks missing."""
    for row in _csv_rows(path):
        if row and row[0] in FEATURES and not _is_same_row(row, FEATURES[row[0]].csv_row()):
            expected = ",".join(FEATURES[row[0]].csv_row())
            yield refuse("changed-template", f"{FEATURES_FILE}: {','.join(row)!r}; {expected!r} expected")


def _csv_rows(path: Path) -> list[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            return list(csv.reader(stream))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable CSV table ({error}); fetch it again") from None


def _is_same_row(found: list[str], expected: tuple[str, str, str, str]) -> bool:
    try:
        members = [json.loads(row[3] or "{}") for row in (found, expected)]
    except (IndexError, ValueError):
        return False
    return tuple(found[:3]) == expected[:3] and members[0] == members[1]


def _unlisted(chunks: set[int]) -> Iterator[Finding]:
    for number in sorted(chunks):
        yield warn("unlisted-chunk", f"chunk {number:04d}: {CLIP_INDEX_FILE} lists no valid clip of it")


def _chunk_numbers(root: Path) -> set[int]:
    names = (path.name for feature in (EGOMOTION, *CAMERAS) for path in _feature_folder(root, feature).glob("*"))
    return {int(match[1]) for name in names if (match := _CHUNK_FILE.search(name))}


def _has_files(root: Path, feature: str) -> bool:
    return any(_CHUNK_FILE.search(path.name) for path in _feature_folder(root, feature).glob("*"))


def _feature_folder(root: Path, feature: str) -> Path:
    return root / FEATURES[feature].directory / feature


def _presence(path: Path) -> dict[str, frozenset[str]]:
    table = _read_index(path, ("clip_id",))
    clips = table["clip_id"].to_pylist()
    return {
        name: frozenset(clip for clip, is_there in zip(clips, table[name].to_pylist(), strict=True) if is_there)
        for name in table.column_names
        if name in FEATURES
    }


def _of_clips(present: dict[str, frozenset[str]] | None, clips: tuple[str, ...]) -> dict[str, frozenset[str]] | None:
    return None if present is None else {name: found.intersection(clips) for name, found in present.items()}


def _read_index(path: Path, columns: tuple[str, ...]) -> pa.Table:
    try:
        table = pq.read_table(path)
        table.validate(full=True)  # a text that is not UTF-8
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet table ({error}); fetch it again") from None
    if missing := [name for name in columns if name not in table.column_names]:
        raise DataError(f"{path}: has no column {missing[0]}; it has {', '.join(table.column_names)}; fetch it again")
    used = [*columns, *(name for name in ("clip_is_valid", *FEATURES) if name in table.column_names)]
    if nested := [name for name in used if pa.types.is_nested(table.schema.field(name).type)]:
        raise DataError(f"{path}: column {nested[0]} holds lists or structures; plain values expected; fetch it again")
    return table
