"""`omni fetch`."""

from pathlib import Path
from typing import Annotated

import typer

from omni_cli.commands._options import DATA, RUNS, Cameras, Data, DryRun, Json, Quiet, Runs

EXAMPLE = "omni fetch --source synthetic --chunks 2"


def command(
    *,
    source: Annotated[
        str, typer.Option(metavar="NAME", help="physical_ai_av, synthetic, openpilot, comma2k19 or dgp.")
    ] = "physical_ai_av",
    chunks: Annotated[
        str | None, typer.Option(metavar="N|A-B|A,B", help="The first N chunks, a range, or a list.")
    ] = None,
    clips: Annotated[
        str | None, typer.Option(metavar="ID,...", help="Clips by id: their parts of the chunks alone.")
    ] = None,
    cameras: Cameras = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="More than omni needs: egomotion.offline, lidar, radar, labels, reasoning, ... The corrected "
            "calibration is preferred where it is: camera_intrinsics.offline,sensor_extrinsics.offline.",
        ),
    ] = None,
    origin: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Import from this folder; no network.")
    ] = None,
    data: Data = DATA,
    max_gb: Annotated[float, typer.Option(min=0, help="Refuse a download larger than this; inf: no limit.")] = 150.0,
    workers: Annotated[int, typer.Option(min=1, help="Files transferred or clips drawn at a time.")] = 12,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the hub.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the synthetic world.")] = 0,
    clips_per_chunk: Annotated[int, typer.Option(min=1, help="Synthetic clips in a chunk.")] = 4,
    seconds: Annotated[float, typer.Option(help="Length of a synthetic clip.")] = 20.0,
    fps: Annotated[int, typer.Option(min=1, help="Frame rate of the synthetic cameras.")] = 30,
    size: Annotated[str, typer.Option(metavar="WxH", help="Pixels of a synthetic camera.")] = "320x180",
    rig: Annotated[str, typer.Option(metavar="a|b|mixed", help="Camera rig of the synthetic cars.")] = "mixed",
    clutter: Annotated[float, typer.Option(help="Synthetic towns: 0 is an empty road, 1 a town.")] = 1.0,
    roads: Annotated[str, typer.Option(metavar="gentle|winding", help="How the synthetic roads turn.")] = "gentle",
    purge: Annotated[
        bool, typer.Option("--purge", help="Delete every copy of a source whose licence ends, and certify it.")
    ] = False,
    runs: Runs = RUNS,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bring driving data here, verified and resumable.

    From the hub, from a folder (--from), or drawn by the synthetic world. Run again, it fetches what is missing.
    What came, with hash and date, stands in manifest.json; where every copy lies, in DATA/ledger.json.
    """
    from omni_cli.config import comma_list
    from omni_cli.report import Console
    from omni_cli.stages import fetch as stage

    console = Console(quiet=quiet, json_output=json)
    if purge:
        is_choosy = any((chunks, clips, cameras, features, origin))
        return console.finish(stage.purge(stage.PurgeRequest(data, source, runs, dry_run, is_choosy), console))
    names = stage.camera_names(cameras, source) if cameras else ()
    pixels = stage.parse_size(size)
    world = stage.SyntheticSpec(seed, clips_per_chunk, seconds, fps, *pixels, rig=rig, clutter=clutter, roads=roads)
    request = stage.FetchRequest(
        source, data, chunks, comma_list(clips or ""), names, stage.feature_names(features or ""), origin,
        max_gb=max_gb, workers=workers, revision=revision, dry_run=dry_run, synthetic=world,
    )  # fmt: skip
    return console.finish(stage.fetch(request, console))
