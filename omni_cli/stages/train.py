"""`omni train`: from shards to verified weights; killed and run again it continues bit for bit."""

import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from datasets import Dataset
from transformers import PrinterCallback, set_seed

from omni_cli import files, telemetry
from omni_cli.config import differences
from omni_cli.errors import DataError, Preempted, UsageError
from omni_cli.models.adapters import trainable_count, weight_count
from omni_cli.recipe import BuiltModel, Sampled, Tokenized, Trainable, TrainSettings
from omni_cli.report import Console
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.shards import ShardSet, open_shards
from omni_cli.samples.splits import check_no_leak
from omni_cli.stages import checkpoints, locate, runs
from omni_cli.stages.etl import EtlRequest, ensure_sidecar, etl
from omni_cli.stages.trainer import GradientCheck, Journal, RowCollator, StopOnSignal, compose_trainer

_CHECKPOINTS_KEPT = 2
_PIXEL_FIELDS = ("cameras", "columns", "canvas_width_px", "canvas_height_px", "num_frames", "rate_hz", "decoder")
_TEXT_FIELDS = ("labels", "past_speed")


@runtime_checkable
class TrainableRecipe(Sampled, Tokenized, Trainable, Protocol):
    """What `train` needs a recipe to be."""

    name: str
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


def train(recipe: Any, request: TrainRequest, console: Console) -> dict[str, Any]:
    """Train a recipe on shards; where there are none yet, cut the raw data into some first.

    Raises:
        UsageError: there is no data, the shards do not fit the recipe, or the run exists with other settings.
        DataError: the shards hold no window to train on, a sample is too long, or a drive is in train and in val.
        Preempted: a signal stopped it; a checkpoint was saved.
    """
    if request.dry_run:
        return dry_run(recipe, request, console)
    shards = _find_shards(recipe, request, console)
    console.say(f"shards {shards.folder}: {shards.manifest.count('train')} windows to train on")
    folder = request.runs / (request.run or f"{recipe.name}-{request.profile}")
    with files.exclusive(folder, "training in"):
        return train_in(folder, recipe, shards, request.profile, console, fresh=request.fresh)


def _find_shards(recipe: Any, request: TrainRequest, console: Console) -> ShardSet:
    if request.shards or locate.has_shards(request.data):
        return open_shards(request.shards or locate.newest_shards(request.data))
    source, raw = locate.raw_folder(request.data, None)
    console.say(f"no shards yet: omni etl comes first, on {raw}")
    made = etl(recipe, EtlRequest(request.data, source, workers=telemetry.usable_cores()), console)
    return open_shards(Path(made["shards"]))


def train_in(
    folder: Path, recipe: Any, shards: ShardSet, profile: str, console: Console, *, fresh: bool = False
) -> dict[str, Any]:
    """Train in a folder, or go on where it stopped, or find that nothing is left to do."""
    preprocess = check_fit(recipe, shards, profile)
    check_no_leak(
        [(entry.id, entry.group, entry.windows) for entry in shards.manifest.recordings], shards.manifest.split_rule
    )
    if fresh:
        _empty(folder)
    manifest = _manifest(recipe, shards, profile)
    run = _same_run(folder, manifest) or runs.start_run(folder, manifest, recipe)
    if run.is_done():
        console.say(f"run {folder} is finished; nothing to do")
        return _result(run)
    dataset = WindowDataset(shards, "train", ensure_sidecar(shards, recipe, console))
    _check_rows(dataset, recipe.train, shards.folder)
    files.write_json(folder / runs.LEARNED, _learned(dataset).model_dump(mode="json"))
    built, facts = _fit(run, recipe, dataset, preprocess, console)
    shutil.rmtree(run.final, ignore_errors=True)
    recipe.save(built, run.final)
    runs.seal_folder(run.final, **facts)
    console.say(f"run {folder}: {facts['steps']} steps, loss {facts['loss']:.4f}, weights in {run.final}")
    return _result(run)


def check_fit(recipe: Any, shards: ShardSet, profile: str) -> Preprocess:
    """Return the shards' preprocessing if it is what the recipe asks for.

    Raises:
        UsageError: cameras, canvas or time grid differ; the message gives the right `omni etl` command.
    """
    found, wanted = shards.manifest.preprocess, recipe.preprocess()
    for field in (*_PIXEL_FIELDS, *_TEXT_FIELDS, "vision"):
        have, want = getattr(found, field), getattr(wanted, field)
        if have != want:
            raise UsageError(
                f"shards {shards.folder} have {field} {_short(have)}, this recipe asks for {_short(want)}; "
                f"make fitting ones: omni etl --profile {profile} --out {shards.folder}-{profile}"
            )
    return found


def dry_run(recipe: Any, request: TrainRequest, console: Console) -> dict[str, Any]:
    """Say what a training would be, on this machine or another; touch nothing."""
    preprocess, settings = recipe.preprocess(), recipe.train
    total, trainable, weight_bytes = recipe.size(preprocess)
    samples = settings.batch_size * settings.accumulation
    facts = {
        "model": recipe.model,
        "tuning": recipe.tune.mode,
        "cameras": list(preprocess.cameras),
        "canvas_px": [preprocess.canvas_width_px, preprocess.canvas_height_px],
        "visual_tokens_per_sample": preprocess.visual_tokens,
        "samples_per_step": samples,
        "visual_tokens_per_step": samples * preprocess.visual_tokens,
        "parameters": total,
        "trainable_parameters": trainable,
        "memory_without_activations_gib": round((weight_bytes + trainable * 12) / 2**30, 2),
    }
    facts |= _planned_steps(recipe, request)
    console.table(f"plan of omni train --profile {request.profile}", ("what", "value"), [*_readable(facts)])
    return {"dry_run": True, **facts}


def _planned_steps(recipe: Any, request: TrainRequest) -> dict[str, Any]:
    try:
        shards = open_shards(request.shards or locate.newest_shards(request.data))
        check_fit(recipe, shards, request.profile)
    except (UsageError, DataError) as error:
        return {"steps": recipe.train.max_steps if recipe.train.max_steps > 0 else None, "shards": f"none yet: {error}"}
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
    """Run the Trainer to its end from the newest checkpoint that verifies."""
    saved = run.folder / "checkpoints"
    checkpoints.remove_unsealed(saved)
    checkpoint = checkpoints.newest_checkpoint(saved)
    done = checkpoints.step_of(checkpoint) if checkpoint else 0
    checkpoints.truncate_history(run.folder, done)
    steps = planned_steps(recipe.train, len(dataset))
    set_seed(recipe.train.seed)
    built = recipe.build(preprocess, checkpoint)
    console.say(f"run {run.folder}: {_describe(recipe, built)} from {len(dataset)} windows, {_span(done, steps)}")
    with console.progress("train", steps - done, "steps") as bar:
        gradients, stop = GradientCheck(done), StopOnSignal()
        trainer = make_trainer(saved, recipe, built, dataset, steps)
        for callback in (gradients, stop, Journal(run.folder, bar)):
            trainer.add_callback(callback)
        try:
            output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            stop.restore()
    if stop.stopped and trainer.state.global_step < steps:
        raise Preempted(f"stopped at step {trainer.state.global_step} of {steps}, saved; run the same command again")
    logged = checkpoints.read_history(run.folder)
    return built, {
        "steps": trainer.state.global_step,
        "loss": logged[-1]["loss"] if logged else float(output.training_loss),
        "gradients_checked_at_step": gradients.passed_at,
    }


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
    kind = recipe.trainer()
    trainer = compose_trainer(kind.trainer, *mixins)(
        model=built.model,
        args=kind.arguments(**_arguments(folder, recipe, steps), **kind.always),
        train_dataset=Dataset.from_dict({"index": list(range(len(dataset)))}),
        data_collator=RowCollator(dataset, recipe),
        processing_class=built.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which holds nothing but `--json`
    trainer.recipe, trainer.preprocess = recipe, dataset.preprocess
    # Qwen2.5-VL declares False; our loss divides by the count of the whole step, which the Trainer gives only so.
    trainer.model_accepts_loss_kwargs = True
    return trainer


def _arguments(folder: Path, recipe: Any, steps: int) -> dict[str, Any]:
    settings: TrainSettings = recipe.train
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": math.ceil(settings.warmup_ratio * steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": settings.optimizer,
        "max_steps": steps,
        "gradient_checkpointing": None,
        "activation_checkpointing": settings.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": _CHECKPOINTS_KEPT,
        "logging_steps": settings.log_steps,
        "dataloader_num_workers": settings.workers,
        "dataloader_pin_memory": on_gpu,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "use_cpu": not on_gpu,
        "bf16": on_gpu and recipe.precision == "bfloat16",
        "fp16": on_gpu and recipe.precision == "float16",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _manifest(recipe: Any, shards: ShardSet, profile: str) -> runs.RunManifest:
    return runs.RunManifest(
        recipe=recipe.name,
        profile=profile,
        settings=recipe.model_dump(mode="json"),
        preprocess=shards.manifest.preprocess,
        shards=runs.ShardsUsed(
            folder=str(shards.folder),
            fingerprint=shards.manifest.fingerprint,
            split_rule=shards.manifest.split_rule,
        ),
        base_fingerprint=recipe.base_fingerprint(),
        machine=telemetry.machine_facts(),
    )


def _same_run(folder: Path, manifest: runs.RunManifest) -> runs.Run | None:
    """Return the run in a folder if it is this one; None where the folder holds none."""
    if not (folder / runs.RUN_FILE).is_file():
        return None
    run = runs.open_run(folder)
    ignored = {"machine": {}, "profile": ""}
    shards = manifest.shards.model_copy(update={"folder": ""})
    old = run.manifest.model_copy(update={**ignored, "shards": run.manifest.shards.model_copy(update={"folder": ""})})
    changed = differences(old, manifest.model_copy(update={**ignored, "shards": shards}))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UsageError(
            f"run {folder} was started with other settings ({'; '.join(changed[:3])}{more}); "
            "use --fresh to start it anew, or --run NAME for another"
        )
    return run


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _check_rows(dataset: WindowDataset, settings: TrainSettings, folder: Path) -> None:
    if not len(dataset):
        raise DataError(f"{folder}: no window in the train split; fetch more recordings, or use --split time")
    longest = max(dataset.token_lengths())
    if longest > settings.max_tokens:
        raise DataError(
            f"{folder}: a sample has {longest} tokens, more than train.max_tokens = {settings.max_tokens}; nothing is "
            "ever cut: make a smaller --canvas or --window at etl, or raise --set train.max_tokens"
        )


def _learned(dataset: WindowDataset) -> runs.Learned:
    rows = [dataset.row(index) for index in range(len(dataset))]
    columns = [name for name, value in rows[0].items() if isinstance(value, int | float)]
    medians = {name: statistics.median(row[name] for row in rows) for name in columns}
    known = {name: median for name, median in medians.items() if math.isfinite(median)}
    return runs.Learned(recordings=tuple(e.id for e in dataset.entries), windows=len(rows), medians=known)


def _describe(recipe: Any, built: BuiltModel) -> str:
    counts = f"{trainable_count(built.model):,} of {weight_count(built.model):,} weights learn"
    return f"{recipe.model}, {recipe.tune.mode}, {counts}"


def _span(done: int, steps: int) -> str:
    return f"going on at step {done} of {steps}" if done else f"{steps} steps"


def _result(run: runs.Run) -> dict[str, Any]:
    receipt = files.read_receipt(run.final) or {}
    facts = {key: receipt.get(key) for key in ("steps", "loss", "gradients_checked_at_step")}
    return {"run": str(run.folder), "weights": str(run.final), **facts}


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return getattr(value, "family", None) or str(value)


def _readable(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (key.replace("_", " "), f"{value:,}" if isinstance(value, int) else _short(value))
        for key, value in facts.items()
    ]
