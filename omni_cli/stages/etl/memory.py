"""How much memory a worker may have: its share of the machine, so that all of them together never exhaust it."""

from math import prod

from omni_cli.samples.camera_frames import camera_frames
from omni_cli.samples.preprocess import Preprocess
from omni_cli.samples.tables import FRAME_ROWS_PER_BATCH
from omni_cli.scene.recording import Recording
from omni_cli.stages.memory import GIB, machine_bytes

_SHARE = 0.9  # the rest is for the supervisor and the system
_MAPPED_BYTES = GIB  # libraries map 1.5 GiB before the first recording is opened, and touch 0.5 (measured: torch 2.13)
_LEAST_BYTES = GIB
_LIBRARY_BYTES, _DECODER_FRAMES = 320 << 20, 20  # measured: numpy, torch, pyarrow, PyAV; H.264 keeps up to 16 frames


def worker_bytes(workers: int, worker_gb: float | None) -> int:
    """Return the limit of a worker's private memory (RLIMIT_DATA).

    Args:
        workers: how many share the machine.
        worker_gb: what each may use, in GiB; None: an equal share.
    """
    own = _SHARE * machine_bytes() / max(workers, 1) if worker_gb is None else worker_gb * GIB
    return round(max(own, _LEAST_BYTES)) + _MAPPED_BYTES


def peak_bytes(recording: Recording, preprocess: Preprocess) -> int:
    """Return how much memory the work on a recording takes at its peak, however long it is; a teacher comes on top.

    The libraries, the frames that a decoder holds, a batch that is written and one that is filled; within a tenth of
    what was measured at 1080p.
    """
    streams = [recording.cameras[name] for name in preprocess.cameras]
    sizes = [camera_frames(f"{recording.id} {stream.name}", stream).size_px for stream in streams]
    frame_bytes = max(width * height for width, height in sizes) * 3 // 2
    picture_bytes = prod(preprocess.picture_shape)
    return _LIBRARY_BYTES + _DECODER_FRAMES * frame_bytes + 2 * FRAME_ROWS_PER_BATCH * picture_bytes
