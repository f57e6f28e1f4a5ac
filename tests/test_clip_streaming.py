"""Clips by ranges, straight to the disk: little memory however large a clip is, and a kill loses next to nothing."""

import io
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.support import pai
from tests.support.clips import CLIPS, FRONT, box, folder_of, get, members_of, of_clips, spoil, zip_of

MEGABYTE = 1_000_000
VIDEO_BYTES = 24 * MEGABYTE
FETCH = """
import re, sys
from pathlib import Path
from omni_cli.report import Console
from omni_cli.stages.fetch import FetchRequest, fetch
from tests.support import pai

def get(*clips):
    request = FetchRequest("physical_ai_av", Path(sys.argv[1]), clips=clips, cameras=pai.CAMERAS, retry_wait_s=0.01)
    fetch(request, Console(quiet=True))
    return re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]

print("peaks", *(get(clip) for clip in sys.argv[2:]))
"""


def enlarge(hub, clips, size):
    """Let clips of both cameras be large, upstream."""
    for camera in pai.CAMERAS:
        stored = hub.stored[pai.FEATURES[camera].chunk_path(0)]
        with zipfile.ZipFile(stored.place) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
        large = {pai.member(camera, "video", clip): size for clip in clips}
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
            for name, value in members:
                archive.writestr(name, pai.mp4() + box(large[name], len(name)) if name in large else value)
        spoil(hub, stored.path, content.getvalue())


def test_a_large_clip_does_not_come_through_memory(hub, tmp_path):
    enlarge(hub, CLIPS[2:], VIDEO_BYTES)  # of one alone the whole zip would come
    process = [sys.executable, "-c", FETCH, str(tmp_path), CLIPS[0], CLIPS[3]]
    told = subprocess.run(process, cwd=Path.cwd(), check=True, capture_output=True, text=True)
    small_kb, large_kb = map(int, re.search(r"peaks (\d+) (\d+)", told.stdout).groups())
    assert zip_of(tmp_path).stat().st_size > VIDEO_BYTES
    assert large_kb - small_kb < 16 * 1024  # two cameras at a time; the ranges were held in memory, each of them twice


@pytest.mark.fault("F1")
def test_a_kill_amid_a_clip_loses_next_to_nothing(hub, tmp_path):
    enlarge(hub, CLIPS[2:], 4 * MEGABYTE)
    get(tmp_path, CLIPS[0])
    hub.log.clear()
    hub.bytes_per_second = 2 * MEGABYTE
    process = subprocess.Popen([sys.executable, "-c", FETCH, str(tmp_path), CLIPS[2]], cwd=Path.cwd())
    deadline = time.monotonic() + 60
    while hub.sent(FRONT) < 3 * MEGABYTE and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    hub.bytes_per_second = None
    get(tmp_path, CLIPS[2])
    whole = hub.stored[pai.FEATURES[FRONT].chunk_path(0)].place
    assert members_of(zip_of(tmp_path)) == of_clips(whole, {CLIPS[0], CLIPS[2]})
    assert hub.sent(FRONT) < 1.1 * 4 * MEGABYTE + 300_000  # of buffers on the way, and a directory
    assert not list(folder_of(tmp_path).rglob("*.part"))
