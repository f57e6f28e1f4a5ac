"""What omni can learn. Recipes are found by name and imported only when asked for."""

from collections.abc import Mapping
from importlib import import_module
from typing import cast

from omni_cli.config import Settings, nearest
from omni_cli.errors import UsageError

_RECIPES: Mapping[str, str] = {"vlm": "omni_cli.recipes.vlm:Vlm", "distill": "omni_cli.recipes.distill:Distill"}


def recipe_names() -> tuple[str, ...]:
    """Return the names a user can type."""
    return tuple(_RECIPES)


def check_recipe(name: str) -> None:
    """Refuse a name that no recipe has.

    Raises:
        UsageError: there is none.
    """
    if name not in _RECIPES:
        raise UsageError(f"unknown recipe {name!r}; {nearest(name, _RECIPES)}")


def recipe_class(name: str) -> type[Settings]:
    """Return a recipe's settings class, whose instances the stages drive.

    Raises:
        UsageError: there is no recipe of that name.
    """
    check_recipe(name)
    module, _, attribute = _RECIPES[name].partition(":")
    return cast(type[Settings], getattr(import_module(module), attribute))
