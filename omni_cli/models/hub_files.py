"""What `AutoProcessor` reads beside a model's weights, written without the library (torchvision) that it needs."""

from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.models.families import VisionFamily

_CLASSES = {
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}


def write_processor_config(folder: Path, family: VisionFamily, *, canvas_px: tuple[int, int], num_frames: int) -> None:
    """Write `processor_config.json` and `preprocessor_config.json`.

    The bounds on the size hold exactly one canvas: a canvas of ours is never resized, and no frame is dropped.

    Args:
        folder: of the model.
        family: its vision backbone.
        canvas_px: width and height of a window's canvases.
        num_frames: canvases in a window.
    """
    processor, video_processor = _CLASSES[family.name]
    # Qwen2.5's video processor bounds the pixels of one frame, Qwen3's those of the whole video.
    pixels = canvas_px[0] * canvas_px[1] * (num_frames if family.name == "qwen3_vl" else 1)
    video = {
        "video_processor_type": video_processor,
        **_vision(family, pixels),
        "do_sample_frames": False,
        "cap_pixels_per_frame": False,  # the bounds above are the cap
        "return_metadata": family.name == "qwen3_vl",  # it writes the times of the frames into the prompt
    }
    image = {"image_processor_type": "Qwen2VLImageProcessor", **_vision(family, canvas_px[0] * canvas_px[1])}
    whole = {"processor_class": processor, "image_processor": image, "video_processor": video}
    files.write_json(folder / "processor_config.json", whole)
    files.write_json(folder / "preprocessor_config.json", {"processor_class": processor, **image})


def _vision(family: VisionFamily, pixels: int) -> dict[str, Any]:
    return {
        "patch_size": family.patch_px,
        "temporal_patch_size": family.temporal_patch,
        "merge_size": family.merge,
        "size": {"shortest_edge": pixels, "longest_edge": pixels},
        "image_mean": list(family.mean),
        "image_std": list(family.std),
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
    }
