"""What a model card tells of a vision-language model: what it is asked, what it answers, how others load it."""

import json
from collections.abc import Mapping

from omni_cli.models import families
from omni_cli.recipe import About, Loading
from omni_cli.recipes.vlm.onnx_example import by_onnxruntime
from omni_cli.recipes.vlm.settings import VlmTune
from omni_cli.samples import prompts
from omni_cli.samples.answer_formats import FORMATS
from omni_cli.samples.tiling import Labels, TiledPreprocess

HERE = "."  # a folder that lies here, as its own card names it
VLLM_TEMPLATE = "chat_template_vllm.jinja"
_TASK = "video-text-to-text"
_LICENCES = {  # as the model cards of the hub repositories state them
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen-research",  # not for commerce
    "Qwen/Qwen2.5-VL-7B-Instruct": "apache-2.0",
    "Qwen/Qwen3-VL-2B-Instruct": "apache-2.0",
    "Qwen/Qwen3-VL-4B-Instruct": "apache-2.0",
    "Qwen/Qwen3-VL-8B-Instruct": "apache-2.0",
}
_EXAMPLE_SPEED_MPS = 10.0
_DOES: Mapping[Labels, str] = {
    "ego-motion": "It reads how its own car moves from the pictures of its cameras.",
    "speed": "It reads how fast its own car moves from the pictures of its cameras.",
    "waypoints": "From the pictures of its cameras it foretells the path of its own car for 6.4 s.",
    "reasoning": (
        "From the pictures of its cameras it says what the driver does next and why, and foretells the path of its own "
        "car for 6.4 s."
    ),
}
_LIBRARIES = {"adapter": "peft", "onnx": "onnx"}  # by form, as the hub spells them
_LOAD = {
    "hf": """\
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

source = "{source}"
model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto").eval()
""",
    "adapter": """\
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

source, base = "{source}", "{base}"
model = AutoModelForImageTextToText.from_pretrained(base, {pinned}dtype="auto")
model.generation_config = GenerationConfig.from_pretrained(source)  # greedy
model = PeftModel.from_pretrained(model, source).eval()
""",
}
_ASK = """\
processor = AutoProcessor.from_pretrained(source)  # needs torchvision

# one window: {frames} RGB canvases, {rate_hz:g} a second, the cameras in the cells that are told above
canvases = torch.zeros({frames}, 3, {height}, {width}, dtype=torch.uint8)
question = {question}
chat = [{{"role": "user", "content": [{{"type": "video"}}, {{"type": "text", "text": question}}]}}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
times = {{"fps": {rate_hz:g}, "total_num_frames": {frames}, "frames_indices": list(range({frames}))}}
inputs = processor(text=[prompt], videos=[canvases], video_metadata=[times], return_tensors="pt")
"""
# transformers 5 lets the text after a video begin below the video's own last time (facts in models/rope.py).
_POSITIONS = """
# transformers 5 begins the text after a video at an earlier position than training and vLLM do: as in training
net = {net}
names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts", "attention_mask")
places = net.model.get_rope_index(**{{name: inputs[name] for name in names}})[0]
after = int((inputs["input_ids"][0] == net.config.video_token_id).nonzero().max()) + 1
places[..., after:] += places[..., :after].max() + 1 - places[0, 0, after]
inputs["position_ids"] = torch.cat([torch.arange(places.shape[-1]).view(1, 1, -1), places])
"""
_GENERATE = """
said = model.generate(**inputs)
print(processor.batch_decode(said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
"""
# Issues of vllm-project/vllm, as the project's facts have them (vlm-finetuning.md, pain 16).
_NO_DORA = "vLLM does not serve DoRA adapters (vllm-project/vllm#10849)."
_NO_TOWER = (
    "vLLM passed over adapters on the vision tower with no more than a warning (vllm-project/vllm#23796 and #27916); "
    "since about 0.14 it has `--enable-tower-connector-lora`."
)
_MERGE_FIRST = "Fold this one into its base where its run is, and serve the whole model, whose card says how:"
_MERGE = """\
omni merge RUN
omni export RUN --format hf
"""


def about_vlm(preprocess: TiledPreprocess, model: str, tune: VlmTune, form: str, source: str) -> About:
    """Return what is told of a model of the recipe `vlm`.

    Args:
        preprocess: of the model.
        model: its base, as the settings name it.
        tune: what of it learned.
        form: of the folder.
        source: the folder, or its name on a hub.
    """
    base, revision = ("", None) if families.is_local(model) else families.split_revision(model)
    answer = FORMATS[preprocess.labels]
    return About(
        does=_DOES[preprocess.labels],
        base=base,
        base_told=_told(model, base, revision),
        licence=_LICENCES.get(base, ""),
        task=_TASK,
        library=_LIBRARIES.get(form, "transformers"),
        asked=prompts.render_question(preprocess, _EXAMPLE_SPEED_MPS),
        answered=answer.render(answer.zero),
        loading=_loading(preprocess, (base or "BASE", revision), form, source) + _served(tune, form),
    )


def _told(model: str, base: str, revision: str | None) -> str:
    if families.is_tiny(model):
        return f"{model}, a tiny model that omni draws from a seed"
    if not base:
        return "a local folder of weights, which is not published here"
    return f"{base}, revision {revision}" if revision else base


def _loading(preprocess: TiledPreprocess, base: tuple[str, str | None], form: str, source: str) -> tuple[Loading, ...]:
    ours = Loading("omni", "bash", _with_omni(preprocess, source))
    if form == "onnx":
        return (Loading("ONNX Runtime", "python", by_onnxruntime(preprocess, source)),)
    if form == "merged":  # others lack what they read beside weights
        return (ours,)
    theirs = Loading("transformers", "python", _with_transformers(preprocess, base, form, source))
    if form == "adapter":
        return (theirs,)
    return ours, theirs, Loading("vLLM", "bash", _with_vllm(preprocess, source))


def _served(tune: VlmTune, form: str) -> tuple[Loading, ...]:
    """Return how an adapter is served where something is known against serving it as it is."""
    known = {_NO_DORA: tune.mode == "dora", _NO_TOWER: bool(tune.vision_targets)}
    told = [sentence for sentence, is_so in known.items() if is_so]
    if form != "adapter" or not told:
        return ()
    return (Loading("vLLM", "bash", _MERGE, " ".join([*told, _MERGE_FIRST])),)


def _with_omni(preprocess: TiledPreprocess, source: str) -> str:
    fetch, folder = _fetched(source)
    cameras = " ".join(f"--camera {name}={name}.mp4" for name in preprocess.cameras)
    return f"{fetch}omni infer {cameras} --model {folder}"


def _fetched(source: str) -> tuple[str, str]:
    """Return the command that brings a folder of the hub here, and the folder."""
    return ("", source) if source == HERE else (f"hf download {source} --local-dir model\n", "model")


def _with_transformers(preprocess: TiledPreprocess, base: tuple[str, str | None], form: str, source: str) -> str:
    is_adapter = form == "adapter"
    values = {
        "frames": preprocess.num_frames,
        "rate_hz": preprocess.rate_hz,
        "height": preprocess.canvas_height_px,
        "width": preprocess.canvas_width_px,
        "question": json.dumps(prompts.render_question(preprocess, _EXAMPLE_SPEED_MPS)),
        "net": "model.get_base_model()" if is_adapter else "model",
    }
    load = _LOAD["adapter" if is_adapter else "hf"].format(source=source, base=base[0], pinned=_pinned(base[1]))
    positions = _POSITIONS if preprocess.vision.family == "qwen2_5_vl" else ""
    return load + (_ASK + positions + _GENERATE).format(**values)


def _pinned(revision: str | None) -> str:
    return f"revision={json.dumps(revision)}, " if revision else ""


def _with_vllm(preprocess: TiledPreprocess, source: str) -> str:
    fetch, folder = _fetched(source)
    media = json.dumps({"video": {"num_frames": preprocess.num_frames}})
    options = f"--limit-mm-per-prompt '{{\"video\": 1}}' --media-io-kwargs '{media}'"
    if preprocess.vision.family == "qwen3_vl":
        options += f" --chat-template {folder}/{VLLM_TEMPLATE}"
    return f"{fetch}vllm serve {folder} {options}"
