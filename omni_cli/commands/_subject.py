"""Who `omni infer` asks: a run, a model folder, or the base model of a profile."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omni_cli.commands._compose import DEFAULT_RECIPE, choose_profile, compose_recipe, open_run
from omni_cli.errors import UsageError
from omni_cli.recipes import recipe_class
from omni_cli.report import Console
from omni_cli.stages.infer import Subject, subject_of_base, subject_of_model, subject_of_run
from omni_cli.stages.models import open_model
from omni_cli.stages.runs import has_finished


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
    if not (model or profile or sets) and (run is not None or has_finished(runs)):
        recipe, trained = open_run(run, runs, console)
        return recipe, subject_of_run(trained)
    chosen = choose_profile(profile, console, dry_run=False)
    words = [*sets, f'model="{model}"'] if model else sets
    recipe = compose_recipe(DEFAULT_RECIPE, chosen, sets=words).value
    return recipe, subject_of_base(recipe)
