"""What vLLM and transformers need of an exported folder (pains 8, 15, 16, 21), field by field with where it is asked.

Read in vllm-project/vllm at 002d181 and 002d7b9, in `vllm/model_executor/models/qwen2_5_vl.py` and `qwen3_vl.py`:

- `hf_to_vllm_mapper` turns prefixes of names into its own, in this order; every weight must land in one of its modules;
- `get_mrope_input_positions` reads `video_token_id`, `vision_start_token_id`, `spatial_merge_size`,
  `tokens_per_second` of the configuration, and looks for the video's token right after the start token;
- `_get_prompt_updates` replaces, of Qwen2.5, each `<|video_pad|>`; of Qwen3 the whole
  `<|vision_start|><|video_pad|><|vision_end|>` by `<t seconds>` and marked frames (issue 46817, PR 46957 is open);
- `get_image_size_with_most_features`, `_get_vision_info`: `size.shortest_edge`, `size.longest_edge`, `merge_size`;
- `vllm/config/model.py` `get_diff_sampling_param`: its defaults are those of `generation_config.json`, but `do_sample`.

The processor's own reading is tested where torchvision is (test_export.py, test_cards.py).
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

from omni_cli.recipe import BuiltModel
from omni_cli.recipes.vlm.about import VLLM_TEMPLATE
from omni_cli.samples import prompts
from omni_cli.samples.answer_formats import FORMATS
from tests.support.pipeline import tiny_recipe

ARCHITECTURES = {  # names in vllm/model_executor/models/registry.py
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
MAPPERS = {
    "qwen2_5_vl": {
        "model.language_model.": "language_model.model.",
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.model.",
    },
    "qwen3_vl": {
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.language_model.": "language_model.model.",
    },
}
MODULES = (
    "visual.patch_embed.",
    "visual.blocks.",
    "visual.merger.",
    "visual.deepstack_merger_list.",
    "visual.pos_embed.",
    "language_model.model.embed_tokens.",
    "language_model.model.layers.",
    "language_model.model.norm.",
    "language_model.lm_head.",
)
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request, tmp_path_factory):
    """A family, its preprocessing, and a folder as `omni export` writes it around weights from a seed."""
    recipe, folder = tiny_recipe(request.param), tmp_path_factory.mktemp(request.param)
    preprocess = recipe.preprocess()
    recipe.save(BuiltModel(recipe.load_base(preprocess), recipe.tokenizer(preprocess)), folder)
    recipe.write_processor_files(folder, preprocess)
    return request.param, preprocess, folder


def read(folder, name):
    return json.loads((folder / name).read_text())


def as_vllm_names(family, name):
    for prefix, other in MAPPERS[family].items():
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    return name


def test_every_weight_has_a_place_in_vllm(served):
    """pain 15: the names are the base's, in the spelling that vLLM maps."""
    family, _, folder = served
    weights = load_file(folder / "model.safetensors")
    names = [as_vllm_names(family, name) for name in weights]
    assert not [name for name in names if not name.startswith(MODULES)]
    assert len(set(names)) == len(weights)
    config = read(folder, "config.json")
    is_tied = config.get("tie_word_embeddings")
    assert ("language_model.lm_head.weight" in names) != bool(is_tied)
    assert config["architectures"] == [ARCHITECTURES[family]]


def test_the_configuration_knows_the_tokens_and_the_grid(served):
    family, preprocess, folder = served
    config, tokenizer = read(folder, "config.json"), AutoTokenizer.from_pretrained(folder)
    for key, token in (
        ("video_token_id", "<|video_pad|>"),
        ("image_token_id", "<|image_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ):
        assert config[key] == tokenizer.convert_tokens_to_ids(token), key
    vision = config["vision_config"]
    assert (vision["spatial_merge_size"], vision["patch_size"], vision["temporal_patch_size"]) == (
        preprocess.vision.merge, preprocess.vision.patch_px, preprocess.vision.temporal_patch,
    )  # fmt: skip
    assert ("tokens_per_second" in vision) == (family == "qwen2_5_vl")
    assert config["text_config"]["rope_parameters"]["mrope_section"]


def test_no_frame_is_dropped_and_no_canvas_resized(served):
    """pains 7, 8: tokens a frame are those of training, in the fields that each version of the library reads."""
    family, preprocess, folder = served
    frame = preprocess.canvas_width_px * preprocess.canvas_height_px
    whole, old = read(folder, "processor_config.json"), read(folder, "video_preprocessor_config.json")
    assert {**old, "processor_class": None} == {**whole["video_processor"], "processor_class": None}
    pixels = frame * (preprocess.num_frames if family == "qwen3_vl" else 1)  # Qwen3 counts the whole video
    assert old["size"] == {"shortest_edge": pixels, "longest_edge": pixels}
    assert (old["do_sample_frames"], old["merge_size"]) == (False, preprocess.vision.merge)
    image = read(folder, "preprocessor_config.json")
    assert image["size"] == {"shortest_edge": frame, "longest_edge": frame}
    assert (
        image["processor_class"] == whole["processor_class"] == f"{ARCHITECTURES[family].partition('For')[0]}Processor"
    )


def test_vllm_puts_the_training_prompt_together(served):
    """pain 2: the ids that a server sees are those that were learned, whatever each library does with its template."""
    family, preprocess, folder = served
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question(preprocess)}]}]
    template = (folder / VLLM_TEMPLATE).read_text() if family == "qwen3_vl" else None
    text = tokenizer.apply_chat_template(chat, chat_template=template, add_generation_prompt=True, tokenize=False)
    assert text.count(VIDEO) == text.count("<|video_pad|>") == 1
    grids, height, width = preprocess.grid
    pads = "<|video_pad|>" * (height * width // preprocess.vision.merge**2)
    if family == "qwen2_5_vl":
        text = text.replace("<|video_pad|>", pads * grids)
    else:
        middles = [(2 * grid + min(2 * grid + 1, preprocess.num_frames - 1)) / 2 for grid in range(grids)]
        seconds = [middle / preprocess.rate_hz for middle in middles]
        frames = [f"<{second:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for second in seconds]
        text = text.replace(VIDEO, "".join(frames))
    assert text == prompts.render_prompt(preprocess, 0.0)


def question(preprocess):
    return prompts.render_question(preprocess, 0.0)


def test_left_to_its_settings_it_answers_greedily_and_ends(served):
    """What vLLM samples by unless it is told otherwise: its own default would be a temperature of 1 over all tokens."""
    _, preprocess, folder = served
    config = GenerationConfig.from_pretrained(folder)
    told = config.to_diff_dict()
    assert (told["top_k"], told["max_new_tokens"]) == (1, FORMATS[preprocess.labels].max_tokens)
    assert told.get("repetition_penalty", 1.0) == told.get("top_p", 1.0) == told.get("temperature", 1.0) == 1.0
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert config.eos_token_id == [tokenizer.convert_tokens_to_ids(prompts.ANSWER_END)]
    ids = tokenizer("How does the car move?", return_tensors="pt")["input_ids"]
    said = model.generate(ids, max_new_tokens=6)[0, ids.shape[1] :]
    for token in said:  # brute force: the most likely token, again and again
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0, -1].argmax()
        assert token == expected
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
