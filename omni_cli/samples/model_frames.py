"""openpilot's model frames: YUV pictures that a driving model takes as they are, warped out of any camera's frames.

A picture is uint8 (6, 128, 256), values 0 to 255, of YUV 4:2:0 in BT.601 limited range: four quarter-size images with
the luma pixels of even rows and even columns, odd and even, even and odd, odd and odd; then U, then V. The tables of a
warp lie in this very order, so that sampling and packing are one pass.

Two samplings, each as openpilot did it. *bilinear*, until 2026 (`selfdrive/modeld/transforms/*.cl`, `common/mat.h`):
in steps of 1/32 pixel with integer weights, chroma pixels centred between luma pixels. *nearest*, since then
(`selfdrive/modeld/compile_modeld.py`): halves rounded to even, chroma pixels on even luma pixels. Outside the frame
both take the nearest edge pixel. openpilot computes coordinates in single precision, we in double: a coordinate beside
a rounding limit may come out one step further there.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse

from omni_cli.formats.driving_model import PICTURE_SHAPE
from omni_cli.formats.video import Uint8Array
from omni_cli.scene.cameras import CameraModel
from omni_cli.scene.clock import Float64Array
from omni_cli.scene.model_frame import ModelView, chroma_sampling_map, sampling_map

Sampling = Literal["bilinear", "nearest"]
_QUARTERS = ((0, 0), (1, 0), (0, 1), (1, 1))  # first row and first column of the luma pixels of each image
_BITS = 5  # of a pixel's fraction: steps of 1/32
_STEPS = 1 << _BITS
_RGB_FROM_YUV = np.array(  # ITU-R BT.601 with Kr = 0.299, Kb = 0.114; 219 and 224 steps of limited range
    [[1 / 219, 0.0, 1.402 / 224], [1 / 219, -0.344136 / 224, -0.714136 / 224], [1 / 219, 1.772 / 224, 0.0]]
)


class _Table(Protocol):
    def sample(self, plane: Uint8Array, out: Uint8Array) -> None:
        """Fill `out` from a plane of the size that the table was made for."""


@dataclass(frozen=True, eq=False)
class Warp:
    """From the frames of one camera, mounted in one way, to the pictures of one view."""

    width_px: int  # of the frames
    height_px: int
    luma: _Table
    chroma: _Table

    @classmethod
    def of(cls, view: ModelView, camera: CameraModel, camera_R_calib: Float64Array, sampling: Sampling) -> "Warp":
        """Make the tables, for all frames under this mount: 10 to 30 ms of work; 6 MB where bilinear, or 1.3 MB.

        Args:
            view: what the model sees.
            camera: model of the frames, at their size.
            camera_R_calib: (3, 3) rotation from `scene.model_frame.camera_R_calib`.
            sampling: how openpilot sampled when the driving model was trained.
        """
        table = _Bilinear.of if sampling == "bilinear" else _Nearest.of
        width, height = camera.width_px, camera.height_px
        luma_px = sampling_map(view, camera, camera_R_calib)
        quarters_px = np.concatenate([luma_px[row::2, column::2] for row, column in _QUARTERS])
        chroma_px = chroma_sampling_map(view, camera, camera_R_calib, centred=sampling == "bilinear")
        return cls(width, height, table(quarters_px, width, height), table(chroma_px, -(-width // 2), -(-height // 2)))

    def pack(self, y: Uint8Array, u: Uint8Array, v: Uint8Array) -> Uint8Array:
        """Return the picture (6, 128, 256) of one frame, as `formats.video.decode_yuv` gives it.

        Raises:
            ValueError: the frame is not of the size that the camera model is for.
        """
        if y.shape != (self.height_px, self.width_px):
            raise ValueError(f"a frame of {y.shape[1]}x{y.shape[0]} for a warp of {self.width_px}x{self.height_px}")
        picture = np.empty(PICTURE_SHAPE, np.uint8)
        self.luma.sample(y, picture[:4])
        self.chroma.sample(u, picture[4])
        self.chroma.sample(v, picture[5])
        return picture


def unpack_luma(picture: Uint8Array) -> Uint8Array:
    """Return the Y plane (256, 512) of a picture (6, 128, 256)."""
    luma = np.empty((2 * picture.shape[1], 2 * picture.shape[2]), np.uint8)
    for image, (row, column) in zip(picture, _QUARTERS, strict=False):
        luma[row::2, column::2] = image
    return luma


def unpack_rgb(picture: Uint8Array) -> Uint8Array:
    """Return a picture (6, 128, 256) as people look at it: RGB (256, 512, 3), each chroma pixel on four luma pixels."""
    chroma = picture[4:].repeat(2, axis=1).repeat(2, axis=2)
    yuv = np.stack([unpack_luma(picture), *chroma], axis=-1) - np.array([16.0, 128.0, 128.0])
    return np.asarray(np.rint(255 * yuv @ _RGB_FROM_YUV.T).clip(0, 255).astype(np.uint8))


@dataclass(frozen=True, eq=False)
class _Nearest:
    index: npt.NDArray[np.intp]  # into the flat plane, one a pixel of the picture; numpy would widen int32 at each take

    @classmethod
    def of(cls, pixels: Float64Array, width_px: int, height_px: int) -> "_Nearest":
        column, row = np.rint(pixels.reshape(-1, 2).T).astype(np.intp)
        return cls(row.clip(0, height_px - 1) * width_px + column.clip(0, width_px - 1))

    def sample(self, plane: Uint8Array, out: Uint8Array) -> None:
        np.take(plane.reshape(-1), self.index, out=out.reshape(-1), mode="clip")  # "raise" would buffer `out`


@dataclass(frozen=True, eq=False)
class _Bilinear:
    """The kernel as a sparse matrix: four integer weights a row, of sum 32 * 32. Its own 2^15 scale rounds the same."""

    weights: Any  # scipy.sparse.csr_array (pixels of the picture, pixels of the plane) int32

    @classmethod
    def of(cls, pixels: Float64Array, width_px: int, height_px: int) -> "_Bilinear":
        columns, column_weights = _two_taps(pixels[..., 0].ravel(), width_px)
        rows, row_weights = _two_taps(pixels[..., 1].ravel(), height_px)
        index = (rows * np.int32(width_px))[:, None] + columns
        weights = row_weights[:, None] * column_weights
        starts = np.arange(0, index.size + 1, 4, dtype=np.int32)
        shape = (rows.shape[1], width_px * height_px)
        return cls(scipy.sparse.csr_array((_by_pixel(weights), _by_pixel(index), starts), shape=shape))

    def sample(self, plane: Uint8Array, out: Uint8Array) -> None:
        total = self.weights @ plane.reshape(-1)
        total += _STEPS * _STEPS // 2
        total >>= 2 * _BITS
        out.reshape(-1)[:] = total


def _two_taps(coordinate_px: Float64Array, size_px: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the two pixels beside each coordinate, kept inside the plane, and their weights, both (2, n)."""
    steps = np.rint(coordinate_px * _STEPS).astype(np.int32)
    before, fraction = steps >> _BITS, steps & (_STEPS - 1)
    taps = np.stack([before, before + 1]).clip(0, size_px - 1)
    return taps, np.stack([_STEPS - fraction, fraction])


def _by_pixel(values: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Lay the four taps (2, 2, n) of each pixel side by side. They are made apart: numpy is slow along short axes."""
    return values.reshape(4, -1).T.ravel()
