"""How fast recordings become shards."""

from collections.abc import Callable
from functools import partial

from omni_cli.formats.video import decode_only
from omni_cli.models.host_memory import keep_freed_blocks
from omni_cli.samples.shards import write_recording
from omni_cli.samples.tables import ShardTables
from omni_cli.samples.windows import span_us
from omni_cli.scene.clock import MICROSECONDS_PER_SECOND
from omni_cli.sources import open_source
from omni_cli.stages.bench.inputs import Inputs
from omni_cli.stages.bench.timing import Line, Part, measure, summed

_WHOLE, _OPEN, _MAKER, _WRITE = "a recording", "open it, read its log", "decode, resize and cut", "write and hash"
_DECODE = "decode alone"


def bench_etl(inputs: Inputs, repeats: int) -> Part:
    """Time all that etl does to one recording, beside a decoder that keeps nothing."""
    found, preprocess, maker = inputs.found, inputs.preprocess, inputs.recipe.table_maker()
    recording, reader = found.recording, open_source(found.source, found.folder)
    videos = [(name, video) for name in preprocess.cameras for video in recording.cameras[name].videos]

    def make() -> ShardTables:
        tables: ShardTables = maker(recording, preprocess, assign_split=lambda _start_us, _end_us: "train")
        return tables

    def decode() -> int:
        return sum(decode_only(video.read(), name) for name, video in videos)

    keep_freed_blocks()  # as etl does
    tables, frames = make(), decode()
    parts: dict[str, Callable[[], object]] = {
        _OPEN: partial(reader.open, recording.id, preprocess.cameras),
        _MAKER: make,
        _WRITE: partial(write_recording, inputs.work / "unit", recording.id, tables, "bench"),
    }
    timings = measure({**parts, _DECODE: decode}, repeats)
    whole = summed([timings[name] for name in parts])
    first_us, last_us = span_us(recording, preprocess.cameras)
    driven = {"s of driving": (last_us - first_us) / MICROSECONDS_PER_SECOND}
    made = {"frames": frames, "pictures": tables.frames.num_rows, "windows": tables.windows.num_rows, **driven}
    stored_mb = {"MB": tables.frames.nbytes / 1e6}
    amounts = {_WHOLE: driven, _OPEN: {}, _MAKER: made, _WRITE: stored_mb, _DECODE: {"frames": frames}}
    lines = tuple(Line(name, (timings | {_WHOLE: whole})[name], amount) for name, amount in amounts.items())
    ratios = {f"{name} / {_WHOLE}, in time": timings[name].median_s / whole.median_s for name in parts}
    ratios[f"{_DECODE} / {_WHOLE}, in time"] = timings[_DECODE].median_s / whole.median_s
    on = f"{recording.id} of {found.folder}, {len(preprocess.cameras)} cameras, one process"
    return Part("etl", on, lines, ratios)
