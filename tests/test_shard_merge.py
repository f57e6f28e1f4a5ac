"""An adapter is folded into the very files of its base, a tensor at a time, exactly as PEFT would in memory."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from omni_cli.errors import DataError
from omni_cli.models import base_files, shard_merge
from omni_cli.models.shard_merge import ShardMerge, plan
from tests.support.pipeline import tiny_recipe

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")
KINDS = {
    "lora": {"mode": "lora"},
    "dora": {"mode": "dora"},
    "rslora and merger": {"mode": "lora", "rank_stabilised": True, "train_merger": True},
    "dora and merger": {"mode": "dora", "train_merger": True, "targets": ("q_proj", "down_proj")},
}


def a_base(family: str, folder: Path, dtype: str = "float32", **saving) -> Path:
    """A tiny base in a folder, in the files that the library writes."""
    recipe = tiny_recipe(family, cameras="1-cam", precision=dtype)
    preprocess = recipe.preprocess()
    recipe.load_base(preprocess).save_pretrained(folder, **saving)
    recipe.tokenizer(preprocess).save_pretrained(folder)
    return folder


def an_adapter(base: Path, folder: Path, **tune) -> Path:
    """An adapter on that base that has learned much: every weight of it is moved by a seed."""
    recipe = tiny_recipe(cameras="1-cam", model=str(base))
    recipe = recipe.model_copy(
        update={"tune": recipe.tune.model_copy(update={"mode": "lora", "targets": ("q_proj", "o_proj"), **tune})}
    )
    built = recipe.build(recipe.preprocess())
    torch.manual_seed(1)
    for weight in built.model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    recipe.save(built, folder)
    return folder


def merged(base: Path, adapter: Path, folder: Path) -> ShardMerge:
    planned = plan(base, adapter)
    folder.mkdir()
    done: list[int] = []
    digests = planned.write(folder, done.append)
    assert sum(done) == planned.total_bytes
    assert planned.count_changed(folder, digests) == 0
    return planned


def as_peft_merges(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT makes of the base's weights in memory, in float32."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True).state_dict()


def content_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a folder, and its type and shape, by the name that it has there."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            kind = f"{path.name} {tensor.dtype} {tuple(tensor.shape)} ".encode()
            found[name] = kind + tensor.flatten().view(torch.uint8).numpy().tobytes()
    return found


def metadata_of(path: Path) -> object:
    with safe_open(path, framework="pt") as opened:
        return opened.metadata()


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory) -> Path:
    return a_base(request.param, tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_hold_what_peft_merges_in_memory_bit_for_bit(kind, base, tmp_path):
    """pain 14, 15: and every tensor that no adapter sits on is the base's own, byte for byte."""
    adapter = an_adapter(base, tmp_path / "adapter", **KINDS[kind])
    planned = merged(base, adapter, tmp_path / "merged")
    model, told = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(told.values())
    expected, found = as_peft_merges(base, adapter), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    before, after = content_of(base), content_of(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == set(planned.changes)
    assert len(planned.changes) >= 4
    assert metadata_of(base / WEIGHTS) == metadata_of(tmp_path / "merged" / WEIGHTS)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == AutoTokenizer.from_pretrained(base).vocab


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["lora", "dora"])
def test_a_base_of_16_bits_is_merged_in_float32_and_rounded_once(mode, dtype, tmp_path):
    """pain 14."""
    base = a_base("qwen2_5_vl", tmp_path / "base", str(dtype).removeprefix("torch."))
    adapter = an_adapter(base, tmp_path / "adapter", mode=mode)
    planned = merged(base, adapter, tmp_path / "merged")
    expected = as_peft_merges(base, adapter)
    names = shard_merge.model_names(AutoModelForImageTextToText.from_pretrained(base), list(planned.changes))
    stored = load_file(tmp_path / "merged" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert set(planned.types.values()) == {dtype}
    for name in planned.changes:
        assert torch.equal(stored[name], expected[names[name]].to(dtype))


def test_old_names_and_new_ones_and_many_files_are_kept_as_they_are(tmp_path):
    """pain 15: transformers before 4.52 called them otherwise, and that is what the hub holds."""
    old, new, many = tmp_path / "old", tmp_path / "new", tmp_path / "many"
    a_base("qwen2_5_vl", old)
    a_base("qwen2_5_vl", many, max_shard_size="1MB")
    shutil.copytree(old, new)
    model = AutoModelForImageTextToText.from_pretrained(old)
    own = {name: weight.contiguous() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(own, new / WEIGHTS, {"format": "pt", "by": "another hand"})
    adapter = an_adapter(old, tmp_path / "adapter", mode="dora", train_merger=True)
    found = {}
    for base in (old, new, many):
        planned = merged(base, adapter, tmp_path / f"{base.name}-merged")
        assert content_of(base).keys() == content_of(tmp_path / f"{base.name}-merged").keys()
        found[base.name] = AutoModelForImageTextToText.from_pretrained(tmp_path / f"{base.name}-merged").state_dict()
    assert any(name.startswith("visual.") for name in load_file(old / WEIGHTS))
    assert any(name.startswith("model.visual.") for name in load_file(new / WEIGHTS))
    assert len(planned.files) > 4
    for other in ("new", "many"):
        assert all(torch.equal(tensor, found[other][name]) for name, tensor in found["old"].items())
    files = [sorted(path.name for path in folder.glob("model*")) for folder in (many, tmp_path / "many-merged")]
    assert files[0] == files[1]
    assert (many / INDEX).read_bytes() == (tmp_path / "many-merged" / INDEX).read_bytes()
    assert not (tmp_path / "old-merged" / INDEX).exists()
    same = [name for name in planned.files if sha256(many / name) == sha256(tmp_path / "many-merged" / name)]
    assert 0 < len(same) < len(planned.files)


def test_a_base_of_one_numbered_file_keeps_its_index(tmp_path):
    base, one, folder = tmp_path / "base", "model-00001-of-00001.safetensors", tmp_path / "merged"
    a_base("qwen2_5_vl", base)
    (base / WEIGHTS).rename(base / one)
    names = load_file(base / one)
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, one)}))
    merged(base, an_adapter(base, tmp_path / "adapter"), folder)
    assert (folder / INDEX).read_bytes() == (base / INDEX).read_bytes()
    assert AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def renamed(old: str, new: str):
    def change(tensors):
        return {name.replace(old, new): tensor for name, tensor in tensors.items()}

    return change


def with_another(tensors):
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    return {**tensors, name.replace("layers.0", "layers.7"): tensors[name].clone()}


def without_one(tensors):
    return {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q_proj.lora_B" not in name}


def of_another_width(tensors):
    return {
        name: tensor[:, :5] if name.endswith("q_proj.lora_A.weight") else tensor for name, tensor in tensors.items()
    }


ADAPTERS = {
    "of the text-only class": (
        renamed("model.language_model.", "model."),
        r"model\.model\.layers.* has no place in it",
    ),
    "with one layer more": (with_another, r"layers\.7\..*lora_A.* has no place in it"),
    "without one of its tensors": (without_one, r"layers\.1\.self_attn\.q_proj\.lora_B.* is not in the adapter; train"),
    "of another width": (of_another_width, r"does not match its base model: size mismatch for .*q_proj\.lora_A"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_every_tensor_of_an_adapter_has_its_place_or_is_named(case, base, tmp_path):
    """pain 15: none is left out without a word."""
    change, message = ADAPTERS[case]
    path = an_adapter(base, tmp_path / "adapter") / ADAPTER
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})
    with pytest.raises(DataError, match=message):
        plan(base, tmp_path / "adapter")


def q_of(tensors) -> str:
    return next(name for name in tensors if name.endswith("layers.1.self_attn.q_proj.weight"))


def twice(tensors):
    name = q_of(tensors)
    return {**tensors, name.replace("model.layers", "model.language_model.layers"): tensors[name].clone()}


BASES = {
    "lacks it": (lambda all_: {name: one for name, one in all_.items() if name != q_of(all_)}, r"hold 0 times"),
    "holds it twice": (twice, r"model\.language_model\.layers\.1\.self_attn\.q_proj\.weight, .* hold 2 times"),
    "of another shape": (
        lambda all_: {**all_, q_of(all_): torch.zeros(3, 4)},
        r"F32 of shape \(3, 4\), expected shape",
    ),
    "of eight bits": (
        lambda all_: {**all_, q_of(all_): all_[q_of(all_)].to(torch.float8_e4m3fn)},
        r"q_proj\.weight is F8_E4M3 of shape .*one of F64, F32, F16, BF16: merge into the base's original weights",
    ),
    "of numbers that are none": (
        lambda all_: {**all_, q_of(all_): torch.full_like(all_[q_of(all_)], torch.nan)},
        r"layers\.1\.self_attn\.q_proj\.weight (cannot be merged: NaNs|merged is not finite)",
    ),
    "of numbers at the end of their type": (
        lambda all_: {**all_, q_of(all_): torch.full_like(all_[q_of(all_)], 65504).half()},
        r"q_proj\.weight merged is not finite as F16",
    ),
}


@pytest.mark.parametrize("case", BASES)
@pytest.mark.fault("F24")
def test_a_base_whose_tensor_is_not_to_be_merged_into_is_one_line(case, tmp_path):
    change, message = BASES[case]
    base = a_base("qwen2_5_vl", tmp_path / "base")
    adapter = an_adapter(base, tmp_path / "adapter", alpha=4000)
    save_file(change(load_file(base / WEIGHTS)), base / WEIGHTS, {"format": "pt"})
    with pytest.raises(DataError, match=message) as raised:
        merged(base, adapter, tmp_path / "merged")
    assert "\n" not in str(raised.value)


def test_a_base_that_is_quantised_itself_is_refused(base, tmp_path):
    """pain 14: a merge into 4 bits is none."""
    adapter = an_adapter(base, tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "four")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "four" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="is quantised itself; merging needs the weights that it was made from"):
        plan(tmp_path / "four", adapter)


def test_a_bit_that_the_disk_changed_is_counted(base, tmp_path):
    adapter = an_adapter(base, tmp_path / "adapter")
    planned, folder = plan(base, adapter), tmp_path / "merged"
    folder.mkdir()
    digests = planned.write(folder, lambda count: None)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    assert planned.count_changed(folder, digests) == 1


def test_what_lies_beside_the_weights_comes_along_and_the_template_of_old_becomes_the_new(tmp_path):
    """pain 14: a tokenizer or processor that stayed behind is the first cause of "worse after the merge"."""
    base = a_base("qwen2_5_vl", tmp_path / "base")
    adapter = an_adapter(base, tmp_path / "adapter")
    beside = {
        "generation_config.json": '{"temperature": 0.01, "do_sample": true}',
        "preprocessor_config.json": '{"patch_size": 14}',
        "video_preprocessor_config.json": '{"fps": 2}',
        "LICENSE": "Apache",
    }
    for name, text in beside.items():
        (base / name).write_text(text)
    (base / "chat_template.json").write_text('{"chat_template": "{{ messages }} said"}')
    (base / "pytorch_model.bin").write_bytes(b"a pickle")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    merged(base, adapter, tmp_path / "merged")
    for name, text in beside.items():
        assert (tmp_path / "merged" / name).read_text() == text
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages }} said"
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {*beside, "config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_a_base_of_the_hub_is_read_from_the_snapshot_that_is_loaded(base, tmp_path, monkeypatch):
    cached, commit = tmp_path / "cache" / "models--org--vlm", "c" * 40
    shutil.copytree(base, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert base_files.find("org/vlm") == cached / "snapshots" / commit
    assert base_files.find(str(base)) == base
    (cached / "snapshots" / commit / WEIGHTS).unlink()
    with pytest.raises(DataError, match=r"holds no \*\.safetensors"):
        base_files.find("org/vlm")


MEASURED = """
import re, sys
from pathlib import Path
import torch
from omni_cli.models.shard_merge import plan

def told(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

torch.set_num_threads(1)
torch.ones(512, 512) @ torch.ones(512, 512)  # what the library keeps for itself comes first
planned = plan(Path(sys.argv[1]), Path(sys.argv[2]))
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = told("VmHWM")
planned.write(Path(sys.argv[3]), lambda count: None)
print(planned.total_bytes, told("VmHWM") - before)
"""


@pytest.mark.marathon
def test_a_merge_needs_the_memory_of_a_few_tensors_however_large_the_model_is(tmp_path, monkeypatch):
    """pain 14: of 160 MB in 39 files, where the largest tensor that changes has 1."""
    monkeypatch.setattr("omni_cli.models.tiny._HIDDEN", 512)
    monkeypatch.setattr("omni_cli.models.tiny._INNER", 2048)
    monkeypatch.setattr("omni_cli.models.tiny._LAYERS", 8)
    monkeypatch.setattr("omni_cli.models.tiny._MROPE", [16, 24, 24])
    base = a_base("qwen2_5_vl", tmp_path / "base", max_shard_size="5MB")
    adapter = an_adapter(base, tmp_path / "adapter", mode="dora", targets=("q_proj",))
    (tmp_path / "merged").mkdir()
    command = [sys.executable, "-c", MEASURED, base, adapter, tmp_path / "merged"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    total_bytes, grown_bytes = map(int, done.stdout.split())
    assert len(list((tmp_path / "merged").glob("model-*"))) > 20
    assert total_bytes > 100 << 20
    assert grown_bytes < total_bytes / 4
