"""How fast recordings become shards, and what share of that time a bare decoder takes."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from omni_cli.models.host_memory import keep_freed_blocks
from omni_cli.sources import open_source
from omni_cli.stages.bench.inputs import Found, Inputs
from omni_cli.stages.bench.subject import Subject
from omni_cli.stages.bench.timing import Line, Part, Timing, measure

WHOLE, DECODE = "a recording", "decode alone"
_THREADS = "one thread that decodes, scales and writes, and one that hashes"
_OPEN, _PICTURES = "open it, read its log", "decode and scale, nothing written"


def bench_etl(inputs: Inputs, repeats: int) -> Part:
    """Time all that etl does to one recording, beside a decoder that keeps nothing, in turn.

    Where the user's videos are smaller than 1080p or of few bits, the same is measured on a texture that is neither.
    """
    keep_freed_blocks()  # as etl does
    found = inputs.found
    own = _subject(inputs, found)
    video = own.video
    measured = _measured(own, f"{own.recording.id} of {found.folder}", repeats)
    if inputs.texture is None or video.is_hard:
        return measured
    textured = inputs.textured(inputs.texture, f"{found.folder} holds {video}")
    if textured is None:
        return measured
    return _both(measured, _measured(_subject(inputs, textured), "a drive past texture", repeats))


def _subject(inputs: Inputs, found: Found) -> Subject:
    reader, unit = open_source(found.source, found.folder), inputs.work / f"unit-{found.folder.name}"
    return Subject.of(found.recording, reader, inputs.preprocess, inputs.recipe.table_maker(), unit)


@dataclass
class _Timed:
    """A piece of work that notes its CPU time too: what is waited for, a disk or another process, is not in that."""

    work: Callable[[], object]
    cpu_s: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        began_s = time.process_time()
        self.work()
        self.cpu_s.append(time.process_time() - began_s)


def _measured(subject: Subject, where: str, repeats: int) -> Part:
    work = {
        WHOLE: subject.whole,
        _OPEN: subject.open,
        _PICTURES: subject.pictures,
        DECODE: subject.decode_alone,
        **subject.other_ways,
    }
    timed = {name: _Timed(one) for name, one in work.items()}
    timings = measure(timed, repeats)
    cpu_s = {name: statistics.median(one.cpu_s[1:]) for name, one in timed.items()}  # the first was the warm-up
    frames = subject.decode_alone()
    amounts = _amounts(subject, frames)
    lines = tuple(Line(name, timings[name], amounts.get(name, {}), {"cpu_s": cpu_s[name]}) for name in timed)
    cameras = len(subject.preprocess.cameras)
    on = f"{where}, {cameras} cameras, {subject.video}, {frames} frames of them, one process, {_THREADS}"
    return Part("etl", on, lines, _shares(timings, cpu_s))


def _amounts(subject: Subject, frames: int) -> Mapping[str, Mapping[str, float]]:
    made = {"camera-frames": frames, "pictures": subject.num_pictures, "windows": subject.windows.num_rows}
    stored = {"MB": subject.stored_bytes / 1e6, "s of driving": subject.driven_s}
    return {WHOLE: {**made, **stored}, DECODE: {"camera-frames": frames}}


def _shares(timings: Mapping[str, Timing], cpu_s: Mapping[str, float]) -> dict[str, float]:
    """Return how long other work takes beside the whole: the speed of the decoder is what etl cannot exceed."""
    whole_s = timings[WHOLE].median_s
    of_time = {f"{name} / {WHOLE}, in time": one.median_s / whole_s for name, one in timings.items() if name != WHOLE}
    return of_time | {f"{DECODE} / {WHOLE}, in CPU time": cpu_s[DECODE] / cpu_s[WHOLE]}


def _both(own: Part, hard: Part) -> Part:
    lines = tuple(Line(f"texture: {line.what}", line.timing, line.amounts, line.notes) for line in hard.lines)
    ratios = {f"texture: {name}": ratio for name, ratio in hard.ratios.items()}
    return Part(own.name, f"{own.on}; {hard.on}", (*own.lines, *lines), {**own.ratios, **ratios})
