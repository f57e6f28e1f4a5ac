"""A repository of two chunks on a loopback hub whose camera zips are large enough to be fetched by clips."""

import contextlib
import hashlib
import io
import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from omni_cli.formats.physical_ai_av import FEATURES
from omni_cli.report import Console
from omni_cli.stages.fetch import FetchRequest, fetch
from tests.support import pai
from tests.support.hub import LoopbackHub, serve_hub

CLIPS = pai.clip_ids(0, 4)
FAR = pai.clip_ids(1, 4)
FRONT, REAR = pai.CAMERAS
VIDEO_BYTES = 150_000


def box(size, seed):
    """Return a box of an mp4 file that players pass over: it makes videos as large as a test needs."""
    return struct.pack(">I4s", size + 8, b"free") + np.random.default_rng(seed).bytes(size)


def write_repository(root):
    pai.write_repository(root, chunks=2, clips=4)
    for chunk, clips in enumerate((CLIPS, FAR)):
        for camera in pai.CAMERAS:
            names = [pai.member(camera, "video", clip) for clip in clips]
            videos = {name: pai.mp4() + box(VIDEO_BYTES, len(camera) + i) for i, name in enumerate(names)}
            pai.edit_zip(pai.zip_path(root, camera, chunk), videos)
    return root


@contextlib.contextmanager
def served(repository, folder, monkeypatch) -> Iterator[LoopbackHub]:
    """Serve a copy of a repository that a test may spoil."""
    with serve_hub(shutil.copytree(repository, folder / "copy")) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def ask(data, *clips, **options):
    given = {"cameras": pai.CAMERAS, "workers": 4, "retry_wait_s": 0.01, "clips": clips, **options}
    return FetchRequest("physical_ai_av", data, **given)


def get(data, *clips, **options):
    return fetch(ask(data, *clips, **options), Console(quiet=True))


def folder_of(data):
    return data / "raw" / "physical_ai_av"


def zip_of(data, camera=FRONT, chunk=0):
    return pai.zip_path(folder_of(data), camera, chunk)


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def of_clips(repository, clips, camera=FRONT, chunk=0):
    whole = members_of(repository if repository.is_file() else pai.zip_path(repository, camera, chunk))
    return {name: content for name, content in whole.items() if name.partition(".")[0] in clips}


def spoil(hub, path, content):
    """Put another content in the place of a file of the repository, with hashes to match: upstream itself is wrong."""
    stored = hub.stored[path]
    stored.place.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    git_sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    hub.stored[path] = type(stored)(path, stored.place, len(content), sha256, git_sha1)


def add_feature(hub, name, clips):
    feature, content = FEATURES[name], io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for seed, clip in enumerate(clips):
            archive.writestr(feature.member(clip, feature.members[0][0]), np.random.default_rng(seed).bytes(100_000))
    add_file(hub, feature.chunk_path(0), content.getvalue())


def add_file(hub, path, content):
    example = next(iter(hub.stored.values()))
    place = Path(str(example.place).removesuffix(example.path)) / path
    place.parent.mkdir(parents=True, exist_ok=True)
    hub.stored[path] = type(example)(path, place, len(content), "", "")
    spoil(hub, path, content)
