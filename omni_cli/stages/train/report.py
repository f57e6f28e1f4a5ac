"""`report.md` and `report.html`: what was trained, from what, how, how fast and at what cost, by the run's files alone.

Whoever reads a report may be anyone: no folder of the machine is named in it, no user and no token.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePath, PureWindowsPath
from statistics import median
from typing import Any

from omni_cli import files
from omni_cli.config import read_document
from omni_cli.errors import OmniError
from omni_cli.report import Console, counted
from omni_cli.stages import pages, runs
from omni_cli.stages.checkpoints import read_history
from omni_cli.stages.train.curves import energy_of, png, telemetry_picture
from omni_cli.stages.train.pace import WAIT_GOAL
from omni_cli.stages.train.roll_back import roll_backs
from omni_cli.stages.train.telemetry import one_line, read_telemetry
from omni_cli.stages.train.validation import LOSS

_LOSS_ROWS = 12
_NOT_MEASURED = "not measured"
_UNTESTED = (
    "the readers of NVIDIA's and AMD's libraries were written from their sources and tested on fakes: no GPU ran them"
)
_LOSS_HEADER = ("step", "training loss", "validation loss", "learning rate", "gradient norm", "time trained")


@dataclass(frozen=True)
class Told:
    """What the files of a run say."""

    run: runs.Run
    history: list[dict[str, float]]
    telemetry: list[dict[str, Any]]
    roll_backs: list[dict[str, Any]]

    @property
    def opened(self) -> list[dict[str, Any]]:
        """The first line of each session."""
        return [line for line in self.telemetry if "opened" in line]

    @property
    def last(self) -> dict[str, Any]:
        """The last that is known of each quantity."""
        known: dict[str, Any] = {}
        for line in self.telemetry:
            known |= line
        return known


def write_report(run: runs.Run) -> Path:
    """Write a run's report and its picture, from its files as they are now; return the page.

    Raises:
        DataError: a file of the run is damaged.
    """
    history, telemetry = read_history(run.folder), read_telemetry(run.folder / runs.TELEMETRY)
    told = Told(run, history, telemetry, roll_backs(run.folder))
    picture = png(telemetry_picture(history, telemetry, [event["step"] for event in told.roll_backs]))
    sections, losses, notes = _sections(told), loss_rows(history), _notes(told)
    files.write_bytes(run.folder / runs.TELEMETRY_PICTURE, picture)
    files.write_text(run.folder / runs.REPORT, _markdown(run.name, sections, losses, notes))
    blocks = [pages.picture("telemetry", picture)]
    for title, rows in sections.items():
        blocks += [pages.heading(title), pages.facts(rows)]
    blocks += [pages.heading("Loss"), pages.table(_LOSS_HEADER, losses)]
    blocks += [pages.heading("What to know of these numbers"), pages.listed(notes)]
    page = run.folder / runs.REPORT_PAGE
    files.write_text(page, pages.page(f"Training of {run.name}", blocks))
    return page


@contextmanager
def reported(folder: Path, console: Console) -> Iterator[None]:
    """Write the report of the run in a folder when what is done in the block ends, be it with a line that says why.

    Where nothing was trained, a report that is there stays as it is.
    """
    before = _size(folder)
    try:
        yield
    except (OmniError, OSError, KeyboardInterrupt):
        if _size(folder) != before:
            _try_to_write(folder, console)
        raise
    if _size(folder) != before or not (folder / runs.REPORT_PAGE).is_file():
        _try_to_write(folder, console)


def _size(folder: Path) -> int:
    path = folder / runs.TELEMETRY
    return path.stat().st_size if path.is_file() else -1


def _try_to_write(folder: Path, console: Console) -> None:
    """Write the report; the weights, and the reason why there are none, are worth more than it."""
    try:
        console.say(f"report {write_report(runs.open_run(folder))}")
    except Exception as error:  # whatever a damaged file of the run, or who draws the picture, leads to
        console.warn(f"no report was written: {one_line(error)}")


def _sections(told: Told) -> dict[str, list[tuple[str, str]]]:
    return {
        "What was trained": _what(told),
        "How it went": _how(told),
        "Time, energy and memory": _cost(told),
        "Machine": _machine(told),
        "Settings": _settings(told.run.manifest.settings),
    }


def _what(told: Told) -> list[tuple[str, str]]:
    manifest, opened = told.run.manifest, told.last.get("opened", {})
    settings = manifest.settings
    rows = [("model", _text(settings.get("model"))), ("recipe", manifest.recipe)]
    rows += [("tuning", _text(settings.get("tune", {}).get("mode"))), ("base", _text(manifest.base_fingerprint))]
    if "weights" in opened:
        rows.append(("weights that learn", f"{opened['trainable_weights']:,} of {opened['weights']:,}"))
    rows.append(("shards", f"{_text(manifest.shards.folder)}, {manifest.shards.fingerprint[:12]}"))
    return rows + _data(told)


def _data(told: Told) -> list[tuple[str, str]]:
    path = told.run.folder / runs.LEARNED
    if not path.is_file():
        return []
    learned = read_document(path, runs.Learned, "what a run learned from")
    of = f"{counted(learned.windows, 'window')} of {counted(len(learned.recordings), 'recording')}"
    rows = [("learned from", f"{of}, split by {told.run.manifest.shards.split_rule}")]
    rows += [("source", learned.source)] if learned.source else []
    return [*rows, ("licence of the data", ", ".join(learned.licences) or "not noted")]


def _how(told: Told) -> list[tuple[str, str]]:
    if not told.history:
        return [("steps", "none was logged")]
    first, last = told.history[0], told.history[-1]
    taken = max(steps_taken(told.telemetry), int(last["step"]))
    rows = [("steps kept", f"{last['step']:.0f}"), ("steps taken", f"at least {taken:,}")]
    rows += [(name, f"{last[name]:,.0f}") for name in ("samples", "tokens") if name in last]
    rows.append(("training loss", f"{first['loss']:.4f} at step {first['step']:.0f}, {last['loss']:.4f} at the end"))
    measured = [line for line in told.history if LOSS in line]
    if measured:
        best = min(measured, key=lambda line: line[LOSS])
        rows.append(("lowest validation loss", f"{best[LOSS]:.4f} at step {best['step']:.0f}"))
    rows.append(("sessions", f"{len(told.opened)}{_resumed(told)}"))
    for event in told.roll_backs:
        rows.append(("roll back", f"to step {event['to_step']}, from step {event['step']}: {_text(event['found'])}"))
    return rows


def _resumed(told: Told) -> str:
    steps = [str(line["step"]) for line in told.opened[1:]]
    return f": went on at step {', '.join(steps)}" if steps else ""


def steps_taken(telemetry: Sequence[Mapping[str, Any]]) -> int:
    """Return how many steps were taken, those that were lost and taken again twice; of a killed session, as sampled."""
    pairs = pairwise(telemetry)
    return sum(max(after["step"] - before["step"], 0) for before, after in pairs if "opened" not in after)


def _cost(told: Told) -> list[tuple[str, str]]:
    last, history = told.last, told.history
    rows = [("time trained, all sessions", duration(last["elapsed_s"]) if last else _NOT_MEASURED)]
    joules = energy_of(last)
    rows.append(("energy, all sessions", energy_text(last) if joules is not None else _NOT_MEASURED))
    for unit in ("samples", "tokens"):
        rates = [line[f"{unit}_per_s"] for line in history if f"{unit}_per_s" in line]
        rows += [(f"{unit} a second", f"{median(rates):,.2f} (median of {len(rates)} lines)")] if rates else []
    waited = data_wait_share(history)
    said = f"{waited:.2%} of the steps' time; the goal is less than {WAIT_GOAL:.0%}" if waited is not None else ""
    rows.append(("waiting for data", said or _NOT_MEASURED))
    peaks = [line["peak_memory_bytes"] for line in history if "peak_memory_bytes" in line]
    rows.append(("peak memory of the training process", f"{max(peaks) / 2**30:.2f} GiB" if peaks else _NOT_MEASURED))
    return rows


def data_wait_share(history: Sequence[Mapping[str, float]]) -> float | None:
    """Return the share of the logged steps' time that waited for data; None where no line tells it."""
    known = [line for line in history if "data_wait_share" in line]
    seen = [0.0, *(line["samples"] for line in known)]
    times_s = [
        (line["samples"] - before) / line["samples_per_s"] for before, line in zip(seen[:-1], known, strict=True)
    ]
    waits_s = [line["data_wait_share"] * time_s for line, time_s in zip(known, times_s, strict=True)]
    return sum(waits_s) / sum(times_s) if known else None


def energy_text(line: Mapping[str, Any]) -> str:
    """Return what was measured of the energy, and of what."""
    names = {"gpu_energy_j": "GPU", "cpu_energy_j": "CPU packages of the whole machine"}
    parts = [f"{line[key] / 3600:,.2f} Wh {name}" for key, name in names.items() if key in line]
    return ", ".join(parts)


def _machine(told: Told) -> list[tuple[str, str]]:
    machine = told.last.get("opened", told.run.manifest.machine)
    names = {"device": "trained on", "cpu": "processor", "cpu_count": "cores", "memory_gib": "memory [GiB]"}
    rows = [(label, _text(machine[key])) for key, label in names.items() if key in machine]
    rows += [("system", _text(machine["platform"]))] if "platform" in machine else []
    packages = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items())
    return [*rows, ("python", _text(machine.get("python", "?"))), ("versions", packages)]


def _settings(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += _settings(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _text(value)))
    return rows


def _text(value: Any) -> str:
    """Return a value for people; of a folder of this machine, its name alone."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    text = " ".join(str(value).split())
    if text.startswith(("/", "~")) or PureWindowsPath(text).is_absolute():
        return PurePath(text.replace("\\", "/")).name
    return text


def loss_rows(history: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """Return the rows of the table of losses: the first and the last line, and some evenly between."""
    most = min(_LOSS_ROWS, len(history))
    chosen = sorted({round(at * (len(history) - 1) / max(most - 1, 1)) for at in range(most)})
    return [_loss_row(history[index]) for index in chosen]


def _loss_row(line: Mapping[str, float]) -> list[str]:
    cells = [f"{line['step']:.0f}", f"{line['loss']:.4f}"]
    for key, style in ((LOSS, ".4f"), ("learning_rate", ".3g"), ("grad_norm", ".3g")):
        cells.append(format(line[key], style) if key in line else "")
    return [*cells, duration(line["elapsed_s"]) if "elapsed_s" in line else ""]


def duration(seconds: float) -> str:
    """Return a time for people: 42.1 s, 3 min 5 s, 2 h 7 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    return f"{minutes} min {rest_s} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _notes(told: Told) -> list[str]:
    last = told.last
    notes = ["time and energy are those of all sessions: what a kill or a roll back lost was paid for too"]
    if not told.telemetry:
        notes.append(f"{runs.TELEMETRY} is not there: load, memory over time, power and energy were not measured")
    elif energy_of(last) is None:
        notes.append(
            "energy was not measured: no GPU that tells it, and the counters of the processor are not readable"
        )
    if "gpus" in last:
        notes.append(_UNTESTED)
    if "cpu_energy_j" in last:
        notes.append("the energy of the processor is that of its packages: other programs of the machine are in it")
    if "sampling_cpu_s" in last:
        notes.append(_sampling(told))
    return notes


def _sampling(told: Told) -> str:
    last, began_s = told.last, told.opened[-1]["elapsed_s"] if told.opened else 0.0
    passed_s = max(last["elapsed_s"] - began_s, 1e-9)
    return f"to sample twice a second took {last['sampling_cpu_s'] / passed_s:.2%} of one core in the last session"


def _markdown(
    name: str, sections: Mapping[str, Sequence[tuple[str, str]]], losses: Sequence[Sequence[str]], notes: Sequence[str]
) -> str:
    lines = [f"# Training of {_plain(name)}", "", f"![telemetry]({runs.TELEMETRY_PICTURE})", ""]
    for title, rows in sections.items():
        lines += [f"## {title}", "", *_table(("", ""), rows), ""]
    lines += ["## Loss", "", *_table(_LOSS_HEADER, losses), "", "## What to know of these numbers", ""]
    return "\n".join([*lines, *(f"- {_plain(note)}" for note in notes)]) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    drawn = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(_plain, row))} |" for row in drawn]


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is: no mark-up, no tag, no new cell."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{each}" if each in "\\`*_[]|#!~" else each for each in escaped)
