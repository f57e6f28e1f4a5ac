"""`omni export`."""

from pathlib import Path
from typing import Annotated

import typer

from omni_cli.commands._options import RUNS, Json, Quiet, RunArgument, Runs

EXAMPLE = "omni export --format onnx --batch 1"


def command(
    *,
    run: RunArgument = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="hf|onnx",
            help="A folder for the hub's tools, or programs for ONNX runtimes. [default: the recipe's first]",
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option(metavar="1|1-8", help="Windows at once; of a range, one ONNX program each.")
    ] = "1",
    opset: Annotated[int, typer.Option(help="Version of the ONNX operators.")] = 20,
    dtype: Annotated[str, typer.Option(metavar="float32|float16", help="Type of the ONNX program.")] = "float32",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="[default: RUN/export/FORMAT]")] = None,
    runs: Runs = RUNS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a run to a folder of the hub's layout, or to ONNX.

    An adapter is merged first. What is exported is compared with the model before it is published.
    """
    from omni_cli.commands._compose import open_run
    from omni_cli.report import Console
    from omni_cli.stages.export import ExportRequest, export, parse_batches

    console = Console(quiet=quiet, json_output=json)
    request = ExportRequest(form, out, opset, parse_batches(batch), dtype)
    recipe, opened = open_run(run, runs, console)
    console.finish(export(recipe, opened, request, console))
