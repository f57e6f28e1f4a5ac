"""`omni export`."""

from pathlib import Path
from typing import Annotated

import typer

from omni_cli.commands._options import RUNS, DryRun, Json, Quiet, RunArgument, Runs

EXAMPLE = "omni export --format onnx --batch 1"


def command(
    *,
    run: RunArgument = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="hf|adapter|onnx",
            help="A whole model or its adapter for the hub's tools, or ONNX programs: of a vision-language model its "
            "vision tower, and its decoder with the KV cache as inputs and outputs. [default: the recipe's first]",
        ),
    ] = None,
    batch: Annotated[
        str,
        typer.Option(
            metavar="1|1-8",
            help="Windows at once; of a range, one vision tower each. A decoder takes any number, of any length.",
        ),
    ] = "1",
    opset: Annotated[int, typer.Option(help="Version of the ONNX operators.")] = 20,
    dtype: Annotated[str, typer.Option(metavar="float32|float16", help="Type of the ONNX program.")] = "float32",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="[default: RUN/export/FORMAT]")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="ORG/NAME", help="Push the folder there, in one commit.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public. [default: private]", show_default=False)
    ] = False,
    licence: Annotated[
        str | None,
        typer.Option(
            "--licence",
            metavar="NAME",
            help="Push although this licence of the data forbids it: you have the right by its licensor.",
        ),
    ] = None,
    dry_run: DryRun = False,
    runs: Runs = RUNS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a run to a folder of the hub's layout, or to ONNX.

    An adapter is merged first, or exported as it is with --format adapter. ONNX weights over 2 GB lie in a file beside
    their program, and --dtype float16 halves them. What is exported is compared with the model before it is published,
    and has a model card. To write ONNX programs takes about 2.4 times as much memory as the model's weights in float32,
    and 2.9 times with --dtype float16 (measured with 0.96 GiB of them). With --push-to-hub the folder goes to a
    repository, which is private unless --public makes it otherwise; run again it sends what differs. For a token:
    hf auth login, or HF_TOKEN. Examples:

    omni export drive --push-to-hub me/drive --dry-run

    omni export drive --format adapter --push-to-hub me/drive-lora --public
    """
    from omni_cli.commands._compose import open_run
    from omni_cli.report import Console
    from omni_cli.stages.export import ExportRequest, export, parse_batches, parse_push

    console = Console(quiet=quiet, json_output=json)
    push = parse_push(push_to_hub, public=public, licence=licence, dry_run=dry_run)
    request = ExportRequest(form, out, opset, parse_batches(batch), dtype, push)
    recipe, opened = open_run(run, runs, console)
    console.finish(export(recipe, opened, request, console))
