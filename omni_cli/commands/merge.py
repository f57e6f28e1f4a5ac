"""`omni merge`."""

from pathlib import Path
from typing import Annotated

import typer

from omni_cli.commands._options import RUNS, Json, Quiet, RunArgument, Runs

EXAMPLE = "omni merge adapter"


def command(
    *,
    run: RunArgument = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the merged model. [default: RUN/merged]")
    ] = None,
    runs: Runs = RUNS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fold a run's adapter into its base, once the logits are proven to be the same.

    The base is loaded anew in full precision, never in 4 bit. The proof is on noise and windows of the run's shards,
    in float32, one model at a time: without a GPU that has the room, this takes about 3.4 times the bytes of a 16-bit
    base's files in memory. Of a vision-language model nothing is published unless all of this holds, in nats a token
    (KL, in the mean):

    1. Merged in memory, in float32, the adapter says what it said: within 2 % of how far it moves its base, at least
    1e-7 and at most 1e-6.

    2. The files are that merge, each weight rounded once to its own file's type: within 2 % of what the rounding
    costs, at least 1e-7.

    3. The files are within 2 % of how far the adapter moves its base (at least 2e-4 and at most 5e-3 in bfloat16, 3e-6
    and 1e-4 in float16, 1e-7 and 1e-6 in float32), or within three times what the rounding costs, whichever is more;
    but never further than 0.05, nor than the base is. One token may be 50 times as far.

    4. No logit differs by more than 5 % of the largest (bfloat16; 1 % in float16, 0.01 % in float32), or three times
    as much as the rounding moves one. 90 % of the first choices stay (all in float32), or all but three times as many
    as the rounding changes.
    """
    from omni_cli.commands._compose import open_run
    from omni_cli.report import Console
    from omni_cli.stages.merge import MergeRequest, merge

    console = Console(quiet=quiet, json_output=json)
    recipe, opened = open_run(run, runs, console)
    console.finish(merge(recipe, opened, MergeRequest(out), console))
