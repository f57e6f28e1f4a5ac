"""`omni etl --dry-run`: what would happen, from settings and indices alone."""

from typing import Any

from omni_cli.errors import UsageError
from omni_cli.recipe import Sampled
from omni_cli.report import Console
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages.etl.estimate import estimate
from omni_cli.stages.etl.request import EtlRequest, prepare

Rows = list[tuple[str, object]]


def dry_run(recipe: Sampled, request: EtlRequest, console: Console) -> dict[str, Any]:
    """Say what would happen and touch nothing; raw data may be absent, the profile of another machine.

    Args:
        recipe: as for `etl`.
        request: as for `etl`.
        console: shows the plan.

    Raises:
        DataError: the raw data are there, but no recording in them.
    """
    preprocess = recipe.preprocess()
    facts, rows = _window_facts(preprocess), _window_rows(recipe, preprocess)
    title = f"plan for {request.profile or 'this machine'}"
    try:
        job, plan = prepare(recipe, preprocess, request)
    except UsageError as error:
        console.table(title, ("what", "value"), rows)
        console.say(f"no raw data yet: {error}")
        return {**facts, "dry_run": True, "profile": request.profile, "recordings": 0, "raw": None}
    expected = estimate(job, plan.share(request.shard))
    rows += [
        ("recordings", f"{expected.recordings} in {job.raw}"),
        ("hours of driving, about", f"{expected.hours:.2f}"),
        ("windows, about", expected.windows),
        ("disk, at most about", f"{expected.stored_bytes / 2**30:.2f} GiB in {job.out}"),
    ]
    console.table(title, ("what", "value"), rows)
    where = {"profile": request.profile, "raw": str(job.raw), "shards": str(job.out)}
    return {**facts, **expected.facts(), "dry_run": True, **where}


def _window_facts(preprocess: Preprocess) -> dict[str, Any]:
    pixels = preprocess.canvas_width_px * preprocess.canvas_height_px
    return {
        "cameras": list(preprocess.cameras),
        "canvas_px": [preprocess.canvas_width_px, preprocess.canvas_height_px],
        "window_frames": preprocess.num_frames,
        "bytes_per_window": preprocess.num_frames * pixels * 3,
        "visual_tokens_per_window": preprocess.visual_tokens,
    }


def _window_rows(recipe: Sampled, preprocess: Preprocess) -> Rows:
    canvas = f"{preprocess.canvas_width_px}x{preprocess.canvas_height_px}"
    cell = f"{preprocess.cell_width_px}x{preprocess.cell_height_px}"
    megabytes = _window_facts(preprocess)["bytes_per_window"] / 1e6
    return [
        ("cameras", f"{len(preprocess.cameras)}, cells of {cell} px in {preprocess.columns} columns"),
        ("canvas", f"{canvas} px, a multiple of {preprocess.vision.multiple_px}"),
        ("window", f"{preprocess.num_frames} frames at {preprocess.rate_hz:g} Hz, stride {recipe.sample.stride}"),
        ("pixels of a window", f"{megabytes:.2f} MB"),
        ("visual tokens of a window", preprocess.visual_tokens),
    ]
