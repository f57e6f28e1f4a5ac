"""Is a merged model still the adapted one? What both say to the same windows, and when that is refused."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from omni_cli.errors import OmniError
from omni_cli.models.losses import IGNORED
from omni_cli.models.qwen_vl import DTYPES
from omni_cli.models.shard_merge import merged_weights
from omni_cli.recipe import BuiltModel, Mergeable, Row
from omni_cli.recipe.by_file import FileMerge, MergeableByFile
from omni_cli.report import Console, counted
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages import models, runs
from omni_cli.stages.divergence import ROUNDINGS, Divergence, Expected, check_divergence, divergences, measured
from omni_cli.stages.etl.sidecar import ensure_sidecar
from omni_cli.stages.fitting import own_shards
from omni_cli.stages.resident import give_back

# Largest difference of an output, as a share of the largest, and the share of positions whose first choice stays:
# merging rounds every weight to the model's type once, and near ties may then fall the other way.
TOLERANCE = {torch.float32: (1e-4, 1.0), torch.float16: (1e-2, 0.9), torch.bfloat16: (5e-2, 0.9)}
REAL_WINDOWS = 4
_ROOM = 1.3  # times its float32 weights that a model needs on a GPU
_ROOM_IN_MEMORY = 1.2  # ... and in memory, beside the files that they are read from (1.05 to 1.17 measured)


@dataclass(frozen=True)
class Parity:
    """What the probe showed: largest differences of an output."""

    adapter_moves: float  # adapted against base
    merged: float  # merged against adapted
    allowed: float
    choices_agree: float  # share of the probed positions
    choices_needed: float
    changed_weights: int  # of those read back from disk, against those merged in memory, bit for bit
    reloaded: float | None = None  # outputs of those, where a whole model was merged in memory
    kl: Divergence | None = None  # where the outputs are logits

    def facts(self) -> dict[str, Any]:
        """Return all numbers by name."""
        flat = {key: value for key, value in vars(self).items() if key != "kl" and value is not None}
        return flat | {f"kl_{key}": value for key, value in vars(self.kl).items()} if self.kl else flat


@torch.no_grad()
def probe(recipe: Mergeable, built: BuiltModel, preprocess: Preprocess) -> Tensor:
    """Return in float32 the raw numbers that a model gives for seeded noise."""
    rows = recipe.probe_rows(built, preprocess)
    return recipe.outputs(built.model.eval(), recipe.collate(rows, preprocess), preprocess).float()


def peak_bytes(planned: FileMerge) -> float:
    """Return the memory that the comparison takes at its peak: one model at a time, in float32 where no GPU has room.

    Of a base in 16 bits that is 3.4 times its files: once are the files themselves, as they are mapped.
    """
    weights = planned.total_bytes // min(dtype.itemsize for dtype in planned.types.values())
    return planned.total_bytes + (0 if _fits_gpu(weights) else 4 * _ROOM_IN_MEMORY * weights)


def as_compared(recipe: MergeableByFile, types: Mapping[str, torch.dtype]) -> MergeableByFile:
    """Return the recipe, in float32 where it would read weights in another type than its base's files hold them in.

    Else the base and the merged weights would each be rounded as they are read, which is no part of the merge.
    """
    is_as_held = set(types.values()) == {DTYPES[recipe.precision]}
    return recipe if is_as_held else recipe.model_copy(update={"precision": "float32"})


def expect(recipe: MergeableByFile, run: runs.Run, types: Mapping[str, torch.dtype], console: Console) -> Expected:
    """Load the adapter over its unquantised base, and return what that says; the model is gone afterwards.

    Args:
        recipe: of the run.
        run: whose adapter is merged.
        types: of the weights in the base's files that the adapter changes, by the model's names.
        console: told where there are no windows to compare on.
    """
    expected = _expected(recipe, run, types, console)
    give_back()
    return expected


def _expected(recipe: MergeableByFile, run: runs.Run, types: Mapping[str, torch.dtype], console: Console) -> Expected:
    preprocess = run.manifest.preprocess
    loaded = recipe.load_to_merge(preprocess, run.final)
    dtype = max((torch.float32, *types.values()), key=lambda each: torch.finfo(each).eps)  # what float64 is read in
    real = _real_rows(recipe, run, console)
    rows = [*recipe.probe_rows(loaded, preprocess), *real]
    built = _to_compare(recipe, loaded)
    logits = _logits(recipe, built, rows, preprocess)
    with recipe.adapter_disabled(built):
        without = _logits(recipe, built, rows, preprocess)
    moves, _ = _apart(recipe, logits, without)
    changed = merged_weights(built.model)
    merged = recipe.merge(built)
    unrounded = _logits(recipe, merged, rows, preprocess)
    for name, weight in changed.items():
        weight.data.copy_(weight.data.to(types[name]))
    return Expected(
        rows=rows,
        logits=logits,
        rounded=unrounded if dtype == torch.float32 else _logits(recipe, merged, rows, preprocess),
        adapter_moves=moves,
        adapter_kl=fmean(divergences(logits, without)),
        unrounded_kl=fmean(divergences(logits, unrounded)),
        dtype=dtype,
        windows=len(real),
    )


def compare(
    recipe: MergeableByFile, folder: Path, expected: Expected, preprocess: Preprocess
) -> tuple[Parity, list[Tensor]]:
    """Load a merged model from its folder and compare it; return its logits too.

    Args:
        recipe: of the run.
        folder: of the merged model.
        expected: of the adapted one.
        preprocess: of the run.
    """
    built = _to_compare(recipe, recipe.of_whole_model(str(folder)).load(preprocess, folder))
    found = _logits(recipe, built, expected.rows, preprocess)
    tolerance, choices_needed = TOLERANCE[expected.dtype]
    largest = max(float(one.abs().max()) for one in expected.logits)
    rounding, changed_by_rounding = _apart(recipe, expected.logits, expected.rounded)
    merged, changed = _apart(recipe, expected.logits, found)
    parity = Parity(
        adapter_moves=expected.adapter_moves,
        merged=merged,
        allowed=max(tolerance * max(1.0, largest), ROUNDINGS * rounding),
        choices_agree=1 - changed,
        choices_needed=min(choices_needed, 1 - ROUNDINGS * changed_by_rounding),
        changed_weights=0,
        kl=measured(expected, found),
    )
    return parity, found


def learned_logits(recipe: MergeableByFile, run: runs.Run, rows: Sequence[Row]) -> list[Tensor]:
    """Return what the model says that really learned: the adapter over a base that is quantised, in its own types."""
    give_back()
    return _logits(recipe, recipe.load(run.manifest.preprocess, run.final), rows, run.manifest.preprocess)


def _apart(recipe: MergeableByFile, ones: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[float, float]:
    """Return the largest difference of a logit, and the share of positions whose first choice is another."""
    pairs = list(zip(ones, others, strict=True))
    differ = torch.cat([recipe.choices(one) != recipe.choices(other) for one, other in pairs])
    return max(difference(one, other) for one, other in pairs), float(differ.double().mean())


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
    if not parity.merged <= parity.allowed:
        raise OmniError(
            f"merged outputs differ by {parity.merged:.1e} from the adapted model's; {parity.allowed:.1e} are allowed; "
            "nothing is published"
        )
    if parity.kl is None and not parity.merged < parity.adapter_moves:
        raise OmniError(
            f"merged outputs differ by {parity.merged:.1e} from the adapted model's, and the adapter moves them by "
            f"{parity.adapter_moves:.1e}: to round the merged weights costs as much as was learned; keep the adapter "
            "as it is, or train longer; nothing is published"
        )
    if parity.choices_agree < parity.choices_needed:
        raise OmniError(
            f"the merged model's first choice agrees at {parity.choices_agree:.1%} of the positions, "
            f"{parity.choices_needed:.0%} expected; nothing is published"
        )
    if parity.kl is not None:
        check_divergence(parity.kl)
    if parity.changed_weights or not (parity.reloaded or 0.0) <= parity.allowed:
        by = "" if parity.reloaded is None else f", its outputs by {parity.reloaded:.1e}"
        raise OmniError(
            f"the written model differs from the merged one in {counted(parity.changed_weights, 'weight')}{by}; "
            "check the disk, and merge again"
        )


def said(parity: Parity) -> str:
    """Return a comparison in one line: what was measured, each with its limit."""
    line = (
        f"outputs differ by {parity.merged:.1e}, {parity.allowed:.1e} allowed; first choices agree at "
        f"{parity.choices_agree:.1%}, {parity.choices_needed:.1%} needed"
    )
    return line if parity.kl is None else f"{line}; {parity.kl.said()}"


def _real_rows(recipe: MergeableByFile, run: runs.Run, console: Console) -> list[Row]:
    """Return windows of the run's own shards, evenly apart; none where those are gone."""
    shards = own_shards(run, are_needed=False)
    if shards is None:
        console.say("comparing on seeded noise alone: the shards that the run learned from are gone or were made anew")
        return []
    key = ensure_sidecar(shards, recipe, console)
    split = "val" if len(WindowDataset(shards, "val")) else "train"
    dataset = WindowDataset(shards, split, key)
    step = max(1, math.ceil(len(dataset) / REAL_WINDOWS))
    rows = [dataset[index] for index in range(0, len(dataset), step)]
    return [row for row in rows if bool((row["labels"] != IGNORED).any())]


def _to_compare(recipe: MergeableByFile, built: BuiltModel) -> BuiltModel:
    """Return a model that computes in float32, on a GPU that has the room: its weights stay what they are.

    In 16 bits the arithmetic differs more between two right models than the weights do: ten times in nats (measured).
    """
    fits = _fits_gpu(sum(weight.numel() for weight in built.model.parameters()))
    return recipe.place(built, models.ready_device(None if fits else "cpu"), "float32")


def _fits_gpu(weights: int) -> bool:
    return models.best_device() == "cuda" and torch.cuda.mem_get_info()[0] > 4 * _ROOM * weights


@torch.no_grad()
def _logits(recipe: Mergeable, built: BuiltModel, rows: Sequence[Row], preprocess: Preprocess) -> list[Tensor]:
    """Return (labelled tokens, vocabulary) of every row, one at a time, in float32."""
    model = built.model.eval()
    device = next(model.parameters()).device
    return [
        recipe.outputs(model, _moved(recipe.collate([row], preprocess), device), preprocess)
        .flatten(0, -2)
        .float()
        .cpu()
        for row in rows
    ]


def _moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
