"""`omni merge`: an adapter folded into its base, published once its outputs are proven to be the same.

A model of logits is merged in its base's files, one tensor at a time, whatever its own run kept the base in: 16 bits or
4. It is the proof that takes memory: the adapted model, and then the merged one, each in float32, on a GPU that has the
room or else in 3.4 times the bytes of a base in 16 bits. Others are merged whole, in memory. Killed, a merge is begun
anew; nothing of it is ever taken for a model.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from omni_cli import files
from omni_cli.errors import OmniError, UsageError
from omni_cli.recipe import Mergeable, require
from omni_cli.recipe.by_file import FileMerge, MergeableByFile
from omni_cli.report import Console, Step
from omni_cli.stages import models, parity, runs
from omni_cli.stages.cards import README, Published, card_text, put_card
from omni_cli.stages.disk import check_room
from omni_cli.stages.divergence import Expected, divergences
from omni_cli.stages.memory import GIB, warn_of_more

MERGED = "merged"
_FORMAT = 2  # of a merged folder; 1, of omni 0.5, was not compared in nats and has no licence in its omni.json
_MIB = 1 << 20
_BESIDE_BYTES = 32 * _MIB  # of tokenizer and configurations


@dataclass(frozen=True)
class MergeRequest:
    """What a user asked of `omni merge`."""

    out: Path | None = None  # None: RUN/merged


def merge(recipe: Any, run: runs.Run, request: MergeRequest, console: Console) -> dict[str, Any]:
    """Merge a run's adapter into its base and publish the model once its outputs are proven.

    Raises:
        UsageError: the run has no adapter.
        DataError: the adapter does not match its base, or a merged weight is not finite.
        OmniError: the merged model answers otherwise, or the disk has no room for it.
    """
    mergeable: Mergeable = require(recipe, Mergeable)  # type: ignore[type-abstract]  # a protocol names the capability
    if mergeable.tune.mode == "full":
        raise UsageError(f"run {run.name} was tuned in full: nothing to merge, its weights are whole; use: omni export")
    folder, key = request.out or run.folder / MERGED, models.weights_key(run)
    made_of = {"run_weights": key, "format": _FORMAT}
    if done := models.made_from(folder, **made_of):
        console.say(f"{folder} is merged from these weights; nothing to do")
        with models.held(folder, "writing the card of"):  # measured since, perhaps
            put_card(folder, card_text(recipe, run, Published("merged", parity=done["parity"])))
        return {"model": str(folder), "run": str(run.folder), "parity": done["parity"]}
    models.check_base(mergeable, run)
    with models.publish_folder(folder, "merging into") as (made, facts):
        way = _merge_files if isinstance(mergeable, MergeableByFile) else _merge_whole
        found = way(made, mergeable, run, console)  # type: ignore[arg-type]  # as was just asked
        facts |= {**made_of, "parity": found.facts()}
        files.write_text(made / README, card_text(recipe, run, Published("merged", parity=found.facts())))
    console.say(f"merged model in {folder}: {parity.said(found)}")
    return {"model": str(folder), "run": str(run.folder), "parity": found.facts()}


def _merge_files(folder: Path, recipe: MergeableByFile, run: runs.Run, console: Console) -> parity.Parity:
    """Write the merged model into a folder that nobody sees yet, and compare it: one model in memory at a time."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        planned = recipe.merge_files(run.manifest.preprocess, run.final, Path(work))
        what = f"comparing the merged model with the adapted one, of {planned.total_bytes / GIB:.2f} GiB of weights,"
        warn_of_more(parity.peak_bytes(planned), what, console)
        check_room(folder, planned.total_bytes + _BESIDE_BYTES, what="a merged model needs", option="--out")
        digests = _write(folder, planned, console)
    console.say("probing the adapted model")
    compared = parity.as_compared(recipe, planned.types)
    expected = parity.expect(compared, run, planned.types, console)
    console.say("probing the merged model")
    found, logits = parity.compare(compared, folder, expected, run.manifest.preprocess)
    found = replace(found, changed_weights=planned.count_changed(folder, digests))
    parity.check_parity(found)
    models.write_model_card(folder, recipe, run, found.facts())
    if recipe.quantization != "none":
        console.say(_from_what_learned(recipe, run, expected, logits))
    return found


def _write(folder: Path, planned: FileMerge, console: Console) -> Any:
    with console.progress("merge", planned.total_bytes // _MIB, "MiB") as bar:
        return planned.write(folder, _in_mib(bar))


def _in_mib(bar: Step) -> Callable[[int], None]:
    """Return what tells a bar of whole MiB about bytes."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        bar.advance((done + count) // _MIB - done // _MIB)
        done += count

    return advance


def _from_what_learned(recipe: MergeableByFile, run: runs.Run, expected: Expected, merged: Sequence[Tensor]) -> str:
    """Return one line on how far the merged model is from the one that learned, whose base was quantised."""
    what = f"the model that learned ({recipe.quantization})"
    if importlib.util.find_spec("bitsandbytes") is None:
        return f"{what} was not compared: bitsandbytes is not installed"
    try:
        learned = parity.learned_logits(recipe, run, expected.rows)
    except OmniError as error:
        return f"{what} was not compared: {error}"
    return f"{what} is {fmean(divergences(learned, merged)):.1e} nats a token from the merged one"


def _merge_whole(folder: Path, recipe: Mergeable, run: runs.Run, console: Console) -> parity.Parity:
    """Write the merged model into a folder that nobody sees yet, and compare it on the way."""
    preprocess = run.manifest.preprocess
    adapted = recipe.load_to_merge(preprocess, run.final)
    console.say("probing the adapted model")
    expected = parity.probe(recipe, adapted, preprocess)
    with recipe.adapter_disabled(adapted):
        without = parity.probe(recipe, adapted, preprocess)
    tolerance, choices_needed = parity.TOLERANCE[next(adapted.model.parameters()).dtype]
    merged = recipe.merge(adapted)
    in_memory = parity.probe(recipe, merged, preprocess)
    recipe.save(merged, folder)
    read_back = recipe.of_whole_model(str(folder)).load(preprocess, folder)
    from_disk = parity.probe(recipe, read_back, preprocess)
    found = parity.Parity(
        adapter_moves=parity.difference(expected, without),
        merged=parity.difference(in_memory, expected),
        allowed=tolerance * max(1.0, float(expected.abs().max())),
        choices_agree=float((recipe.choices(in_memory) == recipe.choices(expected)).double().mean()),
        choices_needed=choices_needed,
        changed_weights=parity.count_changed(read_back.model, merged.model),
        reloaded=parity.difference(from_disk, in_memory),
    )
    parity.check_parity(found)
    models.write_model_card(folder, recipe, run, found.facts())
    return found
