"""What this process holds of the machine's memory, as Linux counts it, and how it gives back the rest."""

import ctypes
import gc
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # proc(5)


def give_back() -> None:
    """Give the memory of what is gone back to the machine."""
    gc.collect()  # PEFT's layers hold each other
    if sys.platform == "linux":  # glibc keeps what is freed between other things: up to half a model (measured)
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # another libc has no such thing


def forget_peak() -> int | None:
    """Begin a new peak; return the bytes that are held now, or None where the kernel does not let peaks be begun."""
    try:
        _CLEAR.write_text("5")
        return _status("VmRSS")
    except (OSError, StopIteration):
        return None


def peak_bytes() -> int:
    """Return the most bytes that were held since `forget_peak`, where that was possible."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) << 10
