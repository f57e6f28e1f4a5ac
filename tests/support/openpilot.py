"""Small openpilot segments with known times, speed and steering, made with the real schema."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from omni_cli.sources.openpilot_schema import log_schema

DONGLE, LOG_ID = "0123456789abcdef", "00000008--0696c823fa"
BOOT_US = 5_000_000  # the first frame's time
FRAME_US = 50_000


def frame_times_us(count: int, first: int = 0) -> np.ndarray:
    """20 Hz with a jitter that no frame rate explains, on the 90 kHz grid of MPEG-TS to a microsecond.

    `first` is the number of the first frame in its drive.
    """
    number = first + np.arange(count)
    ticks = (number * FRAME_US + BOOT_US + number % 7 * 300) * 9 // 100
    return np.round(ticks * 100 / 9).astype(np.int64)


def speed_at(time_us: float) -> float:
    return 10.0 + 2.0 * (time_us - BOOT_US) / 1e6


def events(count: int, segment: int = 0, first_speed_us: int = -100_000, *, first: int = 0) -> bytes:
    """Out of time order, as in real logs: encode indices first, then the car.

    The car is heard a little before the first frame and after the last, so that a later segment repeats the one before.
    """
    log, out, begin_us = log_schema(), [], BOOT_US + first * FRAME_US
    init = log.Event.new_message(logMonoTime=0)
    init.init("initData").version = "0.9.9"
    out.append(init)
    for kind in ("qRoadEncodeIdx", "roadEncodeIdx"):
        for i, time_us in reversed(list(enumerate(frame_times_us(count, first)))):
            event = log.Event.new_message(logMonoTime=int(time_us + 17_000) * 1000)
            index = event.init(kind)
            index.segmentId, index.segmentNum, index.timestampEof = i, segment, int(time_us) * 1000 + 499
            index.frameId = first + i
            out.append(event)
    for time_us in range(begin_us + first_speed_us, begin_us + count * FRAME_US + 100_000, 10_000):
        event = log.Event.new_message(logMonoTime=time_us * 1000)
        state = event.init("carState")
        state.vEgo, state.steeringAngleDeg = speed_at(time_us), 3.0
        out.append(event)
    return b"".join(event.to_bytes() for event in out)


def event(kind: str, body: dict, time_us: int = BOOT_US, *, valid: bool = True) -> bytes:
    """One event of any kind."""
    return log_schema().Event.new_message(logMonoTime=time_us * 1000, valid=valid, **{kind: body}).to_bytes()


def every(kind: str, bodies: list[dict], step_us: int = 250_000) -> bytes:
    """Events of one kind, one after the other from the first frame on."""
    return b"".join(event(kind, body, BOOT_US + i * step_us) for i, body in enumerate(bodies))


def calibration(rpy_rad: tuple[float, ...], status: str = "calibrated", **more) -> dict:
    """The body of a liveCalibration."""
    return {"rpyCalib": list(rpy_rad), "calStatus": status, "height": [1.3]} | more


def rotation(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Rz Ry Rx, written out."""
    cr, sr, cp, sp, cy, sy = (f(angle) for angle in (roll, pitch, yaw) for f in (np.cos, np.sin))
    rx = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    ry = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    return np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]]) @ ry @ rx


def frame_indices(kind: str, count: int, first_id: int, segment: int = 0) -> bytes:
    """Encode indices alone; the first frame's id is `first_id`."""
    times_ns = [int(time_us) * 1000 + 499 for time_us in frame_times_us(count)]
    bodies = [
        {"segmentId": i, "segmentNum": segment, "frameId": first_id + i, "timestampEof": time_ns}
        for i, time_ns in enumerate(times_ns)
    ]
    return every(kind, bodies, FRAME_US)


def xyzt(*columns, **more) -> dict:
    return dict(zip("xyz", ([float(v) for v in column] for column in columns), strict=True)) | more


def model(frame_id: int, *, shift: float = 0.0, leads: int = 3) -> dict:
    """The body of a modelV2 whose every number tells where it belongs: frame, part, point."""
    points = np.arange(33) + shift
    std = {f"{axis}Std": (points / 100 + i).tolist() for i, axis in enumerate("xyz")}
    lines = [xyzt(points, points * 0 + line, points / 10 + line) for line in range(4)]
    edges = [xyzt(points, points * 0 - 5 + edge, points / 10) for edge in range(2)]
    lead = [
        {"prob": 0.9 - i / 10, "x": [30.0 + i, *[0.5] * 5], "y": [1.0 + i, *[9.0] * 5], "v": [20.0 + i] * 6,
         "a": [0.1] * 6}
        for i in range(leads)
    ]  # fmt: skip
    return {
        "frameId": frame_id,
        "position": xyzt(points, points / 10, points / 20, **std),
        "laneLines": lines,
        "laneLineProbs": [0.1, 0.2, 0.3, 0.4],
        "roadEdges": edges,
        "leadsV3": lead,
    }


def frames(count: int, size: tuple[int, int] = (96, 64)):
    for i in range(count):
        picture = np.zeros((size[1], size[0], 3), np.uint8)
        picture[:, : size[0] * (i + 1) // count] = 200
        yield picture


def encode(
    container: str, codec: str, times_us: np.ndarray, options: dict[str, str], size: tuple[int, int] = (96, 64)
) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as out:
        track = out.add_stream(codec, rate=20)
        track.width, track.height, track.pix_fmt, track.options = *size, "yuv420p", options
        track.codec_context.time_base = Fraction(1, 90_000)
        for time_us, picture in zip(times_us, frames(len(times_us), size), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(int(time_us) * 9 / 100), Fraction(1, 90_000)
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    return stream.getvalue()


def qcamera(times_us: np.ndarray, size: tuple[int, int] = (96, 64)) -> bytes:
    return encode("mpegts", "libx264", times_us, {"preset": "ultrafast", "bf": "0", "g": "15"}, size)


def raw_hevc(times_us: np.ndarray) -> bytes:
    quiet = "bframes=0:keyint=20:log-level=none:pools=none:frame-threads=1"
    return encode("hevc", "libx265", times_us, {"preset": "ultrafast", "x265-params": quiet})


def write_segment(folder: Path, count: int = 40, *, segment: int = 0, first: int = 0) -> Path:
    """Write qcamera.ts and qlog of one segment straight into `folder`; `first` is its first frame's number."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qcamera.ts").write_bytes(qcamera(frame_times_us(count, first)))
    (folder / "qlog").write_bytes(events(count, segment, first=first))
    return folder


def write_route(folder: Path, counts: Sequence[int], *, first_segment: int = 0) -> list[Path]:
    """Write segments of so many frames, each going on where the one before ended, into folders of `folder`."""
    firsts = np.cumsum([0, *counts[:-1]]).tolist()
    return [
        write_segment(folder / f"{LOG_ID}--{first_segment + i}", count, segment=first_segment + i, first=first)
        for i, (count, first) in enumerate(zip(counts, firsts, strict=True))
    ]


def drive_folder(data: Path, number: int) -> Path:
    """Where the one segment of a drive lies under DATA/raw/openpilot."""
    return data / "raw" / "openpilot" / DONGLE / f"{number:08x}--0696c823fa--0"


def recording_id(number: int) -> str:
    return f"{DONGLE}_{number:08x}--0696c823fa--0"


def write_drives(data: Path, count: int) -> Path:
    """Write so many drives of one segment each, none as long as another, under DATA/raw/openpilot; return DATA."""
    for number in range(count):
        write_segment(drive_folder(data, number), 40 + 4 * number)
    return data


def copied_frames(content: bytes, first: int, end: int) -> bytes:
    """Frames first..end-1 of an MPEG-TS without B-frames, packet by packet; `first` must be a keyframe."""
    copy = io.BytesIO()
    with av.open(io.BytesIO(content)) as source, av.open(copy, "w", format="mpegts") as out:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.size][first:end]
        assert packets[0].is_keyframe
        track = out.add_stream_from_template(stream)
        for packet in packets:
            packet.stream = track
            out.mux(packet)
    return copy.getvalue()


def cut_log(content: bytes, first: int, end: int, segment: int, repeated_us: int = 200_000) -> bytes:
    """The part of a segment's log about frames first..end-1, as the log of a segment of its own.

    Everything else goes by the time at which frames were seen; the start of a log repeats the end of the one before.
    """
    found = list(log_schema().Event.read_multiple_bytes(content))
    seen_ns = {e.roadEncodeIdx.segmentId: e.roadEncodeIdx.timestampEof for e in found if e.which() == "roadEncodeIdx"}
    begin_ns, end_ns = seen_ns[first] - repeated_us * 1000 if first else 0, seen_ns.get(end, 2**63)
    kept = []
    for event in found:
        if event.which().endswith("EncodeIdx"):
            if first <= getattr(event, event.which()).segmentId < end:
                kept.append(_moved(event, first, segment))
        elif event.which() == "initData" or begin_ns <= event.logMonoTime < end_ns:
            kept.append(event.as_builder().to_bytes())
    return b"".join(kept)


def _moved(event, first: int, segment: int) -> bytes:
    builder = event.as_builder()
    index = getattr(builder, event.which())
    index.segmentId, index.segmentNum = index.segmentId - first, segment
    return builder.to_bytes()
