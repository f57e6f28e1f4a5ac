"""`omni train`: from shards to verified weights; killed and run again it continues bit for bit."""

import contextlib
import math
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from datasets import Dataset
from transformers import PrinterCallback, set_seed

from omni_cli import files, telemetry
from omni_cli.errors import DataError, Preempted, UsageError
from omni_cli.models.adapters import trainable_count, weight_count
from omni_cli.models.losses import IGNORED
from omni_cli.recipe import BuiltModel, ModelSize, Sampled, Tokenized, Trainable, TrainSettings
from omni_cli.report import Console, counted
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import ShardSet, open_shards
from omni_cli.samples.splits import check_no_leak
from omni_cli.stages import checkpoints, disk, locate, models, runs
from omni_cli.stages.etl import EtlRequest, ensure_sidecar, etl
from omni_cli.stages.fitting import as_cut, check_fit, short
from omni_cli.stages.loading import in_words_of_workers
from omni_cli.stages.raw_lock import reading
from omni_cli.stages.trainer import (
    GradientCheck,
    Journal,
    RowCollator,
    StopOnSignal,
    check_optimizer_name,
    check_runnable,
    compose_trainer,
    trainer_arguments,
)
from omni_cli.stages.worker import start_server

_MORE_LABELS = "make other shards with omni etl, with fewer filters, a shorter warm-up of windows, or another teacher"


@runtime_checkable
class TrainableRecipe(Sampled, Trainable, Protocol):
    """What `train` needs a recipe to be."""

    name: str
    model: str
    precision: str

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Return the settings as plain values."""


@dataclass(frozen=True)
class TrainRequest:
    """What a user asked of `omni train`."""

    shards: Path | None
    data: Path
    runs: Path
    run: str | None
    profile: str
    fresh: bool = False
    dry_run: bool = False
    asked: frozenset[str] | None = None  # keys of the settings that the user typed; None: all of them


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
    shards = _find_shards(recipe, request, console)
    console.say(f"shards {shards.folder}: {counted(shards.manifest.count('train'), 'window')} to train on")
    recipe = as_cut(recipe, shards, console, request.asked)
    with reading(shards.folder), files.exclusive(folder, runs.TRAINING):
        return train_in(folder, recipe, shards, request.profile, console, fresh=request.fresh)


def _find_shards(recipe: Any, request: TrainRequest, console: Console) -> ShardSet:
    if request.shards or locate.has_shards(request.data):
        return _chosen_shards(recipe, request)
    source, raw = locate.raw_folder(request.data, None)
    console.say(f"no shards yet: omni etl comes first, on {raw}")
    made = etl(recipe, EtlRequest(request.data, source, workers=telemetry.usable_cores()), console)
    return open_shards(Path(made["shards"]))


def _chosen_shards(recipe: Any, request: TrainRequest) -> ShardSet:
    """Return the shards that were named, or the newest that fit; where none fit, the newest says why."""
    refusals = []
    for folder in [request.shards] if request.shards else locate.finished_shards(request.data):
        try:
            shards = open_shards(folder)
            check_fit(recipe, shards, request.profile)
        except (UsageError, DataError) as error:
            refusals.append(error)
        else:
            return shards
    raise refusals[0]


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
    _check_rows(dataset, recipe, shards.folder)
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
    built, facts = _fit(run, recipe, dataset, preprocess, console)
    shutil.rmtree(run.final, ignore_errors=True)
    with disk.writing(run.final):
        recipe.save(built, run.final)
        run.seal(**facts)
    console.say(f"run {run.folder}: {facts['steps']} steps, loss {facts['loss']:.4f}, weights in {run.final}")
    return _result(run)


def dry_run(recipe: Any, request: TrainRequest, console: Console) -> dict[str, Any]:
    """Say what a training would be, on this machine or another; touch nothing."""
    preprocess, settings = recipe.preprocess(), recipe.train
    size = recipe.size(preprocess)
    samples = settings.batch_size * settings.accumulation
    facts = {
        "model": recipe.model,
        "tuning": recipe.tune.mode,
        **preprocess.facts(),
        "samples_per_step": samples,
        "parameters": size.weights,
        "trainable_parameters": size.learning,
        "memory_without_activations_gib": round((size.weight_bytes + size.learning * 12) / 2**30, 2),
        **({"notes": size.notes} if size.notes else {}),
    }
    facts |= _planned_steps(recipe, request, console)
    facts |= _planned_disk(size, recipe, facts.get("steps"))
    console.table(f"plan of omni train --profile {request.profile}", ("what", "value"), [*_readable(facts)])
    return {"dry_run": True, **facts}


def _planned_disk(size: ModelSize, recipe: Any, steps: int | None) -> dict[str, int]:
    tuning, settings = recipe.tune.mode, recipe.train
    return {
        "checkpoint_bytes": disk.checkpoint_bytes(size, tuning, settings.optimizer),
        "disk_bytes": disk.run_bytes(size, tuning, settings, steps),
    }


def _planned_steps(recipe: Any, request: TrainRequest, console: Console) -> dict[str, Any]:
    try:
        shards = _chosen_shards(recipe, request)
    except (UsageError, DataError) as error:
        console.warn(f"no shards to count the steps of an epoch: {error}")
        return {"steps": recipe.train.max_steps, "shards": None} if recipe.train.max_steps > 0 else {"shards": None}
    windows = shards.manifest.count("train")
    return {"windows": windows, "steps": planned_steps(recipe.train, windows), "shards": str(shards.folder)}


def planned_steps(settings: TrainSettings, windows: int) -> int:
    """Return the number of optimiser steps on one process."""
    if settings.max_steps > 0:
        return settings.max_steps
    batches = math.ceil(windows / settings.batch_size)
    return math.ceil(settings.epochs * max(math.ceil(batches / settings.accumulation), 1))


def _fit(
    run: runs.Run, recipe: Any, dataset: WindowDataset, preprocess: Preprocess, console: Console
) -> tuple[BuiltModel, dict[str, Any]]:
    """Run the Trainer to its end from the newest checkpoint of this run that verifies."""
    saved, steps = run.folder / runs.CHECKPOINTS, planned_steps(recipe.train, len(dataset))
    start = checkpoints.find_start(saved, run.manifest.key())
    checkpoints.truncate_history(run.folder, start.step)
    gradients = GradientCheck(start.facts)
    set_seed(recipe.train.seed)
    built = recipe.build(preprocess, start.checkpoint)
    learns_from = counted(len(dataset), "window")
    console.say(f"run {run.folder}: {_describe(recipe, built)} from {learns_from}, {_span(start.step, steps)}")
    for note in built.notes:
        console.say(note)
    trainer = make_trainer(saved, recipe, built, dataset, steps)
    if start.checkpoint and start.step == steps:  # killed before the weights were published
        # `train` would take one step more; this is what it does first, so that the same bytes are published.
        trainer._load_from_checkpoint(str(start.checkpoint))
    else:
        _take_steps(trainer, run, start, gradients, console)
    loss = checkpoints.last_loss(run.folder, steps)
    return built, {"steps": steps, "loss": loss, "gradients_checked_at_step": gradients.passed_at}


def _take_steps(
    trainer: Any, run: runs.Run, start: checkpoints.Start, gradients: GradientCheck, console: Console
) -> None:
    """Train to the last step, or until a signal comes."""
    steps = trainer.args.max_steps
    if trainer.args.dataloader_num_workers:
        start_server()
    if (gpus := torch.cuda.device_count()) > 1:
        console.say(f"training on one of {gpus} GPUs; CUDA_VISIBLE_DEVICES chooses which")
    with console.progress("train", steps - start.step, "steps") as bar:
        stop = StopOnSignal(console)
        for callback in (gradients, stop, Journal(run, gradients, bar)):
            trainer.add_callback(callback)
        try:
            with in_words_of_workers():
                trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
        finally:
            stop.restore()
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if stop.signal and trainer.state.global_step < steps:
        raise Preempted(f"stopped at step {trainer.state.global_step} of {steps}, saved; run the same command again")
    if not gradients.had_label:
        raise DataError(
            f"run {run.folder}: none of the {steps} steps met a label that counts; take more of them, or {_MORE_LABELS}"
        )


def make_trainer(
    folder: Path, recipe: Any, built: BuiltModel, dataset: WindowDataset, steps: int, *mixins: type
) -> Any:
    """Return the recipe's Trainer with our loss, ready to run.

    Args:
        folder: of its checkpoints.
        recipe: a `TrainableRecipe`.
        built: what learns.
        dataset: the windows to learn from.
        steps: of the optimiser.
        mixins: classes whose methods come before ours.
    """
    models.ready_device()  # the Trainer's choice too
    trainer = compose_trainer(recipe.trainer().trainer, *mixins)(
        model=built.model,
        args=trainer_arguments(folder, recipe, steps),
        train_dataset=Dataset.from_dict({"index": list(range(len(dataset)))}),
        data_collator=RowCollator(dataset, recipe),
        processing_class=built.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which holds nothing but `--json`
    trainer.recipe, trainer.preprocess = recipe, dataset.preprocess
    # Qwen2.5-VL declares False; our loss divides by the count of the whole step, which the Trainer gives only so.
    trainer.model_accepts_loss_kwargs = True
    return trainer


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


def _check_rows(dataset: WindowDataset, recipe: Any, folder: Path) -> None:
    if not len(dataset):
        raise DataError(f"{folder}: no window in the train split; make other shards with: omni etl")
    if not any(_has_label(dataset, index, recipe) for index in range(len(dataset))):
        raise DataError(f"{folder}: none of its {len(dataset)} windows has a label that counts; {_MORE_LABELS}")
    if isinstance(recipe, Tokenized) and (longest := max(dataset.token_lengths())) > recipe.max_tokens:
        raise DataError(
            f"{folder}: a sample has {longest} tokens, more than train.max_tokens = {recipe.max_tokens}; nothing is "
            "ever cut: make a smaller --canvas or --window at etl, or raise --set train.max_tokens"
        )


def _has_label(dataset: WindowDataset, index: int, recipe: Any) -> bool:
    """Say whether a window has a label as training counts them; its pictures hold none and are not read."""
    batch = recipe.collate([{**dataset.row(index), "pictures": torch.empty(0)}], dataset.preprocess)
    return bool((batch["labels"] != IGNORED).any())


def _learned(dataset: WindowDataset, recipe: Any) -> runs.Learned:
    rows = [dataset.row(index) for index in range(len(dataset))]
    groups = {entry.group for entry in dataset.entries if entry.group}
    return runs.Learned(
        recordings=tuple(entry.id for entry in dataset.entries),
        groups=tuple(sorted(groups)),
        windows=len(rows),
        medians=dict(recipe.medians(rows)),
    )


def _describe(recipe: Any, built: BuiltModel) -> str:
    counts = f"{trainable_count(built.model):,} of {weight_count(built.model):,} weights learn"
    return f"{recipe.model}, {recipe.tune.mode}, {counts}"


def _span(done: int, steps: int) -> str:
    return f"going on at step {done} of {steps}" if done else f"{steps} steps"


def _result(run: runs.Run) -> dict[str, Any]:
    receipt = files.read_receipt(run.final) or {}
    facts = {key: receipt.get(key) for key in ("steps", "loss", "gradients_checked_at_step")}
    return {"run": str(run.folder), "weights": str(run.final), **facts}


def _readable(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), _worded(value)) for key, value in facts.items()]


def _worded(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return f"{value:,}" if isinstance(value, int) else short(value)
