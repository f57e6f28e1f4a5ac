"""The texts of `reasoning/ood_reasoning.parquet`: why a driver did what followed, for a few clips of the dataset.

One row a clip. `events` is a JSON text, or null: a list of objects with `event_start_frame` (an index at 10 Hz),
`event_start_timestamp` (us since the clip's start, which is what counts) and `coc`, the text.
"""

import json
from pathlib import Path
from typing import Any

from omni_cli.errors import DataError
from omni_cli.scene.recording import Caption
from omni_cli.sources.parquet_tables import read_table

_MAX_CHARACTERS = 1 << 20  # of a clip's events


def read_events(path: Path) -> dict[str, str]:
    """Return the `events` of each clip that has some, as they are written.

    Raises:
        DataError: the file is no such table.
    """
    table = read_table(path, str(path), ("clip_id", "events")).to_pydict()
    rows = zip(table["clip_id"], table["events"], strict=True)
    return {str(clip): str(events) for clip, events in rows if events is not None}


def parse_events(events: str, name: str) -> tuple[Caption, ...]:
    """Return a clip's texts by time.

    Args:
        events: the JSON text.
        name: what to call it in an error.

    Raises:
        DataError: it is no list of events, or one lacks its time or its text.
    """
    try:
        listed = json.loads(events) if len(events) <= _MAX_CHARACTERS else None
    except ValueError:
        listed = None
    if not isinstance(listed, list):
        raise DataError(f"{name}: events is no JSON list ({events[:60]!r}); fetch it again or quarantine the clip")
    return tuple(sorted((_caption(event, name) for event in listed), key=lambda one: one.timestamp_us))


def _caption(event: Any, name: str) -> Caption:
    try:
        at_us, text = event["event_start_timestamp"], event["coc"]
    except (KeyError, TypeError):
        found = ", ".join(map(str, event)) if isinstance(event, dict) else type(event).__name__
        raise DataError(
            f"{name}: an event has {found[:120]}; expected event_start_timestamp and coc; fetch it again"
        ) from None
    if isinstance(at_us, bool) or not isinstance(at_us, int | float) or at_us != int(at_us):
        raise DataError(f"{name}: event_start_timestamp is {at_us!r}; expected whole microseconds; fetch it again")
    if not isinstance(text, str | None):
        raise DataError(f"{name}: coc is a {type(text).__name__}; expected a text; fetch it again")
    return Caption(int(at_us), text or "")
