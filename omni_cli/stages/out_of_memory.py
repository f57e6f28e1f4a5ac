"""What is said where memory runs out: torch says it in many ways, and never what was done and what to do.

On a GPU it is `torch.OutOfMemoryError`, and of what a driver or a library of kernels wanted for itself a RuntimeError.
On a host a tensor that does not fit is a RuntimeError too, of c10/core/impl/alloc_cpu.cpp (torch 2.13), and anything
else a MemoryError.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch

from omni_cli.errors import OmniError, first_line
from omni_cli.stages.memory import GIB, machine_bytes

_ON_HOST = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory")
_ON_GPU = re.compile(r"(CUDA|HIP) error: out of memory|(CU|HIP)BLAS_STATUS_ALLOC_FAILED")


@contextmanager
def in_words(say: Callable[[str], str]) -> Iterator[None]:
    """Say in one line that memory ran out.

    Args:
        say: returns the line; it is given what ran out, how much of it there is, and how much this process held.

    Raises:
        OmniError: it did.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (what := _what_ran_out(error)) is None:
            raise
        raise OmniError(say(f"{what} ({first_line(error)})")) from error


def _what_ran_out(error: RuntimeError | MemoryError) -> str | None:
    """Return whose memory ran out, with its size; None where the error tells of something else."""
    said = str(error)
    if isinstance(error, MemoryError) or _ON_HOST.search(said):
        return _host()
    if not isinstance(error, torch.OutOfMemoryError) and not _ON_GPU.search(said):
        return None
    return _gpu() if torch.cuda.is_available() else _host()


def _gpu() -> str:
    found, held = torch.cuda.get_device_properties(torch.cuda.current_device()), torch.cuda.max_memory_reserved()
    return f"GPU {found.name} has {found.total_memory / GIB:.2f} GiB of memory, this process held {held / GIB:.2f} GiB"


def _host() -> str:
    held = psutil.Process().memory_info().rss
    return f"this machine has {machine_bytes() / GIB:.2f} GiB of memory, this process held {held / GIB:.2f} GiB"
