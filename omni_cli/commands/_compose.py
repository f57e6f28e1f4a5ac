"""From what the user typed to a profile and a recipe's settings; the heavy imports happen here, when a verb runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omni_cli.config import Layer, Resolved, Settings, override_layer, read_layer, resolve, unheeded
from omni_cli.errors import UsageError
from omni_cli.files import read_json
from omni_cli.formats.physical_ai_av import expand_cameras
from omni_cli.profiles import Profile, check_machine, default_profile, load_profile
from omni_cli.recipes import recipe_class, recipe_names
from omni_cli.report import Console
from omni_cli.stages import runs
from omni_cli.stages.locate import SHARDS_MARK, choose_run, newest_shards
from omni_cli.stages.models import check_usable

DEFAULT_RECIPE = "vlm"
PIPELINE_TABLES = ("fetch",)  # of a --config file: for `omni run`; the other verbs pass over them
# options that are a short spelling of one recipe setting
FLAG_KEYS: Mapping[str, tuple[str, str]] = {
    "--cameras": ("sample", "cameras"),
    "--window": ("sample", "window"),
    "--stride": ("sample", "stride"),
    "--rate-hz": ("sample", "rate_hz"),
    "--canvas": ("sample", "canvas_px"),
    "--labels": ("sample", "labels"),
    "--teacher": ("sample", "teacher"),
    "--split": ("split", "rule"),
}

S = TypeVar("S", bound=Settings)


def choose_profile(name: str | None, console: Console, *, dry_run: bool) -> Profile:
    """Load the profile asked for, or the one that fits this machine, and say which.

    Raises:
        UsageError: there is no such profile, or this machine cannot run it and it is not a dry run.
    """
    profile = load_profile(name or default_profile())
    if name is None:
        console.say(f"profile: {profile.name}, which fits this machine (choose another with --profile)")
    if not dry_run:
        check_machine(profile)
    return profile


def compose_recipe(
    recipe_name: str,
    profile: Profile,
    *,
    config: Path | None = None,
    sets: Sequence[str] | None = None,
    flags: Mapping[str, Any] | None = None,
    is_to_measure: bool = False,
) -> Resolved[Any]:
    """Lay the settings over each other: recipe defaults < profile < `--config` < the verb's own options < `--set`.

    Args:
        recipe_name: `vlm`, ...
        profile: gives its section for this recipe.
        config: a TOML file of settings.
        sets: `KEY=VALUE` texts.
        flags: values of the options in `FLAG_KEYS`; None means not given.
        is_to_measure: nothing is kept of what the recipe does; the weights of its model may be random.

    Raises:
        UsageError: an unknown recipe, key, type or value, in one line; one of the command line that has no effect; or
            a model of random weights, to be used.
    """
    schema, beneath = recipe_class(recipe_name), profile.recipe_layer(recipe_name)
    files = [_without(PIPELINE_TABLES, read_layer(config))] if config else []
    typed = [_flag_layer(option, value) for option, value in (flags or {}).items() if value is not None]
    typed += [override_layer(sets or [])]
    resolved: Resolved[Any] = resolve(schema, [beneath, *files, *typed])
    _check_heeded(resolved, typed)
    if not is_to_measure:
        check_usable(resolved.value.model)
    return resolved


def _check_heeded(resolved: Resolved[Any], typed: Sequence[Layer]) -> None:
    """Refuse what the user typed and nothing heeds: an adapter's rank in full tuning would look obeyed.

    A profile and a file serve several ways of training, and a run's own config.toml lists every key: either may hold
    what one of them passes over.

    Args:
        resolved: the settings.
        typed: the layers of the command line.

    Raises:
        UsageError: a setting has no effect.
    """
    origins = {layer.origin for layer in typed}
    for key, why in unheeded(resolved.value):
        if (origin := resolved.origin_of(key)) in origins:
            raise UsageError(f"{origin}: {key} {why}")


def typed_keys(resolved: Resolved[Any], profile: Profile) -> frozenset[str]:
    """Return the dotted keys that the user set, in a file or on the command line, and not the profile or a default."""
    return frozenset(key for key, origin in resolved.origins.items() if origin != f"profile {profile.name}")


def recipe_maker(recipe_name: str, profile: str) -> Callable[[Mapping[str, Any]], Any]:
    """Return what makes a recipe of a profile with one more table of settings laid over it."""
    layer = load_profile(profile).recipe_layer(recipe_name)
    return lambda table: resolve(recipe_class(recipe_name), [layer, Layer("omni demo", table)]).value


def compose_every_recipe(profile: Profile) -> dict[str, Resolved[Any]]:
    """Return the settings that a profile leads to, for each recipe that it has a section for."""
    prepared = [name for name in recipe_names() if getattr(profile, name)]
    return {name: compose_recipe(name, profile) for name in prepared}


def table_of(config: Path | None, name: str, schema: type[S]) -> S:
    """Return one table of a pipeline's TOML file that is not the recipe's; its defaults where it is absent."""
    layer = read_layer(config) if config else Layer("", {})
    return resolve(schema, [Layer(f"{layer.origin} [{name}]", layer.table.get(name, {}))]).value


def recipe_of_shards(shards: Path | None, data: Path) -> str:
    """Return the recipe that the shards were made for; the default one where they cannot say.

    What is wrong with the shards, the stage that reads them says in better words.
    """
    try:
        return str(read_json((shards or newest_shards(data)) / SHARDS_MARK)["recipe"])
    except (UsageError, OSError, ValueError, KeyError, TypeError):
        return DEFAULT_RECIPE


def open_run(run: Path | None, folder: Path, console: Console) -> tuple[Any, runs.Run]:
    """Return a run's recipe, exactly as it was trained, and the run: the one named, or the newest finished one.

    Raises:
        UsageError: there is no such run.
        DataError: it is not finished.
    """
    opened = runs.open_finished(choose_run(run, folder))
    if run is None:
        console.say(f"run: {opened.folder}, the newest finished one")
    return opened.recipe_settings(recipe_class(opened.manifest.recipe)), opened


def camera_list(text: str | None) -> tuple[str, ...] | None:
    """Return the cameras that a comma list of sets and names stands for; None where nothing is asked."""
    return expand_cameras(text or "") or None


def _without(names: Sequence[str], layer: Layer) -> Layer:
    return Layer(layer.origin, {key: value for key, value in layer.table.items() if key not in names})


def _flag_layer(option: str, value: Any) -> Layer:
    section, key = FLAG_KEYS[option]
    return Layer(option, {section: {key: value}})
