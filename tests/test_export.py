"""What is exported computes what the run computes: in the hub's own tools, and in onnxruntime."""

import itertools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from omni_cli.errors import OmniError, UsageError
from omni_cli.models import qwen_vl
from omni_cli.recipes.vlm import packed
from omni_cli.recipes.vlm.decoding import agreement, first_choices
from omni_cli.report import Console
from omni_cli.samples import prompts
from omni_cli.stages import memory, models, programs, runs
from omni_cli.stages.export import ExportRequest, export, parse_batches
from omni_cli.stages.programs import compare_outputs, needed_bytes, of_type
from tests.support.pipeline import QUIET, Made, make_run, tiny_recipe, write_synthetic

VIDEO_TOKEN = prompts.video_token("qwen2_5_vl")
RUNS = {"qwen2_5_vl": "full", "qwen3_vl": "lora"}
OF_PICTURES = ("image_embeds", "deepstack_0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("export")
    write_synthetic(data, cameras=("camera_front_wide_120fov",))
    return data


@pytest.fixture(scope="module", params=RUNS)
def made(request, data, tmp_path_factory) -> Made:
    recipe = tiny_recipe(request.param, cameras="1-cam", mode=RUNS[request.param])
    return make_run(tmp_path_factory.mktemp(request.param), recipe, data=data)


@pytest.fixture(scope="module")
def in_onnx(made):
    result = export(made.recipe, made.run, ExportRequest("onnx", batches=(1, 2)), QUIET)
    return result, made.run.folder / "export" / "onnx"


@pytest.fixture(scope="module")
def for_the_hub(made):
    export(made.recipe, made.run, ExportRequest("hf"), QUIET)
    return made.run.folder / "export" / "hf"


def pictures_of(preprocess, windows: int):
    shape = (windows, *preprocess.window_shape)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("windows", [1, 2])
def test_onnxruntime_computes_what_the_vision_tower_does(made, in_onnx, windows):
    _, folder = in_onnx
    preprocess = made.run.manifest.preprocess
    pixels = preprocess.pixel_values(pictures_of(preprocess, windows))
    session = onnxruntime.InferenceSession(str(folder / f"vision-b{windows}.onnx"))
    found = session.run(None, {"pixel_values": pixels.numpy()})
    tower = made.recipe.load(preprocess, made.run.final).model
    tower = tower.get_base_model() if hasattr(tower, "get_base_model") else tower
    with torch.no_grad():
        output = tower.model.visual(pixels, grid_thw=torch.tensor([preprocess.grid] * windows))
    expected = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
    names = ["image_embeds", *(f"deepstack_{level}" for level in range(len(expected) - 1))]
    assert [one.name for one in session.get_outputs()] == names
    for one, other in zip(found, expected, strict=True):
        assert one.shape == (windows * preprocess.visual_tokens, 128)
        np.testing.assert_allclose(one, other.numpy(), atol=2e-5, rtol=0)


def test_the_card_says_what_the_programs_are(made, in_onnx):
    result, folder = in_onnx
    card = json.loads((folder / "programs.json").read_text())
    preprocess = made.run.manifest.preprocess
    assert (card["opset"], card["dtype"], card["from_run"]) == (20, "float32", "run")
    assert tuple(card["window"]["grid"][axis] for axis in ("time", "height", "width")) == preprocess.grid
    assert card["preprocess"] == preprocess.model_dump(mode="json")
    assert card["programs"] == result["programs"]
    assert [program["file"] for program in card["programs"]] == ["vision-b1.onnx", "vision-b2.onnx", "decoder.onnx"]
    for program in card["programs"]:
        assert 0 < program["max_difference"] < 2e-5 < program["allowed_difference"]
        session = onnxruntime.InferenceSession(str(folder / program["file"]))
        assert {one.name: one.shape for one in session.get_inputs()} == program["inputs"]
        assert {one.name: one.shape for one in session.get_outputs()} == program["outputs"]
        assert program["shares"].keys() == program["outputs"].keys()
        assert all(0 < share < 1e-5 < program["allowed_share"] for share in program["shares"].values())
    cases = itertools.product(("1 window", "2 windows, 1 padded"), ("logits", "keys", "values"))
    assert set(card["rehearsed"]) == {f"{case}, prompt and 4 tokens: {kind}" for case, kind in cases}
    assert all(0 < share < 1e-5 for share in card["rehearsed"].values())
    assert card["choices_agree"] == result["choices_agree"] == 1.0
    assert runs.verified_folder(folder)


def in_torch(planned):
    """Programs run by torch: what ONNX Runtime says of them is compared elsewhere."""
    modules = {program.name: program.module for program in planned}
    return lambda name, inputs: modules[name](*inputs.values())


@pytest.fixture(scope="module")
def planned(made):
    """The programs of a run whose adapter is merged, and the model."""
    preprocess = made.run.manifest.preprocess
    built = made.recipe.load_to_merge(preprocess, made.run.final)
    built = built if made.recipe.tune.mode == "full" else made.recipe.merge(built)
    return built, made.recipe.programs(built, preprocess, (1,))


def spoil_places(inputs):
    return {**inputs, "position_ids": inputs["position_ids"] + torch.tensor([0, 0, 1]).view(3, 1, 1)}


def spoil_padding(inputs):
    return {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}


def spoil_pictures(inputs):
    last = list(inputs)[3 if "deepstack_0" not in inputs else 4]  # the last of what the tower says
    return {**inputs, last: inputs[last].flip(0)}


def spoil_past(inputs):
    return {**inputs, "past_key_values.1.value": inputs["past_key_values.1.value"] * 1.001}


@pytest.mark.fault("F30")
@pytest.mark.parametrize("spoil", [None, spoil_places, spoil_padding, spoil_pictures, spoil_past])
def test_a_decoder_that_reads_otherwise_than_the_library_is_refused(made, planned, spoil):
    """A decoder is held to the library's own forward: positions, padding, pictures, and what was read before."""
    built, programs = planned
    right = in_torch(programs)

    def run(name, inputs):
        return right(name, spoil(inputs) if spoil and name == "decoder" else inputs)

    asked = (built, made.run.manifest.preprocess, programs, run, "float32")
    if spoil is None:
        rehearsed = made.recipe.rehearse(*asked)
        assert max(rehearsed.apart.values()) < 1e-5
        assert rehearsed.choices_agree == 1.0
    else:
        with pytest.raises(OmniError, match=r"of the ONNX programs differ .* 1e-04 allowed; nothing is published"):
            made.recipe.rehearse(*asked)


@pytest.mark.fault("F30")
def test_another_first_choice_is_refused_where_the_models_is_clear():
    """Logits within 2e-2 of the largest, 0.2 here: a margin of 0.3 is clear and must hold, one of 0.1 need not."""
    logits = torch.tensor([[10.0, 9.7, 0.0], [10.0, 9.9, 0.0], [1.0, 5.0, -10.0]])
    same = first_choices(logits, logits, 2e-2)
    assert (same.agree.tolist(), same.clear.tolist()) == ([True] * 3, [True, False, True])
    assert agreement([same, same]) == 1.0
    unclear = first_choices(logits, logits + torch.tensor([[0.0, 0.2, 0.0], [-0.2, 0.0, 0.0], [0.0, 0.0, 0.0]]), 2e-2)
    assert agreement([same, unclear]) == pytest.approx(5 / 6)
    other = first_choices(logits, logits + torch.tensor([[-0.19, 0.19, 0.0], [0.0] * 3, [0.0] * 3]), 2e-2)
    with pytest.raises(OmniError, match=r"is another at 1 of the 4 places where the model's is clear; nothing is pub"):
        agreement([same, other])


@pytest.mark.fault("F30")
def test_a_decoder_whose_first_choice_is_another_is_refused(made, planned):
    """Though its logits are all within what float16 allows."""
    built, programs = planned
    right = in_torch(programs)

    def run(name, inputs):
        said = right(name, inputs)
        return said if name != "decoder" else [of_another_choice(said[0]), *said[1:]]

    with pytest.raises(OmniError, match=r"the first choice of the ONNX programs is another at \d+ of the \d+ places"):
        made.recipe.rehearse(built, made.run.manifest.preprocess, programs, run, "float16")


def of_another_choice(logits):
    """Put each row's second token first, where 1.9e-2 of the largest logit lets it be."""
    by = 1.9e-2 * logits.abs().max()
    first, second = logits.topk(2).indices.unbind(-1)
    other = logits.scatter_add(-1, first[:, None], -by.expand(len(logits), 1))
    return other.scatter_add(-1, second[:, None], by.expand(len(logits), 1))


def test_greedy_tokens_by_onnxruntime_are_those_of_generate(made, in_onnx, planned):
    """Two windows, one padded on the left, sixteen tokens: the same as transformers' own `generate`, each of them."""
    (built, _), preprocess, windows = (
        planned,
        made.run.manifest.preprocess,
        pictures_of(made.run.manifest.preprocess, 2),
    )
    model = qwen_vl.base_of(built.model)
    rows = [made.recipe.prompt_row(one, preprocess, built.tokenizer, 3.0) for one in windows]
    rows[1] = {**rows[1], **{name: rows[1][name][..., 5:] for name in ("input_ids", "labels", "position_ids")}}
    batch = packed.left_padded(rows, built.tokenizer.pad_token_id, torch.device("cpu"))
    assert batch["attention_mask"].sum(1).diff().item() == -5
    features = model.model.get_video_features(preprocess.pixel_values(windows), torch.tensor([preprocess.grid] * 2))
    told = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    expected = model.generate(
        **told, mm_encoder_outputs={"video": features}, do_sample=False, min_new_tokens=16, max_new_tokens=16
    )[:, batch["input_ids"].shape[1] :]

    _, folder = in_onnx
    tower, decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("vision-b2", "decoder"))
    said = tower.run(None, {"pixel_values": preprocess.pixel_values(windows).numpy()})
    given = {name: tensor.numpy() for name, tensor in told.items()}
    given |= {"position_ids": given["position_ids"][1:]}
    given |= dict(zip((one.name for one in tower.get_outputs()), said, strict=True))
    past = {one.name: one.shape for one in decoder.get_inputs() if one.name.startswith("past_key_values.")}
    given |= {name: np.zeros((2, shape[1], 0, shape[3]), np.float32) for name, shape in past.items()}
    tokens = []
    for _ in range(16):
        logits, *present = decoder.run(None, given)
        logits[:, built.tokenizer.convert_tokens_to_ids(prompts.ANSWER_END)] = -np.inf  # as `min_new_tokens` does
        tokens.append(logits.argmax(-1)[:, None])
        given = {name: array[:0] if name in OF_PICTURES else array for name, array in given.items()}
        given |= dict(zip(past, present, strict=True)) | {"input_ids": tokens[-1]}
        given["attention_mask"] = np.concatenate([given["attention_mask"], np.ones((2, 1), np.int64)], axis=1)
        given["position_ids"] = given["position_ids"][..., -1:] + 1
    assert np.concatenate(tokens, axis=1).tolist() == expected.tolist()


def test_the_cards_example_answers_with_numpy_alone(made, in_onnx, planned):
    (built, _), preprocess, (_, folder) = planned, made.run.manifest.preprocess, in_onnx
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    black = torch.zeros(preprocess.window_shape, dtype=torch.uint8)
    row = made.recipe.prompt_row(black, preprocess, built.tokenizer, 10.0)
    (expected,) = made.recipe.predict(built, [row], preprocess)
    alone = f"{code}\nimport sys\nassert not {{'torch', 'transformers', 'omni_cli'}} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", alone], cwd=folder, text=True, capture_output=True, check=False)
    assert (done.stderr, done.stdout) == ("", f"{expected.text}\n")


def test_weights_of_half_precision_are_cast_once_and_tables_of_positions_stay(planned):
    decoder = planned[1][-1].module
    half = of_type(decoder, torch.float16)
    assert {weight.dtype for weight in half.parameters()} == {torch.float16}
    assert half.head.weight is half.language_model.embed_tokens.weight  # tied, as they were
    assert half.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert {weight.dtype for weight in decoder.parameters()} == {torch.float32}
    assert of_type(decoder, torch.float32) is decoder


def test_what_programs_need_is_known_before_they_are_written(made, in_onnx, planned, monkeypatch):
    """A full disk is told before an hour's work, and nothing is left."""
    _, folder = in_onnx
    written = {path.name: path.stat().st_size for path in folder.glob("*.onnx")}
    told = needed_bytes(planned[1], "float32")
    found = written["vision-b1.onnx"] + written["decoder.onnx"]
    assert found < told < found + len(planned[1]) * 4.5 * 2**20
    out = made.run.folder / "full"
    state = os.statvfs("/")
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=state.f_frsize))
    with pytest.raises(OmniError, match=r"ONNX programs need about 0\.\d\d GiB, 0\.00 GiB are free; .* with --out$"):
        export(made.recipe, made.run, ExportRequest("onnx", out), QUIET)
    assert not list(made.run.folder.glob("*full*"))


def test_an_export_that_takes_more_memory_than_there_is_is_told_of(made, monkeypatch):
    weights = sum(weight.numel() for weight in made.recipe.load_base(made.recipe.preprocess()).parameters())
    monkeypatch.setattr(memory, "machine_bytes", lambda: 10 * weights)
    monkeypatch.setattr(programs, "load", lambda *_: pytest.fail("it was told of first"))
    console = Console(quiet=True)
    monkeypatch.setattr(console, "warn", lambda said: pytest.fail(f"10 bytes a weight are enough: {said}"))
    with pytest.raises(pytest.fail.Exception, match="told of first"):
        export(made.recipe, made.run, ExportRequest("onnx", made.run.folder / "large"), console)
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    with pytest.raises(pytest.fail.Exception, match="told of first"):
        export(made.recipe, made.run, ExportRequest("onnx", made.run.folder / "large", dtype="float16"), console)
    assert re.fullmatch(rf"an export of {weights:,} weights to ONNX takes about .* it may be killed: .*", said[0])


def test_a_second_export_does_nothing_and_another_opset_is_another_export(made, in_onnx):
    result, folder = in_onnx
    before = (folder / "vision-b1.onnx").stat().st_mtime_ns
    assert export(made.recipe, made.run, ExportRequest("onnx", batches=(1, 2)), QUIET) == result
    assert (folder / "vision-b1.onnx").stat().st_mtime_ns == before


@pytest.mark.parametrize("made", [pytest.param("qwen2_5_vl", marks=pytest.mark.marathon), "qwen3_vl"], indirect=True)
def test_half_precision_stays_within_its_stated_tolerance(made, tmp_path):
    request = ExportRequest("onnx", tmp_path / "half", dtype="float16", opset=18)
    result = export(made.recipe, made.run, request, QUIET)
    for program in result["programs"]:
        assert 1e-6 < program["max_difference"] < program["allowed_difference"]
    assert all(1e-5 < share < 2e-2 for share in result["rehearsed"].values())
    assert 0.5 < result["choices_agree"] <= 1.0
    (pixels,) = onnxruntime.InferenceSession(str(tmp_path / "half" / "vision-b1.onnx")).get_inputs()
    assert pixels.type == "tensor(float16)"


def test_the_hubs_folder_holds_the_weights_of_the_run(made, for_the_hub):
    whole = made.run.final if made.recipe.tune.mode == "full" else made.run.folder / "merged"
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, for_the_hub))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    model = AutoModelForImageTextToText.from_pretrained(for_the_hub)
    assert model.config.model_type == made.run.manifest.preprocess.vision.family
    assert models.open_model(for_the_hub).card.preprocess == made.run.manifest.preprocess
    assert runs.verified_folder(for_the_hub)


def test_the_chat_template_renders_our_prompt(made, for_the_hub):
    preprocess = made.run.manifest.preprocess
    question = prompts.render_question(preprocess, 3.0)
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
    tokenizer = AutoTokenizer.from_pretrained(for_the_hub)
    rendered = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    assert rendered.count(VIDEO_TOKEN) == 1
    assert with_one_placeholder(prompts.render_prompt(preprocess, 3.0)) == with_one_placeholder(rendered)
    system = {"role": "system", "content": "Other."}
    other = tokenizer.apply_chat_template([system, message], add_generation_prompt=False, tokenize=False)
    assert other.startswith("<|im_start|>system\nOther.<|im_end|>\n<|im_start|>user\n")
    assert other.endswith(f"{question}<|im_end|>\n")


def with_one_placeholder(text: str) -> str:
    """Return a prompt with all that a processor puts in a video's place as one word."""
    pads = rf"<\|vision_start\|>(?:{re.escape(VIDEO_TOKEN)})+<\|vision_end\|>"
    return re.sub(rf"(?:(?:<[\d.]+ seconds>)?{pads})+|{re.escape(VIDEO_TOKEN)}", "VIDEO", text)


def test_the_hubs_own_processor_makes_the_same_inputs(made, for_the_hub):
    pytest.importorskip("torchvision", reason="the hub's video processors need torchvision")
    from transformers import AutoProcessor
    from transformers.video_utils import VideoMetadata

    preprocess = made.run.manifest.preprocess
    processor = AutoProcessor.from_pretrained(for_the_hub)
    message = {"type": "text", "text": prompts.render_question(preprocess, 3.0)}
    chat = [{"role": "user", "content": [{"type": "video"}, message]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    pictures, count = pictures_of(preprocess, 1), preprocess.num_frames
    frames = preprocess.canvases(pictures)[0].permute(0, 3, 1, 2)
    times = VideoMetadata(total_num_frames=count, fps=preprocess.rate_hz, frames_indices=list(range(count)))
    metadata = {"video_metadata": [times]} if preprocess.vision.family == "qwen3_vl" else {}
    made_by_it = processor(text=[text], videos=[frames], return_tensors="pt", **metadata)
    ours = processor.tokenizer.encode(prompts.render_prompt(preprocess, 3.0), add_special_tokens=False)
    assert made_by_it["input_ids"][0].tolist() == ours
    assert torch.equal(made_by_it["pixel_values_videos"], preprocess.pixel_values(pictures))


def test_without_the_extra_the_remedy_is_named(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        UsageError, match=re.escape("needs onnxscript; install them with: pip install 'omni-cli[onnx]'")
    ):
        export(made.recipe, made.run, ExportRequest("onnx", made.run.folder / "other"), QUIET)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ExportRequest("tflite"), "--format tflite: recipe vlm is exported as hf or onnx"),
        (ExportRequest("onnx", opset=17), r"--opset 17: expected 18 to \d+"),
        (ExportRequest("onnx", dtype="int4"), "--dtype int4: ONNX programs are float32 or float16"),
    ],
)
def test_wrong_options_are_one_line(made, request_, message):
    with pytest.raises(UsageError, match=message):
        export(made.recipe, made.run, request_, QUIET)


def test_batches():
    assert parse_batches("4") == (4,)
    assert parse_batches("1-3") == (1, 2, 3)
    for wrong in ("0", "3-1", "1-", "a", "1-65"):
        with pytest.raises(UsageError, match="expected a number of windows such as 1, or a range such as 1-8"):
            parse_batches(wrong)


@pytest.mark.fault("F30")
def test_other_outputs_are_refused():
    expected = [np.full((2, 3), 2.0, dtype=np.float32)]
    facts = compare_outputs([expected[0] + 1e-4], expected, 1e-3)
    assert facts["max_difference"] == pytest.approx(1e-4, rel=1e-2)
    assert facts["allowed_difference"] == pytest.approx(2e-3)
    for wrong in (expected[0] + 3e-3, expected[0] * np.nan):
        with pytest.raises(OmniError, match="nothing is published"):
            compare_outputs([wrong], expected, 1e-3)
    with pytest.raises(OmniError, match="other shapes"):
        compare_outputs([expected[0][:1]], expected, 1e-3)
    beside_a_large_one = [np.array([100.0], dtype=np.float32), np.array([1.0], dtype=np.float32)]
    with pytest.raises(OmniError, match=r"output 1 .* differs from torch's by 1\.5e\+00, 2\.0e-02 allowed"):
        compare_outputs([beside_a_large_one[0], np.array([-0.5], dtype=np.float32)], beside_a_large_one, 2e-2)
