"""Exports of LLaVA-OneVision and InternVL: what the library loads, its processor reads, vLLM maps and onnxruntime runs.

The base lies in a folder as its hub repository spells it. Of vLLM, read in vllm-project/vllm at 01dc287 and 03923ea, in
`vllm/model_executor/models/interns1.py` (which serves `InternVLForConditionalGeneration`) and `llava_onevision.py`:

- `hf_to_vllm_mapper` turns the names of transformers since 4.52 into its own, which are those of the hub's files;
- `InternS1ProcessingInfo.get_hf_processor` gives the video processor the size of the one for pictures, and
  `resolve_target_ratios` reads `crop_to_patches`; `InternS1ForConditionalGeneration` reads two sides of
  `vision_config.image_size` and `patch_size`, and `downsample_ratio`; `<video>` must be one token;
- `get_num_video_tokens` of LLaVA-OneVision counts by `vision_config`, and looks for `video_token_index`.
"""

import hashlib
import json
import math
import re
from types import MethodType, SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, InternVLProcessor, LlavaOnevisionProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from omni_cli.models import tiny
from omni_cli.models.families import FAMILIES
from omni_cli.models.hub_files import write_processor_config
from omni_cli.recipes.vlm.exporting import tower_programs
from omni_cli.samples import prompts
from omni_cli.stages import models, runs
from omni_cli.stages.export import ExportRequest, export
from omni_cli.stages.programs import Writer
from tests.support import with_torchvision
from tests.support.pipeline import QUIET, Made, make_run, tiny_recipe, write_synthetic

SIDES_PX = {"llava_onevision": 126, "internvl": 140}  # 9 x 9 patches pooled to 5 x 5; 10 x 10 shuffled to 5 x 5
TOKENS_A_FRAME = 25
FRAMES = 4


def write_base(family, folder):
    """Write a tiny base whose files are spelled as those of the family's hub repositories are."""
    recipe = tiny_recipe(family, cameras="1-cam")
    tokenizer = recipe.tokenizer(recipe.preprocess())
    config = tiny.tiny_config(family, tokenizer)
    side = SIDES_PX[family]
    config.vision_config.image_size = side if family == "llava_onevision" else [side, side]
    torch.manual_seed(3)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family == "llava_onevision":  # the library wraps SigLIP no more; the files on the hub are older
        weights = load_file(folder / "model.safetensors")
        older = {name.replace("vision_tower.", "vision_tower.vision_model."): part for name, part in weights.items()}
        save_file(older, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("frames")
    write_synthetic(data, cameras=("camera_front_wide_120fov",))
    return data


@pytest.fixture(scope="module", params=SIDES_PX)
def made(request, data, tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    write_base(request.param, folder / "base")
    recipe = tiny_recipe(request.param, cameras="1-cam", mode="lora", model=str(folder / "base"))
    return make_run(folder, recipe, data=data)


@pytest.fixture(scope="module")
def for_the_hub(made):
    export(made.recipe, made.run, ExportRequest("hf"), QUIET)
    return made.run.folder / "export" / "hf"


@pytest.fixture(scope="module")
def library(for_the_hub):
    return AutoModelForImageTextToText.from_pretrained(for_the_hub).eval()


def family_of(made) -> str:
    return made.run.manifest.preprocess.vision.family


def pictures_of(preprocess, windows: int):
    shape = (windows, *preprocess.window_shape)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_the_folder_holds_the_bases_own_names(made, for_the_hub):
    """pain 15: whatever reads the base reads this."""
    base, found = (load_file(folder / "model.safetensors") for folder in (for_the_hub, models_base(made)))
    assert base.keys() == found.keys()
    assert any("vision_tower.vision_model." in name for name in found) == (family_of(made) == "llava_onevision")
    assert models.open_model(for_the_hub).card.preprocess == made.run.manifest.preprocess
    assert runs.verified_folder(for_the_hub)


def models_base(made):
    return made.run.folder.parent.parent / "base"


def test_every_weight_has_a_place_in_vllm(made, for_the_hub):
    """pain 15: vLLM maps the newer names to these, and its modules are named by these."""
    family, weights = family_of(made), load_file(for_the_hub / "model.safetensors")
    tower = "vision_tower.vision_model." if family == "llava_onevision" else "vision_tower."
    modules = (
        *(f"{tower}{part}." for part in ("embeddings", "encoder", "post_layernorm")),
        "multi_modal_projector.",
        "image_newline",
        *(f"language_model.model.{part}." for part in ("embed_tokens", "layers", "norm")),
        "language_model.lm_head.",
    )
    assert not [name for name in weights if not name.startswith(modules)]
    config = read(for_the_hub, "config.json")
    assert ("language_model.lm_head.weight" in weights) != config["tie_word_embeddings"]


def test_vllm_finds_what_it_reads(made, for_the_hub):
    """pain 1: by the fields that vLLM counts with, a window has as many placeholders as in training."""
    preprocess, config = made.run.manifest.preprocess, read(for_the_hub, "config.json")
    vision, tokenizer = config["vision_config"], AutoTokenizer.from_pretrained(for_the_hub)
    if family_of(made) == "internvl":
        assert config["architectures"] == ["InternVLForConditionalGeneration"]
        (height, width), (patch, _) = vision["image_size"], vision["patch_size"]
        assert (height // patch) * (width // patch) * config["downsample_ratio"] ** 2 == TOKENS_A_FRAME
        image = read(for_the_hub, "preprocessor_config.json")
        assert image["size"] == {"height": height, "width": width}
        assert not image["crop_to_patches"]
        assert len(tokenizer.encode(tokenizer.video_token)) == 1
        assert preprocess.visual_tokens == FRAMES * TOKENS_A_FRAME
    else:
        assert config["architectures"] == ["LlavaOnevisionForConditionalGeneration"]
        assert config["video_token_index"] == tokenizer.convert_tokens_to_ids("<video>")
        pooled = math.ceil(vision["image_size"] // vision["patch_size"] / 2)
        assert preprocess.visual_tokens == FRAMES * pooled**2 + 1


def test_the_files_of_each_version_of_the_library_agree(for_the_hub):
    whole = read(for_the_hub, "processor_config.json")
    for name, part in (("preprocessor_config", "image_processor"), ("video_preprocessor_config", "video_processor")):
        older = read(for_the_hub, f"{name}.json")
        assert older.pop("processor_class") == whole["processor_class"]
        assert older == whole[part]


@pytest.mark.marathon
def test_half_precision_stays_within_its_stated_tolerance(made, tmp_path):
    result = export(made.recipe, made.run, ExportRequest("onnx", tmp_path / "half", dtype="float16"), QUIET)
    assert all(1e-5 < share < 2e-2 for share in result["rehearsed"].values())
    assert 0.5 < result["choices_agree"] <= 1.0


def counted_for(family, side_px, folder):
    write_processor_config(folder, FAMILIES[family], canvas_px=(side_px, side_px), num_frames=FRAMES)
    return read(folder, "processor_config.json")


def test_the_patches_of_a_still_are_counted_side_by_side(tmp_path):
    """384 px, as LLaVA-OneVision's hub models read, are 27 patches of 14 and 6 px: 729, and not 384 * 384 // 196."""
    count = counted_for("llava_onevision", 384, tmp_path)["num_image_tokens"]
    assert count == 729
    library = LlavaOnevisionProcessor
    image = SimpleNamespace(image_grid_pinpoints=[[384, 384], [384, 768]])
    processor = SimpleNamespace(num_image_tokens=count, vision_aspect_ratio="anyres_max_9", image_processor=image)
    processor._get_unpadded_features = MethodType(library._get_unpadded_features, processor)
    # the whole still, and its one part with a new line after each row
    assert library._get_number_of_features(processor, 384, 384, 384, 384) == 27 * 27 + 27 * (27 + 1)
    assert [counted_for("internvl", side, tmp_path)["image_seq_length"] for side in (448, 458)] == [256, 256]


def as_its_processor_writes(made, folder, question: str) -> str:
    """Return the prompt as the library's processor writes it for a video, by the files in the folder."""
    config, tokenizer = read(folder, "processor_config.json"), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    video = {"pixel_values_videos": [torch.empty(FRAMES, 3)]}
    if family_of(made) == "internvl":
        processor = SimpleNamespace(
            start_image_token=tokenizer.start_image_token,
            end_image_token=tokenizer.end_image_token,
            image_token=tokenizer.context_image_token,
            image_seq_length=config["image_seq_length"],
        )
        assert text.count(tokenizer.video_token) == 1
        return text.replace(tokenizer.video_token, InternVLProcessor.replace_video_token(processor, video, 0))
    processor = SimpleNamespace(num_image_tokens=config["num_image_tokens"], video_token="<video>")
    assert text.count("<video>") == 1
    return text.replace("<video>", LlavaOnevisionProcessor.replace_video_token(processor, video, 0))


def as_its_processor_sees(folder, preprocess, pictures):
    """Return the pixels (frames, 3, height, width) by what the folder says of videos, in the library's own sums."""
    video = read(folder, "video_preprocessor_config.json")
    known = ("size", "image_mean", "image_std", "do_resize", "do_rescale", "do_normalize")
    processor = GotOcr2ImageProcessorPil(**{name: video[name] for name in known})
    canvases = preprocess.canvases(pictures)[0].permute(0, 3, 1, 2).numpy()
    seen = processor(images=list(canvases), return_tensors="pt", input_data_format="channels_first")
    return seen["pixel_values"]


def test_the_library_answers_what_the_run_does(made, for_the_hub, library):
    """pains 1, 8, 14, 15: text, pixels, weights and wiring are the folder's alone; the answer is the run's."""
    preprocess, tokenizer = made.run.manifest.preprocess, AutoTokenizer.from_pretrained(for_the_hub)
    pictures = pictures_of(preprocess, 1)
    prompt = as_its_processor_writes(made, for_the_hub, prompts.render_question(preprocess, 0.0))
    assert prompt == prompts.render_prompt(preprocess, 0.0)
    pixels = as_its_processor_sees(for_the_hub, preprocess, pictures)
    assert torch.allclose(pixels, preprocess.pixel_values(pictures)[0], atol=1e-6)
    built = made.recipe.load(preprocess, made.run.final)
    row = made.recipe.prompt_row(pictures[0], preprocess, built.tokenizer, 0.0)
    asked = tokenizer(prompt, return_tensors="pt")["input_ids"]
    scored = int((row["labels"] != -100).sum())
    ids = torch.cat([asked, row["input_ids"][None, -scored:]], dim=1)
    assert torch.equal(ids[0], row["input_ids"])
    seen = {"pixel_values": pixels} if family_of(made) == "internvl" else {"pixel_values_videos": pixels[None]}
    with torch.no_grad():
        theirs = library(input_ids=ids, attention_mask=torch.ones_like(ids), **seen).logits[0, -scored - 1 : -1]
        ours = made.recipe.outputs(built.model, made.recipe.collate([row], preprocess), preprocess)
    assert theirs.shape == ours.shape
    assert float((theirs - ours).abs().max()) < 1e-4 * float(ours.abs().max())


@pytest.fixture(scope="module")
def in_onnx(made, tmp_path_factory):
    """The facts of the tower's program, and its folder; `omni export` writes the language model's beside it."""
    built, folder = made.recipe.load(made.run.manifest.preprocess, made.run.final), tmp_path_factory.mktemp("onnx")
    (program,) = tower_programs(built.model, made.run.manifest.preprocess, (1, 2, 3))
    return Writer(folder, onnxruntime, 20, "float32").write(program), folder


def test_onnxruntime_sees_what_the_library_does(made, library, in_onnx):
    """pain 21: one program for any number of windows, of the weights of the run."""
    program, folder = in_onnx
    preprocess = made.run.manifest.preprocess
    assert program["file"] == "vision.onnx"
    assert (program["windows"], program["inputs"]["pixel_values"][0]) == ("any", "windows")
    assert program["outputs"] == {"image_embeds": ["visual_tokens", 128]}
    session = onnxruntime.InferenceSession(str(folder / "vision.onnx"))
    for windows in (1, 3):
        pixels = preprocess.pixel_values(pictures_of(preprocess, windows))
        (found,) = session.run(["image_embeds"], {"pixel_values": pixels.numpy()})
        with torch.no_grad():
            if family_of(made) == "internvl":
                expected = library.get_image_features(pixels.flatten(0, 1)).pooler_output
            else:
                expected = library.get_video_features(pixels).pooler_output
        assert found.shape == (windows * preprocess.visual_tokens, 128)
        np.testing.assert_allclose(found, expected.flatten(0, 1).numpy(), atol=2e-5, rtol=0)


def test_a_program_holds_the_tower_and_no_language_model(made, in_onnx):
    _, folder = in_onnx
    weights = load_file(made.run.folder / "merged" / "model.safetensors")
    seeing = sum(part.nbytes for name, part in weights.items() if not name.startswith("language_model."))
    written = sum(path.stat().st_size for path in folder.glob("vision*"))
    assert 0.9 * seeing < written < 1.2 * seeing + 200_000


def test_the_card_tells_how_others_load_it(for_the_hub):
    card = (for_the_hub / "README.md").read_text()
    assert "AutoProcessor.from_pretrained(source)" in card
    assert (
        """vllm serve . --limit-mm-per-prompt '{"video": 1}' --media-io-kwargs '{"video": {"num_frames": 4}}'""" in card
    )


@pytest.mark.skipif(not with_torchvision.is_here(), reason=with_torchvision.REASON)
def test_its_own_processor_makes_the_same_inputs_bit_for_bit(made, for_the_hub, tmp_path):
    """pains 1, 7, 8: `AutoProcessor` itself, on pictures of noise."""
    preprocess = made.run.manifest.preprocess
    pictures = pictures_of(preprocess, 1)
    torch.save(preprocess.canvases(pictures)[0].permute(0, 3, 1, 2).contiguous(), tmp_path / "canvases.pt")
    code = snippet((for_the_hub / "README.md").read_text()).replace('"."', f'"{for_the_hub}"')
    code = re.sub(r"canvases = .*", 'canvases = torch.load("canvases.pt")', code).partition("said =")[0]
    code += (
        "import hashlib, json\nseen = inputs.get('pixel_values_videos', inputs.get('pixel_values'))\n"
        "print(json.dumps([inputs['input_ids'][0].tolist(), hashlib.sha256(seen.numpy().tobytes()).hexdigest()]))\n"
    )
    ids, digest = json.loads(with_torchvision.run(code, tmp_path).splitlines()[-1])
    question = re.search(r'^question = (".*")$', code, re.MULTILINE)[1]
    assert json.loads(question) == prompts.render_question(preprocess, 10.0)
    tokenizer = made.recipe.tokenizer(preprocess)
    assert ids == tokenizer.encode(prompts.render_prompt(preprocess, 10.0), add_special_tokens=False)
    assert digest == hashlib.sha256(preprocess.pixel_values(pictures).numpy().tobytes()).hexdigest()


@pytest.mark.skipif(not with_torchvision.is_here(), reason=with_torchvision.REASON)
@pytest.mark.parametrize("form", ["hf", "adapter"])
def test_the_code_in_the_card_answers_as_omni_does(made, form):
    export(made.recipe, made.run, ExportRequest(form), QUIET)
    folder, preprocess = made.run.folder / "export" / form, made.run.manifest.preprocess
    code = snippet((folder / "README.md").read_text()).replace('"BASE"', f'"{models_base(made)}"')
    built = made.recipe.load(preprocess, made.run.final)
    black = torch.zeros(preprocess.window_shape, dtype=torch.uint8)
    said = made.recipe.predict(built, [made.recipe.prompt_row(black, preprocess, built.tokenizer, 10.0)], preprocess)
    assert with_torchvision.run(code, folder) == said[0].text + "\n"


def snippet(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
