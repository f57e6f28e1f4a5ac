"""What is said to a vision-language model about a window, and what it should answer.

No name of a clip, file or split ever enters a prompt: cameras, layout, time and, where the recipe says so, the speed
at the first instant. The chat format is Qwen's ChatML; special tokens are written as text, tokenizers know them.
"""

import re
from collections.abc import Mapping
from typing import Any

from omni_cli.samples.answer_formats import FORMATS
from omni_cli.samples.tiling import Family, Labels, TiledPreprocess

SYSTEM = "You are a driving assistant."
_PLACEHOLDERS: Mapping[Family, str] = {
    "qwen2_5_vl": "<|video_pad|>",
    "qwen3_vl": "<|video_pad|>",
    "llava_onevision": "<video>",
    "internvl": "<IMG_CONTEXT>",
}
ANSWER_END = "<|im_end|>"
_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nSYSTEM<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}VIDEO{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWERED: Mapping[Labels, tuple[str, ...]] = {  # the numbers that short answers state
    "ego-motion": ("mean_speed_mps", "displacement_m"),
    "speed": ("mean_speed_mps",),
}
_SPECIAL = re.compile(r"<\|\w+\|>|<video>|</?img>|<IMG_CONTEXT>")
_MAX_ANSWER_CHARACTERS = 100_000  # of an answer that is searched: the longest has 768 tokens, Qwen's have 128 at most


def video_token(family: Family) -> str:
    """Return the token that stands for a piece of a video."""
    return _PLACEHOLDERS[family]


def camera_title(name: str) -> str:
    """Return a camera's name for people: `camera_front_wide_120fov` is `front wide`."""
    return re.sub(r"_\d+fov$", "", name.removeprefix("camera_")).replace("_", " ")


def render_prompt(preprocess: TiledPreprocess, start_speed_mps: float) -> str:
    """Return the chat up to where the assistant speaks.

    Args:
        preprocess: cameras, layout, time grid, and whether the past speed is told.
        start_speed_mps: forward speed at the first instant.
    """
    user = f"<|im_start|>user\n{_video_text(preprocess)}{render_question(preprocess, start_speed_mps)}<|im_end|>\n"
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{user}<|im_start|>assistant\n"


def render_question(preprocess: TiledPreprocess, start_speed_mps: float) -> str:
    """Return what the user asks beside the video."""
    cameras = ", ".join(camera_title(name) for name in preprocess.cameras)
    question = (
        f"{preprocess.num_frames} frames at {preprocess.rate_hz:g} Hz, "
        f"{preprocess.rows}x{preprocess.columns} grid of cameras: {cameras}. {FORMATS[preprocess.labels].question}"
    )
    if preprocess.past_speed:
        question += f" Its speed at the first frame is {start_speed_mps:.2f} m/s."
    return question


def chat_template(preprocess: TiledPreprocess) -> str:
    """Return the Jinja template that renders a video and a question as `render_prompt` does.

    The video is one placeholder, which the model's own processor repeats; Qwen3-VL's adds the marks of each grid.
    """
    video = {"qwen2_5_vl": "<|vision_start|><|video_pad|><|vision_end|>", "qwen3_vl": "<|video_pad|>"}.get(
        preprocess.vision.family, "<video>\n"
    )
    return _TEMPLATE.replace("SYSTEM", SYSTEM).replace("VIDEO", video)


def render_answer(labels: Labels, targets: Mapping[str, Any]) -> str:
    """Return the answer to a window, without the token that ends it.

    Args:
        labels: the answer's format; `ego-motion` is the one of DESIGN section 9, `speed` a whole number.
        targets: of the window, by column.
    """
    return FORMATS[labels].render(targets)


def parse_answer(labels: Labels, text: str) -> dict[str, Any] | None:
    """Read an answer back: numbers by the columns they state, a path as `xy_m` (64, 2); None where it is no answer."""
    return FORMATS[labels].parse(text[:_MAX_ANSWER_CHARACTERS])


def sample_sentences(preprocess: TiledPreprocess) -> list[str]:
    """Return sentences from which a tokenizer of our own learns its words; numbers are left to single digits."""
    prompts = [render_prompt(preprocess.model_copy(update={"past_speed": told}), 0.0) for told in (False, True)]
    answers = [render_answer(labels, FORMATS[labels].zero) for labels in _told_of(preprocess.labels)]
    return [_SPECIAL.sub(" ", text) for text in prompts + answers]


def _video_text(preprocess: TiledPreprocess) -> str:
    """Return the placeholders of a window as its family's own processor writes them, ready for the language model."""
    vision, frames = preprocess.vision, preprocess.grid[0]
    pads = video_token(vision.family) * ((preprocess.visual_tokens - vision.closing_tokens) // frames)
    match vision.family:
        case "qwen2_5_vl":
            return f"<|vision_start|>{pads * frames}<|vision_end|>"
        case "qwen3_vl":
            seconds = [_grid_middle_s(preprocess, grid) for grid in range(frames)]
            return "".join(f"<{middle:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for middle in seconds)
        case "llava_onevision":
            return f"{pads * frames}{video_token(vision.family) * vision.closing_tokens}\n"
        case "internvl":
            return "\n".join(f"Frame{number + 1}: <img>{pads}</img>" for number in range(frames)) + "\n"


def _grid_middle_s(preprocess: TiledPreprocess, grid: int) -> float:
    """Return the middle of a grid's first and last frame in seconds, as Qwen3-VL's own processor states it."""
    frames = preprocess.vision.temporal_patch
    first = grid * frames
    last = min(first + frames, preprocess.num_frames) - 1
    return (first + last) / 2 / preprocess.rate_hz


def _told_of(labels: Labels) -> tuple[Labels, ...]:
    """Return the formats whose words a tokenizer learns: of the short ones both, as one base serves either."""
    return ("ego-motion", "speed") if labels in ("ego-motion", "speed") else (labels,)
