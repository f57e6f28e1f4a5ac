"""`omni demo`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from omni_cli.commands._options import Json, Quiet

EXAMPLE = "omni demo --dir demo"


def command(
    *,
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where everything goes.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of the drives and of the training.")] = 0,
    chunks: Annotated[int, typer.Option(min=4, help="Ten drives each; the adapter learns from half as many.")] = 50,
    base_steps: Annotated[int, typer.Option(min=2, help="Training steps of the tiny base.")] = 1000,
    adapter_steps: Annotated[int | None, typer.Option(min=2, help="Of the adapter; by default what suits it.")] = None,
    base: Annotated[Literal["tiny", "smollm2"], typer.Option(help="What is adapted.")] = "tiny",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go the whole way on a CPU in about ten minutes, explained: from drives to a measured, exported model.

    Killed and run again, it goes on where it was. With --base smollm2 the adapter sits on a real pretrained language
    model from the package index, SmolLM2-135M, which looks through the tower that the tiny model learned.
    """
    from omni_cli.commands._compose import recipe_maker
    from omni_cli.report import Console
    from omni_cli.stages.demo import PROFILE, DemoRequest, demo
    from omni_cli.telemetry import usable_cores

    console = Console(quiet=quiet, json_output=json)
    request = DemoRequest(folder, seed, chunks, base_steps, adapter_steps, usable_cores(), base)
    console.finish(demo(recipe_maker("vlm", PROFILE), request, console))
