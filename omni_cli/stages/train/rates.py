"""Learning rates of parts: each is a group of the optimiser, made from the groups that the library has chosen."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from omni_cli.errors import OmniError
from omni_cli.recipe import OwnRate

SUFFIX = "_learning_rate"  # of a part, in the history


class OwnRates:
    """Mixin: some parts of the model learn at rates of their own, under one schedule."""

    own_rates: Sequence[OwnRate] = ()
    args: Any
    model: nn.Module
    optimizer: Any

    def create_optimizer(self, model: Any = None) -> Any:
        """Return the library's optimiser, whose groups are divided by rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)  # type: ignore[misc]  # of the Trainer that this is mixed into
        if is_new and self.own_rates:
            divide_groups(optimizer, self.model, self.own_rates)
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the rates of parts beside the rate of the rest."""
        if "learning_rate" in logs:
            share = logs["learning_rate"] / self.args.learning_rate  # which the schedule lets all of them have
            logs = {**logs, **{rate.part + SUFFIX: share * rate.learning_rate for rate in self.own_rates}}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]  # as above


def divide_groups(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Sequence[OwnRate]) -> None:
    """Move weights with a rate of their own into groups of their own; all else of a group, as weight decay, stays.

    Raises:
        OmniError: a weight that learns is then in no group, in two, or in one of another rate.
    """
    names = {weight: name for name, weight in model.named_parameters()}
    for group in list(optimizer.param_groups):
        for rate in rates:
            own = [weight for weight in group["params"] if names.get(weight) in rate.weights]
            group["params"] = [weight for weight in group["params"] if names.get(weight) not in rate.weights]
            if own:
                optimizer.add_param_group({**group, "params": own, "lr": rate.learning_rate})
    check_groups(optimizer, model, rates)


def check_groups(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Sequence[OwnRate]) -> None:
    """Check that each weight that learns is in one group, and that a rate of its own is that group's.

    Raises:
        OmniError: the first that breaks the rule is named.
    """
    learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    counts = Counter(weight for group in optimizer.param_groups for weight in group["params"])
    if wrong := [name for name, weight in learning.items() if counts[weight] != 1]:
        found = counts[learning[wrong[0]]]
        raise OmniError(f"weight {wrong[0]} is in {found} groups of the optimizer, expected 1; use another optimizer")
    found_rates = {weight: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    for rate in rates:
        for name in sorted(rate.weights):
            if name not in learning or found_rates[learning[name]] != rate.learning_rate:
                found_rate = found_rates[learning[name]] if name in learning else "none: it does not learn"
                raise OmniError(f"weight {name} has the rate {found_rate}, expected {rate.learning_rate:g}")
