"""What there is to do: one unit a recording, each with its split, decided before anything is opened."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omni_cli import __version__
from omni_cli.config import nearest
from omni_cli.errors import DataError, UsageError
from omni_cli.files import hash_json
from omni_cli.formats.physical_ai_av import CAMERA_SETS
from omni_cli.recipe import Sampled, SplitSettings
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import FORMAT, safe_name
from omni_cli.samples.splits import Split, SplitRule, assign_splits, read_split_file
from omni_cli.samples.windows import TableMaker
from omni_cli.sources import RecordingRef, Source
from omni_cli.sources.quarantine import read_quarantine

ByTime = Literal["by time"]


@dataclass(frozen=True)
class Unit:
    """One recording to be worked on; `split` is that of all its windows, or each window's own by its time."""

    recording_id: str
    group: str
    split: Split | ByTime


@dataclass(frozen=True)
class Job:
    """What all units share. It travels to the workers, so it holds plain tables in place of the recipe."""

    recipe_name: str
    settings: dict[str, dict[str, Any]]  # the recipe's [sample] and [split] tables
    targets: tuple[str, ...]  # columns
    make_tables: TableMaker
    preprocess: Preprocess
    source: str
    reader: Source  # keeps the indices it has read
    raw: Path
    out: Path

    def plan_key(self, unit: Unit) -> str:
        """Return the hash of what a shard depends on that is known before its recording is opened."""
        facts = {
            "format": FORMAT,
            "version": __version__,
            "recipe": self.recipe_name,
            "preprocess": self.preprocess.model_dump(mode="json"),
            "sample": self.settings["sample"],
            "targets": self.targets,
            "source": self.source,
            "recording": unit.recording_id,
            "group": unit.group,
            "split": self.settings["split"] if unit.split == "by time" else unit.split,
        }
        return hash_json(facts)


def make_job(recipe: Sampled, preprocess: Preprocess, source: str, reader: Source, raw: Path) -> Job:
    """Return the job of a recipe on raw data; its output folder is still to be chosen.

    Raises:
        UsageError: the source has no such camera.
    """
    if unknown := [name for name in preprocess.cameras if name not in reader.known_cameras]:
        sets = [name for name, cameras in CAMERA_SETS.items() if set(cameras) <= set(reader.known_cameras)]
        known = (*sets, *reader.known_cameras)
        raise UsageError(f"no camera {unknown[0]!r} in {source} data; {nearest(unknown[0], known)}")
    tables = {"sample": recipe.sample.model_dump(mode="json"), "split": recipe.split.model_dump(mode="json")}
    columns = tuple(str(column) for column in recipe.target_columns())
    name = type(recipe).__name__.lower()
    return Job(name, tables, columns, recipe.table_maker(), preprocess, source, reader, raw, out=Path())


@dataclass(frozen=True)
class Plan:
    """Every unit of a shard set, in the order of the source's bundles."""

    units: tuple[Unit, ...]
    split_rule: SplitRule
    quarantined: dict[str, str] = field(default_factory=dict)
    unassigned: int = 0  # recordings that the split file does not name

    def share(self, shard: tuple[int, int] | None) -> tuple[Unit, ...]:
        """Return the units of share i of N (1-based), or all of them.

        Raises:
            UsageError: there is no such share.
        """
        if shard is None:
            return self.units
        index, count = shard
        if not 1 <= index <= count:
            raise UsageError(f"--shard {index}/{count}: expected I/N with 1 <= I <= N, for example --shard 1/4")
        return self.units[index - 1 :: count]


def make_plan(reader: Source, raw: Path, split: SplitSettings, split_file: Path | None) -> Plan:
    """Read a source's index and decide every recording's split.

    Args:
        reader: of the raw data.
        raw: their folder, where the quarantine list lies.
        split: how the recordings are divided.
        split_file: says it instead, where given.

    Raises:
        UsageError: the split file is wrong.
        DataError: the source's index is, or it holds no recording.
    """
    everything = reader.recordings()
    listed = read_quarantine(raw) | _unnameable(everything)
    quarantined = {ref.id: listed[ref.id] for ref in everything if ref.id in listed}
    refs = [ref for ref in everything if ref.id not in quarantined]
    if not refs:
        raise DataError(f"{raw}: holds no recording to work on ({len(quarantined)} in quarantine); fetch more")
    if split_file is not None:
        return _plan_by_file(refs, split_file, quarantined)
    if split.rule == "time":
        return Plan(tuple(Unit(ref.id, _group(ref), "by time") for ref in refs), "time", quarantined)
    splits = assign_splits([_group(ref) for ref in refs], validation=split.validation, seed=split.seed)
    return Plan(tuple(Unit(ref.id, _group(ref), splits[_group(ref)]) for ref in refs), "hash", quarantined)


def _plan_by_file(refs: Sequence[RecordingRef], path: Path, quarantined: dict[str, str]) -> Plan:
    splits = read_split_file(path)
    known = {ref.id for ref in refs} | quarantined.keys()
    if unknown := sorted(splits.keys() - known):
        raise UsageError(f"{path}: names recording {unknown[0]}, which the data do not hold; `omni audit` lists them")
    units = tuple(Unit(ref.id, _group(ref), splits[ref.id]) for ref in refs if ref.id in splits)
    if not units:
        raise UsageError(f"{path}: names no recording of these data; `omni audit` lists them")
    return Plan(units, "file", quarantined, unassigned=len(refs) - len(units))


def _unnameable(refs: Sequence[RecordingRef]) -> dict[str, str]:
    """Return the recordings whose id, a stranger's, cannot name a folder, and why; the others go on without them."""
    reasons: dict[str, str] = {}
    for ref in refs:
        try:
            safe_name(ref.id)
        except DataError as error:
            reasons[ref.id] = str(error)
    return reasons


def _group(ref: RecordingRef) -> str:
    return ref.group or ref.id
