"""Run omni; a user's mistake is one line and an exit code, only our bug is a traceback."""

import sys

import typer

from omni_cli import __version__

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Run the command line."""
    sys.exit(app())
