"""A repository whose camera zips are random bytes beside real small tables, and fetches of it by chunks."""

import fcntl
from pathlib import Path

import numpy as np

from omni_cli import files
from omni_cli.formats.physical_ai_av import CAMERAS, FEATURES
from omni_cli.report import Console
from omni_cli.stages.fetch import FetchRequest, fetch
from tests.support import pai
from tests.support.folders import tree

BIG = CAMERAS[:3]
BIG_BYTES = 600_000
TOKEN = "hf_secretSECRETsecret"
_TABLES = ("egomotion", "camera_intrinsics", "sensor_extrinsics", "vehicle_dimensions")
_RECORDS = ("revision.json", "manifest.json", ".lock")


def write_repository(root: Path, chunks: int = 3, *, clips: int = 2, zip_bytes: int = BIG_BYTES) -> Path:
    """Write real small tables, and random bytes for the zips of three cameras."""
    pai.write_repository(root, chunks, clips)
    random = np.random.default_rng(7)
    for chunk in range(chunks):
        for camera in BIG:
            path = pai.zip_path(root, camera, chunk)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(random.bytes(zip_bytes + chunk))
    return root


def ask(data, **options):
    defaults = {"source": "physical_ai_av", "chunks": "2", "cameras": BIG, "workers": 4, "retry_wait_s": 0.01}
    return FetchRequest(data=data, **{**defaults, **options})


def get(data, **options):
    return fetch(ask(data, **options), Console(quiet=True))


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file in a folder but those of our own records."""
    return {path: digest for path, digest in tree(folder).items() if not _is_record(path)}


def _is_record(path: str) -> bool:
    return path.endswith(files.RECEIPT_SUFFIX) or Path(path).name in _RECORDS


def expected(repository: Path, chunks) -> dict[str, str]:
    """What a fetch of these chunks must leave: the indices, and every file asked for that exists."""
    wanted = {FEATURES[name].chunk_path(chunk) for chunk in chunks for name in (*BIG, *_TABLES)}
    return {path: digest for path, digest in contents(repository).items() if path in wanted or "chunk_" not in path}


def just_before_the_lock(monkeypatch, another) -> None:
    """Let another fetch do all of its work between what the next one reads first and the moment it holds the folder."""
    flock = fcntl.flock

    def interleaved(stream, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        another()
        flock(stream, operation)

    monkeypatch.setattr(fcntl, "flock", interleaved)
