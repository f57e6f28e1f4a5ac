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
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Decode every frame, check every CRC and hash. Without it only headers, tables and sizes are read.",
        ),
    ] = False,
    subset: Annotated[
        str | None,
        typer.Option("--subset", metavar="5%|3/30", help="Be as thorough with a share, or a part, chosen by name."),
    ] = None,
    quarantine: Annotated[
        bool,
        typer.Option(
            "--quarantine",
            help="Move damaged files to quarantine/, for fetch or etl to make anew, and list refused recordings in "
            "quarantine.json, for later stages to leave out.",
        ),
    ] = False,
    restore: Annotated[
        bool,
        typer.Option(
            "--restore",
            help="Undo --quarantine: move back what was set aside, except over what fetch or etl made anew since, and "
            "use every listed recording again. Nothing is audited.",
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Where the page goes; PATH/audit.html, or beside a single PATH."),
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no page.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find and name what is wrong with data before it is learned from.

    Exits with 3 when data are refused. Nothing is deleted, and without --quarantine nothing but the page is written.
    """
    from omni_cli.commands._compose import camera_list
    from omni_cli.report import Console
    from omni_cli.stages.audit import AuditRequest, audit, restore_all
    from omni_cli.stages.audit.reporting import default_report

    console = Console(quiet=quiet, json_output=json)
    if restore:
        is_choosy = any((cameras, deep, subset, quarantine, report))
        return console.finish(restore_all(path, console, is_choosy=is_choosy))
    place = None if no_report else report or default_report(path)
    request = AuditRequest(path, camera_list(cameras), deep, quarantine, subset, place)
    result = audit(request, console)
    console.finish(result)
    if result["refused"]:
        raise typer.Exit(REFUSED)
    return None
