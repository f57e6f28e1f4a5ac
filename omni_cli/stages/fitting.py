"""Do shards fit what a recipe asks for: the cameras, time grid and teacher that it will look through?"""

import shlex
from collections.abc import Collection, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from omni_cli.config import Layer, differences, resolve
from omni_cli.errors import DataError, UsageError
from omni_cli.report import Console
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import ShardSet, open_shards
from omni_cli.stages import runs

_NOT_ASKED = {"kind", "decoder_id"}  # of a preprocessing: what no setting of the recipe asks for


def as_cut(recipe: Any, shards: ShardSet, console: Console, asked: Collection[str] | None = None) -> Any:
    """Return the recipe with the tables that its shards were made with: a run tells what it really learned from.

    What shards may differ in and fit is how many windows there are, and how they were parted. A teacher's files may
    have moved; the shards know which they were.

    Args:
        recipe: what learns.
        shards: to learn from.
        console: told of what was asked for and differs.
        asked: keys of the settings that the user typed; None: all of them.
    """
    settings = {**recipe.model_dump(mode="json"), **shards.manifest.settings}
    made = resolve(type(recipe), [Layer(str(shards.folder), settings)]).value
    changed = [line for line in differences(recipe, made) if asked is None or line.partition(": ")[0] in asked]
    if changed:
        console.say(f"shards {shards.folder} are not as asked ({'; '.join(changed)}); the run records what they are")
    return made


def own_shards(run: runs.Run, *, are_needed: bool) -> ShardSet | None:
    """Return the shards that a run learned from, if they are still there and still those.

    Raises:
        DataError: they are damaged or of an older format, and needed.
    """
    folder = Path(run.manifest.shards.folder)
    try:
        shards = open_shards(folder) if folder.is_dir() else None
    except DataError:
        if are_needed:
            raise
        return None
    return shards if shards and shards.manifest.fingerprint == run.manifest.shards.fingerprint else None


def check_fit(recipe: Any, shards: ShardSet, profile: str, *, is_to_measure: bool = False) -> Preprocess:
    """Return the shards' preprocessing if it is what the recipe asks for.

    Args:
        recipe: what learns, or has learned.
        shards: to learn from, or to measure on.
        profile: named in the message.
        is_to_measure: other steps may count than those that were learned from.

    Raises:
        UsageError: cameras, canvas, time grid or teacher differ; the message gives the right `omni etl` command.
    """
    found, wanted = shards.manifest.preprocess, recipe.preprocess()
    if type(found) is not type(wanted):
        raise UsageError(
            f"shards {shards.folder} were made for recipe {shards.manifest.recipe}; make others with: "
            f"omni etl --recipe {recipe.name} --profile {profile}, or name others with --shards"
        )
    free = {*_NOT_ASKED, *(wanted.filters if is_to_measure else ())}
    fields = [name for name in type(wanted).model_fields if name not in free]
    if differ := [name for name in fields if not _is_as_asked(getattr(found, name), getattr(wanted, name))]:
        have, want = short(getattr(found, differ[0])), short(getattr(wanted, differ[0]))
        raise UsageError(
            f"shards {shards.folder} have {differ[0]} {have}, this recipe asks for {want}; make fitting ones: omni etl "
            f"--recipe {recipe.name} --profile {profile}{_etl_options(recipe, differ)}, or name others with --shards"
            f"{'' if is_to_measure else _as_they_are(recipe, shards, differ)}"
        )
    return found


def _is_as_asked(found: object, wanted: object) -> bool:
    """Compare a field of the preprocessing; a text that ends with `*` asks for no more than what it begins with."""
    if isinstance(wanted, str) and wanted.endswith("*"):
        return str(found).startswith(wanted[:-1])
    return found == wanted


def _etl_options(recipe: Any, fields: Sequence[str]) -> str:
    """Return the options of etl that give these fields of the preprocessing what the recipe asks for."""
    options = recipe.preprocess().etl_options
    asked = [options[name] for name in fields if name in options]
    return "".join(f" {option}{_typed(attrgetter(setting)(recipe))}" for option, setting in asked)


def _as_they_are(recipe: Any, shards: ShardSet, fields: Sequence[str]) -> str:
    """Return the settings of train that ask for what these fields of the shards' preprocessing are."""
    settings = [recipe.preprocess().etl_options[name][1] for name in fields if name in recipe.preprocess().etl_options]
    held = [(setting, shards.manifest.settings.get("sample", {}).get(setting.removeprefix("sample.")))
            for setting in settings]  # fmt: skip
    asked = " ".join(f"--set {setting}={_typed(value)}" for setting, value in held if value is not None)
    return f"; train on these with: {asked}" if asked else ""


def _typed(value: object) -> str:
    """Return a value as a user types it."""
    return str(value).lower() if isinstance(value, bool) else shlex.quote(str(value))


def short(value: object) -> str:
    """Return a value for people: a tuple as a comma list."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return getattr(value, "family", None) or str(value)
