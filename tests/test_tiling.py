"""Where each camera lies on the canvas."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omni_cli.formats.physical_ai_av import CAMERA_SETS
from tests.support.drives import preprocess, tile


def picture(level, width, height):
    return np.full((height, width, 3), level, dtype=np.uint8)


def test_seven_cameras_lie_row_by_row_and_two_cells_stay_empty():
    layout = preprocess(cameras=CAMERA_SETS["7-cam"], columns=3, canvas_width_px=168, canvas_height_px=84)
    assert (layout.cell_width_px, layout.cell_height_px) == (56, 28)
    canvas = tile([picture(10 * (k + 1), 50, 28) for k in range(7)], layout)
    for camera in range(9):
        row, column = divmod(camera, 3)
        cell = canvas[28 * row : 28 * row + 28, 56 * column : 56 * column + 56]
        level = 10 * (camera + 1) if camera < 7 else 0
        assert (cell[:, 3:53] == level).all()
        assert not cell[:, :3].any()
        assert not cell[:, 53:].any()


def test_a_tall_picture_has_its_bars_left_and_right_and_a_wide_one_above_and_below():
    layout = preprocess(cameras=("a", "b"), columns=2, canvas_width_px=112, canvas_height_px=56)
    canvas = tile([picture(200, 28, 56), picture(100, 56, 21)], layout)
    assert (canvas[:, 14:42] == 200).all()
    assert not canvas[:, :14].any()
    assert not canvas[:, 42:56].any()
    assert (canvas[17:38, 56:] == 100).all()
    assert not canvas[:17, 56:].any()
    assert not canvas[38:, 56:].any()


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_a_fitted_picture_fills_one_side_of_the_cell_and_keeps_its_aspect(width, height):
    layout = preprocess()
    cell = layout.cell_width_px, layout.cell_height_px
    fitted = layout.fit_in_cell(width, height)
    assert fitted[0] <= cell[0]
    assert fitted[1] <= cell[1]
    assert fitted[0] == cell[0] or fitted[1] == cell[1]
    scale = min(cell[0] / width, cell[1] / height)
    assert abs(fitted[0] - width * scale) <= 1
    assert abs(fitted[1] - height * scale) <= 1


@pytest.mark.parametrize("cameras", [1, 4, 7])
def test_the_device_puts_canvases_together_as_people_are_shown_them(cameras):
    layout = preprocess(
        cameras=CAMERA_SETS["7-cam"][:cameras], columns=min(cameras, 3), canvas_width_px=112, canvas_height_px=84
    )
    pictures = np.random.default_rng(0).integers(1, 256, (2, *layout.window_shape), dtype=np.uint8)
    canvases = layout.canvases(torch.from_numpy(pictures)).numpy()
    assert canvases.shape == (2, layout.num_frames, *layout.canvas_shape)
    for window, instants in zip(canvases, pictures, strict=True):
        for canvas, cells in zip(window, instants, strict=True):
            np.testing.assert_array_equal(canvas, layout.shown(cells))
            assert (canvas > 0).sum() == cells.size  # all of them, and black elsewhere


def test_a_canvas_is_cut_into_the_cells_that_it_is_put_together_of():
    layout = preprocess(cameras=CAMERA_SETS["7-cam"], columns=3, canvas_width_px=112, canvas_height_px=84)
    cells = np.random.default_rng(0).integers(0, 256, layout.window_shape[1:], dtype=np.uint8)
    np.testing.assert_array_equal(layout.cut(layout.shown(cells)), cells)


def test_a_wrong_number_of_pictures_or_one_too_large_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        tile([picture(1, 8, 8)], preprocess())
    with pytest.raises(ValueError, match="57 px does not fit a cell of 56 px"):
        tile([picture(1, 57, 8)] * 4, preprocess())
