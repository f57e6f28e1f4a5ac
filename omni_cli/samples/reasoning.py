"""Why the car drives on as it does: a recording's own texts, each with the window that ends when it was said.

The texts come from outside, so they are taken as they are or not at all: one that is long, holds what a tokenizer
takes for a token of the chat, or names the recording, drops its window, and the reason is counted. Only white space is
made plain.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from omni_cli.samples.sync import WindowPlan, plan_ending_at
from omni_cli.samples.tables import REASONING_COLUMNS, Frames, ShardTables, windows_schema
from omni_cli.samples.tiling import TiledPreprocess
from omni_cli.samples.waypoints import REACH, WAYPOINT_TARGETS, Waypoints, check_poses, forecast_tables, with_waypoints
from omni_cli.samples.windows import AssignSplit, ChosenWindows, camera_streams, split_windows
from omni_cli.scene.recording import Recording

MAX_CHARACTERS = 1000  # of a text; the published ones are a sentence or two
NO_TEXT = "the recording has no text"
TOO_LONG = f"its text is longer than {MAX_CHARACTERS} characters"
SPECIAL = "its text holds a token of the chat format"
CONTROL = "its text holds control characters"
NAMES_ITSELF = "its text names the recording"
EMPTY = "its text is empty"
SAME_TIME = "another text is of the same instant"
# <|im_end|>, <think>, </tool_call>, [INST], ...: what tokenizers of chat models give an id of its own
_SPECIAL = re.compile(r"<\||\|>|<\s*/?\s*[A-Za-z_][\w-]*\s*>|\[/?[A-Z_]{2,30}\]")
_INVISIBLE = {"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"}  # categories of Unicode, after white space was made plain


def reasoning_tables(
    recording: Recording, preprocess: TiledPreprocess, *, stride: int, max_age_us: int, assign_split: AssignSplit
) -> ShardTables:
    """Return the windows that end at a recording's texts, with ego motion, waypoints and text.

    A recording without a text that fits gives tables without rows: most have none, and nothing is wrong with them.
    `stride` means nothing here.

    Raises:
        DataError: a camera or the poses are missing, a video is damaged, or its windows lie between the splits.
    """
    plan, paths, texts = _plan(recording, preprocess, max_age_us)
    chosen = _split(plan, recording, preprocess, assign_split)
    if not chosen.windows:
        schema = windows_schema((*WAYPOINT_TARGETS, *REASONING_COLUMNS))
        return ShardTables(Frames(0, lambda: iter(())), schema.empty_table(), chosen.dropped)

    def targets_at(at_us: int) -> dict[str, Any]:
        return {**paths[at_us].columns(), "reasoning": texts[at_us]}

    return forecast_tables(recording, preprocess, chosen, targets_at=targets_at, more=REASONING_COLUMNS)


def reasoning_windows(
    recording: Recording, preprocess: TiledPreprocess, *, stride: int, max_age_us: int, assign_split: AssignSplit
) -> ChosenWindows:
    """Return the windows that `reasoning_tables` makes rows of; raises as it does, and decodes nothing."""
    plan, _, _ = _plan(recording, preprocess, max_age_us)
    return _split(plan, recording, preprocess, assign_split)


def _plan(
    recording: Recording, preprocess: TiledPreprocess, max_age_us: int
) -> tuple[WindowPlan, dict[int, Waypoints], dict[int, str]]:
    """Return the windows that end at texts, with the car's path there, and the texts, by their instant."""
    check_poses(recording)
    if not recording.captions:
        return WindowPlan((), {NO_TEXT: 1}), {}, {}
    texts, refused = usable_texts(recording)
    plan = _ending_at(recording, preprocess, sorted(texts), max_age_us)
    plan, paths = with_waypoints(WindowPlan(plan.windows, dict(Counter(plan.dropped) + refused)), recording)
    return plan, paths, texts


def _split(
    plan: WindowPlan, recording: Recording, preprocess: TiledPreprocess, assign_split: AssignSplit
) -> ChosenWindows:
    if not plan.windows:
        return ChosenWindows((), (), plan.dropped)
    return split_windows(plan, recording, preprocess, assign_split, REACH)


def usable_texts(recording: Recording) -> tuple[dict[int, str], Counter[str]]:
    """Return the texts of a recording that may be learned from, by instant, and how many may not for which reason."""
    texts: dict[int, str] = {}
    refused = Counter[str]()
    for caption in recording.captions:
        text = plain_text(caption.text)
        reason = SAME_TIME if caption.timestamp_us in texts else text_refusal(text, recording.id)
        if reason:
            refused[reason] += 1
        else:
            texts[caption.timestamp_us] = text
    return texts, refused


def plain_text(text: str) -> str:
    """Return a text with each run of white space, line ends included, as one space."""
    return " ".join(text.split())


def text_refusal(text: str, recording_id: str) -> str:
    """Say why a text must not be learned from; nothing where it may.

    Args:
        text: as `plain_text` gives it.
        recording_id: which no model may learn to say.
    """
    if not text:
        return EMPTY
    if len(text) > MAX_CHARACTERS:
        return TOO_LONG
    if any(unicodedata.category(character) in _INVISIBLE for character in text):
        return CONTROL
    if _SPECIAL.search(text):
        return SPECIAL
    return NAMES_ITSELF if recording_id.lower() in text.lower() else ""


def _ending_at(
    recording: Recording, preprocess: TiledPreprocess, ends_us: Sequence[int], max_age_us: int
) -> WindowPlan:
    """Return the windows that end at instants, where all cameras see."""
    cameras = {name: one.timestamp_us for name, one in camera_streams(recording, preprocess.cameras).items()}
    return plan_ending_at(
        cameras,
        check_poses(recording).timestamp_us,
        np.array(ends_us, dtype=np.int64),
        rate_hz=preprocess.rate_hz,
        num_frames=preprocess.num_frames,
        max_age_us=max_age_us,
    )
