"""`omni train`: from shards to verified weights; killed and run again it continues bit for bit."""

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omni_cli import files, telemetry
from omni_cli.errors import OmniError
from omni_cli.report import Console, counted
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import ShardSet
from omni_cli.samples.splits import check_no_leak
from omni_cli.stages import disk, locate, runs
from omni_cli.stages.etl import ensure_sidecar
from omni_cli.stages.fitting import as_cut, check_fit
from omni_cli.stages.origins import base_origin
from omni_cli.stages.raw_lock import reading
from omni_cli.stages.train.fit import Fitted, fit
from omni_cli.stages.train.plan import check_memory, dry_run, planned_steps
from omni_cli.stages.train.report import reported
from omni_cli.stages.train.reporters import check_reporters
from omni_cli.stages.train.request import TrainRequest
from omni_cli.stages.train.roll_back import roll_backs
from omni_cli.stages.train.shards import check_rows, find_shards
from omni_cli.stages.train.trainer import (
    check_optimizer_name,
    check_runnable,
)
from omni_cli.stages.train.validation import LOSS, SPLIT, publish_best


def train(recipe: Any, request: TrainRequest, console: Console) -> dict[str, Any]:
    """Train a recipe on shards; where there are none yet, cut the raw data into some first.

    Raises:
        UsageError: the run's name leads elsewhere, its folder is another's or holds other settings, there is no data,
            the shards do not fit the recipe, its optimiser cannot be used, or a step does not fit the machine.
        DataError: the shards hold no window to train on, a sample is too long, or a drive is in train and in val.
        Preempted: a signal stopped it; a checkpoint was saved.
        OmniError: another process is training this run, or is taking the shards away.
    """
    name = f"{recipe.name}-{request.profile}" if request.run is None else request.run
    folder = locate.named_folder(request.runs, name)
    check_optimizer_name(recipe.train.optimizer)
    check_reporters(request.report_to)
    if request.dry_run:
        return dry_run(recipe, request, console)
    runs.check_ours(folder, fresh=request.fresh)
    check_runnable(recipe)  # before an hour of etl
    check_memory(recipe, request, console)
    shards = find_shards(recipe, request, console)
    console.say(f"shards {shards.folder}: {counted(shards.manifest.count('train'), 'window')} to train on")
    recipe = as_cut(recipe, shards, console, request.asked)
    with reading(shards.folder), files.exclusive(folder, runs.TRAINING), reported(folder, console):
        names, is_fresh = request.report_to, request.fresh
        result = train_in(folder, recipe, shards, request.profile, console, fresh=is_fresh, report_to=names)
    page = folder / runs.REPORT_PAGE
    return {**result, "report": str(page) if page.is_file() else None}


def train_in(
    folder: Path,
    recipe: Any,
    shards: ShardSet,
    profile: str,
    console: Console,
    *,
    fresh: bool = False,
    report_to: Sequence[str] = (),
) -> dict[str, Any]:
    """Train in a folder that the caller holds, or go on where it stopped, or find that nothing is left to do."""
    preprocess = check_fit(recipe, shards, profile)
    check_no_leak(
        [(entry.id, entry.group, entry.windows) for entry in shards.manifest.recordings], shards.manifest.split_rule
    )
    manifest = _manifest(recipe, shards, profile)
    run = None if fresh else runs.same_run(folder, manifest, type(recipe))
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
        return _finish(run, recipe, dataset, preprocess, console, report_to=report_to)


def _check_disk(folder: Path, recipe: Any, preprocess: Preprocess, shards: ShardSet) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OmniError: it cannot.
    """
    steps = planned_steps(recipe.train, shards.manifest.count("train"))
    disk.check_room(folder, disk.run_bytes(recipe.size(preprocess), recipe.tune.mode, recipe.train, steps))


def _finish(
    run: runs.Run,
    recipe: Any,
    dataset: WindowDataset,
    preprocess: Preprocess,
    console: Console,
    *,
    report_to: Sequence[str],
) -> dict[str, Any]:
    """Train to the end and publish the weights."""
    files.write_json(run.folder / runs.LEARNED, _learned(dataset, recipe).model_dump(mode="json"))
    fitted = fit(run, recipe, dataset, preprocess, console, report_to=report_to)
    shutil.rmtree(run.final, ignore_errors=True)
    with disk.writing(run.final):
        published = _publish(run, recipe, fitted)
        run.seal(**fitted.facts, **published)
    facts = fitted.facts
    console.say(f"run {run.folder}: {facts['steps']} steps, loss {facts['loss']:.4f}, weights in {run.final}")
    if published["chosen_on"]:
        console.say(
            f"the weights are those of step {published['published_step']}, chosen on split {published['chosen_on']}: "
            "what is measured there flatters them"
        )
    return _result(run)


def _publish(run: runs.Run, recipe: Any, fitted: Fitted) -> dict[str, Any]:
    """Write the weights that become the run's; return which they are, and the split that they were chosen on.

    Raises:
        OmniError: the best are asked for, and none were found, or they are damaged.
    """
    if recipe.train.publish == "last":
        recipe.save(fitted.built, run.final)
        return {"published_step": fitted.facts["steps"], "chosen_on": None}
    if fitted.best is None:
        raise OmniError(
            f"run {run.folder}: no step has a loss on split {SPLIT} that is a number, so none is the best; train with "
            "--set train.publish=last in a run of another name"
        )
    publish_best(run, fitted.best)
    return {"published_step": fitted.best.step, "chosen_on": SPLIT, LOSS: fitted.best.loss}


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
    base = base_origin(recipe.model)
    return runs.Learned(
        recordings=tuple(entry.id for entry in dataset.entries),
        groups=tuple(sorted(groups)),
        windows=len(rows),
        medians=dict(recipe.medians(rows)),
        source=dataset.shards.manifest.source,
        licences=dataset.shards.manifest.provenance.get("licence", ()),
        base=runs.BeforeIt(source=base.source, licences=base.licences),
    )


def _result(run: runs.Run) -> dict[str, Any]:
    receipt = files.read_receipt(run.final) or {}
    names = ("steps", "loss", "gradients_checked_at_step", "published_step", "chosen_on")
    facts = {key: receipt.get(key) for key in names}
    return {"run": str(run.folder), "weights": str(run.final), **facts, "roll_backs": roll_backs(run.folder)}
