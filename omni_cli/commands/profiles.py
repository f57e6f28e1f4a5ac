"""`omni profiles`."""

from typing import Annotated

import typer

from omni_cli.commands._options import Json, Quiet

EXAMPLE = "omni profiles cpu-tiny"


def command(
    *,
    name: Annotated[str | None, typer.Argument(metavar="[NAME|FILE]", help="Show this profile in full.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the hardware profiles, or show one in full.

    The list says on what hardware each was really run, if any, and whether it fits this machine. One profile is shown
    as TOML on stdout, with the origin of every setting: a start for a profile of your own.
    """
    from omni_cli.profiles import load_profile
    from omni_cli.report import Console
    from omni_cli.stages.profiles import list_profiles, show_profile

    console = Console(quiet=quiet, json_output=json)
    if name is None:
        console.finish(list_profiles(console))
        return
    from omni_cli.commands._compose import compose_every_recipe  # after the list, which needs no recipe and no torch

    profile = load_profile(name)
    result = show_profile(profile, compose_every_recipe(profile), console)
    if not json:
        typer.echo(result["toml"])
    console.finish(result)
