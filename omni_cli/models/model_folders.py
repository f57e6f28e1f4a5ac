"""What a folder of weights must hold before a library reads it: it comes from outside, and nothing in it is trusted."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from omni_cli.errors import DataError, OmniError, UsageError

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")  # as a header names them
_DEPTHS, _MOST_LAYERS = ("num_hidden_layers", "depth"), 10_000  # a library makes lists of that length, and longer
_AGAIN = "take the folder again from where it came"


def check_config(folder: Path) -> dict[str, Any]:
    """Return a folder's configuration.

    Raises:
        UsageError: the folder holds an adapter or a run.
        DataError: it holds no configuration, or one that is no JSON object, of no sane size, or names other weights.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"model {str(folder)!r} is an adapter, and no base; fold it in with: omni merge, and name that folder"
        )
    if (folder / "final").is_dir():
        raise UsageError(f"model {str(folder)!r} is a run; its weights are in {folder / 'final'}")
    config = read_config(folder)
    if named := config.get("transformers_weights"):  # the library would read that file, which may be a pickle
        raise DataError(f"{folder / CONFIG}: names the weights {named!r}, expected them in {_WHOLE} or its index")
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration in a folder, whatever else that holds.

    Raises:
        DataError: it is not there, is no JSON object, or is of no sane size.
    """
    config = read_object(folder / CONFIG)
    tables = (config, *(value for value in config.values() if isinstance(value, dict)))
    depths = [table.get(key, 0) for table in tables for key in _DEPTHS]
    if deep := [depth for depth in depths if isinstance(depth, int | float) and depth > _MOST_LAYERS]:
        raise DataError(f"{folder / CONFIG}: asks for {deep[0]:,} layers, expected {_MOST_LAYERS:,} at most: {_AGAIN}")
    return config


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model's folder.

    Raises:
        DataError: it is not there, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(
            f"{path}: no such file; expected a folder of weights with their {path.name}: {_AGAIN}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no JSON ({error}); expected an object of settings: {_AGAIN}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: found no object, expected one of settings: {_AGAIN}")
    return value


def check_weights(folder: Path, *, is_quantized: bool = False) -> int:
    """Check the headers of a folder's weights, and return how many numbers they hold.

    Raises:
        DataError: there are no safetensors, one is damaged, or its weights are no floating point numbers.
    """
    if not (names := weight_files(folder)):
        raise DataError(f"model {str(folder)!r}: the folder holds no *.safetensors; pickled weights are never loaded")
    return sum(prod(shape) for name in names for shape in header(folder / name, is_quantized=is_quantized).values())


def header(path: Path, *, is_quantized: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes in a file of safetensors.

    Raises:
        DataError: it is damaged, or its weights are no floating point numbers and it is not quantised.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            names = opened.keys()
            slices = {name: opened.get_slice(name) for name in names}
            types = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: no whole file of safetensors ({error}): {_AGAIN}") from None
    wrong = [name for name, kind in types.items() if name.endswith((".weight", ".bias")) and kind not in _FLOATS]
    if wrong and not is_quantized:
        raise DataError(
            f"{path}: {wrong[0]} is of type {types[wrong[0]]}, expected one of {', '.join(_FLOATS)}: {_AGAIN}"
        )
    return shapes


@contextmanager
def reading(what: str, source: str) -> Iterator[None]:
    """Let a library read what came from outside, and say in one line what it makes of it: any exception can be that.

    Args:
        what: is done with it, such as `load model`.
        source: a folder, or the id of a repository.

    Raises:
        DataError: a folder's content cannot be read.
        OmniError: the hub's cannot, or cannot be reached.
    """
    told = logging.get_verbosity()
    logging.set_verbosity_error()  # a report of each weight that does not fit
    try:
        yield
    except (OmniError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = f"cannot {what} {source!r}: {_first_line(error)}"
        is_damaged = Path(source).is_dir() and not isinstance(error, ImportError)
        raise (DataError(f"{said}; {_AGAIN}") if is_damaged else OmniError(said)) from None
    finally:
        logging.set_verbosity(told)


def _first_line(error: Exception) -> str:
    """Return what an error says first; a line that ends with a colon needs the one after it."""
    first, *rest = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first.rstrip(".")


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files that a library would read: the one of all weights, those of an index, else all.

    Raises:
        DataError: an index is none, or names a file that is not in the folder itself.
    """
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    if _WHOLE in there:
        return [_WHOLE]  # an index beside it is of weights that were here before
    if not (folder / INDEX).is_file():
        return there
    named = read_object(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise DataError(f"{folder / INDEX}: no weight_map; expected the file of each weight: {_AGAIN}")
    wanted = sorted({str(name) for name in named.values()})
    if absent := [name for name in wanted if name not in there]:
        raise DataError(f"{folder / INDEX}: names {absent[0]!r}, expected a *.safetensors beside it: {_AGAIN}")
    return wanted
