"""`omni demo`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from omni_cli.commands._options import Json, Quiet

EXAMPLE = "omni demo --dir demo"


def command(
    *,
    recipe: Annotated[Literal["vlm", "distill"], typer.Option(help="What is learned.")] = "vlm",
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where everything goes.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of the drives and of the training.")] = 0,
    chunks: Annotated[
        int | None, typer.Option(min=2, help="Ten drives each; an adapter learns from half as many.")
    ] = None,
    base_steps: Annotated[int | None, typer.Option(min=2, help="Training steps of the tiny model.")] = None,
    adapter_steps: Annotated[int | None, typer.Option(min=2, help="Of the adapter (vlm).")] = None,
    base: Annotated[Literal["tiny", "smollm2"], typer.Option(help="What is adapted (vlm).")] = "tiny",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go the whole way on a CPU in about ten minutes, explained: from drives to a measured, exported model.

    Killed and run again, it goes on where it was. With --recipe distill a driving student learns to plan a path along
    winding roads. With --base smollm2 the adapter sits on a real pretrained language
    model from the package index, SmolLM2-135M, which looks through the tower that the tiny model learned.
    """
    from omni_cli.commands._compose import recipe_maker
    from omni_cli.report import Console
    from omni_cli.stages.demo import PROFILE, DemoRequest, driving_demo, seeing_demo
    from omni_cli.telemetry import usable_cores

    console = Console(quiet=quiet, json_output=json)
    request = DemoRequest(folder, seed, chunks, base_steps, adapter_steps, usable_cores(), base)
    tell = {"vlm": seeing_demo, "distill": driving_demo}[recipe]
    console.finish(tell(recipe_maker(recipe, PROFILE), request, console))
