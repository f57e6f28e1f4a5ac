"""Strict settings from layers of TOML, where every value remembers which layer set it.

A schema is a frozen pydantic model. Layers are merged key by key, later ones winning:
recipe defaults < profile < `--config run.toml` < `--set key=value`. A wrong key, type or value names the layer, the
dotted key, what was found, what was expected, and the nearest right spelling.
"""

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import tomli
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from omni_cli.errors import DataError, UsageError

MAX_TOML_BYTES = 1 << 20
DEFAULT_ORIGIN = "default"


class Settings(BaseModel):
    """Base of every schema: frozen, strictly typed, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    def unheeded(self) -> Mapping[str, str]:
        """Return the settings that others leave without effect: why, and what to do, as words after their name."""
        return {}


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Layer:
    """One table of settings and the name of where it came from."""

    origin: str
    table: Mapping[str, Any]
    has_commas: bool = False  # a text may stand for a list: `A,B`


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """Validated settings, and the origin of every dotted key that a layer set."""

    value: S
    origins: Mapping[str, str]

    def origin_of(self, key: str) -> str:
        """Return which layer set a dotted key."""
        return self.origins.get(key, DEFAULT_ORIGIN)


def read_layer(path: Path) -> Layer:
    """Read one TOML file.

    Raises:
        UsageError: the file is missing, unreadable, too large, or not TOML.
    """
    try:
        if path.stat().st_size > MAX_TOML_BYTES:
            raise UsageError(f"{path}: larger than {MAX_TOML_BYTES} bytes; a config file is a short TOML file")
        return Layer(str(path), tomli.loads(path.read_text()))
    except FileNotFoundError:
        raise UsageError(f"no config file {path}; give the path of a TOML file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from None
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error


def override_layer(assignments: Sequence[str]) -> Layer:
    """Turn `--set a.b=1` arguments into a layer; the right side is TOML, or else plain text, `A,B` for a list of words.

    Raises:
        UsageError: an argument has no `=`.
    """
    table: dict[str, Any] = {}
    for text in assignments:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {text}: expected KEY=VALUE, for example --set train.learning_rate=1e-4")
        try:
            value = tomli.loads(f"value = {raw}")["value"]
        except tomli.TOMLDecodeError:
            value = raw
        _assign(table, key.strip().split("."), value)
    return Layer("--set", table, has_commas=True)


def resolve(schema: type[S], layers: Sequence[Layer]) -> Resolved[S]:
    """Merge the layers and validate the result.

    Raises:
        UsageError: the first wrong key or value, in one line.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        for path, value in _leaves(layer.table):
            is_list = layer.has_commas and isinstance(value, str) and _takes_words(schema, path)
            _assign(merged, path, (is_list and comma_list(value)) or value)
            origins[".".join(path)] = layer.origin
    try:
        return Resolved(schema.model_validate(_lists_to_tuples(merged)), origins)
    except ValidationError as error:
        raise UsageError(_explain(schema, error.errors()[0], origins)) from None


def unheeded(settings: Settings, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every dotted key that other settings leave without effect, with the words that `Settings.unheeded` has."""
    for name, why in settings.unheeded().items():
        yield f"{prefix}{name}", why
    for name, value in settings:
        if isinstance(value, Settings):
            yield from unheeded(value, f"{prefix}{name}.")


def read_document(path: Path, schema: type[S], what: str) -> S:
    """Read a JSON document that omni wrote.

    Args:
        path: of the file.
        schema: of what it holds.
        what: it should be, for the error: `a manifest of format 1`.

    Raises:
        DataError: it is something else; the first wrong key is named.
    """
    try:
        return schema.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key, held = ".".join(map(str, first["loc"])), first["input"]
        found = "" if isinstance(held, dict | list) else f" = {held!r}"
        raise DataError(f"{path}: not {what} ({key}{found}: {first['msg']})") from None


def dump_toml(settings: Settings) -> str:
    """Write settings as TOML that `resolve` reads back to an equal value; unset optionals are left out."""
    return "\n".join(_toml_lines(settings.model_dump(mode="json", exclude_none=True), prefix=""))


def differences(old: Settings, new: Settings) -> list[str]:
    """Return `key: old -> new` for every dotted key that differs."""
    before, after = dict(_flat(old.model_dump(mode="json"))), dict(_flat(new.model_dump(mode="json")))
    keys = sorted(before.keys() | after.keys())
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def comma_list(text: str) -> tuple[str, ...]:
    """Split `A,B` into its parts; of nothing an empty tuple."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """Return ` Did you mean 'x'?`, or the list of what is known where nothing is near."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(options)}"


def _assign(table: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            inner = table[name] = {}
        table = inner
    table[path[-1]] = value


def _leaves(table: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    return tuple(_lists_to_tuples(item) for item in value) if isinstance(value, list) else value


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _toml_lines(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in table.items():
        if not isinstance(value, Mapping):
            yield f"{key} = {_toml_value(value)}"
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield f"\n[{prefix}{key}]"
            yield from _toml_lines(value, f"{prefix}{key}.")


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)


def _explain(schema: type[Settings], error: ErrorDetails, origins: Mapping[str, str]) -> str:
    names = [str(part) for part in error["loc"]]
    key = ".".join(names)
    origin = next((origins[k] for k in (key, *_parents(names), *origins) if k in origins and _related(k, key)), "")
    where = f"{origin}: " if origin else ""
    if error["type"] == "extra_forbidden":
        return f"{where}unknown key {key}; {_right_key(schema, names)}"
    if error["type"] == "missing":
        return f"{where}{key} is required and no layer sets it; add it to the profile or give --set {key}=VALUE"
    found = "" if isinstance(error["input"], dict) else f" = {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}{key}{found}: {message[:1].lower()}{message[1:]}{_meant(error)}"


def _meant(error: ErrorDetails) -> str:
    """Return how a list is written, or which of some words was meant, where a value is near one of them."""
    if error["type"] == "tuple_type":
        return """, such as ["A", "B"]; in --set A,B does too"""
    if error["type"] != "literal_error":
        return ""
    known = re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
    close = difflib.get_close_matches(str(error["input"]), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _right_key(schema: type[Settings], names: Sequence[str]) -> str:
    """Return the key that was meant: a near name in the same table, or the same name in another."""
    elsewhere = [path for path in _paths(schema) if path.endswith(f".{names[-1]}")]
    here = nearest(names[-1], _fields(schema, names[:-1]))
    return f"did you mean {elsewhere[0]!r}?" if elsewhere and here.startswith("known:") else here


def _parents(names: Sequence[str]) -> list[str]:
    return [".".join(names[:end]) for end in range(len(names) - 1, 0, -1)]


def _related(candidate: str, key: str) -> bool:
    return candidate == key or candidate.startswith(f"{key}.") or key.startswith(f"{candidate}.")


def _fields(schema: type[Settings], path: Sequence[str]) -> list[str]:
    """Return the field names of the table at `path` of a schema."""
    current: Any = schema
    for name in path:
        current = _table_type(current.model_fields[name].annotation)
    return [field.alias or name for name, field in current.model_fields.items()]


def _takes_words(schema: Any, path: Sequence[str]) -> bool:
    """Say whether the setting at `path` of a schema is a list of texts, of any or of named ones."""
    *tables, name = path
    for table in tables:
        schema = _table_type(schema.model_fields[table].annotation) if table in schema.model_fields else None
        if schema is None:
            return False
    annotation = schema.model_fields[name].annotation if name in schema.model_fields else None
    item = typing.get_args(annotation)[0] if typing.get_origin(annotation) is tuple else None
    return item is str or (typing.get_origin(item) is Literal and isinstance(typing.get_args(item)[0], str))


def _paths(schema: Any, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a schema."""
    for name, field in schema.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        yield path
        if inner := _table_type(field.annotation):
            yield from _paths(inner, f"{path}.")


def _table_type(annotation: Any) -> Any:
    """Return the schema of a table, optional or not; None where a field is no table."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if is_union else (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
