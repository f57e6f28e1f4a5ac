"""The training itself: the Trainer runs to its end from the newest checkpoint that verifies."""

import gc
import signal
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed

from omni_cli import files
from omni_cli.errors import DataError, OmniError, Preempted
from omni_cli.models import compiled
from omni_cli.models.adapters import trainable_count, types_kept, weight_count
from omni_cli.recipe import BuiltModel, SelfTested, TrainSettings
from omni_cli.report import Console, counted
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages import checkpoints, models, runs
from omni_cli.stages.loading import in_words_of_workers
from omni_cli.stages.train.callbacks import GradientCheck, Journal, Keeper, StopOnSignal, StopWhenSaved
from omni_cli.stages.train.dropping import Droppable
from omni_cli.stages.train.guards import BadStep, Guard
from omni_cli.stages.train.pace import Pace, Paced
from omni_cli.stages.train.plan import planned_steps
from omni_cli.stages.train.ranks import ALONE, Ranks, check_norms, seed_apart, share_of
from omni_cli.stages.train.reporters import reporting
from omni_cli.stages.train.roll_back import roll_back
from omni_cli.stages.train.sharding import check_sharding
from omni_cli.stages.train.shards import MORE_LABELS
from omni_cli.stages.train.shortage import Shortage, moment
from omni_cli.stages.train.telemetry import recorder_of
from omni_cli.stages.train.trainer import RowCollator, compose_trainer, trainer_arguments
from omni_cli.stages.train.validation import Best, KeepBest, best_folder, is_best_whole, make_validation
from omni_cli.stages.worker import start_server


@dataclass(frozen=True)
class Fitted:
    """What a training led to."""

    built: BuiltModel  # with the last weights
    best: Best | None
    facts: dict[str, Any]


def fit(
    run: runs.Run,
    recipe: Any,
    dataset: WindowDataset,
    preprocess: Preprocess,
    console: Console,
    *,
    report_to: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> Fitted:
    """Run the Trainer to its end, from the newest checkpoint of this run that verifies.

    After a bad step it begins again from the last good one as if killed and run again, in the same process.

    Raises:
        OmniError: memory ran out; a step is bad, and going back does not help or is not wanted; or the best weights are
            asked for, and are lost, or windows to find them with cannot be read. Its checkpoints stay.
    """
    while True:
        try:
            return _attempt(run, recipe, dataset, preprocess, console, report_to=report_to, ranks=ranks)
        except BadStep as bad:
            found = bad.found
        _free_memory()  # of the model whose frames the exception held
        ranks.decide(partial(roll_back, run, recipe.train, dataset, found, console))


def _attempt(
    run: runs.Run,
    recipe: Any,
    dataset: WindowDataset,
    preprocess: Preprocess,
    console: Console,
    *,
    report_to: Sequence[str],
    ranks: Ranks,
) -> Fitted:
    """Run the Trainer to its end.

    Raises:
        BadStep: a step must not move a weight.
        OmniError: nobody hears what is to be reported; as `reporting` does.
    """
    steps = planned_steps(recipe.train, len(dataset))
    start = ranks.decide(partial(_begin, run, recipe.train, console))
    names = report_to if ranks.is_first and start.step < steps else ()
    with ExitStack() as held:
        with ranks.alike():
            others = held.enter_context(reporting(names, run, start.step, console))
        return _learn(run, recipe, dataset, preprocess, console, start=start, others=others, ranks=ranks)


def _learn(
    run: runs.Run,
    recipe: Any,
    dataset: WindowDataset,
    preprocess: Preprocess,
    console: Console,
    *,
    start: checkpoints.Start,
    others: Sequence[TrainerCallback],
    ranks: Ranks,
) -> Fitted:
    """Run the Trainer from where training goes on to its end.

    Raises:
        BadStep: a step must not move a weight.
        OmniError: memory ran out.
    """
    saved, steps = run.folder / runs.CHECKPOINTS, planned_steps(recipe.train, len(dataset))
    shortage = Shortage(run, recipe, ranks)
    guard = Guard(recipe.train, start.facts, ranks)
    gradients = GradientCheck(start.facts, guard, ranks)
    with ranks.alike(), shortage.told(lambda: "as the model was built"):
        validation = make_validation(recipe, dataset, start.facts, console, ranks)
        set_seed(recipe.train.seed)
        built = recipe.build(preprocess, start.checkpoint)
        check_norms(recipe, built.model, ranks)
    learns_from = counted(len(dataset), "window")
    console.say(f"run {run.folder}: {_describe(recipe, built)} from {learns_from}, {_span(start.step, steps)}")
    for note in (*built.notes, *_shared(recipe.train, ranks)):
        console.say(note)
    with shortage.told(lambda: "as the model was put on its device"):
        trainer = make_trainer(saved, recipe, built, dataset, steps, Droppable, Paced, ranks=ranks)
    trainer.guard, trainer.validation, trainer.pace, trainer.args.run_name = guard, validation, Pace(ranks), run.name
    if start.checkpoint and start.step == steps:  # killed before the weights were published
        # `train` would take one step more; this is what it does first, so that the same bytes are published.
        trainer._load_from_checkpoint(str(start.checkpoint))
    else:
        with ranks.alike(), shortage.told(lambda: "in the first try-out"):
            _try_out(recipe, built, dataset, console)
        keepers: list[Keeper] = [gradients, guard, *([validation] if validation else [])]
        best = [KeepBest(run, recipe, built, validation, ranks)] if validation else []
        with ranks.noticing_loss(), shortage.told(lambda: moment(trainer)):
            _take_steps(trainer, run, start, [gradients, *best], keepers, console=console, others=others)
        with ranks.alike():
            if validation:
                validation.check_fault(trainer.state.global_step)
            _check_labels(run, gradients, steps)
    loss = ranks.decide(partial(checkpoints.last_loss, run.folder, steps))
    facts = {"steps": steps, "loss": loss, "gradients_checked_at_step": gradients.passed_at}
    return Fitted(built, validation.best if validation else None, facts)


def _try_out(recipe: Any, built: BuiltModel, dataset: WindowDataset, console: Console) -> None:
    if isinstance(recipe, SelfTested) and (found := recipe.self_test(built, dataset)):
        console.say(found)


def _begin(run: runs.Run, settings: TrainSettings, console: Console) -> checkpoints.Start:
    """Return where training goes on, with a history that ends there."""
    start = _find_start(run, settings, console)
    checkpoints.truncate_history(run.folder, start.step)
    return start


def _find_start(run: runs.Run, settings: TrainSettings, console: Console) -> checkpoints.Start:
    """Return where training goes on: from the newest checkpoint whose best weights are there, if those are asked for.

    Raises:
        OmniError: they are asked for, and no checkpoint has them.
    """
    start = checkpoints.find_start(run.folder / runs.CHECKPOINTS, run.manifest.key())
    if is_best_whole(run, start.facts):
        return start
    folder = best_folder(run.folder, start.facts["best"]["step"])
    said = f"{folder} {'does not match its receipt' if folder.is_dir() else 'is gone'}"
    if settings.publish == "last":
        console.warn(f"{said}; the best step is sought from here on")
        return replace(start, facts={**start.facts, "best": None})
    earlier = _with_whole_best(run, start.step)
    if earlier is None:
        raise OmniError(f"{said}: the best weights, and train.publish = best; {_how_to_get_back(start)}")
    console.warn(f"{said}; going back to the checkpoint of step {earlier.step}, to find the best weights again")
    checkpoints.discard_from(run.folder / runs.CHECKPOINTS, earlier.step + 1)
    return earlier


def _with_whole_best(run: runs.Run, before: int) -> checkpoints.Start | None:
    """Return the newest checkpoint before a step whose best weights are there; all checkpoints verify."""
    saved = run.folder / runs.CHECKPOINTS
    for step in reversed(checkpoints.steps_saved(saved)):
        folder = saved / f"{checkpoints.PREFIX}{step}"
        facts = files.read_receipt(folder) or {}
        if step < before and is_best_whole(run, facts):
            return checkpoints.Start(step, folder, facts)
    return None


def _how_to_get_back(start: checkpoints.Start) -> str:
    """Say what to do about best weights that are lost; what a run's weights are does not depend on its name."""
    return (
        f"the checkpoint of step {start.step} is good and stays: put a copy of them back, or make them again (the same "
        f"command with --run NAME, until step {start.facts['best']['step']} is saved; copy best/ of that run to this "
        "one), then run the same command again; or start anew with --fresh"
    )


def _free_memory() -> None:
    gc.collect()  # a Trainer and its callbacks know each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _take_steps(
    trainer: Any,
    run: runs.Run,
    start: checkpoints.Start,
    watchers: Sequence[TrainerCallback],
    keepers: Sequence[Keeper],
    *,
    console: Console,
    others: Sequence[TrainerCallback],
) -> None:
    """Train to the last step, or until a signal comes.

    Raises:
        BadStep: a step must not move a weight.
        CompilerFailed: a layer could not be compiled.
    """
    steps, found = trainer.args.max_steps, None
    if trainer.args.dataloader_num_workers:
        start_server()
    ranks = trainer.ranks
    if (gpus := torch.cuda.device_count()) > 1 and ranks.count == 1:
        console.say(
            f"training on one of {gpus} GPUs; CUDA_VISIBLE_DEVICES chooses which; on all of them: "
            f"torchrun --nproc-per-node {gpus} -m -- omni_cli train, with the same options"
        )
    if ranks.count > 1:
        seed_apart(ranks, trainer.args.seed, 0)
    recorder = recorder_of(run, trainer.args.device, trainer.model, console, ranks)
    recording = recorder.running() if ranks.is_first else nullcontext()
    with console.progress("train", steps - start.step, "steps") as bar, recording:
        stop = StopOnSignal(console, start.step, trainer.drop, ranks)
        try:
            journal = Journal(run, keepers, bar, recorder, trainer.pace, guard=trainer.guard, ranks=ranks)
            for callback in (*watchers, stop, journal, *others, StopWhenSaved(stop)):
                trainer.add_callback(callback)
            with in_words_of_workers(), compiled.in_words():
                trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
            heard = stop.agree()
        except BadStep as bad:
            heard = stop.agree()
            if not heard:
                raise
            found = f"a bad step ({bad.found.said})"
        except compiled.CompilerFailed:  # of many ranks one alone may fail, which none of the others would know
            heard = 0 if ranks.count > 1 else stop.agree()
            if not heard:
                raise
            found = "a step that was being compiled"
        finally:
            stop.restore()
    if heard == signal.SIGINT:
        ranks.fail(KeyboardInterrupt())
    if found:  # whoever sent the signal does not wait for a step to be taken again
        ranks.fail(Preempted(f"stopped at {found}, unsaved; run the same command again"))
    if heard and trainer.state.global_step < steps:
        at = trainer.state.global_step
        what = f"stopped at step {at} of {steps}, saved" if at else "stopped before the first step had ended"
        ranks.fail(Preempted(f"{what}; run the same command again"))


def _check_labels(run: runs.Run, gradients: GradientCheck, steps: int) -> None:
    if not gradients.had_label:
        raise DataError(
            f"run {run.folder}: none of the {steps} steps met a label that counts; take more of them, or {MORE_LABELS}"
        )


def make_trainer(
    folder: Path, recipe: Any, built: BuiltModel, dataset: WindowDataset, steps: int, *mixins: type,
    ranks: Ranks = ALONE,
) -> Any:  # fmt: skip
    """Return the recipe's Trainer with our loss, ready to run.

    Args:
        folder: of its checkpoints.
        recipe: a `TrainableRecipe`.
        built: what learns.
        dataset: the windows to learn from.
        steps: of the optimiser.
        mixins: classes whose methods come before ours.
        ranks: of the training.
    """
    rows = len(dataset) + (ranks.count > 1)  # one past the last stands for a batch to be spared
    check_sharding(recipe, ranks.count)
    models.ready_device()  # the Trainer's choice too
    with types_kept(built.model):
        trainer = compose_trainer(recipe.trainer().trainer, *mixins)(
            model=built.model,
            args=trainer_arguments(folder, recipe, steps, ranks),
            train_dataset=Dataset.from_dict({"index": list(range(rows))}),
            data_collator=RowCollator(dataset, recipe),
            processing_class=built.tokenizer,
        )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which holds nothing but `--json`
    trainer.recipe, trainer.preprocess, trainer.own_rates = recipe, dataset.preprocess, built.own_rates
    trainer.guard, trainer.validation, trainer.ranks = Guard(recipe.train, {}), None, ranks
    # Qwen2.5-VL declares False; our loss divides by the count of the whole step, which the Trainer gives only so.
    trainer.model_accepts_loss_kwargs = True
    return trainer


def _shared(settings: TrainSettings, ranks: Ranks) -> list[str]:
    """Say how processes share a step, where there are several."""
    if ranks.count == 1:
        return []
    share = share_of(settings, ranks.count)
    each = f"{share.accumulation} x {counted(share.batch_size, 'window')}"
    whole = counted(settings.batch_size * settings.accumulation, "window")
    return [f"{ranks.count} processes take {each} each in a step, of {whole} as with one process"]


def _describe(recipe: Any, built: BuiltModel) -> str:
    counts = f"{trainable_count(built.model):,} of {weight_count(built.model):,} weights learn"
    return f"{recipe.model}, {recipe.tune.mode}, {counts}"


def _span(done: int, steps: int) -> str:
    return f"going on at step {done} of {steps}" if done else f"{steps} steps"
