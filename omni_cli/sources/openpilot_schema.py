"""openpilot's Cap'n Proto schema, from the `openpilot-logging` package, and the compressions of its logs.

The package is only a carrier of the schema files: it is found without being imported, for its own code wants a network.
"""

import bz2
import hashlib
import importlib
import importlib.util
import io
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.formats.openpilot import BZIP2_MAGIC, EVENT_ORDINALS, ZSTD_MAGIC

MAX_LOG_BYTES = 1 << 30  # a minute of rlog is about 100 MB; more is no log but a decompression bomb
_BLOCK_BYTES = 1 << 16
_ZSTD_PIECE_BYTES = 1 << 10  # a block of 128 KB can be told in four bytes: at most 32 MB at once
_TRIAL = "import sys, capnp; capnp.load(sys.argv[1], imports=[sys.argv[2]])"
_INSTALL = "pip install 'omni-cli[openpilot]'"


@cache
def log_schema() -> Any:
    """Return the loaded `log.capnp`.

    Raises:
        UsageError: the extra is not installed.
        OmniError: the schema files do not fit each other.
    """
    capnp = extra("capnp")
    folder = _schema_folder()
    _require_parses(str(folder), schema_hash())
    capnp.remove_import_hook()
    return capnp.load(str(folder / "log.capnp"), imports=[str(folder)])


@cache
def event_kinds() -> Mapping[str, str]:
    """Return the kind of event that omni reads (`EVENT_ORDINALS`) under each name that this schema has for one.

    Raises:
        UsageError: the extra is not installed.
        OmniError: the schema files do not fit each other.
    """
    event = log_schema().Event.schema
    names = {event.fields[name].proto.ordinal.explicit: name for name in event.union_fields}
    return {names[ordinal]: kind for kind, ordinal in EVENT_ORDINALS.items() if ordinal in names}


@cache
def schema_hash() -> str:
    """Return one sha256 over the schema files, for provenance."""
    digest = hashlib.sha256()
    for path in sorted(_schema_folder().rglob("*.capnp")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def extra(module: str) -> ModuleType:
    """Import a module of the `openpilot` extra.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise UsageError(f"openpilot logs need the module {module}, which is not installed; {_INSTALL}") from None


def decompress(content: bytes, name: str) -> tuple[bytes, bool]:
    """Return a log's events as bytes, and whether the compressed stream ends too early.

    The compression is told by its first bytes, never by the suffix: devices and servers changed it over the years.

    Raises:
        DataError: the stream is damaged, or swells past `MAX_LOG_BYTES`.
    """
    if content.startswith(BZIP2_MAGIC):
        blocks = iter(partial(bz2.BZ2File(io.BytesIO(content)).read1, _BLOCK_BYTES), b"")
        return _joined(blocks, name, (OSError,))
    if content.startswith(ZSTD_MAGIC):
        return _joined(_zstd_blocks(content), name, (extra("zstandard").ZstdError,))
    return content, False


def _zstd_blocks(content: bytes) -> Iterator[bytes]:
    """Yield what the frames of a zstd stream hold.

    The library's own reader of streams gives nothing of the last blocks before a missing tail, and no word of it.

    Raises:
        EOFError: the last frame does not end.
    """
    decompressor, at = extra("zstandard").ZstdDecompressor(), 0
    while at < len(content):
        frame = decompressor.decompressobj()
        while not frame.eof:
            if at >= len(content):
                raise EOFError
            yield frame.decompress(content[at : at + _ZSTD_PIECE_BYTES])
            at += _ZSTD_PIECE_BYTES
        at = min(at, len(content)) - len(frame.unused_data)


def _joined(blocks: Iterable[bytes], name: str, damage: tuple[type[Exception], ...]) -> tuple[bytes, bool]:
    """Join small blocks, so that all before a missing tail is kept, and a bomb is seen before it fills the memory."""
    plain = io.BytesIO()
    try:
        for block in blocks:
            plain.write(block)
            if plain.tell() > MAX_LOG_BYTES:
                raise DataError(f"{name}: decompresses to more than {MAX_LOG_BYTES} bytes; no segment's log does")
    except EOFError:
        return plain.getvalue(), True
    except damage as error:
        raise DataError(f"{name}: damaged compressed log ({error}); fetch it again") from None
    return plain.getvalue(), False


def _schema_folder() -> Path:
    spec = importlib.util.find_spec("openpilot_logging")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"openpilot's log schema (package openpilot-logging) is not installed; {_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations))) / "cereal"


@cache
def _require_parses(folder: str, digest: str) -> None:
    """Try the schema in another process first: pycapnp ends the whole process on one that does not parse.

    Args:
        folder: where log.capnp and what it imports lie.
        digest: hash of those files; a verdict holds for these bytes only.
    """
    command = [sys.executable, "-c", _TRIAL, str(Path(folder) / "log.capnp"), folder]
    trial = subprocess.run(command, capture_output=True, check=False, timeout=120)
    if trial.returncode:
        raise OmniError(f"{folder}: its schema files {digest[:12]} do not parse together; {_INSTALL} --force-reinstall")
