"""What `AutoProcessor` reads beside a model's weights, written without the library (torchvision) that it needs."""

from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.errors import UsageError
from omni_cli.models.families import VisionFamily, is_local

_CLASSES = {
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}


def check_family(name: str, asking: str) -> None:
    """Refuse a family whose processor's files omni does not write.

    Args:
        name: of the family.
        asking: the command that asks such a model all the same.

    Raises:
        UsageError: it is one.
    """
    if name not in _CLASSES:
        raise UsageError(
            f"family {name}: omni does not write its processor's files, so other tools could not ask it; ask it with: "
            f"{asking}"
        )


def write_processor_config(folder: Path, family: VisionFamily, *, canvas_px: tuple[int, int], num_frames: int) -> None:
    """Write `processor_config.json`, and the two files that transformers before 5 reads instead.

    The bounds on the size hold exactly one canvas: a canvas of ours is never resized, and no frame is dropped.

    Args:
        folder: of the model.
        family: its vision backbone.
        canvas_px: width and height of a window's canvases.
        num_frames: canvases in a window.

    Raises:
        UsageError: omni does not write the files of this family's processor.
    """
    check_family(family.name, "omni infer")
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
    files.write_json(folder / "video_preprocessor_config.json", {"processor_class": processor, **video})


def write_generation_config(folder: Path, *, end: int, pad: int, most: int) -> None:
    """Write `generation_config.json` so that both transformers and vLLM answer greedily, as models are measured.

    vLLM takes temperature, top_k, top_p, repetition_penalty and max_new_tokens from it, and not do_sample: the most
    likely token is what sampling from one token gives (vllm/config/model.py, `get_diff_sampling_param`).

    Args:
        folder: of the model.
        end: token that ends an answer.
        pad: token that fills shorter rows.
        most: tokens of the longest answer.
    """
    greedy = {"do_sample": True, "temperature": 1.0, "top_k": 1, "top_p": 1.0, "repetition_penalty": 1.0}
    ends = {"eos_token_id": [end], "pad_token_id": pad, "max_new_tokens": most}
    files.write_json(folder / "generation_config.json", {**greedy, **ends})


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


def forget_local_base(folder: Path) -> None:
    """Take the path of a local base out of an adapter's configuration: it means nothing elsewhere."""
    path = folder / "adapter_config.json"
    config = files.read_json(path)
    base = config["base_model_name_or_path"] or ""
    if not base or is_local(base):
        files.write_json(path, {**config, "base_model_name_or_path": None})
