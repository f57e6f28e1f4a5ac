"""What a fetch costs, said before it begins: files and bytes by feature, and hours at two stated rates."""

from collections import defaultdict
from collections.abc import Sequence

from omni_cli.report import Console, counted
from omni_cli.stages.fetch import landing
from omni_cli.stages.fetch.partial import Piece

_PIECES_SHOWN = 40
RATES_MBPS = (100, 1000)  # stated, not measured: a short probe tells nothing of an hour


def seconds_at(size_bytes: int, rate_mbps: int) -> float:
    """Return how long bytes take at a rate in megabits a second."""
    return size_bytes * 8 / (rate_mbps * 1e6)


def say_estimate(pieces: Sequence[Piece], console: Console) -> None:
    """Say how much will come, and for how long."""
    if pieces:
        size_bytes = sum(piece.transfer_bytes for piece in pieces)
        console.say(
            f"to fetch: {counted(len(pieces), 'file')}, {landing.size_text(size_bytes)}; {_times_text(size_bytes)}"
        )


def say_pieces(pieces: Sequence[Piece], console: Console) -> None:
    """Name the first files that would come, and how many follow."""
    for piece in pieces[:_PIECES_SHOWN]:
        part = f" of {counted(len(piece.clips), 'clip')}" if piece.clips else ""
        console.say(f"would fetch {piece.file.path}  {landing.size_text(piece.transfer_bytes)}{part}")
    if len(pieces) > _PIECES_SHOWN:
        console.say(f"would fetch {counted(len(pieces) - _PIECES_SHOWN, 'file')} more")


def say_table(pieces: Sequence[Piece], console: Console) -> None:
    """Show files, bytes and hours by feature, of what must come and of what is there."""
    by_feature: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_feature[_feature_of(piece.file.path)].append(piece)
    header = ("feature", "files", "to fetch", *(f"hours at {rate} Mb/s" for rate in RATES_MBPS), "there already")
    rows = [_row(name, of_feature) for name, of_feature in by_feature.items()]
    console.table("what a fetch would bring", header, [*rows, _row("all", pieces)])
    console.say(_times_text(sum(piece.transfer_bytes for piece in pieces)))


def _row(name: str, pieces: Sequence[Piece]) -> tuple[object, ...]:
    missing = [piece for piece in pieces if not piece.is_there]
    size_bytes = sum(piece.transfer_bytes for piece in missing)
    hours = (f"{seconds_at(size_bytes, rate) / 3600:.2f}" for rate in RATES_MBPS)
    return name, len(missing), landing.size_text(size_bytes), *hours, len(pieces) - len(missing)


def _feature_of(path: str) -> str:
    """Return the feature of a chunk's file, or the folder or name of a global table."""
    parts = path.split("/")
    return parts[1] if len(parts) == 3 else parts[0]


def _times_text(size_bytes: int) -> str:
    return ", ".join(f"{_duration_text(seconds_at(size_bytes, rate))} at {rate} Mb/s" for rate in RATES_MBPS)


def _duration_text(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
