"""FFmpeg for torchcodec: the system's shared libraries, or else the ones inside PyAV's wheel (no root needed).

PyAV bundles FFmpeg under hashed file names (`libavcodec-1a2b3c4d.so.62.x`). torchcodec looks for the plain ones, so the
libraries are copied once into a cache with the names inside them rewritten to the plain names (same length, padded
with NUL), and loaded before torchcodec is imported.
"""

import ctypes
import ctypes.util
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

from omni_cli import files

_HASHED = re.compile(r"(lib(?:av|sw)\w+)-[0-9a-f]{8}\.so\.(\d+)")
_LOAD_ORDER = ("avutil", "swresample", "swscale", "avcodec", "avformat", "avfilter", "avdevice")


def torchcodec_version() -> str:
    """Return the installed torchcodec's version without importing it."""
    return importlib.metadata.version("torchcodec")


def load_torchcodec() -> ModuleType:
    """Import torchcodec, with FFmpeg's libraries in place; return the package with its decoders and transforms."""
    if not ctypes.util.find_library("avcodec"):
        preload_pyav_libraries(_cache_folder())
    package = importlib.import_module("torchcodec")
    importlib.import_module("torchcodec.decoders")
    importlib.import_module("torchcodec.transforms")
    return package


def preload_pyav_libraries(cache: Path) -> None:
    """Load the FFmpeg inside PyAV's wheel under its plain library names."""
    import_spec = importlib.util.find_spec("av")
    assert import_spec is not None
    assert import_spec.origin is not None
    importlib.import_module("av")  # its own rpath loads x264, x265 and the other codecs that FFmpeg needs
    bundled = Path(import_spec.origin).parent.parent / "av.libs"
    plain = {f.name: f"{m[1]}.so.{m[2]}" for f in sorted(bundled.iterdir()) if (m := _HASHED.match(f.name))}
    for hashed, name in plain.items():
        if not (cache / name).exists():
            files.write_bytes(cache / name, _renamed((bundled / hashed).read_bytes(), plain))
    for part in _LOAD_ORDER:
        ctypes.CDLL(str(next(cache.glob(f"lib{part}.so.*"))), mode=ctypes.RTLD_GLOBAL)


def _renamed(library: bytes, plain: dict[str, str]) -> bytes:
    for hashed, name in plain.items():
        library = library.replace(hashed.encode() + b"\0", name.encode().ljust(len(hashed), b"\0") + b"\0")
    return library


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "omni" / f"ffmpeg-{importlib.metadata.version('av')}"
