"""`omni doctor`."""

from typing import Annotated

import typer

from omni_cli.commands._options import DATA, RUNS, Data, Json, Quiet, Runs

EXAMPLE = "omni doctor --json"


def command(
    *,
    data: Data = DATA,
    runs: Runs = RUNS,
    online: Annotated[bool, typer.Option("--online", help="Also ask the Hugging Face hub whether it answers.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that this machine has what omni needs.

    Exits with 1 if something that every verb needs is broken. The value of a token is never read out.
    """
    from omni_cli.report import Console
    from omni_cli.stages.doctor import DoctorRequest, doctor

    console = Console(quiet=quiet, json_output=json)
    result = doctor(DoctorRequest(data=data, runs=runs, online=online), console)
    console.finish(result)
    if result["broken"]:
        raise typer.Exit(1)
