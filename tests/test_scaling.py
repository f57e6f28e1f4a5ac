"""Pictures are scaled by way of planes where that is faster: byte for byte what FFmpeg makes of a frame in one step."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation

from omni_cli.formats.video import decode

ONE_STEP = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
CODED_PX = (146, 120)
COARSER_PX = [(146, 60), (97, 60), (73, 59), (42, 33), (200, 7), (3, 2)]  # at most half as high: by way of planes
FINER_PX = [(146, 120), (97, 61), (97, 80), (73, 90), (146, 119), (200, 130)]
CODED = [  # pixel format, AVColorSpace, AVColorRange
    *[(name, 2, 1) for name in ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "gray", "bgr0")],
    ("yuv420p", 1, 1),
    ("yuv420p", 5, 2),
    ("yuv444p", 9, 1),
]


def noise(pixel_format: str, color_space: int, color_range: int) -> tuple[bytes, av.VideoFrame]:
    """One frame of noise without loss in Matroska, and the frame."""
    rng, stream = np.random.default_rng(0), io.BytesIO()
    frame = av.VideoFrame(*CODED_PX, pixel_format)
    frame.pts, frame.time_base = 0, Fraction(1, 20)
    frame.colorspace, frame.color_range = color_space, color_range
    top = 1 << frame.format.components[0].bits
    for plane in frame.planes:
        samples = rng.integers(0, top, plane.buffer_size // (2 if top > 256 else 1))
        plane.update(samples.astype(np.uint16 if top > 256 else np.uint8).tobytes())
    with av.open(stream, "w", format="matroska") as out:
        track = out.add_stream("ffv1", rate=20)
        track.width, track.height, track.pix_fmt = *CODED_PX, pixel_format
        track.codec_context.colorspace, track.codec_context.color_range = color_space, color_range
        out.mux(track.encode(frame))
        out.mux(track.encode(None))
    return stream.getvalue(), frame


@pytest.mark.parametrize("coded", CODED, ids=str)
def test_a_picture_is_what_ffmpeg_scales_in_one_step(coded):
    content, frame = noise(*coded)
    for width, height in (*COARSER_PX, *FINER_PX):
        [(_, picture)] = decode(content, "noise", [0], width_px=width, height_px=height)
        expected = frame.reformat(width, height, "rgb24", interpolation=ONE_STEP, threads=1).to_ndarray()
        np.testing.assert_array_equal(picture, expected, f"{width}x{height}")
