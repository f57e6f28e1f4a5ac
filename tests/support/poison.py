"""Recordings that do to their worker what a hostile file does: a module of its own, quick to import."""

import contextlib
import ctypes
import itertools
import os
import signal
import sys
import time
from pathlib import Path

from omni_cli.samples.windows import choose_windows, ego_motion_tables


def poisoned_tables(recording, preprocess, *, assign_split, poison, stride):
    """Do what `poison` says of this recording, then make its tables.

    KIND; KIND once FILE, where FILE is not there yet; KIND tally FILE, which grows by a byte each time. Some kinds are
    KIND=PATH: what they do it to.
    """
    kind, rule, file = [*poison.get(recording.id, "").split(" "), "", ""][:3]
    if kind and not (rule == "once" and Path(file).exists()):
        if file:
            with Path(file).open("a") as stream:
                stream.write("x")
        misbehave(kind)
    return ego_motion_tables(recording, preprocess, stride=stride, max_age_us=100_000, assign_split=assign_split)


def poisoned_windows(recording, preprocess, *, assign_split, poison, stride):
    """Choose the windows; `raise` strikes here already, before a worker has it."""
    if poison.get(recording.id) == "raise":
        misbehave("raise")
    return choose_windows(recording, preprocess, stride=stride, max_age_us=100_000, assign_split=assign_split)


def misbehave(kind):
    sys.stderr.write(f"about to {kind}\n")
    what, _, path = kind.partition("=")
    match what:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            ctypes.string_at(0)
        case "grow":
            bytearray(8 << 30)
        case "raise":
            raise ZeroDivisionError("a bug")
        case "wait":
            time.sleep(600)
        case "fill":
            with Path(path).open("ab", buffering=0) as ballast:
                _until_refused(lambda _: ballast.write(bytes(1 << 12)))
        case "litter":
            _until_refused(lambda number: Path(f"{path}{number}").touch())
        case "clock":  # libfaketime reads it at every call
            Path(path).write_text("-2y")


def _until_refused(act):
    with contextlib.suppress(OSError):
        for number in itertools.count():
            act(number)
