"""Videos that are damaged, odd or hostile: each is called by its name, and none harms the audit."""

import io
import random
from fractions import Fraction
from functools import cache, partial

import av
import numpy as np
import pytest

from omni_cli.formats.video_check import examine, read_header
from omni_cli.stages.checks.pictures import look, picture_hashes
from omni_cli.stages.checks.videos import deep_findings, header_findings
from omni_cli.stages.pool import run_pool

FRAMES, RATE = 30, 10
TIMES_US = np.arange(FRAMES, dtype=np.int64) * 100_000 + 7
STANDING, MOVING = 0.0, 8.0


@cache
def textures(width: int = 64, height: int = 48, seed: int = 0) -> tuple[np.ndarray, ...]:
    """A camera that moves over a pattern."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(30, 220, (height // 8 + 12, width // 8 + 12, 3), dtype=np.uint8)
    pattern = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    return tuple(np.ascontiguousarray(pattern[i : i + height, 2 * i : 2 * i + width]) for i in range(FRAMES))


@cache
def mp4(
    *,
    pixel_format: str = "yuv420p",
    b_frames: int = 0,
    start: int = 0,
    late: int = 0,
    turn: int = 0,
    codec: str = "libx264",
) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        track = container.add_stream(codec, rate=RATE)
        track.width, track.height, track.pix_fmt, track.thread_count = 64, 48, pixel_format, 1
        track.options = {"bf": str(b_frames), "g": "10", "crf": "20"}
        track.time_base = track.codec_context.time_base = Fraction(1, 1000)
        if turn:
            track.set_display_rotation(turn)
        for number, picture in enumerate(textures()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = start + number * 100 + (late if number >= 12 else 0)
            frame.time_base = Fraction(1, 1000)
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return stream.getvalue()


def annexb(*sizes: tuple[int, int]) -> bytes:
    """Raw H.264 whose picture changes its size."""
    content = b""
    for width, height in sizes:
        encoder = av.CodecContext.create("libx264", "w")
        encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
        encoder.time_base, encoder.framerate, encoder.thread_count = Fraction(1, RATE), Fraction(RATE), 1
        encoder.options = {"g": "10", "bf": "0"}
        for number in range(10):
            grey = np.full((height, width, 3), 20 * number + 20, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts = number
            content += b"".join(bytes(packet) for packet in encoder.encode(frame))
        content += b"".join(bytes(packet) for packet in encoder.encode(None))
    return content


def codes(
    content: bytes, times_us: np.ndarray = TIMES_US, *, deep: bool = True, size=(64, 48), speed=MOVING
) -> set[str]:
    found = list(header_findings(content, "clip", times_us, size))
    if deep:
        at_speed = partial(np.full_like, dtype=np.float64, fill_value=speed)
        found += deep_findings(content, "clip", times_us, len(times_us), at_speed)[1]
    return {finding.code for finding in found}


def _corrupt(content: bytes) -> bytes:
    at = content.index(b"mdat") + 4
    middle = at + (len(content) - at) // 3
    return content[:middle] + bytes(200) + content[middle + 200 :]


@pytest.mark.fault("F15")
@pytest.mark.parametrize(
    ("content", "expected", "is_deep"),
    [
        (mp4, set(), True),
        (lambda: mp4()[: len(mp4()) // 2], {"unreadable-video"}, False),
        (lambda: mp4().replace(b"moov", b"none"), {"unreadable-video"}, False),
        (lambda: b"", {"unreadable-video"}, False),
        (lambda: b"\0" * 4096, {"unreadable-video"}, False),
        (lambda: _corrupt(mp4()), {"unreadable-video", "damaged-frames", "concealed-damage", "lost-frames"}, True),
        (lambda: mp4(start=1500), {"video-start"}, False),
        (lambda: mp4(b_frames=2), set(), True),
        (lambda: mp4(late=60), {"variable-rate"}, False),
        (lambda: mp4(late=400), {"variable-rate", "times-disagree"}, False),
        (lambda: mp4(pixel_format="yuv420p10le"), {"pixel-format"}, False),
        (lambda: mp4(codec="libx265"), set(), True),
        (lambda: mp4(turn=90), {"rotated"}, True),
        (lambda: annexb((64, 48), (96, 64)), {"size-changes"}, True),
    ],
)
def test_a_video_is_called_by_its_defect(content, expected, is_deep):
    times = TIMES_US[:20] if content() == annexb((64, 48), (96, 64)) else TIMES_US
    found = codes(content(), times, deep=is_deep)
    assert found <= expected if len(expected) > 2 else expected <= found
    assert bool(found) == bool(expected)


@pytest.mark.fault("F15", "F17")
def test_frames_and_times_must_be_as_many(request):
    assert codes(mp4(), TIMES_US[:-2], deep=False) == {"frame-count"}
    assert codes(mp4(), np.arange(33) * 100_000, deep=False) == {"frame-count"}
    assert codes(mp4(), size=(1920, 1080), deep=False) == {"other-size"}


@pytest.mark.fault("F15")
def test_a_picture_of_sixteen_thousand_pixels_is_not_decoded():
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("mjpeg", rate=RATE)
        track.width, track.height, track.pix_fmt = 16_384, 16, "yuvj420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16_384, 3), np.uint8), format="rgb24")
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    assert codes(stream.getvalue()) == {"oversized-picture"}


def _fuzzed(seed: int) -> str:
    """Change some bytes of the index of a video, and check it as an audit would."""
    rng, content = random.Random(seed), bytearray(mp4())
    first = content.index(b"moov")
    for _ in range(rng.randrange(1, 6)):
        content[rng.randrange(first, len(content))] = rng.randrange(256)
    return ",".join(sorted(codes(bytes(content))))


@pytest.mark.fault("F15", "F20")
def test_a_fuzzed_index_never_harms_the_audit():
    """Each is judged, or its worker dies alone."""
    limits = {"attempts": 1, "timeout_s": 60.0, "memory_bytes": 2 << 30}
    outcomes = list(run_pool(_fuzzed, range(350), workers=1, **limits))
    judged = [outcome for outcome in outcomes if outcome.result is not None]
    assert [outcome.error for outcome in outcomes if outcome.result is None] == []
    assert sum("unreadable-video" in str(outcome.result) for outcome in judged) > 50


def test_black_and_frozen_pictures_are_found_and_standing_still_is_not():
    thumbs = examine(mp4(), "clip").thumbs
    moving, standing = (lambda times, speed=speed: np.full(len(times), speed) for speed in (MOVING, STANDING))
    assert look(thumbs, TIMES_US, moving)[1] == []
    black = thumbs.copy()
    black[5:8] = 16
    facts, found = look(black, TIMES_US, moving)
    assert (facts.num_black, [(one.code, one.severity) for one in found]) == (3, [("black-frames", "warn")])
    frozen = thumbs.copy()
    frozen[10:20] = frozen[10]
    facts, found = look(frozen, TIMES_US, moving)
    assert (facts.num_frozen, [(one.code, one.severity) for one in found]) == (9, [("frozen-frames", "refuse")])
    assert look(frozen, TIMES_US, standing)[1] == []
    assert look(frozen, TIMES_US, lambda times: np.full(len(times), np.nan))[1] == []


def test_difference_hashes_are_those_of_a_plain_loop():
    thumbs = examine(mp4(), "clip").thumbs
    wanted = []
    for share in range(1, 16, 2):
        picture = thumbs[share * len(thumbs) // 16].astype(float)
        bits = 0
        for row in range(8):
            for column in range(8):
                left = picture[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mean()
                right = picture[4 * row : 4 * row + 4, 4 * column + 4 : 4 * column + 8].mean()
                bits |= int(right < left) << (8 * row + column)
        wanted.append(bits)
    assert picture_hashes(thumbs) == tuple(wanted)
    assert picture_hashes(np.full_like(thumbs, 90)) == (0,) * 8  # nothing to hash


def test_a_header_is_read_without_the_pictures():
    content = mp4()
    at = content.index(b"mdat") + 4
    size = int.from_bytes(content[at - 8 : at - 4], "big") - 8
    blind = read_header(content[:at] + b"\xff" * size + content[at + size :], "clip")
    seen = read_header(content, "clip")
    assert (blind.num_frames, blind.start_us, seen.num_frames) == (FRAMES, 0, FRAMES)
    assert set(seen.step_us.tolist()) == {100_000}
