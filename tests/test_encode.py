"""What the encoder writes depends on the pictures alone."""

import io
from fractions import Fraction

import numpy as np

from omni_cli.formats.video import encode_h264


def test_pictures_become_the_same_bytes_whatever_the_memory_held_before():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (30, 40, 3)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    pictures = [blocks[row : row + 54, 2 * row : 2 * row + 96] for row in range(12)]  # six macroblocks wide
    held, written = [], set()
    for _ in range(60):
        held = [*held[-2:], _litter(rng)]
        stream = io.BytesIO()
        encode_h264(stream, pictures, rate_hz=Fraction(10), gop=10)
        written.add(stream.getvalue())
    assert len(written) == 1


def _litter(rng):
    """Leave small numbers all over the heap: x264 took them for motion vectors, in one of five videos."""
    blocks = [rng.integers(-128, 128, int(size), dtype=np.int16) for size in rng.choice([512, 4096, 32768], 40)]
    return blocks[1::2]
