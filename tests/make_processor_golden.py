"""Write tests/assets/processor_golden.json: what the models' own video processors make of seeded frames.

Needs torchvision, which omni does not. In a scratch environment beside the pinned one:

    pip install --no-deps --target /tmp/tv torchvision==0.28.0
    PYTHONPATH=/tmp/tv python tests/make_processor_golden.py
"""

import hashlib
import json
from pathlib import Path

import torch

SHAPES = [(8, 56, 112), (7, 84, 84), (2, 28, 140), (1, 112, 56)]  # frames, height, width in units of 28 / 32 px


def seeded_frames(frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames * 1_000_003 + height * 1009 + width)
    return torch.randint(0, 256, (frames, 3, height, width), generator=generator, dtype=torch.uint8)


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def shape_for(family: str, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    unit = 28 if family == "qwen2_5_vl" else 32
    return shape[0], shape[1] // 28 * unit, shape[2] // 28 * unit


def main() -> None:
    library = torch.library.Library("torchvision", "DEF")  # torchvision's CPU build lacks its operators' names
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    golden = {}
    for family, processor in (("qwen2_5_vl", Qwen2VLVideoProcessor()), ("qwen3_vl", Qwen3VLVideoProcessor())):
        for shape in SHAPES:
            frames, height, width = shape_for(family, shape)
            out = processor(
                [seeded_frames(frames, height, width)],
                do_resize=False,
                do_sample_frames=False,
                return_tensors="pt",
            )
            golden[f"{family} {frames}x{height}x{width}"] = {
                "grid": out["video_grid_thw"][0].tolist(),
                "sha256": digest(out["pixel_values_videos"]),
            }
    text = json.dumps(golden, indent=2, sort_keys=True) + "\n"
    (Path(__file__).parent / "assets" / "processor_golden.json").write_text(text)


if __name__ == "__main__":
    main()
