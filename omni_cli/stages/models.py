"""Model folders: a whole model in the hub's layout, and an `omni.json` that says how pictures become its inputs.

MODEL/omni.json      recipe, settings, preprocessing, the run it comes from
MODEL/config.json …  what `AutoModelForImageTextToText` and `AutoTokenizer` load
MODEL.receipt.json   written last: every file with its size and hash
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import Field

from omni_cli import files
from omni_cli.config import Layer, Settings, read_document, resolve
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.models.families import RANDOM_PREFIX, is_random
from omni_cli.models.host_memory import keep_freed_blocks
from omni_cli.recipe import Trainable
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages import run_file, runs
from omni_cli.stages.disk import writing
from omni_cli.stages.origins import origin_of

FORMAT = 1
CARD_FILE = run_file.MODEL_CARD
ONNX_CARD = "programs.json"  # of a folder of exported programs
HERE = "."  # in the card's settings: the model is the folder that the card lies in
_WHAT_IT_IS = {
    runs.RUN_FILE: "a run; ask it with --run {0}",
    ONNX_CARD: "a folder of ONNX programs: its README.md shows how to ask them; ask their run with --run",
    "adapter_config.json": "an adapter without its base; make a model of its run with: omni merge",
    "config.json": "a model that omni did not make; ask it zero-shot with --set model={0}",
}


class ModelCard(Settings):
    """What a model folder is."""

    format: int = FORMAT
    recipe: str
    settings: dict[str, Any]
    preprocess: Preprocess
    from_run: str
    base_fingerprint: str
    parity: dict[str, Any] = Field(default_factory=dict)  # of the merge that it comes from
    source: str = ""  # of all data that led to it, of its base's too; empty: not known, as of models of omni 0.5
    licences: tuple[str, ...] = ()  # noted of those


@dataclass(frozen=True)
class ModelFolder:
    """A model folder and its card."""

    folder: Path
    card: ModelCard

    def recipe_settings(self, schema: type[Settings]) -> Any:
        """Return the recipe that loads this model."""
        settings = {**self.card.settings, "model": str(self.folder)}
        return resolve(schema, [Layer(str(self.folder / CARD_FILE), settings)]).value


def write_model_card(
    folder: Path, recipe: Any, run: runs.Run, parity: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write the card of a whole model that a run led to.

    Args:
        folder: of the model.
        recipe: the run's.
        run: where the weights come from.
        parity: how near they are to what the run learned, where that was merged.
    """
    origin = origin_of(run)
    card = ModelCard(
        recipe=run.manifest.recipe,
        settings=recipe.of_whole_model(HERE).model_dump(mode="json"),
        preprocess=run.manifest.preprocess,
        from_run=run.name,
        base_fingerprint=run.manifest.base_fingerprint,
        parity=dict(parity),
        source=origin.source,
        licences=origin.licences,
    )
    files.write_json(folder / CARD_FILE, card.model_dump(mode="json"))


def open_model(folder: Path) -> ModelFolder:
    """Open a model folder.

    Raises:
        UsageError: it is another kind of folder; the message says which.
        DataError: it is unfinished or damaged.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        raise UsageError(f"{folder} is {_what_it_is(folder)} (expected a model of omni, with an {CARD_FILE})")
    if files.receipt_path(folder).is_file() and runs.verified_folder(folder) is None:
        raise DataError(f"{folder}: does not match its receipt; make it again with: omni merge or omni export")
    return ModelFolder(folder, read_document(path, ModelCard, f"a model card of format {FORMAT}"))


@contextmanager
def publish_folder(folder: Path, doing: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield an empty folder that takes its place, and is sealed, only if the block ends without an error.

    The block puts the facts of the receipt into the dict beside it. They are written with the lock still held: another
    process would take the folder away while it is hashed. After an error nothing is left.

    Raises:
        UsageError: what is in the way is a part of a run, or omni did not make it.
        OmniError: another process is at it.
    """
    if folder.name == runs.FINAL and (folder.parent / runs.RUN_FILE).is_file():
        raise UsageError(f"{folder}: holds what run {folder.parent.name} has learned; choose another folder with --out")
    if folder.exists() and not _may_be_replaced(folder):
        raise UsageError(f"{folder}: is there and omni did not make it; choose another folder with --out")
    with held(folder, doing) as work:
        files.remove_leftovers(folder.parent)  # a kill may have left half of its receipt
        made, old = work / "made", work / "old"
        for leftover in (made, old):
            shutil.rmtree(leftover, ignore_errors=True)
        made.mkdir()
        facts: dict[str, Any] = {}
        with writing(made):
            yield made, facts
        _take_place(made, folder, old)
        with writing(folder):
            runs.seal_folder(folder, **facts)


@contextmanager
def held(folder: Path, doing: str) -> Iterator[Path]:
    """Hold a folder that is published, or is to be; yield one beside it for what is on the way.

    Raises:
        OmniError: another process is at it.
    """
    work = folder.with_name(f".{folder.name}.partial")
    with files.exclusive(work, doing):
        if not (work / ".lock").exists():
            raise OmniError(f"another omni has just left {folder}; run the same command again")
        try:
            yield work
        finally:
            shutil.rmtree(work)  # with the lock still held: what is in it is ours


def _take_place(made: Path, folder: Path, old: Path) -> None:
    """Put a folder in the place of another, which has no receipt from here on."""
    files.sync_tree(made)  # before the rename says that it is there
    files.receipt_path(folder).unlink(missing_ok=True)
    if folder.exists():
        folder.rename(old)
    made.rename(folder)
    files.sync_folder(folder.parent)


def check_base(recipe: Trainable, run: runs.Run) -> None:
    """Refuse a base that is not the one that a run's adapter was trained on; a fully tuned run needs none.

    Raises:
        DataError: it is another.
    """
    if recipe.tune.mode == "full":
        return
    found, expected = recipe.base_fingerprint(), run.manifest.base_fingerprint
    if found != expected:
        raise DataError(
            f"adapter does not match its base: run {run.name} was trained on {expected}, the base is now {found}; "
            "bring the old base back, or train again"
        )


def check_usable(model: str) -> None:
    """Refuse a model that can only be measured.

    Raises:
        UsageError: its weights are random.
    """
    if is_random(model):
        raise UsageError(
            f"model {model}: its weights are random, nothing made with it is of use; it is for omni bench and omni "
            f"train --dry-run; else take {model.removeprefix(RANDOM_PREFIX)}"
        )


def weights_key(run: runs.Run) -> str:
    """Return the hash of a run's trained weights: what is made from them is outdated where it changes."""
    receipt = files.read_receipt(run.final) or {}
    return files.hash_json(receipt.get("files"))


def made_from(folder: Path, **facts: Any) -> dict[str, Any] | None:
    """Return a folder's receipt if all of it verifies and it holds these facts; else None."""
    receipt = files.read_receipt(folder)
    if receipt is None or any(receipt.get(key) != value for key, value in facts.items()):
        return None
    return runs.verified_folder(folder)


def _what_it_is(folder: Path) -> str:
    if not folder.is_dir():
        return "no folder"
    known = [text for name, text in _WHAT_IT_IS.items() if (folder / name).is_file()]
    return (known or ["not a model"])[0].format(folder)


def _may_be_replaced(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    is_ours = files.receipt_path(folder).is_file() or any((folder / card).is_file() for card in (CARD_FILE, ONNX_CARD))
    return is_ours or not any(folder.iterdir())


def best_device() -> str:
    """Return where a model runs unless the user says otherwise: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def ready_device(wanted: str | None = None) -> str:
    """Return where a model is to run, the best device unless one is wanted; a CPU's memory is made ready for it."""
    device = wanted or best_device()
    if device == "cpu":
        keep_freed_blocks()
    return device
