"""The command line: Typer and nothing else. Parse, one call into a stage, print.

A verb is a module of this package with a function `command` and a working `EXAMPLE`. It is imported only when it is
run, completed or asked for help: `omni --help` reads the table below and stays fast.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from omni_cli import __version__

VERBS: Mapping[str, str] = {  # in the order of the work, then those that serve it
    "fetch": "Bring driving data here, verified and resumable.",
    "audit": "Find and name what is wrong with data before it is learned from.",
    "etl": "Turn recordings into shards of windows with true timestamps.",
    "train": "Train on shards; killed and run again, it continues bit for bit.",
    "eval": "Measure runs and models on recordings they never saw, beside controls.",
    "merge": "Fold a run's adapter into its base, once the logits are proven to be the same.",
    "export": "Export a run to a folder of the hub's layout, or to ONNX.",
    "infer": "Ask a model how the car moves in a clip or a live stream.",
    "bench": "Measure how fast each stage is on this machine.",
    "run": "Fetch, audit, etl, train and eval in one command.",
    "demo": "Go the whole way on a CPU in about ten minutes, explained: from drives to a measured, exported model.",
    "doctor": "Check that this machine has what omni needs.",
    "profiles": "List the hardware profiles, or show one in full.",
}


class _Ready(TyperCommand):
    """The real command of a verb: the libraries that it needs are loaded once its words are understood."""

    def invoke(self, ctx: Any) -> Any:
        import_module("omni_cli.commands._ready").make_ready(str(self.name), ctx.params)
        return super().invoke(ctx)


class _Verb(TyperCommand):
    """A verb known by name and summary; the real command takes over as soon as there is something to parse."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return load_verb(str(self.name)).make_context(info_name, args, parent, **extra)


class _Verbs(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, summary in VERBS.items():
            self.add_command(_Verb(name, help=summary, short_help=summary))


def load_verb(name: str) -> Any:
    """Import one verb and return its command, with the example at the end of its help."""
    module = import_module(f"omni_cli.commands.{name}")
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, cls=_Ready, epilog=f"\b\nExample:\n  {module.EXAMPLE}")(module.command)
    return typer.main.get_command(single)


app = typer.Typer(cls=_Verbs, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Turn multi-camera driving video into trained, exported, measured models.

    `omni VERB --help` explains a verb and shows an example that works.
    """
    if version:
        typer.echo(f"omni {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)
