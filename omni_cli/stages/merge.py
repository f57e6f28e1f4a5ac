"""`omni merge`: an adapter folded into its base, published once its outputs are proven to be the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omni_cli.errors import OmniError, UsageError
from omni_cli.recipe import BuiltModel, Mergeable, require
from omni_cli.report import Console, counted
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages import models, runs

MERGED = "merged"
# Largest difference of an output, as a share of the largest, and the share of positions whose first choice stays:
# merging rounds every weight to the model's type once, and near ties may then fall the other way.
_TOLERANCE = {torch.float32: (1e-4, 1.0), torch.float16: (1e-2, 0.9), torch.bfloat16: (5e-2, 0.9)}


@dataclass(frozen=True)
class MergeRequest:
    """What a user asked of `omni merge`."""

    out: Path | None = None  # None: RUN/merged


@dataclass(frozen=True)
class Parity:
    """What the probe showed: largest differences of an output."""

    adapter_moves: float  # adapted against base
    merged: float  # merged in memory against adapted
    allowed: float
    choices_agree: float  # share of the probed positions
    choices_needed: float
    changed_weights: int  # of those read back from disk, against those merged in memory, bit for bit
    reloaded: float  # outputs of those; rounding may differ with where in memory a weight lies


def merge(recipe: Any, run: runs.Run, request: MergeRequest, console: Console) -> dict[str, Any]:
    """Merge a run's adapter into a fresh base and publish the model once its outputs are proven.

    Raises:
        UsageError: the run has no adapter.
        DataError: the adapter does not match its base.
        OmniError: the merged model answers otherwise.
    """
    mergeable: Mergeable = require(recipe, Mergeable)  # type: ignore[type-abstract]  # a protocol names the capability
    if mergeable.tune.mode == "full":
        raise UsageError(f"run {run.name} was tuned in full: nothing to merge, its weights are whole; use: omni export")
    folder, key = request.out or run.folder / MERGED, models.weights_key(run)
    if done := models.made_from(folder, run_weights=key):
        console.say(f"{folder} is merged from these weights; nothing to do")
        return {"model": str(folder), "run": str(run.folder), "parity": done["parity"]}
    models.check_base(mergeable, run)
    with models.publish_folder(folder, "merging into") as (made, facts):
        parity = _merge_into(made, mergeable, run, console)
        facts |= {"run_weights": key, "parity": vars(parity)}
    console.say(f"merged model in {folder}: outputs differ by {parity.merged:.1e}, {parity.allowed:.1e} allowed")
    return {"model": str(folder), "run": str(run.folder), "parity": vars(parity)}


def _merge_into(folder: Path, recipe: Mergeable, run: runs.Run, console: Console) -> Parity:
    """Write the merged model into a folder that nobody sees yet, and compare it on the way."""
    preprocess = run.manifest.preprocess
    adapted = recipe.load_to_merge(preprocess, run.final)
    console.say("probing the adapted model")
    expected = probe(recipe, adapted, preprocess)
    with recipe.adapter_disabled(adapted):
        without = probe(recipe, adapted, preprocess)
    tolerance, choices_needed = _TOLERANCE[next(adapted.model.parameters()).dtype]
    merged = recipe.merge(adapted)
    in_memory = probe(recipe, merged, preprocess)
    recipe.save(merged, folder)
    models.write_model_card(folder, recipe, run)
    read_back = recipe.of_whole_model(str(folder)).load(preprocess, folder)
    from_disk = probe(recipe, read_back, preprocess)
    parity = Parity(
        adapter_moves=difference(expected, without),
        merged=difference(in_memory, expected),
        allowed=tolerance * max(1.0, float(expected.abs().max())),
        choices_agree=float((recipe.choices(in_memory) == recipe.choices(expected)).double().mean()),
        choices_needed=choices_needed,
        changed_weights=count_changed(read_back.model, merged.model),
        reloaded=difference(from_disk, in_memory),
    )
    check_parity(parity)
    return parity


@torch.no_grad()
def probe(recipe: Mergeable, built: BuiltModel, preprocess: Preprocess) -> Tensor:
    """Return in float32 the raw numbers that a model gives for seeded noise."""
    rows = recipe.probe_rows(built, preprocess)
    return recipe.outputs(built.model.eval(), recipe.collate(rows, preprocess), preprocess).float()


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of an output; infinite where one is not a number."""
    largest = (one - other).abs().max()
    return float(largest) if bool(torch.isfinite(largest)) else float("inf")


def count_changed(one: nn.Module, other: nn.Module) -> int:
    """Return how many tensors of two models differ in a bit, or are in one of them alone."""
    ones, others = one.state_dict(), other.state_dict()
    shared = ones.keys() & others.keys()
    return len(ones.keys() ^ others.keys()) + sum(not torch.equal(ones[name], others[name]) for name in shared)


def check_parity(parity: Parity) -> None:
    """Refuse a merge that changed what the model says.

    Raises:
        OmniError: one of the comparisons failed; nothing is published.
    """
    if not parity.adapter_moves > 0:
        raise OmniError("the adapter does not change a single output; nothing was learned, nothing is merged")
    if not parity.merged <= parity.allowed or not parity.merged < parity.adapter_moves:
        raise OmniError(
            f"merged outputs differ by {parity.merged:.1e} from the adapted model's; {parity.allowed:.1e} are allowed, "
            f"and less than the {parity.adapter_moves:.1e} by which the adapter moves them; nothing is published"
        )
    if parity.choices_agree < parity.choices_needed:
        raise OmniError(
            f"the merged model's first choice agrees at {parity.choices_agree:.1%} of the positions, "
            f"{parity.choices_needed:.0%} expected; nothing is published"
        )
    if parity.changed_weights or not parity.reloaded <= parity.allowed:
        raise OmniError(
            f"the written model differs from the merged one in {counted(parity.changed_weights, 'weight')}, "
            f"its outputs by {parity.reloaded:.1e}; check the disk, and merge again"
        )
