"""Every fault that omni must survive is injected by a test, or left out for a stated reason.

A row is what `@pytest.mark.fault("F7")` names. `make storm` runs all of these tests, `make test` the quick ones.
"""

import re
from pathlib import Path

FAULTS = {
    "F1": "kill -9 at any instant",
    "F2": "SIGTERM and Ctrl-C",
    "F3": "a full disk, no inode left",
    "F4": "EIO, a read-only folder, no permission",
    "F5": "a torn file: a tail of zeros, too short, too long",
    "F6": "one flipped bit at rest, in every kind of artefact",
    "F7": "a flip on the wire, another file of the right size, a captive portal",
    "F8": "a network and a hub that fail in every known way",
    "F9": "the upstream repository changes under us",
    "F10": "two processes on one folder, a flock that lies",
    "F11": "a stale lock of a dead process",
    "F12": "a clock that jumps, times of modification in the future",
    "F13": "a damaged or hostile zip",
    "F14": "hostile names",
    "F15": "a damaged, odd or hostile video",
    "F16": "a damaged or odd table",
    "F17": "a missing, shorter, swapped or uncalibrated camera",
    "F18": "odd timestamps",
    "F19": "an impossible motion of the car",
    "F20": "a worker that dies, hangs, swells or returns garbage",
    "F21": "a dead supervisor",
    "F22": "few file descriptors, little shared memory",
    "F23": "huge and empty files",
    "F24": "code in inputs",
    "F25": "a wrong config",
    "F26": "a torn checkpoint",
    "F27": "a loss that is no number",
    "F28": "a lost rank",
    "F29": "a GPU out of memory",
    "F30": "a wrong merge or export",
    "F31": "no network",
    "F32": "a power loss that keeps the rename and loses the data",
}
LEFT_OUT = {
    "F28": "training on several ranks is refused until it is built",
    "F29": "needs a GPU: nobody has run omni on one",
}
_MARK = re.compile(r"mark\.fault\(([^)]*)\)")


def test_each_row_has_a_test_or_a_reason():
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    tested = {row for text in texts for marked in _MARK.findall(text) for row in re.findall(r'"(F\d+)"', marked)}
    assert tested == FAULTS.keys() - LEFT_OUT.keys()
