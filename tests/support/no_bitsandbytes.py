"""A machine without bitsandbytes. Libraries remember whether it is there: what they remember is forgotten again."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from peft import import_utils as of_peft
from transformers.utils import import_utils as of_transformers


def _forget() -> None:
    of_transformers.is_bitsandbytes_available.cache_clear()
    of_peft.is_bnb_available.cache_clear()
    of_peft.is_bnb_4bit_available.cache_clear()


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Hide the package in this process."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            _hide(patch)
            yield
    finally:
        _forget()


def _hide(patch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        patch.setitem(sys.modules, name, None)
    _forget()
