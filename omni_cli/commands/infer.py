"""`omni infer`."""

from pathlib import Path
from typing import Annotated

import typer

from omni_cli.commands._live import Batch, Patience, Reconnect, Seconds, Windows
from omni_cli.commands._options import DATA, RUNS, Data, Json, Quiet, RunOption, Runs, Sets, named_places

EXAMPLE = "omni infer clip.mp4 --overlay"


def command(
    *,
    clips: Annotated[
        list[str] | None,
        typer.Argument(metavar="CLIP...", help="Video files, folders of them, ids of recordings, or a live camera."),
    ] = None,
    camera: Annotated[
        list[str] | None,
        typer.Option("--camera", metavar="NAME=FILE|URL", help="One view of a drive; one for each camera."),
    ] = None,
    tiled: Annotated[
        bool,
        typer.Option("--tiled", help="The files are ready mosaics of all cameras, cell by cell as the model has them."),
    ] = False,
    run: RunOption = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="DIR|ID", help="A merged or exported model, or a base on the hub.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="NAME|FILE", help="Ask this profile's base model, zero-shot.")
    ] = None,
    sets: Sets = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Frames between the starts of two windows. [default: as trained]")
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="[default: a GPU where there is one]")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|bfloat16|float16", help="Type of the weights. [default: as trained]")
    ] = None,
    batch: Batch = None,
    seconds: Seconds = None,
    windows: Windows = None,
    patience: Patience = None,
    reconnect: Reconnect = None,
    constrained: Annotated[
        bool,
        typer.Option("--constrained/--unconstrained", help="Hold answers to their format; what was forced is marked."),
    ] = True,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write a video with the answers in it.")] = False,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the answers.")] = Path("infer"),
    data: Data = DATA,
    runs: Runs = RUNS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask a model how the car moves in a clip or a live stream.

    One file is the view of a one-camera model. A model that looks at several cameras takes --camera for each, a folder
    with a file named after each, the id of a recording, or --tiled. With no run and no model it asks the profile's base
    model, zero-shot. A live camera is rtsp://HOST/STREAM, another URL, or /dev/video0: where the model is slower, the
    newest window is answered and the others are counted. Ctrl-C ends a watch with exit code 0, SIGTERM with 75; what
    was answered is kept. Of a URL the host and the port alone are shown, and a few signs that stand for the rest.
    """
    from omni_cli.commands._subject import open_subject
    from omni_cli.report import Console
    from omni_cli.stages.infer import InferRequest
    from omni_cli.stages.live import Limits, ask

    console = Console(quiet=quiet, json_output=json)
    views = named_places(camera or [])
    recipe, subject = open_subject(run, runs, console, model=model, profile=profile, sets=sets or [])
    how = device, dtype, overlay, stride, batch, constrained
    request = InferRequest(tuple(clips or ()), views, tiled, data, out, *how)
    result = ask(recipe, subject, request, Limits(seconds, windows, patience, reconnect), console)
    console.finish(result)
    if result["failed"]:
        raise typer.Exit(1)
