"""`omni train`: from shards to verified weights; killed and run again it continues bit for bit."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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
from omni_cli.stages.train.ranks import ALONE, Ranks, joined, with_share
from omni_cli.stages.train.report import reported
from omni_cli.stages.train.reporters import check_reporters
from omni_cli.stages.train.request import TrainRequest
from omni_cli.stages.train.roll_back import roll_backs
from omni_cli.stages.train.sharding import check_sharding
from omni_cli.stages.train.shards import check_rows, find_shards
from omni_cli.stages.train.shortage import Shortage
from omni_cli.stages.train.trainer import check_optimizer_name, check_runnable
from omni_cli.stages.train.validation import LOSS, SPLIT, publish_best, save_weights


@dataclass(frozen=True)
class Task:
    """What is left to do once everything is looked at: every rank is told of it, and opens the shards itself."""

    run: runs.Run
    recipe: Any  # as the shards were cut
    dataset: WindowDataset | None  # None: the run is finished


def train(recipe: Any, request: TrainRequest, console: Console) -> dict[str, Any]:
    """Train a recipe on shards; where there are none yet, cut the raw data into some first.

    Of the processes that torchrun started, the first looks at everything, holds the locks and writes; the others wait
    to be told, then train with it, and return what it returns.

    Raises:
        UsageError: the run's name leads elsewhere, its folder is another's or holds other settings, there is no data,
            the shards do not fit the recipe, its optimiser cannot be used, a step does not fit the machine, or cannot
            be shared by so many processes.
        DataError: the shards hold no window to train on, a sample is too long, or a drive is in train and in val.
        Preempted: a signal stopped it; a checkpoint was saved.
        OmniError: another process is training this run, or is taking the shards away.
    """
    with joined(recipe.train) as ranks, ExitStack() as held:
        if request.dry_run:
            return ranks.decide(lambda: _planned(recipe, request, console, ranks))
        task = ranks.decide(lambda: _prepared(recipe, request, console, ranks, held))
        result = _carry_out(task, console, ranks, report_to=request.report_to)
    page = Path(result["run"]) / runs.REPORT_PAGE
    return {**result, "report": str(page) if page.is_file() else None}


def train_in(folder: Path, recipe: Any, shards: ShardSet, profile: str, console: Console) -> dict[str, Any]:
    """Train in a folder that the caller holds, or go on where it stopped, or find that nothing is left to do."""
    with ExitStack() as held:
        task = _prepared_in(folder, recipe, shards, profile, console, held=held)
        return _carry_out(task, console, ALONE)


def _named_folder(recipe: Any, request: TrainRequest) -> Path:
    name = f"{recipe.name}-{request.profile}" if request.run is None else request.run
    folder = locate.named_folder(request.runs, name)
    check_optimizer_name(recipe.train.optimizer)
    check_reporters(request.report_to)
    return folder


def _planned(recipe: Any, request: TrainRequest, console: Console, ranks: Ranks) -> dict[str, Any]:
    _named_folder(recipe, request)
    if ranks.count > 1:  # the processes are those that would train; one may plan for another machine
        check_runnable(recipe, ranks)
    elif recipe.train.sharding != "none":
        check_sharding(recipe, 2)  # or more: can it be cut at all
        console.warn(
            f"train.sharding = {recipe.train.sharding} needs several processes, which one alone can only plan for; "
            "what each needs is said by: torchrun --nproc-per-node N -m -- omni_cli train --dry-run ..."
        )
    return dry_run(recipe, request, console, ranks.count)


def _prepared(recipe: Any, request: TrainRequest, console: Console, ranks: Ranks, held: ExitStack) -> Task:
    """Look at everything that is asked for, and hold what it needs."""
    folder = _named_folder(recipe, request)
    runs.check_ours(folder, fresh=request.fresh)
    check_runnable(recipe, ranks)  # before an hour of etl
    if request.fresh or folder not in locate.finished_runs(request.runs):
        check_memory(with_share(recipe, ranks.count), request, console, ranks.count)
    shards = find_shards(recipe, request, console)
    console.say(f"shards {shards.folder}: {counted(shards.manifest.count('train'), 'window')} to train on")
    recipe = as_cut(recipe, shards, console, request.asked)
    for each in (reading(shards.folder), files.exclusive(folder, runs.TRAINING), reported(folder, console)):
        held.enter_context(each)
    profile, is_fresh = request.profile, request.fresh
    return _prepared_in(folder, recipe, shards, profile, console, held=held, fresh=is_fresh, ranks=ranks)


def _prepared_in(
    folder: Path,
    recipe: Any,
    shards: ShardSet,
    profile: str,
    console: Console,
    *,
    held: ExitStack,
    fresh: bool = False,
    ranks: Ranks = ALONE,
) -> Task:
    """Make a run ready in a folder that the caller holds, or find it there."""
    preprocess = check_fit(recipe, shards, profile)
    check_no_leak(
        [(entry.id, entry.group, entry.windows) for entry in shards.manifest.recordings], shards.manifest.split_rule
    )
    manifest = _manifest(recipe, shards, profile)
    run = None if fresh else runs.same_run(folder, manifest, type(recipe))
    if run and run.is_done():
        console.say(f"run {folder} is finished; nothing to do")
        return Task(run, recipe, None)
    check_runnable(recipe, ranks)
    _check_disk(folder, recipe, preprocess, shards)
    key = ensure_sidecar(shards, recipe, console)
    dataset = WindowDataset(shards, "train", key, verify=recipe.train.verify_shards)
    check_rows(dataset, recipe, shards.folder)
    if fresh:
        held.enter_context(runs.emptied(folder))
    run = run or runs.start_run(folder, manifest, recipe)
    files.write_json(run.folder / runs.LEARNED, _learned(dataset, recipe).model_dump(mode="json"))
    return Task(run, recipe, dataset)


def _carry_out(task: Task, console: Console, ranks: Ranks, report_to: Sequence[str] = ()) -> dict[str, Any]:
    if task.dataset is not None:
        _finish(task.run, task.recipe, task.dataset, console, ranks, report_to=report_to)
    return ranks.decide(lambda: _result(task.run))


def _check_disk(folder: Path, recipe: Any, preprocess: Preprocess, shards: ShardSet) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OmniError: it cannot.
    """
    steps = planned_steps(recipe.train, shards.manifest.count("train"))
    disk.check_room(folder, disk.run_bytes(recipe.size(preprocess), recipe.tune.mode, recipe.train, steps))


def _finish(
    run: runs.Run, recipe: Any, dataset: WindowDataset, console: Console, ranks: Ranks, *, report_to: Sequence[str]
) -> None:
    """Train to the end and publish the weights."""
    fitted = fit(run, recipe, dataset, dataset.preprocess, console, report_to=report_to, ranks=ranks)
    with ranks.alike(), Shortage(run, recipe, ranks).told(lambda: "as the trained weights were written"):
        published = _publish(run, recipe, fitted, ranks)
    facts = fitted.facts
    console.say(f"run {run.folder}: {facts['steps']} steps, loss {facts['loss']:.4f}, weights in {run.final}")
    if published["chosen_on"]:
        console.say(
            f"the weights are those of step {published['published_step']}, chosen on split {published['chosen_on']}: "
            "what is measured there flatters them"
        )


def _publish(run: runs.Run, recipe: Any, fitted: Fitted, ranks: Ranks) -> dict[str, Any]:
    """Write the weights that become the run's; return which they are, and the split that they were chosen on."""
    if not ranks.is_first:
        return _put_weights(run, recipe, fitted, ranks)
    shutil.rmtree(run.final, ignore_errors=True)
    with disk.writing(run.final):
        published = _put_weights(run, recipe, fitted, ranks)
        run.seal(**fitted.facts, **published)
    return published


def _put_weights(run: runs.Run, recipe: Any, fitted: Fitted, ranks: Ranks) -> dict[str, Any]:
    """Write the weights.

    Raises:
        OmniError: the best are asked for, and none were found, or they are damaged.
    """
    if recipe.train.publish == "last":
        save_weights(recipe, fitted.built, run.final, ranks)
        return {"published_step": fitted.facts["steps"], "chosen_on": None}
    if fitted.best is None:
        raise OmniError(
            f"run {run.folder}: no step has a loss on split {SPLIT} that is a number, so none is the best; train with "
            "--set train.publish=last in a run of another name"
        )
    if ranks.is_first:
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
