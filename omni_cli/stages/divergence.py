"""How far, in nats, what a merged model says is from what the adapted one said, and how far it may be.

A right merge is PEFT's merge in float32, each weight rounded once to the type that its base's file holds it in. So the
adapter is merged in memory too, and three things are asked in turn:

1. Unrounded, is that still the adapted model? Then PEFT merges what it trained.
2. Are the files that merge, rounded alike? Then they are right, whatever rounding costs.
3. What does rounding cost? That depends on the model: in bfloat16 1e-5 nats with 2 layers, 2e-3 with 28 whose logits
   are spread as a trained model's, 0.1 with 16 whose signals grow (measured; in float16 1/64 of it, since an error of
   the weights enters squared). A right merge that costs too much is not published either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from omni_cli.errors import OmniError
from omni_cli.recipe import Row
from omni_cli.report import counted

# Mean KL of the merged from the adapted model in nats a token, both in float32 arithmetic: (noise, most). In float32 it
# is the arithmetic's noise alone.
KL_LIMITS = {torch.float32: (1e-7, 1e-6), torch.float16: (3e-6, 1e-4), torch.bfloat16: (2e-4, 5e-3)}
# ... and between those no more than this share of how far the adapter moves its base. Right merges: 0.002 to 0.01; half
# the scale: 0.2, DoRA without its magnitudes: 0.2, one layer of two left out: 0.03 to 0.15 (measured). Nor may files be
# further than this share of what rounding costs from the merge in memory that is rounded alike.
KL_SHARE = 0.02
# Allowed too is so many times what rounding costs on the same rows: in nats, in the largest difference and in choices.
ROUNDINGS = 3
# Whatever rounding costs, no more than this (5 % of perplexity), nor more than the adapter moves its base by.
KL_CEILING = 0.05
KL_WORST = 50  # times the mean that one token may differ by; 11 was measured


@dataclass(frozen=True)
class Expected:
    """What an adapted model says, row by row: the logits (labelled tokens, vocabulary) that the merged one is held to.

    Attributes:
        rows: noise first, then windows of the shards.
        logits: of the adapted model.
        rounded: of the same, its adapter merged in memory and each weight rounded to the type of its file.
        adapter_moves: largest difference of a logit to the base.
        adapter_kl: mean KL of the base.
        unrounded_kl: mean KL of the adapter merged in memory, before it is rounded.
        dtype: the coarsest of the merged weights in the base's files, float32 at the finest.
        windows: how many of the rows are real.
    """

    rows: Sequence[Row]
    logits: Sequence[Tensor]
    rounded: Sequence[Tensor]
    adapter_moves: float
    adapter_kl: float
    unrounded_kl: float
    dtype: torch.dtype
    windows: int


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

    def said(self) -> str:
        """Return in words what was measured, each with its limit."""
        where = f"{counted(self.windows, 'window')} and noise" if self.windows else "noise alone"
        return (
            f"KL {self.mean:.1e} nats a token, {self.mean_allowed:.1e} allowed (worst {self.largest:.1e}, "
            f"{self.largest_allowed:.1e} allowed; rounding alone costs {self.rounding:.1e}, the adapter moves its base "
            f"by {self.adapter:.1e}), {self.apart:.1e} from the merge in memory, {self.apart_allowed:.1e} allowed, "
            f"over {counted(self.tokens, 'token')} of {where}"
        )


def measured(expected: Expected, found: Sequence[Tensor]) -> Divergence:
    """Return how far a merged model is from the adapted one, and how far it may be.

    Args:
        expected: of the adapted model.
        found: logits (labelled tokens, vocabulary) of the merged one, row by row.
    """
    each, rounding = divergences(expected.logits, found), fmean(divergences(expected.logits, expected.rounded))
    by_share, unrounded_allowed = (
        min(most, max(noise, KL_SHARE * expected.adapter_kl))
        for noise, most in (KL_LIMITS[expected.dtype], KL_LIMITS[torch.float32])
    )
    allowed = min(max(by_share, ROUNDINGS * rounding), KL_CEILING, expected.adapter_kl)
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
        apart_allowed=max(KL_LIMITS[torch.float32][0], KL_SHARE * rounding),
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
    if not kl.apart <= kl.apart_allowed:
        raise OmniError(
            f"the merged files are {kl.apart:.1e} nats a token from the adapter merged in memory and rounded alike, "
            f"{kl.apart_allowed:.1e} are allowed: they are not that merge; nothing is published"
        )
    if not kl.mean <= kl.mean_allowed or not kl.largest <= kl.largest_allowed:
        raise OmniError(
            f"the merge is right, but with its weights rounded to the types of the base's files it is {kl.mean:.1e} "
            f"nats a token from the adapted model ({kl.largest:.1e} at worst), {kl.mean_allowed:.1e} "
            f"({kl.largest_allowed:.1e}) are allowed: {_cost(kl)}; keep the adapter beside its base (omni eval, infer "
            "and export take it), or train over the base in float32, or longer; nothing is published"
        )


def _cost(kl: Divergence) -> str:
    if kl.mean_allowed >= kl.adapter:
        return f"rounding alone costs {kl.rounding:.1e}, as much as was learned ({kl.adapter:.1e})"
    return f"rounding alone costs {kl.rounding:.1e}, where the adapter moves its base by {kl.adapter:.1e}"
