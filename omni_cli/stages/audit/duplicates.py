"""Recordings that show the same drive: by the bytes of a video, or by difference hashes of some of its pictures.

All are compared with all, a block against the rest at a time: 10,000 recordings of 8 hashes and one camera take
seconds. Two hashes of unrelated pictures differ in about half of their bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omni_cli.stages.checks.facts import RecordingFacts
from omni_cli.stages.checks.findings import Finding, warn

MAX_DIFFERENT_SHARE = 0.06  # of the bits; a copy coded again differs in about 0.01, other drives in 0.2 and more
_MIN_PICTURES = 4  # of those with features that two recordings share
_BITS = 64
_BLOCK = 256
Hashes = Mapping[str, tuple[int, ...]]  # camera -> hashes at the same shares of each video


@dataclass(frozen=True)
class Pair:
    """Two recordings that look alike."""

    one: str
    other: str
    different_share: float  # of the bits, in the camera where they differ most
    cameras: tuple[str, ...]  # in which they look alike
    is_whole: bool  # no other camera that both have tells them apart


def duplicate_pairs(hashes: Mapping[str, Hashes]) -> list[Pair]:
    """Return the pairs that look alike in a camera that both have, sorted.

    Args:
        hashes: recording -> camera -> difference hashes, 0 for a picture without features.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for camera in sorted({camera for of_one in hashes.values() for camera in of_one}):
        names = sorted(name for name, of_one in hashes.items() if of_one.get(camera))
        for one, other, share in _near(names, np.array([hashes[name][camera] for name in names], dtype=np.uint64)):
            found.setdefault((one, other), {})[camera] = share
    return [
        Pair(
            one,
            other,
            max(shares.values()),
            tuple(shares),
            is_whole=not _differ_elsewhere(hashes[one], hashes[other], shares),
        )
        for (one, other), shares in sorted(found.items())
    ]


def duplicate_findings(facts: Sequence[RecordingFacts]) -> Iterator[Finding]:
    """Name recordings whose videos are the same, byte for byte or to the eye."""
    first: dict[tuple[str, str], str] = {}
    exact: set[tuple[str, str]] = set()
    for one in sorted(facts, key=lambda found: found.recording):
        for camera, found in sorted(one.cameras.items()):
            other = first.setdefault((camera, found.content_key), one.recording) if found.content_key else one.recording
            if other != one.recording and (other, one.recording) not in exact:
                exact.add((other, one.recording))
                detail = f"the same video as {other}, byte for byte; keep one, or both in one split"
                yield warn("duplicate-video", detail).about(one.recording, camera)
    pairs = duplicate_pairs({one.recording: recording_hashes(one) for one in facts})
    yield from (_duplicate(pair) for pair in _first_of_each(pairs) if (pair.one, pair.other) not in exact)


def _first_of_each(pairs: Sequence[Pair]) -> list[Pair]:
    """Return one pair for each later recording, a whole one where it has one: of 100 copies 99, and not 4950."""
    first = {pair.other: pair for pair in reversed(pairs)}
    whole = {pair.other: pair for pair in reversed(pairs) if pair.is_whole}
    return sorted((first | whole).values(), key=lambda pair: (pair.other, pair.one))


def _duplicate(pair: Pair) -> Finding:
    differing = f"{pair.different_share:.1%} of the bits of its picture hashes differ"
    if pair.is_whole:
        detail = f"looks like {pair.one} in {len(pair.cameras)} cameras: {differing}; keep one, or both in one split"
        return warn("duplicate", detail).about(pair.other)
    detail = f"looks like {pair.one} in this camera alone: {differing}; one video may lie in the other's place"
    return warn("duplicate-camera", detail).about(pair.other, pair.cameras[0])


def recording_hashes(facts: RecordingFacts) -> Hashes:
    """Return the hashes of a recording's cameras that were decoded."""
    return {camera: found.pictures.hashes for camera, found in facts.cameras.items() if found.pictures is not None}


def _near(names: Sequence[str], hashes: npt.NDArray[np.uint64]) -> Iterator[tuple[str, str, float]]:
    """Yield the pairs of rows (n, instants) that differ little, with the share of their bits that differs."""
    for start in range(0, len(names), _BLOCK):
        block = hashes[start : start + _BLOCK]
        bits = np.zeros((len(block), len(names)), dtype=np.uint16)
        shared = np.zeros_like(bits)
        for instant in range(hashes.shape[1]):
            is_told = (block[:, instant] != 0)[:, None] & (hashes[:, instant] != 0)[None]
            bits += np.bitwise_count(block[:, instant, None] ^ hashes[None, :, instant]) * is_told
            shared += is_told
        is_near = (shared >= _MIN_PICTURES) & (bits <= MAX_DIFFERENT_SHARE * _BITS * shared)
        for row, other in zip(*np.nonzero(is_near), strict=True):
            if other > start + row:
                share = float(bits[row, other] / (_BITS * int(shared[row, other])))
                yield names[start + row], names[other], share


def _differ_elsewhere(one: Hashes, other: Hashes, shares: Mapping[str, float]) -> bool:
    """Say whether another camera that both have, and that shows something, tells them apart."""
    rest = [camera for camera in one if camera not in shares and other.get(camera) and one[camera]]
    return any(sum(bool(a) and bool(b) for a, b in zip(one[c], other[c], strict=True)) >= _MIN_PICTURES for c in rest)
