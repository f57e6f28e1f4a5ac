"""Checks of the member names of a chunk zip. Pure functions."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from zipfile import ZipInfo

from omni_cli.formats.physical_ai_av import Feature
from omni_cli.stages.checks.findings import Finding, refuse, warn

# Without these no window can be made; the others (blurred boxes) only describe the pictures.
_ESSENTIAL = frozenset({"video", "frame_timestamps", "egomotion"})
_LOCAL_HEADER_BYTES = 30  # before the name; an extra field may follow it


def member_findings(
    feature: Feature, names: Sequence[str], clips: Sequence[str], expected: Iterable[str], listed: Iterable[str]
) -> Iterator[Finding]:
    """Check the members of one chunk zip against the templates and the presence table.

    Args:
        feature: what the zip holds.
        names: its members, as its directory lists them.
        clips: every clip of the chunk.
        expected: the clips that should have this feature.
        listed: every clip that the index names for this chunk, those that are not valid too.
    """
    unsafe, promised = sorted({name for name in names if _is_unsafe(name)}), set(expected)
    for name in unsafe:
        finding = refuse("unsafe-member", f"{feature.name} zip holds {name!r}, a name that leaves its folder")
        yield from of_all(clips, finding)
    for name, count in Counter(names).items():
        if count > 1:
            yield refuse("duplicate-member", f"{name}: {count} times in the zip").about(name.partition(".")[0])
    members = {clip: {alias: feature.member(clip, alias) for alias, _ in feature.members} for clip in clips}
    known = {name for of_clip in members.values() for name in of_clip.values()}
    yield from _strangers(feature, sorted(set(names) - known - set(unsafe)), set(listed))
    there = set(names)
    for clip, of_clip in members.items():
        yield from _missing(clip, of_clip, there) if clip in promised else _surprising(clip, of_clip, there)


def layout_findings(entries: Sequence[ZipInfo], name: str, clips: Sequence[str]) -> Iterator[Finding]:
    """Check that no two members share bytes: a small zip could claim a large content so, or hide one in another.

    Args:
        entries: of the zip's directory.
        name: of the zip.
        clips: every clip of the chunk.
    """
    ends_at = 0
    for entry in sorted(entries, key=lambda one: one.header_offset):
        if entry.header_offset < ends_at:
            detail = f"{name}: {entry.filename} begins inside another member; fetch it again"
            yield from of_all(clips, refuse("overlapping-members", detail, name))
            return
        ends_at = entry.header_offset + _LOCAL_HEADER_BYTES + len(entry.orig_filename) + entry.compress_size


def of_all(clips: Iterable[str], finding: Finding) -> list[Finding]:
    """Say a finding about a whole file of every clip in it, so that each is refused; or once where there is none."""
    return [finding.about(clip) for clip in clips] or [finding]


def _strangers(feature: Feature, names: Sequence[str], listed: set[str]) -> Iterator[Finding]:
    vanished: dict[str, list[str]] = {}
    for name in names:
        clip, _, rest = name.partition(".")
        if rest not in dict(feature.members).values():
            yield warn("extra-member", f"{name}: belongs to no clip of this chunk")
        elif clip not in listed:
            vanished.setdefault(clip, []).append(name)
    for clip, found in vanished.items():
        yield warn("vanished-clip", f"{found[0]}: in the zip, and the clip index lists it no more: it was withdrawn, "
                   "or the two are of two revisions").about(clip)  # fmt: skip


def _missing(clip: str, members: Mapping[str, str], there: set[str]) -> Iterator[Finding]:
    for alias, name in members.items():
        if name not in there:
            make = refuse if alias in _ESSENTIAL else warn
            yield make("missing-member", f"{name}: not in the zip; fetch the chunk again").about(clip)


def _surprising(clip: str, members: Mapping[str, str], there: set[str]) -> Iterator[Finding]:
    for name in members.values():
        if name in there:
            yield warn("unpromised-member", f"{name}: the presence table says no").about(clip)


def _is_unsafe(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name
