"""A segment at full rate, derived from the real one, of which only the small video and the short log are at hand.

Derived: fcamera.hevc is the small video enlarged; ecamera.hevc shows the same picture where a wide camera would see it,
on grey where it would see more; rlog.zst is the short log, with an event of each camera for each frame. Frame times,
the car and the device are the real ones.
"""

import bz2
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
import zstandard
from scipy.ndimage import map_coordinates

from omni_cli.sources.openpilot_schema import log_schema
from tests.support.model_frames import QCAMERA, V, k_matrix, mapped, rotation
from tests.support.openpilot import copied_frames

FULL_SIZE_PX, WIDE_FOCAL_PX = (1928, 1208), 567.0
GREY = (126, 128, 128)
_CAMERA_STATES = {"roadEncodeIdx": "roadCameraState", "wideRoadEncodeIdx": "wideRoadCameraState"}
# As the device codes them: raw, a keyframe every 30, no frame that leans on a later one.
_X265 = "bframes=0:keyint=30:log-level=none:pools=none:frame-threads=1"


def real_events(segment: Path) -> list:
    """Every event of the real segment's log, as the schema reads it."""
    return list(log_schema().Event.read_multiple_bytes(bz2.decompress((segment / "qlog.bz2").read_bytes())))


def derive_full_rate(real: Path, folder: Path, first: int, end: int) -> None:
    """Write frames first..end-1 of the real segment as a full-rate segment; `first` must be one of its keyframes."""
    folder.mkdir(parents=True)
    events = real_events(real)
    small = copied_frames((real / "qcamera.ts").read_bytes(), first, end)
    (folder / "qcamera.ts").write_bytes(small)
    (folder / "fcamera.hevc").write_bytes(raw_hevc(enlarged(small)))
    (folder / "ecamera.hevc").write_bytes(raw_hevc(seen_wide(small, wide_matrix(events))))
    (folder / "rlog.zst").write_bytes(as_zstd(full_rate_log(events, first, end)))


def full_rate_log(events: list, first: int, end: int) -> Iterator[bytes]:
    """The real log of a video that begins with frame `first`, with an event of each camera for each frame."""
    kinds = [event.which() for event in events]
    states = {kind: events[kinds.index(kind)] for kind in _CAMERA_STATES.values()}
    for kind, event in zip(kinds, events, strict=True):
        if not kind.endswith("EncodeIdx"):
            if kind not in states:
                yield event.as_builder().to_bytes()
        elif first <= getattr(event, kind).segmentId < end:
            if kind in _CAMERA_STATES:
                yield camera_state(states[_CAMERA_STATES[kind]], event)
            index = event.as_builder()
            getattr(index, kind).segmentId -= first
            yield index.to_bytes()


def camera_state(like, indexed) -> bytes:
    """An event of a camera about the frame that an encode index tells of."""
    event, index = like.as_builder(), getattr(indexed, indexed.which())
    state = getattr(event, like.which())
    state.frameId, state.timestampSof, state.timestampEof = index.frameId, index.timestampSof, index.timestampEof
    event.logMonoTime = index.timestampEof + 3_000_000
    return event.to_bytes()


def as_zstd(parts: Iterable[bytes], *, is_ended: bool = True) -> bytes:
    """A stream as a device writes it, block by block: it does not say how long it will be, or else that it ends."""
    stream = zstandard.ZstdCompressor().compressobj()
    end = zstandard.COMPRESSOBJ_FLUSH_FINISH if is_ended else zstandard.COMPRESSOBJ_FLUSH_BLOCK
    return b"".join([*(stream.compress(part) for part in parts), stream.flush(end)])


def small_frames(content: bytes) -> Iterator[av.VideoFrame]:
    with av.open(io.BytesIO(content)) as container:
        yield from container.decode(video=0)


def enlarged(small: bytes) -> Iterator[av.VideoFrame]:
    return (frame.reformat(*FULL_SIZE_PX, interpolation="BICUBIC") for frame in small_frames(small))


def wide_matrix(events: list) -> np.ndarray:
    """From the wide camera's pixels to those of the small video: openpilot's lenses, and how the log says they turn."""
    wide_rpy_rad = [e.liveCalibration.wideFromDeviceEuler for e in events if e.which() == "liveCalibration"][-1]
    width, height = FULL_SIZE_PX
    k_wide = np.array([[WIDE_FOCAL_PX, 0, width / 2], [0, WIDE_FOCAL_PX, height / 2], [0, 0, 1]])
    return k_matrix(QCAMERA) @ V @ rotation(wide_rpy_rad).T @ V.T @ np.linalg.inv(k_wide)


def seen_wide(small: bytes, matrix: np.ndarray) -> Iterator[av.VideoFrame]:
    """What a wide camera would see of the small pictures, and grey where they show nothing."""
    width, height = FULL_SIZE_PX
    places = [seen_places(matrix, *size) for size in ((width, height), *[(width // 2, height // 2)] * 2)]
    for frame in small_frames(small):
        wide = [np.full(inside.shape, grey, np.uint8) for (inside, _), grey in zip(places, GREY, strict=True)]
        for drawn, plane, (inside, place) in zip(wide, planes_of(frame), places, strict=True):
            drawn[inside] = map_coordinates(plane, place, order=1)
        whole = np.concatenate([drawn.reshape(-1, width) for drawn in wide])
        yield av.VideoFrame.from_ndarray(whole, format="yuv420p")


def seen_places(matrix: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels of a plane show a place of the small one (height, width), and its row and column (2, n)."""
    scale = FULL_SIZE_PX[0] / width
    coarser = np.array([[scale, 0, (scale - 1) / 2], [0, scale, (scale - 1) / 2], [0, 0, 1]])
    at = mapped(np.linalg.inv(coarser) @ matrix @ coarser, width, height)
    last = np.array([QCAMERA.width_px / scale, QCAMERA.height_px / scale]) - 1
    inside = ((at >= 0) & (at <= last)).all(axis=-1)
    return inside, at[inside].T[::-1]


def planes_of(frame: av.VideoFrame) -> list[np.ndarray]:
    whole = frame.to_ndarray(format="yuv420p")
    chroma = whole[frame.height :].reshape(2, frame.height // 2, frame.width // 2)
    return [whole[: frame.height], *chroma]


def raw_hevc(frames: Iterable[av.VideoFrame]) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format="hevc") as out:
        track = out.add_stream("libx265", rate=20)
        track.width, track.height = FULL_SIZE_PX
        track.pix_fmt, track.options = "yuv420p", {"preset": "ultrafast", "x265-params": _X265}
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, 1 / track.codec_context.framerate
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    return stream.getvalue()
