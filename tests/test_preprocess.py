"""The preprocessing against the models' own video processors (golden outputs; tests/make_processor_golden.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from omni_cli.recipes.vlm import Vlm
from omni_cli.samples.tiling import fit_canvas, normalise, patchify
from tests.make_processor_golden import digest, seeded_frames

GOLDEN = json.loads((Path(__file__).parent / "assets" / "processor_golden.json").read_text())


def vision_of(family: str):
    return Vlm(model=f"tiny:{family}").preprocess().vision


@pytest.mark.parametrize("case", GOLDEN)
def test_patches_equal_the_models_own_processor_bit_for_bit(case: str) -> None:
    family, shape = case.split()
    frames, height, width = map(int, shape.split("x"))
    vision = vision_of(family)
    patches = patchify(normalise(seeded_frames(frames, height, width), vision), vision)
    time, rows, columns = GOLDEN[case]["grid"]
    assert patches.shape == (time * rows * columns, 3 * vision.temporal_patch * vision.patch_px**2)
    assert digest(patches) == GOLDEN[case]["sha256"]


def test_preprocess_makes_the_same_patches_from_stored_pictures() -> None:
    preprocess = Vlm(model="tiny:qwen2_5_vl").preprocess()
    shape = (preprocess.num_frames, preprocess.canvas_height_px, preprocess.canvas_width_px)
    frames = seeded_frames(*shape)
    cells = np.stack([preprocess.cut(canvas) for canvas in frames.permute(0, 2, 3, 1).numpy()])
    pictures = torch.from_numpy(cells)[None].expand(2, *preprocess.window_shape)
    expected = patchify(normalise(frames, preprocess.vision), preprocess.vision)
    assert torch.equal(preprocess.pixel_values(pictures), torch.cat([expected, expected]))
    time, rows, columns = preprocess.grid
    assert preprocess.visual_tokens == time * rows * columns // 4


@pytest.mark.parametrize(("family", "multiple"), [("qwen2_5_vl", 28), ("qwen3_vl", 32)])
def test_canvas_is_rounded_to_the_grid(family: str, multiple: int) -> None:
    for asked in (1, 100, 504, 896):
        width, height = fit_canvas(asked, 16 / 9, vision_of(family))
        assert width % multiple == height % multiple == 0
        assert abs(width - max(asked, multiple)) <= multiple / 2


def test_a_canvas_off_the_grid_is_refused() -> None:
    preprocess = Vlm(model="tiny:qwen2_5_vl").preprocess()
    values = {**preprocess.model_dump(), "canvas_width_px": 500}
    with pytest.raises(ValueError, match="not a multiple of 28"):
        type(preprocess).model_validate(values)
