"""Several cameras on one canvas, row by row, each with its aspect kept.

Pictures are stored at the size they have on the canvas, one row a camera and instant; the canvas is put together when
a window is read. What no picture covers is black layout: the bars beside a picture of another aspect, and the last two
cells of seven cameras in a 3 x 3 grid.
"""

from collections.abc import Sequence

import numpy as np

from omni_cli.formats.video import Uint8Array
from omni_cli.samples.preprocess import Preprocess


def fit_in_cell(width_px: int, height_px: int, preprocess: Preprocess) -> tuple[int, int]:
    """Return the (width, height) of the largest picture of that aspect which a cell holds."""
    scale = min(preprocess.cell_width_px / width_px, preprocess.cell_height_px / height_px)
    return max(round(width_px * scale), 1), max(round(height_px * scale), 1)


def tile(pictures: Sequence[Uint8Array], preprocess: Preprocess) -> Uint8Array:
    """Return the canvas (height, width, 3) of one instant.

    Args:
        pictures: one (height, width, 3) uint8 picture a camera, in the order of `preprocess.cameras`.
        preprocess: columns and canvas size.
    """
    canvas = np.zeros((preprocess.canvas_height_px, preprocess.canvas_width_px, 3), dtype=np.uint8)
    tile_into(canvas, pictures, preprocess)
    return canvas


def tile_into(canvas: Uint8Array, pictures: Sequence[Uint8Array], preprocess: Preprocess) -> None:
    """Draw the pictures of one instant on a black canvas, each centred in its cell.

    Raises:
        ValueError: there are not as many pictures as cameras, or one is larger than a cell.
    """
    if len(pictures) != len(preprocess.cameras):
        raise ValueError(f"{len(pictures)} pictures for {len(preprocess.cameras)} cameras")
    for position, picture in enumerate(pictures):
        row, column = divmod(position, preprocess.columns)
        height, width = picture.shape[:2]
        top = row * preprocess.cell_height_px + _margin(preprocess.cell_height_px, height)
        left = column * preprocess.cell_width_px + _margin(preprocess.cell_width_px, width)
        canvas[top : top + height, left : left + width] = picture


def _margin(cell_px: int, picture_px: int) -> int:
    if picture_px > cell_px:
        raise ValueError(f"a picture of {picture_px} px does not fit a cell of {cell_px} px")
    return (cell_px - picture_px) // 2
