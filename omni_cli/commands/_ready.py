"""Before a verb's own work: what is plainly wrong is refused at once, then the heavy libraries are loaded, visibly.

torch and what stands on it take seconds to import: no refusal that needs none of it waits for that, nor does the first
word.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from omni_cli.commands._options import parse_share, parse_split
from omni_cli.config import override_layer, read_layer
from omni_cli.errors import OmniError, UsageError
from omni_cli.files import read_json
from omni_cli.profiles import check_machine, load_profile
from omni_cli.recipes import check_recipe, recipe_class, recipe_names
from omni_cli.report import Console
from omni_cli.stages.run_file import MODEL_CARD, RUN_FILE

_READERS, _LEARNERS = "the readers of driving data", "torch and transformers"
_STAGES: Mapping[str, tuple[str, str]] = {  # what a verb imports, and in the user's words
    "fetch": ("stages.fetch", _READERS),
    "audit": ("stages.audit", _READERS),
    "etl": ("stages.etl", _LEARNERS),
    "train": ("stages.train", _LEARNERS),
    "eval": ("stages.evaluate", _LEARNERS),
    "merge": ("stages.merge", _LEARNERS),
    "export": ("stages.export", _LEARNERS),
    "infer": ("stages.infer", _LEARNERS),
    "bench": ("stages.bench", _LEARNERS),
    "run": ("stages.pipeline", _LEARNERS),
    "demo": ("stages.demo", _LEARNERS),
    "doctor": ("stages.doctor", "torch, to see whether it works"),
    "profiles": ("stages.profiles", _LEARNERS),
}

_IN_MANY = (
    "train",
    "doctor",
    "profiles",
)  # verbs that several processes may run: they train together, or write nothing


def make_ready(verb: str, given: Mapping[str, Any]) -> None:
    """Refuse what can be refused without torch, then import what a verb needs while a passing line says so.

    Args:
        verb: its name.
        given: the values of its parameters, by their Python names.

    Raises:
        UsageError: a profile, recipe, config file, setting, run, or the raw data for etl is wrong or not there.
    """
    refuse_early(verb, given)
    module, words = _STAGES[verb]
    with Console(quiet=given["quiet"], json_output=given["json"]).passing(f"loading {words}"):
        import_module(f"omni_cli.{module}")
        for name in _recipes(verb, given):
            recipe_class(name)


def refuse_early(verb: str, given: Mapping[str, Any]) -> None:
    """Refuse what can be refused without torch; arguments and errors as for `make_ready`."""
    if verb not in _IN_MANY:
        check_alone(verb)
    if profile := given.get("profile"):
        loaded = load_profile(profile)
        if not given.get("dry_run"):
            check_machine(loaded)
    if recipe := given.get("recipe"):
        check_recipe(recipe)
    if config := given.get("config"):
        read_layer(config)
    override_layer(given.get("sets") or [])
    if isinstance(run := given.get("run"), Path):  # one that exists
        _locate().choose_run(run, given["runs"])
    elif run is not None:  # the name of a new one
        _locate().named_folder(given["runs"], run)
    for word in given.get("measured") or ():
        if not _locate().names_model(word, given["runs"]):
            _locate().choose_run(Path(word), given["runs"])
    if verb == "etl":
        parse_share(given["shard"])
        parse_split(given["split"])
    if verb in ("etl", "train") and not given["dry_run"]:
        _require_data(given)


def check_alone(verb: str) -> None:
    """Refuse to be one of several processes, which would work on the same folders against each other.

    Raises:
        UsageError: a launcher started several.
    """
    if (processes := os.environ.get("WORLD_SIZE") or "1") != "1":
        raise UsageError(
            f"WORLD_SIZE = {processes}: only omni train runs in several processes; run omni {verb} by itself"
        )


def _require_data(given: Mapping[str, Any]) -> None:
    """Refuse to make shards, or to train on them, where there is nothing to make them of."""
    locate = _locate()
    if "shards" not in given:
        locate.raw_folder(given["data"], given["source"])
    elif given["shards"] is None and not locate.has_shards(given["data"]):
        locate.raw_folder(given["data"], None)  # train makes them first


def _locate() -> Any:
    return import_module("omni_cli.stages.locate")  # it imports scipy


def _recipes(verb: str, given: Mapping[str, Any]) -> Iterator[str]:
    """Yield the recipes that a verb will open; where that cannot be told yet, it opens one later."""
    if verb == "profiles":
        yield from recipe_names() if given["name"] else ()
    elif given.get("recipe"):
        yield given["recipe"]
    elif verb in ("train", "eval", "merge", "export", "infer"):
        with suppress(OmniError, OSError, ValueError, KeyError, TypeError):  # the stage says it in better words
            yield str(read_json(_source(given))["recipe"])


def _source(given: Mapping[str, Any]) -> Path:
    """Return the file that names the recipe: of the shards to train on, or of the run."""
    locate = _locate()
    if "measured" in given:
        return _source_of_measured(next(iter(given["measured"] or ()), None), given["runs"])
    if isinstance(run := given["run"], Path) or "data" not in given:
        return Path(locate.choose_run(run, given["runs"]), RUN_FILE)
    return Path(given.get("shards") or locate.newest_shards(given["data"]), locate.SHARDS_MARK)


def _source_of_measured(word: str | None, runs: Path) -> Path:
    """Return the file that names the recipe of what is measured first: of a model folder, or of a run."""
    locate = _locate()
    if word and locate.names_model(word, runs):
        return Path(word, MODEL_CARD)
    return Path(locate.choose_run(Path(word) if word else None, runs), RUN_FILE)
