"""Is a merged model still the adapted one? What both say to the same windows, and when that is refused."""

import gc
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
from omni_cli.recipe import BuiltModel, Mergeable, Row
from omni_cli.recipe.by_file import MergeableByFile
from omni_cli.report import Console, counted
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages import models, runs
from omni_cli.stages.etl.sidecar import ensure_sidecar
from omni_cli.stages.fitting import own_shards

# Largest difference of an output, as a share of the largest, and the share of positions whose first choice stays:
# merging rounds every weight to the model's type once, and near ties may then fall the other way.
TOLERANCE = {torch.float32: (1e-4, 1.0), torch.float16: (1e-2, 0.9), torch.bfloat16: (5e-2, 0.9)}
# Mean KL of the merged from the adapted model in nats a token, both in float32 arithmetic: (noise, most). What the one
# rounding of right merges costs was measured on random models, adapters that move them by 0.001 to 1 nat: in bfloat16
# 1e-5 with 2 layers, 2e-4 with 28, and 2e-3 with 28 whose logits are spread as a trained model's; in float16 1/64 of
# that, since an error of the weights enters squared. In float32 it is the arithmetic's noise alone.
KL_LIMITS = {torch.float32: (1e-7, 1e-6), torch.float16: (3e-6, 1e-4), torch.bfloat16: (2e-4, 5e-3)}
# ... and between those no more than this share of how far the adapter moves its base. Right merges: 0.002 to 0.01; half
# the scale: 0.2, DoRA without its magnitudes: 0.2, one layer of two left out: 0.03 to 0.15 (measured, as above).
KL_SHARE = 0.02
KL_WORST = 50  # times the mean that one token may differ by; 11 was measured
REAL_WINDOWS = 4
_ROOM = 1.3  # times its float32 weights that a model needs on a GPU


@dataclass(frozen=True)
class Divergence:
    """How far next-token probabilities are from the adapted model's: KL(adapted || other), nats a token."""

    adapter: float  # of the base, in the mean
    mean: float  # of the merged model, as is what follows
    largest: float  # of one token
    mean_allowed: float
    largest_allowed: float
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
        adapter_moves: largest difference of a logit to the base.
        adapter_kl: mean KL of the base.
        dtype: that the recipe keeps weights in.
        windows: how many of the rows are real.
    """

    rows: Sequence[Row]
    logits: Sequence[Tensor]
    adapter_moves: float
    adapter_kl: float
    dtype: torch.dtype
    windows: int


@torch.no_grad()
def probe(recipe: Mergeable, built: BuiltModel, preprocess: Preprocess) -> Tensor:
    """Return in float32 the raw numbers that a model gives for seeded noise."""
    rows = recipe.probe_rows(built, preprocess)
    return recipe.outputs(built.model.eval(), recipe.collate(rows, preprocess), preprocess).float()


def expect(recipe: MergeableByFile, run: runs.Run, console: Console) -> Expected:
    """Load the adapter over its unquantised base, and return what that says; the model is gone afterwards."""
    preprocess = run.manifest.preprocess
    loaded = recipe.load_to_merge(preprocess, run.final)
    dtype = next(loaded.model.parameters()).dtype
    real = _real_rows(recipe, run, console)
    rows = [*recipe.probe_rows(loaded, preprocess), *real]
    built = _to_compare(recipe, loaded)
    logits = _logits(recipe, built, rows, preprocess)
    with recipe.adapter_disabled(built):
        without = _logits(recipe, built, rows, preprocess)
    moves = max(difference(one, other) for one, other in zip(logits, without, strict=True))
    return Expected(rows, logits, moves, fmean(divergences(logits, without)), dtype, len(real))


def compare(
    recipe: MergeableByFile, folder: Path, expected: Expected, preprocess: Preprocess, *, rounded: torch.dtype
) -> tuple[Parity, list[Tensor]]:
    """Load a merged model from its folder and compare it; return its logits too.

    Args:
        recipe: of the run.
        folder: of the merged model.
        expected: of the adapted one.
        preprocess: of the run.
        rounded: the coarsest type of the weights that were merged.
    """
    gc.collect()  # PEFT's layers hold each other: the adapted model goes before this one comes
    built = _to_compare(recipe, recipe.of_whole_model(str(folder)).load(preprocess, folder))
    found = _logits(recipe, built, expected.rows, preprocess)
    coarsest = max(rounded, expected.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    tolerance, choices_needed = TOLERANCE[coarsest]
    pairs = list(zip(expected.logits, found, strict=True))
    largest = max(float(one.abs().max()) for one in expected.logits)
    agree = [recipe.choices(one) == recipe.choices(other) for one, other in pairs]
    parity = Parity(
        adapter_moves=expected.adapter_moves,
        merged=max(difference(one, other) for one, other in pairs),
        allowed=tolerance * max(1.0, largest),
        choices_agree=float(torch.cat(agree).double().mean()),
        choices_needed=choices_needed,
        changed_weights=0,
        kl=_divergence(expected, found, coarsest),
    )
    return parity, found


def learned_logits(recipe: MergeableByFile, run: runs.Run, rows: Sequence[Row]) -> list[Tensor]:
    """Return what the model says that really learned: the adapter over a base that is quantised, in its own types."""
    gc.collect()
    return _logits(recipe, recipe.load(run.manifest.preprocess, run.final), rows, run.manifest.preprocess)


def _divergence(expected: Expected, found: Sequence[Tensor], dtype: torch.dtype) -> Divergence:
    each = divergences(expected.logits, found)
    noise, most = KL_LIMITS[dtype]
    allowed = min(most, max(noise, KL_SHARE * expected.adapter_kl))
    return Divergence(
        adapter=expected.adapter_kl,
        mean=fmean(each),
        largest=max(each),
        mean_allowed=allowed,
        largest_allowed=KL_WORST * allowed,
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
    if not kl.mean <= kl.mean_allowed or not kl.largest <= kl.largest_allowed:
        raise OmniError(
            f"the merged model's probabilities are {kl.mean:.1e} nats a token from the adapted one's ({kl.largest:.1e} "
            f"at worst), {kl.mean_allowed:.1e} ({kl.largest_allowed:.1e}) are allowed where the adapter moves them by "
            f"{kl.adapter:.1e}; nothing is published"
        )


def said(parity: Parity) -> str:
    """Return a comparison in one line."""
    line = f"outputs differ by {parity.merged:.1e}, {parity.allowed:.1e} allowed"
    if (kl := parity.kl) is None:
        return line
    where = f"{counted(kl.windows, 'window')} and noise" if kl.windows else "noise alone"
    return (
        f"{line}; KL {kl.mean:.1e} nats a token, {kl.mean_allowed:.1e} allowed (worst {kl.largest:.1e}; the adapter "
        f"moves its base by {kl.adapter:.1e}), over {counted(kl.tokens, 'token')} of {where}"
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
    needed = 4 * _ROOM * sum(weight.numel() for weight in built.model.parameters())
    fits = models.best_device() == "cuda" and torch.cuda.mem_get_info()[0] > needed
    return recipe.place(built, models.ready_device(None if fits else "cpu"), "float32")


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
