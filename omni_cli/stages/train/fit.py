"""The training itself: the Trainer runs to its end from the newest checkpoint that verifies."""

import signal
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, set_seed

from omni_cli.errors import DataError, Preempted
from omni_cli.models.adapters import trainable_count, weight_count
from omni_cli.recipe import BuiltModel
from omni_cli.report import Console, counted
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages import checkpoints, models, runs
from omni_cli.stages.loading import in_words_of_workers
from omni_cli.stages.train.callbacks import GradientCheck, Journal, StopOnSignal
from omni_cli.stages.train.plan import planned_steps
from omni_cli.stages.train.shards import MORE_LABELS
from omni_cli.stages.train.trainer import RowCollator, compose_trainer, trainer_arguments
from omni_cli.stages.worker import start_server


def fit(
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
            f"run {run.folder}: none of the {steps} steps met a label that counts; take more of them, or {MORE_LABELS}"
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


def _describe(recipe: Any, built: BuiltModel) -> str:
    counts = f"{trainable_count(built.model):,} of {weight_count(built.model):,} weights learn"
    return f"{recipe.model}, {recipe.tune.mode}, {counts}"


def _span(done: int, steps: int) -> str:
    return f"going on at step {done} of {steps}" if done else f"{steps} steps"
