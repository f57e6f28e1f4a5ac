"""`omni train`: from shards to verified weights; killed and run again it continues bit for bit."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from omni_cli import files, telemetry
from omni_cli.report import Console, counted
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import ShardSet
from omni_cli.samples.splits import check_no_leak
from omni_cli.stages import disk, locate, runs
from omni_cli.stages.etl import ensure_sidecar
from omni_cli.stages.fitting import as_cut, check_fit
from omni_cli.stages.raw_lock import reading
from omni_cli.stages.train.fit import fit
from omni_cli.stages.train.plan import dry_run, planned_steps
from omni_cli.stages.train.request import TrainRequest
from omni_cli.stages.train.shards import check_rows, find_shards
from omni_cli.stages.train.trainer import (
    check_optimizer_name,
    check_runnable,
)


def train(recipe: Any, request: TrainRequest, console: Console) -> dict[str, Any]:
    """Train a recipe on shards; where there are none yet, cut the raw data into some first.

    Raises:
        UsageError: the run's name leads elsewhere, its folder is another's or holds other settings, there is no data,
            the shards do not fit the recipe, or its optimiser cannot be used.
        DataError: the shards hold no window to train on, a sample is too long, or a drive is in train and in val.
        Preempted: a signal stopped it; a checkpoint was saved.
        OmniError: another process is training this run, or is taking the shards away.
    """
    name = f"{recipe.name}-{request.profile}" if request.run is None else request.run
    folder = locate.named_folder(request.runs, name)
    check_optimizer_name(recipe.train.optimizer)
    if request.dry_run:
        return dry_run(recipe, request, console)
    runs.check_ours(folder, fresh=request.fresh)
    check_runnable(recipe)  # before an hour of etl
    shards = find_shards(recipe, request, console)
    console.say(f"shards {shards.folder}: {counted(shards.manifest.count('train'), 'window')} to train on")
    recipe = as_cut(recipe, shards, console, request.asked)
    with reading(shards.folder), files.exclusive(folder, runs.TRAINING):
        return train_in(folder, recipe, shards, request.profile, console, fresh=request.fresh)


def train_in(
    folder: Path, recipe: Any, shards: ShardSet, profile: str, console: Console, *, fresh: bool = False
) -> dict[str, Any]:
    """Train in a folder that the caller holds, or go on where it stopped, or find that nothing is left to do."""
    preprocess = check_fit(recipe, shards, profile)
    check_no_leak(
        [(entry.id, entry.group, entry.windows) for entry in shards.manifest.recordings], shards.manifest.split_rule
    )
    manifest = _manifest(recipe, shards, profile)
    run = None if fresh else runs.same_run(folder, manifest)
    if run and run.is_done():
        console.say(f"run {folder} is finished; nothing to do")
        return _result(run)
    check_runnable(recipe)
    _check_disk(folder, recipe, preprocess, shards)
    key = ensure_sidecar(shards, recipe, console)
    dataset = WindowDataset(shards, "train", key, verify=recipe.train.verify_shards)
    check_rows(dataset, recipe, shards.folder)
    with runs.emptied(folder) if fresh else contextlib.nullcontext():
        run = run or runs.start_run(folder, manifest, recipe)
        return _finish(run, recipe, dataset, preprocess, console)


def _check_disk(folder: Path, recipe: Any, preprocess: Preprocess, shards: ShardSet) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OmniError: it cannot.
    """
    steps = planned_steps(recipe.train, shards.manifest.count("train"))
    disk.check_room(folder, disk.run_bytes(recipe.size(preprocess), recipe.tune.mode, recipe.train, steps))


def _finish(
    run: runs.Run, recipe: Any, dataset: WindowDataset, preprocess: Preprocess, console: Console
) -> dict[str, Any]:
    """Train to the end and publish the weights."""
    files.write_json(run.folder / runs.LEARNED, _learned(dataset, recipe).model_dump(mode="json"))
    built, facts = fit(run, recipe, dataset, preprocess, console)
    shutil.rmtree(run.final, ignore_errors=True)
    with disk.writing(run.final):
        recipe.save(built, run.final)
        run.seal(**facts)
    console.say(f"run {run.folder}: {facts['steps']} steps, loss {facts['loss']:.4f}, weights in {run.final}")
    return _result(run)


def _manifest(recipe: Any, shards: ShardSet, profile: str) -> runs.RunManifest:
    return runs.RunManifest(
        recipe=recipe.name,
        profile=profile,
        settings=recipe.model_dump(mode="json"),
        preprocess=shards.manifest.preprocess,
        shards=runs.ShardsUsed(
            folder=str(shards.folder.absolute()),
            fingerprint=shards.manifest.fingerprint,
            split_rule=shards.manifest.split_rule,
        ),
        base_fingerprint=recipe.base_fingerprint(),
        machine=telemetry.machine_facts(),
    )


def _learned(dataset: WindowDataset, recipe: Any) -> runs.Learned:
    rows = [dataset.row(index) for index in range(len(dataset))]
    groups = {entry.group for entry in dataset.entries if entry.group}
    return runs.Learned(
        recordings=tuple(entry.id for entry in dataset.entries),
        groups=tuple(sorted(groups)),
        windows=len(rows),
        medians=dict(recipe.medians(rows)),
    )


def _result(run: runs.Run) -> dict[str, Any]:
    receipt = files.read_receipt(run.final) or {}
    facts = {key: receipt.get(key) for key in ("steps", "loss", "gradients_checked_at_step")}
    return {"run": str(run.folder), "weights": str(run.final), **facts}
