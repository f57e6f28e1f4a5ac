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
from omni_cli.stages.etl.sidecar import ensure_sidecar
from omni_cli.stages.fitting import own_shards
from omni_cli.stages.resident import give_back

# Largest difference of an output, as a share of the largest, and the share of positions whose first choice stays:
# merging rounds every weight to the model's type once, and near ties may then fall the other way.
TOLERANCE = {torch.float32: (1e-4, 1.0), torch.float16: (1e-2, 0.9), torch.bfloat16: (5e-2, 0.9)}
# Mean KL of the merged from the adapted model in nats a token, both in float32 arithmetic: (noise, most). In float32 it
# is the arithmetic's noise alone.
KL_LIMITS = {torch.float32: (1e-7, 1e-6), torch.float16: (3e-6, 1e-4), torch.bfloat16: (2e-4, 5e-3)}
# ... and between those no more than this share of how far the adapter moves its base. Right merges: 0.002 to 0.01; half
# the scale: 0.2, DoRA without its magnitudes: 0.2, one layer of two left out: 0.03 to 0.15 (measured, as above).
KL_SHARE = 0.02
# What the one rounding of a right merge costs depends on the model: in bfloat16 1e-5 with 2 layers, 2e-3 with 28 whose
# logits are spread as a trained model's (measured; in float16 1/64 of it, since an error of the weights enters
# squared). So it is measured, on the same rows: the adapter is merged in memory too, in float32, and those weights are
# rounded once. Unrounded, that is the adapted model but for the arithmetic's noise. Rounded, the files are held to it:
# they may be `KL_SHARE` of its cost away, and may always cost this many times what it costs, in nats, in the largest
# difference and in choices. Of files that hold more than one type, in memory all is rounded to the coarsest.
ROUNDINGS = 3
_KL_APART = {True: KL_SHARE, False: 4.0}  # of that cost, from memory to files, by whether the two are rounded alike
KL_WORST = 50  # times the mean that one token may differ by; 11 was measured
REAL_WINDOWS = 4
_ROOM = 1.3  # times its float32 weights that a model needs on a GPU
_ROOM_IN_MEMORY = 1.2  # ... and in memory, beside the files that they are read from (1.05 to 1.17 measured)


@dataclass(frozen=True)
class Divergence:
    """How far next-token probabilities are from the adapted model's: KL(adapted || other), nats a token."""

    adapter: float  # of the base, in the mean
    mean: float  # of the merged model, as is what follows
    largest: float  # of one token
    mean_allowed: float
    largest_allowed: float
    unrounded: float  # of the adapter merged in memory, in float32
    unrounded_allowed: float
    rounding: float  # ... once those weights are rounded
    apart: float  # KL(that || merged model)
    apart_allowed: float
    tokens: int
    windows: int  # of the run's shards; the rest is seeded noise


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


@dataclass(frozen=True)
class Expected:
    """What an adapted model says, row by row: the logits (labelled tokens, vocabulary) that the merged one is held to.

    Attributes:
        rows: noise first, then windows of the shards.
        logits: of the adapted model.
        rounded: of the same, its adapter merged in memory and rounded to `dtype`.
        adapter_moves: largest difference of a logit to the base.
        adapter_kl: mean KL of the base.
        unrounded_kl: mean KL of the adapter merged in memory, before it is rounded.
        dtype: the coarsest of the merged weights in the base's files.
        is_exact: whether they have no other, so that memory and files are rounded alike.
        windows: how many of the rows are real.
    """

    rows: Sequence[Row]
    logits: Sequence[Tensor]
    rounded: Sequence[Tensor]
    adapter_moves: float
    adapter_kl: float
    unrounded_kl: float
    dtype: torch.dtype
    is_exact: bool
    windows: int


@torch.no_grad()
def probe(recipe: Mergeable, built: BuiltModel, preprocess: Preprocess) -> Tensor:
    """Return in float32 the raw numbers that a model gives for seeded noise."""
    rows = recipe.probe_rows(built, preprocess)
    return recipe.outputs(built.model.eval(), recipe.collate(rows, preprocess), preprocess).float()


def peak_bytes(planned: FileMerge) -> float:
    """Return the memory that the comparison takes at its peak: one model at a time, in float32 where no GPU has room.

    Of a base in 16 bits that is 3.4 times its files: once are the files themselves, as they are mapped.
    """
    weights = planned.total_bytes // min(dtype.itemsize for dtype in planned.types)
    return planned.total_bytes + (0 if _fits_gpu(weights) else 4 * _ROOM_IN_MEMORY * weights)


def as_compared(recipe: MergeableByFile, types: frozenset[torch.dtype]) -> MergeableByFile:
    """Return the recipe, in float32 where it would round weights that its base's files hold in a finer type.

    Else the base and the merged weights would each be rounded as they are read, which is no part of the merge.
    """
    is_rounding = min(torch.finfo(dtype).eps for dtype in types) < torch.finfo(DTYPES[recipe.precision]).eps
    return recipe.model_copy(update={"precision": "float32"}) if is_rounding else recipe


def expect(recipe: MergeableByFile, run: runs.Run, types: frozenset[torch.dtype], console: Console) -> Expected:
    """Load the adapter over its unquantised base, and return what that says; the model is gone afterwards.

    Args:
        recipe: of the run.
        run: whose adapter is merged.
        types: of the weights in the base's files that the adapter changes.
        console: told where there are no windows to compare on.
    """
    expected = _expected(recipe, run, types, console)
    give_back()
    return expected


def _expected(recipe: MergeableByFile, run: runs.Run, types: frozenset[torch.dtype], console: Console) -> Expected:
    preprocess = run.manifest.preprocess
    loaded = recipe.load_to_merge(preprocess, run.final)
    dtype = max(types, key=lambda each: torch.finfo(each).eps)
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
    for weight in changed:
        weight.data.copy_(weight.data.to(dtype))
    return Expected(
        rows=rows,
        logits=logits,
        rounded=unrounded if dtype == torch.float32 else _logits(recipe, merged, rows, preprocess),
        adapter_moves=moves,
        adapter_kl=fmean(divergences(logits, without)),
        unrounded_kl=fmean(divergences(logits, unrounded)),
        dtype=dtype,
        is_exact=types == {dtype},
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
        kl=_divergence(expected, found),
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


def _divergence(expected: Expected, found: Sequence[Tensor]) -> Divergence:
    each, rounding = divergences(expected.logits, found), fmean(divergences(expected.logits, expected.rounded))
    by_share, unrounded_allowed = (
        min(most, max(noise, KL_SHARE * expected.adapter_kl))
        for noise, most in (KL_LIMITS[expected.dtype], KL_LIMITS[torch.float32])
    )
    allowed = max(by_share, ROUNDINGS * rounding)
    return Divergence(
        adapter=expected.adapter_kl,
        mean=fmean(each),
        largest=max(each),
        mean_allowed=allowed,
        largest_allowed=KL_WORST * allowed,
        unrounded=expected.unrounded_kl,
        unrounded_allowed=unrounded_allowed,
        rounding=rounding,
        apart=fmean(divergences(expected.rounded, found)),
        apart_allowed=max(KL_LIMITS[torch.float32][0], _KL_APART[expected.is_exact] * rounding),
        tokens=len(each),
        windows=expected.windows,
    )


def divergences(logits: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
    """Return KL(softmax(logits) || softmax(others)) of every token in nats.

    In float64: in float32 that of a right merge drowns in the sum over a vocabulary.

    Args:
        logits: (tokens, vocabulary) of each window.
        others: of the same shapes.
    """
    result = []
    for one, other in zip(logits, others, strict=True):
        log_p, log_q = one.double().log_softmax(-1), other.double().log_softmax(-1)
        result += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
    return result


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
    if parity.kl is not None:
        check_divergence(parity.kl)
    if parity.changed_weights or not (parity.reloaded or 0.0) <= parity.allowed:
        by = "" if parity.reloaded is None else f", its outputs by {parity.reloaded:.1e}"
        raise OmniError(
            f"the written model differs from the merged one in {counted(parity.changed_weights, 'weight')}{by}; "
            "check the disk, and merge again"
        )


def check_divergence(kl: Divergence) -> None:
    """Refuse a merged model whose probabilities are not the adapted one's.

    Raises:
        OmniError: they are not.
    """
    if not kl.unrounded <= kl.unrounded_allowed:
        raise OmniError(
            f"merged in memory, in float32, the adapter is {kl.unrounded:.1e} nats a token from the adapted model, "
            f"{kl.unrounded_allowed:.1e} are allowed: PEFT merges another function than it trained; nothing is "
            "published"
        )
    if not kl.mean <= kl.mean_allowed or not kl.largest <= kl.largest_allowed:
        raise OmniError(
            f"the merged model's probabilities are {kl.mean:.1e} nats a token from the adapted one's ({kl.largest:.1e} "
            f"at worst), {kl.mean_allowed:.1e} ({kl.largest_allowed:.1e}) are allowed where the adapter moves them by "
            f"{kl.adapter:.1e} and rounding alone by {kl.rounding:.1e}; nothing is published"
        )
    if not kl.apart <= kl.apart_allowed:
        raise OmniError(
            f"the merged files are {kl.apart:.1e} nats a token from the adapter merged in memory and rounded alike, "
            f"{kl.apart_allowed:.1e} are allowed: they are not that merge; nothing is published"
        )


def said(parity: Parity) -> str:
    """Return a comparison in one line."""
    line = f"outputs differ by {parity.merged:.1e}, {parity.allowed:.1e} allowed"
    if (kl := parity.kl) is None:
        return line
    where = f"{counted(kl.windows, 'window')} and noise" if kl.windows else "noise alone"
    return (
        f"{line}; KL {kl.mean:.1e} nats a token, {kl.mean_allowed:.1e} allowed (worst {kl.largest:.1e}; rounding alone "
        f"costs {kl.rounding:.1e}, the adapter moves its base by {kl.adapter:.1e}), {kl.apart:.1e} from the merge in "
        f"memory, {kl.apart_allowed:.1e} allowed, over {counted(kl.tokens, 'token')} of {where}"
    )


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
