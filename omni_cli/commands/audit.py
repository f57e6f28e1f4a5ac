"""`omni audit`."""

from pathlib import Path
from typing import Annotated

import typer

from omni_cli.commands._options import DATA, Cameras, Json, Quiet

EXAMPLE = "omni audit data --deep"
REFUSED = 3


def command(
    *,
    path: Annotated[
        Path, typer.Argument(envvar="OMNI_DATA", metavar="[PATH]", help="Raw data, shards, runs or exports.")
    ] = DATA,
    cameras: Cameras = None,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every frame and hash every artefact.")] = False,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="List refused recordings, so that later stages leave them out.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find and name what is wrong with data before it is learned from.

    Exits with 3 when data are refused. The data themselves are never changed.
    """
    from omni_cli.commands._compose import camera_list
    from omni_cli.report import Console
    from omni_cli.stages.audit import AuditRequest, audit

    console = Console(quiet=quiet, json_output=json)
    request = AuditRequest(path=path, cameras=camera_list(cameras), deep=deep, quarantine=quarantine)
    result = audit(request, console)
    console.finish(result)
    if result["refused"]:
        raise typer.Exit(REFUSED)
