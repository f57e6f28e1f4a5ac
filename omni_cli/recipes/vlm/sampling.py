"""From settings to the frozen preprocessing: cameras, tiles, canvas and the backbone's grid."""

import math

from omni_cli.errors import UsageError
from omni_cli.formats import video
from omni_cli.formats.physical_ai_av import CAMERA_SETS, expand_cameras
from omni_cli.models import families
from omni_cli.recipes.vlm.settings import VlmSample
from omni_cli.samples.tiling import TiledPreprocess, VisionGrid, fit_canvas

_MAX_CAMERAS = 9  # of a 3x3 grid


def tiled_preprocess(model: str, sample: VlmSample) -> TiledPreprocess:
    """Return the preprocessing that a model and its [sample] table ask for.

    Raises:
        UsageError: there are no cameras, or too many.
    """
    vision = _vision_grid(model)
    cameras = camera_names(sample.cameras)
    columns = math.ceil(math.sqrt(len(cameras)))
    rows = math.ceil(len(cameras) / columns)
    width, height = fit_canvas(sample.canvas_px, sample.aspect * columns / rows, vision)
    return TiledPreprocess(
        cameras=cameras,
        columns=columns,
        canvas_width_px=width,
        canvas_height_px=height,
        num_frames=sample.window,
        rate_hz=sample.rate_hz,
        labels=sample.labels,
        past_speed=sample.past_speed,
        decoder=sample.decoder,
        decoder_id=video.decoder_id(sample.decoder),
        vision=vision,
    )


def camera_names(text: str) -> tuple[str, ...]:
    """Return the cameras of a set, or the names between commas.

    Raises:
        UsageError: there are none, or too many for a 3x3 grid.
    """
    names = expand_cameras(text)
    if not 1 <= len(names) <= _MAX_CAMERAS:
        raise UsageError(f"cameras {text!r}: expected {', '.join(CAMERA_SETS)}, or 1 to 9 names with commas")
    return names


def _vision_grid(model: str) -> VisionGrid:
    family = families.family_of(model)
    return VisionGrid(
        family=family.name,  # type: ignore[arg-type]  # the table's keys are the literal's values
        patch_px=family.patch_px,
        merge=family.merge,
        temporal_patch=family.temporal_patch,
        mean=family.mean,
        std=family.std,
        reads="frames" if family.reads_frames else "patches",
        side_px=families.side_px(model),
        closing_tokens=family.closing_tokens,
    )
