"""Run something in a forked process under strace, which kills it or fails a system call of it at a chosen place.

A fork costs a tenth of a second where a new process would import for seconds.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from omni_cli.errors import OmniError

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)  # prctl(2), Yama: a sibling may trace
REFUSED, CRASHED = 3, 70
# those that return a new descriptor or change a file; memory and signals are the process's own
CALLS = "openat,write,pwrite64,fsync,fdatasync,rename,renameat,unlink,unlinkat,close,read,fstat,newfstatat,lseek,mkdir"


def run_traced(
    act: Callable[[], object], *rules: str, log: Path | None = None, only: Path | None = None, calls: str = CALLS
) -> int:
    """Run `act` in a fork under strace; return its exit code (negative: the signal that killed it).

    Args:
        act: its OSError or OmniError is REFUSED, anything else that it raises CRASHED.
        rules: of strace, such as `inject=fsync:error=EIO:when=3`.
        log: where the calls are listed.
        only: the file whose calls alone are counted; None: of every file.
        calls: that are seen; a rule for any other has no effect.
    """
    pid = os.fork()
    if pid == 0:
        os._exit(_child(act))
    os.waitpid(pid, os.WUNTRACED)
    command = ["strace", "-f", "-qqq", "-o", str(log or os.devnull), "-p", str(pid), "-e", f"trace={calls}"]
    command += ["-P", str(only)] if only else []
    with subprocess.Popen([*command, *(part for rule in rules for part in ("-e", rule))]) as tracer:
        while f"TracerPid:\t{tracer.pid}\n" not in Path(f"/proc/{pid}/status").read_text():
            time.sleep(0.002)
            if tracer.poll() is not None:
                raise RuntimeError(f"strace ended with {tracer.returncode}")
        os.kill(pid, signal.SIGCONT)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _child(act: Callable[[], object]) -> int:
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        act()
    except (OSError, OmniError):
        return REFUSED
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        return CRASHED
    return 0


def count_calls(act: Callable[[], object], log: Path) -> Counter[str]:
    """Return how often `act` makes each of the calls."""
    assert run_traced(act, log=log) == 0
    return Counter(re.findall(r"^\d+ +(\w+)\(", log.read_text(), re.MULTILINE))
