"""Which data a run learned from, its base too, and whether what was made of them may be shared."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.errors import UsageError
from omni_cli.models.families import is_local, is_path
from omni_cli.models.hub_models import fetch_file
from omni_cli.samples.shards import MANIFEST_FILE, Manifest
from omni_cli.stages import licences, run_file, runs


@dataclass(frozen=True)
class DataOrigin:
    """Where the data come from that a run learned from, and under which licences."""

    source: str = ""  # empty: nothing says so
    licences: tuple[str, ...] = ()  # none are noted of recordings that users made themselves


NOT_OURS = DataOrigin("none of omni's")  # what a base learned from that omni did not train
_SEPARATOR = ", "


def origin_of(run: runs.Run) -> DataOrigin:
    """Return what the data of a run and of its base are.

    As it noted them itself, or where it is older than 0.6, as its shards and its base do.

    Raises:
        DataError: the run does not say what it learned from.
    """
    learned = run.learned()
    own = _origin(learned.source, learned.licences) if learned.source else _of_older(run)
    if learned.base is None:
        return _together(own, _of_local_base(str(run.manifest.settings.get("model", ""))))
    return _together(own, DataOrigin(learned.base.source, learned.base.licences))


def base_origin(model: str) -> DataOrigin:
    """Return what the data are that a base had learned from before: nothing is known of a model of omni 0.5.

    Args:
        model: the base, as settings name it.

    Raises:
        OmniError: it is on the hub, which does not give it.
    """
    if is_local(model):
        return _of_local_base(model)
    card = fetch_file(run_file.MODEL_CARD, model)
    return noted_origin(_read_object(card)) if card else NOT_OURS


def _of_local_base(model: str) -> DataOrigin:
    """Return the same of a base that lies here; on a hub omni 0.5, which noted no base, had none."""
    folder = Path(model).expanduser().resolve()
    if not folder.is_dir():
        return DataOrigin() if is_path(model) else NOT_OURS
    if (folder / run_file.MODEL_CARD).is_file():
        return noted_origin(_read_object(folder / run_file.MODEL_CARD))
    above = [parent for parent in folder.parents[:2] if (parent / run_file.RUN_FILE).is_file()]
    return origin_of(runs.open_run(above[0])) if above else NOT_OURS


def origin_of_shards(manifest: Manifest) -> DataOrigin:
    """Return what the data in shards are."""
    return _origin(manifest.source, manifest.provenance.get("licence", ()))


def noted_origin(noted: Mapping[str, Any]) -> DataOrigin:
    """Return what a document says of its data: a model card or a report, wherever it comes from."""
    source, names = noted.get("source", ""), noted.get("licences", [])
    return _origin(str(source), map(str, names)) if source and isinstance(names, list) else DataOrigin()


def check_right(origin: DataOrigin, override: str | None) -> None:
    """Refuse to push what was made of data whose licence forbids it, or of which nothing is known.

    Raises:
        UsageError: so it is, and no licence is named to push all the same.
    """
    if not origin.source and not override:
        raise UsageError(
            "nothing says under which licence the data of this run or of its base are: it is older than omni 0.6, and "
            "its shards are gone or were made anew, or its base is; bring them back, or name the licence with "
            "--licence NAME"
        )
    licences.check_push(origin.licences, override)


def _of_older(run: runs.Run) -> DataOrigin:
    manifest = _read_object(Path(run.manifest.shards.folder) / MANIFEST_FILE)
    if files.hash_json(manifest) != run.manifest.shards.fingerprint:
        return DataOrigin()
    return _origin(str(manifest["source"]), manifest.get("provenance", {}).get("licence", ()))


def _together(own: DataOrigin, base: DataOrigin) -> DataOrigin:
    """Return what all data are; nothing names their source where one is not known, and the licences stay."""
    noted = tuple(sorted({*own.licences, *base.licences}))
    if base == NOT_OURS:
        return own
    if not own.source or not base.source:
        return DataOrigin("", noted)
    named = dict.fromkeys([*own.source.split(_SEPARATOR), *base.source.split(_SEPARATOR)])
    return DataOrigin(_SEPARATOR.join(named), noted)


def _read_object(path: Path) -> dict[str, Any]:
    """Return a document as it was written, of whatever format; nothing where it is gone or damaged."""
    try:
        document = files.read_json(path)
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _origin(source: str, noted: Iterable[str]) -> DataOrigin:
    return DataOrigin(source, tuple(sorted(noted)) or licences.implied(source))
