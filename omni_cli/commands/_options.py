"""Options that several verbs share, so that a name means the same everywhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from omni_cli.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="End stdout with one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen and touch nothing.")]

Data = Annotated[Path, typer.Option("--data", envvar="OMNI_DATA", metavar="DIR", help="Folder of raw data and shards.")]
Runs = Annotated[Path, typer.Option("--runs", envvar="OMNI_RUNS", metavar="DIR", help="Folder of training runs.")]
DATA = Path("data")
RUNS = Path("runs")
SPLIT_RULES = ("hash", "time")

ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile", metavar="NAME|FILE", help="Hardware profile (see `omni profiles`). [default: the one that fits]"
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file of settings, over those of the profile.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting, over everything else; may be repeated."),
]
Cameras = Annotated[
    str | None, typer.Option("--cameras", metavar="4-cam|7-cam|NAME,...", help="A set of cameras, or their names.")
]
Shards = Annotated[Path | None, typer.Option("--shards", metavar="DIR", help="Folder of shards. [default: the newest]")]
RunArgument = Annotated[
    Path | None, typer.Argument(metavar="[RUN]", help="Folder or name of a run. [default: the newest finished one]")
]
RunOption = Annotated[
    Path | None,
    typer.Option("--run", metavar="RUN", help="Folder or name of a run. [default: the newest finished one]"),
]


def typed_options(context: typer.Context) -> list[str]:
    """Return the options that a user typed, in the order of the help; those of the environment are none of them."""
    return [
        option.opts[0]
        for option in context.command.params
        if option.opts[0].startswith("--") and _is_typed(context, option.name or "")
    ]


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def named_places(texts: Sequence[str]) -> dict[str, str]:
    """Read `NAME=FILE` texts; of a live camera the place is a URL.

    Raises:
        UsageError: one has no name or no `=`, or a name is given twice.
    """
    pairs = [text.partition("=") for text in texts]
    for text, (name, equals, file) in zip(texts, pairs, strict=True):
        if not (name and equals and file) or _is_like_url(name):
            shown = "" if _is_like_url(text) else f" {text}"  # which may hold a password
            raise UsageError(
                f"--camera{shown}: expected NAME=FILE, for example --camera camera_front_wide_120fov=a.mp4"
            )
    named = {name: file for name, _, file in pairs}
    if len(named) < len(texts):
        raise UsageError("--camera: a camera is named twice; give one file for each")
    return named


def _is_like_url(text: str) -> bool:
    return "@" in text or ":/" in text or "//" in text


def parse_share(text: str | None) -> tuple[int, int] | None:
    """Read `2/8` as (2, 8), the second of eight shares; None where nothing is given.

    Raises:
        UsageError: it is not a share of a whole.
    """
    if text is None:
        return None
    share, _, total = text.partition("/")
    if not (share.isdigit() and total.isdigit() and 1 <= int(share) <= int(total)):
        raise UsageError(f"--shard {text}: expected I/N with I from 1 to N, for example --shard 2/8")
    return int(share), int(total)


def parse_controls(text: str) -> Literal["all", "basic", "none"]:
    """Read `--controls`.

    Raises:
        UsageError: it is none of the words.
    """
    match text:
        case "all" | "basic" | "none":
            return text
    raise UsageError(f"--controls {text}: expected all, basic or none")


def parse_split(text: str | None) -> tuple[str | None, Path | None]:
    """Tell the rule of `--split` from a file that lists the splits: (rule, file), at most one of which is there.

    Raises:
        UsageError: it is neither a rule nor a file.
    """
    if text is None or text in SPLIT_RULES:
        return text, None
    if not Path(text).is_file():
        raise UsageError(f"--split {text}: expected {', '.join(SPLIT_RULES)}, or a file that lists recordings")
    return None, Path(text)


def names_in(values: list[str] | None) -> tuple[str, ...]:
    """Return the names of an option that takes several, in one value with commas or in values of their own."""
    return tuple(dict.fromkeys(name.strip() for value in values or () for name in value.split(",") if name.strip()))
