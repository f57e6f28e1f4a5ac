"""What `omni eval` measures: runs, model folders, and models on the hub at one or several revisions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omni_cli.commands._compose import choose_profile, compose_recipe, open_run, recipe_of_shards
from omni_cli.errors import UsageError
from omni_cli.recipes import recipe_class
from omni_cli.report import Console
from omni_cli.stages.evaluate import Candidate, candidate_of_base, candidate_of_model, candidate_of_run, fetched_model
from omni_cli.stages.locate import is_hub_id, names_model
from omni_cli.stages.models import CARD_FILE, open_model


def open_candidates(
    words: Sequence[str],
    revisions: Sequence[str],
    runs: Path,
    console: Console,
    *,
    shards: Path | None,
    profile: str | None,
    out: Path,
) -> list[Candidate]:
    """Return what a user named to be measured, or the newest finished run.

    Args:
        words: folders or names of runs, model folders, ids on the hub.
        revisions: of the one model on the hub.
        runs: the folder of runs.
        console: says which run was taken.
        shards: whose windows a base model is asked about.
        profile: of a base model.
        out: folder of the reports of models.

    Raises:
        UsageError: one is not there, or revisions are named of something else.
        DataError: a run is not finished, or a model is damaged.
    """
    if revisions and not (len(words) == 1 and is_hub_id(words[0], runs) and "@" not in words[0]):
        raise UsageError("--revision goes with one model on the hub: omni eval ORGANISATION/NAME --revision REV")
    if not words:
        return [_of_run(None, runs, console)]
    named = [f"{words[0]}@{revision}" for revision in revisions] or words

    def of_model(word: str) -> Candidate:
        folder = fetched_model(word) if is_hub_id(word, runs) else Path(word)
        if folder is not None and (folder / CARD_FILE).is_file():
            model = open_model(folder)
            return candidate_of_model(model.recipe_settings(recipe_class(model.card.recipe)), model, out, word)
        return _of_base(word, shards, profile, out, console)

    return [of_model(word) if names_model(word, runs) else _of_run(Path(word), runs, console) for word in named]


def _of_run(run: Path | None, runs: Path, console: Console) -> Candidate:
    return candidate_of_run(*open_run(run, runs, console))


def _of_base(word: str, shards: Path | None, profile: str | None, out: Path, console: Console) -> Candidate:
    """Return a base model as it is, asked as these shards ask."""
    if shards is None:
        raise UsageError(f"{word}: nothing says what to measure it on; name windows with --shards")
    chosen = choose_profile(profile, console, dry_run=False)
    recipe: Any = compose_recipe(recipe_of_shards(shards, Path()), chosen, sets=[f'model="{word}"']).value
    return candidate_of_base(recipe, shards, chosen.name, out, console)
