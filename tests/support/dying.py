"""A check that kills its worker. A module of its own, so that a worker imports nothing heavy for it."""

import os
import signal

from omni_cli.stages.checks.findings import Checked


def die_on_the_second_segment(unit, *, deep):
    if any(recording.endswith("--2") for recording in unit.recordings):
        os.kill(os.getpid(), signal.SIGKILL)
    return Checked()
