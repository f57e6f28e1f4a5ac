"""Small openpilot segments with known times, speed and steering, made with the real schema."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from omni_cli.sources.openpilot_schema import log_schema

DONGLE, LOG_ID = "0123456789abcdef", "00000008--0696c823fa"
BOOT_US = 5_000_000  # the first frame's time
FRAME_US = 50_000


def frame_times_us(count: int) -> np.ndarray:
    """20 Hz with a jitter that no frame rate explains, on the 90 kHz grid of MPEG-TS to a microsecond."""
    ticks = (np.arange(count) * FRAME_US + BOOT_US + np.arange(count) % 7 * 300) * 9 // 100
    return np.round(ticks * 100 / 9).astype(np.int64)


def speed_at(time_us: float) -> float:
    return 10.0 + 2.0 * (time_us - BOOT_US) / 1e6


def events(count: int, segment: int = 0, first_speed_us: int = -100_000) -> bytes:
    """Out of time order, as in real logs: encode indices first, then the car."""
    log, out = log_schema(), []
    init = log.Event.new_message(logMonoTime=0)
    init.init("initData").version = "0.9.9"
    out.append(init)
    for kind in ("qRoadEncodeIdx", "roadEncodeIdx"):
        for i, time_us in reversed(list(enumerate(frame_times_us(count)))):
            event = log.Event.new_message(logMonoTime=int(time_us + 17_000) * 1000)
            index = event.init(kind)
            index.segmentId, index.segmentNum, index.timestampEof = i, segment, int(time_us) * 1000 + 499
            out.append(event)
    for time_us in range(BOOT_US + first_speed_us, BOOT_US + count * FRAME_US + 100_000, 10_000):
        event = log.Event.new_message(logMonoTime=time_us * 1000)
        state = event.init("carState")
        state.vEgo, state.steeringAngleDeg = speed_at(time_us), 3.0
        out.append(event)
    return b"".join(event.to_bytes() for event in out)


def frames(count: int, size: tuple[int, int] = (96, 64)):
    for i in range(count):
        picture = np.zeros((size[1], size[0], 3), np.uint8)
        picture[:, : size[0] * (i + 1) // count] = 200
        yield picture


def encode(container: str, codec: str, times_us: np.ndarray, options: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as out:
        track = out.add_stream(codec, rate=20)
        track.width, track.height, track.pix_fmt, track.options = 96, 64, "yuv420p", options
        track.codec_context.time_base = Fraction(1, 90_000)
        for time_us, picture in zip(times_us, frames(len(times_us)), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(int(time_us) * 9 / 100), Fraction(1, 90_000)
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    return stream.getvalue()


def qcamera(times_us: np.ndarray) -> bytes:
    return encode("mpegts", "libx264", times_us, {"preset": "ultrafast", "bf": "0", "g": "15"})


def raw_hevc(times_us: np.ndarray) -> bytes:
    quiet = "bframes=0:keyint=20:log-level=none:pools=none:frame-threads=1"
    return encode("hevc", "libx265", times_us, {"preset": "ultrafast", "x265-params": quiet})


def write_segment(folder: Path, count: int = 40, *, segment: int = 0) -> Path:
    """Write qcamera.ts and qlog of one segment straight into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qcamera.ts").write_bytes(qcamera(frame_times_us(count)))
    (folder / "qlog").write_bytes(events(count, segment))
    return folder
