"""What follows a bad step: training goes on from the last good checkpoint, or ends with one line that says why."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omni_cli.errors import OmniError
from omni_cli.recipe import TrainSettings
from omni_cli.report import Console, counted
from omni_cli.samples.dataset import WindowDataset
from omni_cli.stages import checkpoints, runs
from omni_cli.stages.train.guards import Finding

ROLL_BACK = "roll back"
_NAMED = 3  # windows, in a line for people; the run's events list all
_SLOWER = "a lower --set train.learning_rate in a run of another name"
_REMEDIES = {
    "loss": f"look at these windows with omni audit, or train with {_SLOWER}",
    "gradient": f"look at these windows with omni audit, or train with {_SLOWER}",
    "spike": f"train with {_SLOWER}, or go on and let losses rise with --set train.spike_window=0",
    "dead": "train with a higher --set precision, or other --set tune.targets, in a run of another name",
}


def roll_back(run: runs.Run, settings: TrainSettings, dataset: WindowDataset, found: Finding, console: Console) -> None:
    """Make the last checkpoint before a bad step the newest one, and write down why.

    Args:
        run: that learns.
        settings: what a bad step leads to.
        dataset: what it learns from.
        found: what is wrong.
        console: told of it.

    Raises:
        OmniError: it is not to be tried again, or was tried before; the checkpoint stays.
    """
    saved, windows = run.folder / runs.CHECKPOINTS, _windows(dataset, found.windows)
    checkpoints.discard_from(saved, _first_to_go(saved, found.since))
    start = checkpoints.find_start(saved, run.manifest.key())
    said = f"{found.said}, on {_named(windows)}"
    if refusal := _why_not(settings, found, start.step, checkpoints.read_events(run.folder)):
        raise OmniError(f"run {run.folder}: {said}; {refusal}; {_good(start)}; {_REMEDIES[found.reason]}")
    event = {"event": ROLL_BACK, "step": found.step, "reason": found.reason, "found": found.said, "windows": windows}
    checkpoints.append_event(run.folder, {**event, "to_step": start.step})
    console.warn(f"{said}; going back to {_place(start)}")


def roll_backs(run_folder: Path) -> list[dict[str, Any]]:
    """Return when and why training went back, without the windows."""
    events = [event for event in checkpoints.read_events(run_folder) if event.get("event") == ROLL_BACK]
    return [{key: event[key] for key in ("step", "reason", "found", "to_step")} for event in events]


def _why_not(settings: TrainSettings, found: Finding, to_step: int, events: Sequence[dict[str, Any]]) -> str | None:
    """Return why training does not go back once more, None where it does."""
    before = [event for event in events if event.get("event") == ROLL_BACK]
    if settings.on_bad_step == "stop":
        return "train.on_bad_step = stop"
    if any((event["step"], event["reason"]) == (found.step, found.reason) for event in before):
        return "so it was when this step was taken before: it does not pass by itself"
    if to_step == 0 and any(event["to_step"] == 0 for event in before):
        return "training has begun anew once already"
    if len(before) >= settings.max_roll_backs:
        return (
            f"training has gone back {counted(len(before), 'time')}, train.max_roll_backs is {settings.max_roll_backs}"
        )
    return None


def _first_to_go(saved: Path, since: int) -> int:
    """Return from which step on checkpoints are discarded: where all are part of what went wrong, the oldest stays."""
    return max(since, min(checkpoints.steps_saved(saved), default=0) + 1)


def _windows(dataset: WindowDataset, numbers: Sequence[int]) -> list[dict[str, Any]]:
    rows = [dataset.row(number) for number in numbers]
    return [{"recording": row["recording"], "start_us": row["start_us"]} for row in rows]


def _named(windows: Sequence[dict[str, Any]]) -> str:
    names = ", ".join(f"{window['recording']} at {window['start_us']} us" for window in windows[:_NAMED])
    more = len(windows) - _NAMED
    return f"{names} and {counted(more, 'more window')}" if more > 0 else names


def _good(start: checkpoints.Start) -> str:
    return f"{start.checkpoint} is good" if start.checkpoint else "no checkpoint came before it"


def _place(start: checkpoints.Start) -> str:
    return f"the checkpoint of step {start.step}" if start.checkpoint else "the beginning"
