"""Who `omni infer` asks and what `omni bench` measures: a run, a model folder, or what a profile leads to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_cli.commands._compose import DEFAULT_RECIPE, choose_profile, compose_recipe, open_run
from omni_cli.errors import UsageError
from omni_cli.recipes import recipe_class
from omni_cli.report import Console
from omni_cli.stages import runs as run_folders
from omni_cli.stages.infer import Subject, subject_of_base, subject_of_model, subject_of_run
from omni_cli.stages.locate import finished_runs
from omni_cli.stages.models import open_model

_OF_GPU = ("--profile", "--set", "--out", "--minutes", "--json", "--quiet")
_OF_PARTS: Mapping[str, Sequence[str | None]] = {  # of `omni bench`; what is not here is heeded by all but gpu
    "--out": ("gpu",),
    "--minutes": ("gpu",),
    "--alone": ("train", None),
    "--teacher": ("export", None),
}


def open_subject(
    run: Path | None, runs: Path, console: Console, *, model: str | None, profile: str | None, sets: Sequence[str]
) -> tuple[Any, Subject]:
    """Return the recipe and the subject: what is named, else the newest finished run, else the profile's base model.

    Raises:
        UsageError: two are named, or what is named is not there.
    """
    if run is not None and (model or profile or sets):
        raise UsageError("--run asks a trained model as it is; leave out --model, --profile and --set")
    if model and Path(model).is_dir():
        if profile or sets:
            raise UsageError(f"--model {model} is asked as it is; leave out --profile and --set")
        opened = open_model(Path(model))
        return opened.recipe_settings(recipe_class(opened.card.recipe)), subject_of_model(opened)
    if not (model or profile or sets) and (run is not None or finished_runs(runs)):
        recipe, trained = open_run(run, runs, console)
        return recipe, subject_of_run(trained)
    chosen = choose_profile(profile, console, dry_run=False)
    words = [*sets, f'model="{model}"'] if model else sets
    recipe = compose_recipe(DEFAULT_RECIPE, chosen, sets=words).value
    return recipe, subject_of_base(recipe)


def bench_subject(
    run: Path | None, runs: Path, asked: Mapping[str, Any], console: Console
) -> tuple[Any, str, run_folders.Run | None]:
    """Return a recipe, the name of its profile, and the run that was named.

    Args:
        run: whose settings are measured; None: those of a profile.
        runs: the folder of runs; the newest says which recipe, unless one is asked for.
        asked: values of --profile, --recipe, --config and --set; None means not given.
        console: says which profile was chosen.

    Raises:
        UsageError: a run is named and settings are as well, or what is named is not there.
        DataError: the run is not finished.
    """
    if run is not None:
        if given := [option for option, value in asked.items() if value]:
            raise UsageError(f"--run measures with the run's own settings; leave out {', '.join(given)}")
        recipe, opened = open_run(run, runs, console)
        return recipe, opened.manifest.profile, opened
    chosen = choose_profile(asked["--profile"], console, dry_run=False)
    name = asked["--recipe"] or _newest_recipe(runs)
    resolved = compose_recipe(name, chosen, config=asked["--config"], sets=asked["--set"], is_to_measure=True)
    return resolved.value, chosen.name, None


def check_bench_options(part: str | None, typed: Sequence[str]) -> None:
    """Refuse options that what is measured does not heed.

    Args:
        part: that is measured; None: all but gpu.
        typed: the options that a user gave.

    Raises:
        UsageError: one of them is of other parts.
    """
    if part == "gpu":
        if given := [option for option in typed if option not in _OF_GPU]:
            raise UsageError(f"omni bench gpu measures rows of its own; leave out {', '.join(given)}")
        return
    for option in typed:
        if (parts := _OF_PARTS.get(option)) and part not in parts:
            asked = f"omni bench {part or ''}".rstrip()
            raise UsageError(f"{option}: {asked} does not heed it, omni bench {parts[0]} does; leave it out")


def rows_request(profile: str | None, sets: Sequence[str] | None, out: Path, minutes: float, console: Console) -> Any:
    """Return what is asked of `omni bench gpu`, whose rows say themselves what is measured.

    Args:
        profile: its name; None: the one that fits.
        sets: single settings over those of every row.
        out: where rows go.
        minutes: how long they take at most.
        console: says which profile was chosen.
    """
    from omni_cli.stages.bench import RowsRequest

    chosen = choose_profile(profile, console, dry_run=False)
    return RowsRequest(DEFAULT_RECIPE, chosen.name, out, minutes, tuple(sets or ()))


def _newest_recipe(runs: Path) -> str:
    finished = finished_runs(runs)
    return run_folders.open_run(finished[0]).manifest.recipe if finished else DEFAULT_RECIPE
