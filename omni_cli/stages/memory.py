"""How much memory this machine has, and what is said where a work takes more."""

from pathlib import Path

import psutil

from omni_cli.report import Console

GIB = 1 << 30
_OWN_CGROUPS, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # cgroups(7)


def machine_bytes() -> int:
    """Return the memory of this machine, or of the container or the job around this process where that is less."""
    found = [path.read_text().strip() for path in _limit_files() if path.is_file()]
    return min([int(psutil.virtual_memory().total), *(int(text) for text in found if text.isdigit())])


def _limit_files() -> list[Path]:
    """Return what may limit this process: its control group, as Slurm makes one a job, and those around it."""
    lines = _OWN_CGROUPS.read_text().splitlines() if _OWN_CGROUPS.is_file() else []
    files = []
    for controllers, group in (line.split(":", 2)[1:] for line in lines):
        if controllers in ("", "memory"):  # version 2, version 1
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            own = _CGROUPS / controllers / group.lstrip("/")
            files += [folder / name for folder in (own, *own.parents) if folder.is_relative_to(_CGROUPS / controllers)]
    return files


def warn_of_more(needed_bytes: float, what: str, console: Console) -> None:
    """Tell of a work that takes more memory than there is: it may be killed, or wait for a swap for hours.

    Args:
        needed_bytes: at its peak.
        what: takes them.
        console: told.
    """
    if needed_bytes > (held := machine_bytes()):
        console.warn(
            f"{what} takes about {needed_bytes / GIB:.2f} GiB of memory at its peak, this machine has "
            f"{held / GIB:.2f} GiB; it may be killed: nothing is lost then, and a machine with more can do it"
        )
