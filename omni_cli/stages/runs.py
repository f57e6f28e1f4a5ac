"""The folder of one training: what it is, whether it is finished, and how to open it again.

runs/NAME/run.json       recipe, settings, preprocessing, shards, base: written before the first step
runs/NAME/config.toml    the same settings, for people
runs/NAME/checkpoints/   resumable states, each with a manifest of hashes
runs/NAME/best/          of the steps whose loss on the val split was the lowest: the weights, as in final/
runs/NAME/history.jsonl  one line a logged step
runs/NAME/telemetry.jsonl  what the machine did, twice a second, in every session
runs/NAME/report.html    what was trained, from what, how and how fast: for people, as report.md and telemetry.png
runs/NAME/events.jsonl   one line each time that training went back to a checkpoint; absent where it never did
runs/NAME/final/         the trained weights and tokenizer; run is done when final.receipt.json lists them
runs/.NAME.discarded/    what --fresh took away, until it is deleted

A receipt of a checkpoint or of the final weights names its run by the hash of everything the weights depend on: what
another training left here never counts.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from omni_cli import files
from omni_cli.config import Layer, Settings, differences, dump_toml, read_document, resolve
from omni_cli.errors import DataError, UsageError
from omni_cli.recipe.settings import WATCHING, WITHOUT_EFFECT
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages import run_file

FORMAT = 1
RUN_FILE = run_file.RUN_FILE
CONFIG = "config.toml"
CHECKPOINTS = "checkpoints"
FINAL = run_file.FINAL
LEARNED = "learned.json"
BEST = "best"
HISTORY = "history.jsonl"
TELEMETRY = "telemetry.jsonl"
TELEMETRY_PICTURE = "telemetry.png"
REPORT = "report.md"
REPORT_PAGE = "report.html"
TENSORBOARD = "tensorboard"  # a folder, where --report-to asks for it
EVENTS = "events.jsonl"
RECORDS = "records"  # what lies beside the weights; its receipt alone is written
TRAINING = "training in"  # what the lock of a run's folder is held for
_LOCK = ".lock"
_OF_A_RUN = {
    RUN_FILE,
    CONFIG,
    CHECKPOINTS,
    FINAL,
    FINAL + files.RECEIPT_SUFFIX,
    LEARNED,
    BEST,
    HISTORY,
    EVENTS,
    TELEMETRY,
    TELEMETRY_PICTURE,
    REPORT,
    REPORT_PAGE,
    TENSORBOARD,
    RECORDS + files.RECEIPT_SUFFIX,
}
_KEYS_OF_A_RUN = {"recipe", "settings", "shards", "base_fingerprint"}  # of run.json, whatever its format


class ShardsUsed(Settings):
    """Which shards a run learned from."""

    folder: str  # where they lay; only the fingerprint counts
    fingerprint: str
    split_rule: str


class RunManifest(Settings):
    """Everything that a run's weights depend on, and the machine it started on."""

    format: int = FORMAT
    recipe: str
    profile: str
    settings: dict[str, Any]
    preprocess: Preprocess
    shards: ShardsUsed
    base_fingerprint: str
    machine: dict[str, Any]

    def identity(self) -> Self:
        """Return the manifest without what the weights do not depend on."""
        shards = self.shards.model_copy(update={"folder": ""})
        train = {
            key: value
            for key, value in self.settings.get("train", {}).items()
            if key not in WATCHING and (key, value) not in WITHOUT_EFFECT
        }
        settings = {**self.settings, **({"train": train} if "train" in self.settings else {})}
        return self.model_copy(update={"profile": "", "machine": {}, "shards": shards, "settings": settings})

    def key(self) -> str:
        """Return the hash of everything that the weights depend on."""
        return files.hash_json(self.identity().model_dump(mode="json"))


class BeforeIt(Settings):
    """What the base of a run had learned from before."""

    source: str  # as of `Learned`; empty: nobody says
    licences: tuple[str, ...] = ()


class Learned(Settings):
    """What a run saw in training: for the leak check, and for baselines without the shards."""

    recordings: tuple[str, ...]
    groups: tuple[str, ...] = ()  # the drives they are parts of, where the source knows
    windows: int
    medians: dict[str, float | tuple[float, ...]]  # over its windows, as the recipe's constant baseline needs them
    source: str = ""  # of its data, and the licences noted of them; runs of omni 0.5 do not say
    licences: tuple[str, ...] = ()
    base: BeforeIt | None = None  # older runs do not say


@dataclass(frozen=True)
class Run:
    """A run's folder and what its manifest says."""

    folder: Path
    manifest: RunManifest

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def final(self) -> Path:
        """The folder of the trained weights."""
        return self.folder / FINAL

    def is_done(self) -> bool:
        """Say whether the trained weights are there and whole, and are this run's."""
        return verified_folder(self.final, expect=self._bound()) is not None

    def seal(self, **facts: Any) -> None:
        """Write the receipt of the trained weights: the run is done.

        What lies beside them has a receipt of its own: a history holds times, and the weights' receipt depends on none.
        """
        names = [name for name in (RUN_FILE, CONFIG, LEARNED, HISTORY, EVENTS) if (self.folder / name).is_file()]
        beside = {name: file_facts(self.folder / name) for name in names}
        files.put_receipt(self.folder / RECORDS, {"files": {}, "beside": beside})
        seal_folder(self.final, **self._bound(), **facts)

    def learned(self) -> Learned:
        """Return what the run saw in training.

        Raises:
            DataError: it is not there, or is something else.
        """
        path = self.folder / LEARNED
        if not path.is_file():
            raise DataError(f"{path}: is not there; omni train writes it again")
        return read_document(path, Learned, "what a run learned from")

    def _bound(self) -> dict[str, Any]:
        learned = self.folder / LEARNED
        learned_sha256 = files.sha256_of(learned) if learned.is_file() else None
        return {"run": self.manifest.key(), "learned_sha256": learned_sha256}

    def recipe_settings(self, schema: type[Settings]) -> Any:
        """Return the recipe exactly as it was trained."""
        return resolve(schema, [Layer(str(self.folder / RUN_FILE), self.manifest.settings)]).value


def check_ours(folder: Path, *, fresh: bool) -> None:
    """Refuse a folder in which something lies that no run.json accounts for.

    Without --fresh nothing but the beginnings of a run may lie there: what is older than the run.json that would be
    written beside it could be taken for this run's.

    Raises:
        UsageError: something does; it is named.
    """
    is_run = _is_run(folder) if fresh else (folder / RUN_FILE).is_file()
    if is_run or not folder.is_dir():
        return
    found = {path.name for path in folder.iterdir() if files.TEMPORARY_MARK not in path.name} - {_LOCK, CONFIG}
    if others := sorted(found - _OF_A_RUN):
        raise UsageError(f"{folder} is no run of omni (it holds {others[0]}); choose another name with --run")
    if found and not fresh:
        raise UsageError(
            f"{folder} holds {min(found)} and no {RUN_FILE} that says of which training; "
            "use --fresh to discard it, or --run NAME for another"
        )


def same_run(folder: Path, manifest: RunManifest, schema: type[Settings]) -> Run | None:
    """Return the run in a folder if it is this one; None where the folder holds none.

    A finished run of an older omni is asked with what it did not know yet as it is unless said otherwise.

    Args:
        folder: of the run.
        manifest: of the run that is asked for.
        schema: of its settings.

    Raises:
        UsageError: it is another; the message says what differs.
        DataError: its manifest cannot be read.
    """
    if not (folder / RUN_FILE).is_file():
        return None
    run = open_run(folder)
    held = run.manifest
    if run.is_done():
        settings = run.recipe_settings(schema).model_dump(mode="json")
        held = held.model_copy(update={"settings": settings})
    if changed := differences(_spelled_out(held), _spelled_out(manifest)):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UsageError(
            f"run {folder} was started with other settings ({'; '.join(changed[:3])}{more}); "
            "use --fresh to start it anew, or --run NAME for another"
        )
    return run


def _spelled_out(manifest: RunManifest) -> RunManifest:
    """Return what the weights depend on, with what changes nothing: `compile: true -> false` tells more than None."""
    identity = manifest.identity()
    train = {**dict(WITHOUT_EFFECT), **identity.settings.get("train", {})}
    return identity.model_copy(update={"settings": {**identity.settings, "train": train}})


@contextmanager
def emptied(folder: Path) -> Iterator[None]:
    """Take all that a run has learned out of its folder in one step, and hold the empty folder.

    Killed before that step nothing has changed, killed after it nothing of the old run is left to be taken for the new.

    Args:
        folder: of the run, whose lock the caller holds.
    """
    real = folder.resolve()  # of a link to another disk the content goes, not the link
    discarded = _discarded(real)
    _delete(discarded)
    discarded.mkdir()
    real.rename(discarded / "old")  # one level down: no search for runs finds it there
    files.sync_folder(real.parent)
    with files.exclusive(real, TRAINING):  # the caller's lock left with the old folder
        _delete(discarded)
        yield


def start_run(folder: Path, manifest: RunManifest, settings: Settings) -> Run:
    """Write a run's manifest and its readable configuration into a folder that holds no run."""
    _delete(_discarded(folder.resolve()))  # where the one who did it was killed
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / CONFIG, dump_toml(settings) + "\n")
    files.write_json(folder / RUN_FILE, manifest.model_dump(mode="json"))
    return Run(folder, manifest)


def open_run(folder: Path) -> Run:
    """Open a run by its folder.

    Raises:
        UsageError: there is no run in that folder.
        DataError: its manifest cannot be read.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        raise UsageError(f"no run in {folder}: it has no {RUN_FILE}; train one with: omni train, or name another")
    return Run(folder, read_document(path, RunManifest, f"a run's manifest of format {FORMAT}"))


def open_finished(folder: Path) -> Run:
    """Open a run whose training is finished.

    Raises:
        DataError: it is not finished, or its weights do not verify.
    """
    run = open_run(folder)
    if not run.is_done():
        raise DataError(
            f"run {folder} is not finished, or its weights or {LEARNED} do not verify; finish it with: omni train"
        )
    return run


def seal_folder(folder: Path, **facts: Any) -> dict[str, Any]:
    """Flush a whole folder and write its receipt: the size and hash of every file in it."""
    files.sync_tree(folder)
    listed = {str(path.relative_to(folder)): file_facts(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    receipt = {**facts, "files": listed}
    files.put_receipt(folder, receipt)
    return receipt


def file_facts(path: Path) -> dict[str, Any]:
    """Return the size and the hash of a file, as receipts list them."""
    return {"size": path.stat().st_size, "sha256": files.sha256_of(path)}


def verified_folder(folder: Path, *, expect: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return a folder's receipt if it holds the facts in `expect` and every listed file is there, byte for byte."""
    receipt = files.read_receipt(folder)
    if receipt is None or not receipt.get("files"):
        return None
    if any(receipt.get(key) != value for key, value in (expect or {}).items()):
        return None
    for name, file in receipt["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file["size"] or files.sha256_of(path) != file["sha256"]:
            return None
    return receipt


def _is_run(folder: Path) -> bool:
    try:
        manifest = files.read_json(folder / RUN_FILE)
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.keys() >= _KEYS_OF_A_RUN


def _discarded(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.discarded")


def _delete(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
