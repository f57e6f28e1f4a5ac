"""What `AutoProcessor` reads beside a model's weights, written without the library (torchvision) that it needs."""

from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.models.families import VisionFamily, is_local

_CLASSES = {  # of the processor, and of its parts for pictures and for videos
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor"),
    "llava_onevision": ("LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor", "LlavaOnevisionVideoProcessor"),
    "internvl": ("InternVLProcessor", "GotOcr2ImageProcessor", "InternVLVideoProcessor"),
}
_NAMED_TOKENS = {  # `InternVLProcessor` asks its tokenizer for them by these names
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}


def named_tokens(family: str) -> dict[str, str]:
    """Return the tokens that a family's processor asks its tokenizer for, by the names it knows them by."""
    return dict(_NAMED_TOKENS.get(family, {}))


def write_processor_config(folder: Path, family: VisionFamily, *, canvas_px: tuple[int, int], num_frames: int) -> None:
    """Write `processor_config.json`, and the two files that transformers before 5 reads instead.

    What they say of the size holds exactly one canvas: a canvas of ours is never resized, and no frame is dropped.

    Args:
        folder: of the model.
        family: its vision backbone.
        canvas_px: width and height of a window's canvases.
        num_frames: canvases in a window.
    """
    processor, of_images, of_videos = _CLASSES[family.name]
    for_images, for_videos = _whole(family, canvas_px) if family.reads_frames else _cut(family, canvas_px, num_frames)
    image = {"image_processor_type": of_images, **_pixels(family), **for_images}
    video = {
        "video_processor_type": of_videos,
        **_pixels(family),
        **for_videos,
        "do_sample_frames": False,
        "return_metadata": family.name == "qwen3_vl",  # it writes the times of the frames into the prompt
    }
    counted = {"processor_class": processor, **_counted(family, canvas_px)}
    files.write_json(folder / "processor_config.json", {**counted, "image_processor": image, "video_processor": video})
    files.write_json(folder / "preprocessor_config.json", {"processor_class": processor, **image})
    files.write_json(folder / "video_preprocessor_config.json", {"processor_class": processor, **video})


def _cut(family: VisionFamily, canvas_px: tuple[int, int], num_frames: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is said of pictures and of videos that are cut into patches."""
    cut = {"patch_size": family.patch_px, "temporal_patch_size": family.temporal_patch, "merge_size": family.merge}
    frame = canvas_px[0] * canvas_px[1]
    # Qwen2.5's video processor bounds the pixels of one frame, Qwen3's those of the whole video.
    pixels = frame * (num_frames if family.name == "qwen3_vl" else 1)
    video = {**cut, "size": _bounds(pixels), "cap_pixels_per_frame": False}  # the bounds are the cap
    return {**cut, "size": _bounds(frame)}, video


def _bounds(pixels: int) -> dict[str, int]:
    return {"shortest_edge": pixels, "longest_edge": pixels}


def _whole(family: VisionFamily, canvas_px: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is said of pictures and of videos whose frames are read whole, however many they are."""
    size = {"size": {"width": canvas_px[0], "height": canvas_px[1]}}
    return {**size, **({"crop_to_patches": False} if family.name == "internvl" else {})}, size


def _counted(family: VisionFamily, canvas_px: tuple[int, int]) -> dict[str, Any]:
    """Return by what a processor counts the placeholders of a frame; Qwen's count its patches.

    What is left of a side beyond its last whole patch is not looked at: 384 px are 27 patches of 14.
    """
    width, height = (side_px // family.patch_px for side_px in canvas_px)
    match family.name:
        case "llava_onevision":  # before they are pooled, with which its processor reckons
            return {"num_image_tokens": width * height, "vision_feature_select_strategy": "full"}
        case "internvl":
            return {"image_seq_length": (width // family.merge) * (height // family.merge)}
    return {}


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


def _pixels(family: VisionFamily) -> dict[str, Any]:
    return {
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
