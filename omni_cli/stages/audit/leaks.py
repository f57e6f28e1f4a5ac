"""What of a shard set is on both sides of its split: a drive, or two recordings that show the same."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from omni_cli.errors import DataError
from omni_cli.formats.video_check import THUMB_HEIGHT_PX, THUMB_WIDTH_PX
from omni_cli.samples.shards import RecordingEntry, ShardSet
from omni_cli.samples.splits import check_no_leak
from omni_cli.samples.stored import StoredRecording
from omni_cli.stages.audit.duplicates import duplicate_pairs
from omni_cli.stages.checks.findings import Finding, refuse, warn
from omni_cli.stages.checks.pictures import HASHED_AT, picture_hashes


def split_findings(shards: ShardSet) -> Iterator[Finding]:
    """Check by the manifest alone that no drive lies on both sides, nor one recording's bytes under two names."""
    entries, rule = shards.manifest.recordings, shards.manifest.split_rule
    try:
        check_no_leak([(entry.id, entry.group, entry.windows) for entry in entries], rule)
    except DataError as error:
        yield refuse("split-leak", str(error))
    first: dict[str, RecordingEntry] = {}
    for entry in entries:
        other = first.setdefault(entry.frames_file.sha256, entry)
        if other is not entry and _are_apart(other, entry):
            detail = f"the same pictures as {other.id}, byte for byte, which is in the other split"
            yield refuse("split-leak", detail).about(entry.id)


def picture_findings(shards: ShardSet, chosen: Sequence[RecordingEntry]) -> Iterator[Finding]:
    """Name recordings of different splits whose pictures look alike.

    Args:
        shards: the set.
        chosen: the recordings whose pictures are read; files that do not match their receipts are not among them.
    """
    chosen = [entry for entry in chosen if any(entry.windows.values())]  # one without a text has neither
    if len({split for entry in chosen for split, count in entry.windows.items() if count}) < 2:
        return  # there is no other side
    hashes = {entry.id: {"": _hashes(shards, entry)} for entry in chosen}
    by_id = {entry.id: entry for entry in chosen}
    for pair in duplicate_pairs(hashes):
        one, other = by_id[pair.one], by_id[pair.other]
        if _are_apart(one, other) and one.frames_file.sha256 != other.frames_file.sha256:
            detail = f"looks like {pair.one}, which is in the other split: {pair.different_share:.1%} of the bits of "
            yield warn("duplicate-across-splits", f"{detail}their picture hashes differ").about(pair.other)


def _are_apart(one: RecordingEntry, other: RecordingEntry) -> bool:
    """Say whether two recordings have windows in different splits."""
    sides = [{split for split, count in entry.windows.items() if count} for entry in (one, other)]
    return any(left != right for left in sides[0] for right in sides[1])


def _hashes(shards: ShardSet, entry: RecordingEntry) -> tuple[int, ...]:
    """Hash pictures of the first view at fixed shares of a recording."""
    stored = StoredRecording(shards, entry, None, None, verify=False)
    pictures = np.stack(stored.first_view(HASHED_AT))
    luma = pictures.mean(axis=-1 if pictures.shape[-1] == 3 else 1)  # RGB, or the six planes of a driving model's YUV
    return picture_hashes(np.stack([_thumb(picture) for picture in _without_bars(luma)]))


def _without_bars(luma: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Cut off what is black at the edges of all pictures (n, height, width): unlike drives would look alike by it."""
    is_lit = luma.max(axis=0) > 0
    if not is_lit.any():
        return luma
    (top, bottom), (left, right) = (np.flatnonzero(is_lit.any(axis=axis))[[0, -1]] for axis in (1, 0))
    return luma[:, top : bottom + 1, left : right + 1]


def _thumb(luma: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    small = Image.fromarray(luma.astype(np.uint8)).resize((THUMB_WIDTH_PX, THUMB_HEIGHT_PX), Image.Resampling.BOX)
    return np.asarray(small)
