"""The folder of one training: what it is, whether it is finished, and how to open it again.

runs/NAME/run.json       recipe, settings, preprocessing, shards, base: written before the first step
runs/NAME/config.toml    the same settings, for people
runs/NAME/checkpoints/   resumable states, each with a manifest of hashes
runs/NAME/history.jsonl  one line a logged step
runs/NAME/final/         the trained weights and tokenizer; run is done when final.receipt.json lists them
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.config import Layer, Settings, dump_toml, read_document, resolve
from omni_cli.errors import DataError, UsageError
from omni_cli.samples.preprocess import Preprocess

FORMAT = 1
RUN_FILE = "run.json"
FINAL = "final"
LEARNED = "learned.json"
HISTORY = "history.jsonl"


class ShardsUsed(Settings):
    """Which shards a run learned from."""

    folder: str  # as it was found; only the fingerprint counts
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


class Learned(Settings):
    """What a run saw in training: for the leak check, and for baselines without the shards."""

    recordings: tuple[str, ...]
    windows: int
    medians: dict[str, float]  # of every numeric column of the windows


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
        """Say whether the trained weights are there and whole."""
        return verified_folder(self.final) is not None

    def learned(self) -> Learned:
        """Return what the run saw in training."""
        return Learned.model_validate_json((self.folder / LEARNED).read_bytes())

    def recipe_settings(self, schema: type[Settings]) -> Any:
        """Return the recipe exactly as it was trained."""
        return resolve(schema, [Layer(str(self.folder / RUN_FILE), self.manifest.settings)]).value


def start_run(folder: Path, manifest: RunManifest, settings: Settings) -> Run:
    """Write a run's manifest and its readable configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "config.toml", dump_toml(settings) + "\n")
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
        raise UsageError(
            f"no run in {folder}: it has no {RUN_FILE}; train one with: omni train, or name one with --run"
        )
    return Run(folder, read_document(path, RunManifest, f"a run's manifest of format {FORMAT}"))


def open_finished(folder: Path) -> Run:
    """Open a run whose training is finished.

    Raises:
        DataError: it is not finished, or its weights do not verify.
    """
    run = open_run(folder)
    if not run.is_done():
        raise DataError(f"run {folder} is not finished or its weights do not verify; finish it with: omni train")
    return run


def has_finished(runs: Path) -> bool:
    """Say whether a folder of runs holds a finished one."""
    return any(runs.glob(f"*/{FINAL}{files.RECEIPT_SUFFIX}"))


def choose_run(run: Path | None, runs: Path) -> Path:
    """Return the folder of the run that a user named (a path, or a name in `runs`), or of the newest finished one.

    Raises:
        UsageError: there is none.
    """
    if run is not None:
        return run if run.is_dir() or not (runs / run).is_dir() else runs / run
    finished = [folder.parent for folder in runs.glob(f"*/{FINAL}{files.RECEIPT_SUFFIX}")]
    if not finished:
        raise UsageError(f"no finished run in {runs}; train one with: omni train")
    return max(finished, key=lambda folder: files.receipt_path(folder / FINAL).stat().st_mtime_ns)


def seal_folder(folder: Path, **facts: Any) -> dict[str, Any]:
    """Flush a whole folder and write its receipt: the size and hash of every file in it."""
    files.sync_tree(folder)
    listed = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": files.sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    receipt = {**facts, "files": listed}
    files.write_json(files.receipt_path(folder), receipt)
    return receipt


def verified_folder(folder: Path) -> dict[str, Any] | None:
    """Return a folder's receipt if every listed file is there, byte for byte; else None."""
    receipt = files.read_receipt(folder)
    if receipt is None or not receipt.get("files"):
        return None
    for name, file in receipt["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file["size"] or files.sha256_of(path) != file["sha256"]:
            return None
    return receipt
