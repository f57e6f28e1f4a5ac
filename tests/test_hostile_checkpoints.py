"""A model's folder that is damaged, of another kind, or hostile: one line, and no pickle is ever loaded."""

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omni_cli.__main__ import run as omni
from omni_cli.errors import OmniError
from omni_cli.files import RECEIPT_PROOF, read_json, receipt_path
from omni_cli.models import qwen_vl
from omni_cli.samples.shards import open_shards
from omni_cli.stages import runs
from omni_cli.stages.merge import MergeRequest, merge
from tests.support.driving import tiny_student, write_drives
from tests.support.hostile import Hostile
from tests.support.pipeline import QUIET, Made, make_run, tiny_recipe, write_synthetic

pytestmark = pytest.mark.fault("F24", "F26")
WEIGHTS, INDEX, AGAIN = "model.safetensors", "model.safetensors.index.json", "take the folder again"
FRONT = "camera_front_wide_120fov"
SETTINGS = {"sample.cameras": FRONT, "sample.window": 4, "sample.stride": 4, "sample.canvas_px": 112}
SETTINGS |= {"split.validation": 0.5, "train.max_steps": 1, "train.batch_size": 2, "tune.mode": "lora"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """A run over a base in a folder, merged."""
    folder = tmp_path_factory.mktemp("hostile")
    write_synthetic(folder / "data", cameras=(FRONT,))
    base = tiny_recipe(cameras="1-cam")
    base.save(base.build(base.preprocess()), folder / "base")
    recipe = tiny_recipe(cameras="1-cam", mode="lora", model=str(folder / "base"))
    made = make_run(folder, recipe, data=folder / "data")
    merge(made.recipe, made.run, MergeRequest(), QUIET)
    return made


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Made:
    """A run over a student in a folder."""
    folder = tmp_path_factory.mktemp("student")
    write_drives(folder, seconds=3.0)
    base = tiny_student()
    base.save(base.build(base.preprocess()), folder / "base")
    return make_run(folder, tiny_student(mode="dora", model=str(folder / "base")), data=folder)


# -- what is done to a folder


def holds(name, content):
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def config(name="config.json", **changes):
    """Change a configuration; `a__b` is b in a, and None takes a value away."""

    def change(folder):
        whole = read_json(folder / name)
        for key, value in changes.items():
            *tables, last = key.split("__")
            table = whole[tables[0]] if tables else whole
            table.pop(last, None)
            table |= {} if value is None else {last: value}
        (folder / name).write_text(json.dumps(whole))

    return change


def header(length):
    def change(folder):
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])

    return change


def tensors(**entries):
    """A file of safetensors whose header says what it likes of 64 bytes."""
    text = json.dumps(entries).encode()
    return holds(WEIGHTS, struct.pack("<Q", len(text)) + text + bytes(64))


def cut(length, name=WEIGHTS):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def weights(change, name=WEIGHTS):
    def changed(folder):
        held = {key: weight.clone() for key, weight in load_file(folder / name).items()}
        (folder / name).unlink()
        save_file(change(held), folder / name, {"format": "pt"})

    return changed


def as_type(dtype):
    return weights(lambda held: {name: weight.to(dtype) for name, weight in held.items()})


def wider(held):
    name = next(name for name, weight in held.items() if weight.ndim == 2)
    return {**held, name: torch.cat([held[name], held[name]])}


def pickled(name, other="pytorch_model.bin"):
    """Weights as a pickle whose loading leaves a canary beside the folder."""

    def change(folder):
        (folder / name).unlink()
        torch.save({"x": Hostile(folder.parent / "canary")}, folder / other)

    return change


def indexed(index):
    def change(folder):
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        (folder / INDEX).write_text(index)

    return change


def gone(name):
    return lambda folder: (folder / name).unlink()


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
CONFIGS = {
    "no JSON": (holds("config.json", '{"model_type": '), 3, r"config\.json: no JSON .*take the folder again"),
    "a list": (holds("config.json", "[]"), 3, r"config\.json: found no object"),
    "a number": (holds("config.json", "3"), 3, r"config\.json: found no object"),
    "nothing": (holds("config.json", ""), 3, r"config\.json: no JSON"),
    "bytes": (holds("config.json", b"\xff\xfe\x00"), 3, r"config\.json: no JSON"),
    "depth": (holds("config.json", "[" * 100_000), 3, r"config\.json: no JSON"),
    "absent": (gone("config.json"), 3, r"config\.json: no such file"),
    "another model": (config(model_type="bert"), 2, r"family 'bert' is not supported; choose one of qwen2_5_vl"),
    "an unknown model": (config(model_type="evil"), 3, r"model type `evil`"),
    "no type": (config(model_type=None), 3, r"Unrecognized model"),
    "a type of lists": (config(model_type=[1]), 3, r"unhashable"),
    "code": (config(model_type="evil", auto_map={"AutoConfig": "x.Y"}), 3, r"custom code"),
    "text that is none": (config(text_config="x"), 3, r"Validation error for field 'text_config': TypeError"),
    "a text model of default size": (config(text_config=None), 3, r"asks for [\d,]+ weights, its files hold"),
    "a negative width": (config(text_config__hidden_size=-1), 3, r"negative dimension"),
    "an enormous width": (config(text_config__hidden_size=1 << 40), 3, AGAIN),
    "enormous depth": (
        config(text_config__num_hidden_layers=10**9, text_config__layer_types=None),
        3,
        r"config.json: asks for 1,000,000,000 layers, expected 10,000 at most",
    ),
    "a vision tower of enormous depth": (config(vision_config__depth=10**9), 3, r"asks for 1,000,000,000 layers"),
    "patches of nothing": (
        config(vision_config__patch_size=0),
        3,
        r"has the shape .* asks for \(.*\); take|zero-element",
    ),
    "an unknown activation": (config(text_config__hidden_act="evil"), 3, AGAIN),
    "an unknown type": (config(dtype="evil"), 3, AGAIN),
    "weights of another name": (config(transformers_weights="adapter_model.bin"), 3, r"names the weights 'adapter_mod"),
    "an adapter": (
        holds("adapter_config.json", '{"base_model_name_or_path": "evil/base"}'),
        2,
        r"is an adapter, and no",
    ),
}
FILES = {
    "cut at its end": (cut(-10), 3, r"safetensors: no whole file of safetensors .*incomplete.*take the folder again"),
    "cut in its header": (cut(3000), 3, r"no whole file of safetensors \(.*header"),
    "empty": (cut(0), 3, r"no whole file of safetensors"),
    "a header of 2^60 bytes": (header(1 << 60), 3, r"no whole file of safetensors \(.*header too large"),
    "a header of 2^64 - 1 bytes": (header((1 << 64) - 1), 3, r"no whole file of safetensors"),
    "no header": (header(0), 3, r"no whole file of safetensors"),
    "a header that is no JSON": (holds(WEIGHTS, struct.pack("<Q", 5) + b'{"a":'), 3, r"no whole file of safetensors"),
    "overlapping": (tensors(a=ENTRY, b={**ENTRY, "data_offsets": [8, 24]}), 3, r"no whole file of safetensors"),
    "shapes beyond counting": (tensors(a={**ENTRY, "shape": [1 << 40] * 2}), 3, r"no whole file of safetensors"),
    "an unknown number": (tensors(a={**ENTRY, "dtype": "X99"}), 3, r"no whole file of safetensors"),
    "whole numbers": (as_type(torch.int64), 3, r"weight is of type I64, expected one of F64, F32, F16, BF16"),
    "truths": (as_type(torch.bool), 3, r"weight is of type BOOL"),
    "eight bits": (as_type(torch.float8_e4m3fn), 3, r"weight is of type F8_E4M3"),
    "other shapes": (weights(wider), 3, r"has the shape \(\d+, \d+\), its config.json asks for \(\d+, \d+\)"),
    "some weights": (weights(lambda held: dict([*held.items()][3:])), 3, r"lacks 4 of its weights, first lm_head"),
    "no weight": (weights(lambda held: {}), 3, r"its files hold 0"),
    "other weights": (weights(lambda held: {"x": torch.zeros(3)}), 3, r"weights, its files hold 3"),
    "absent": (gone(WEIGHTS), 3, r"holds no \*\.safetensors; pickled weights are never loaded"),
    "a pickle": (pickled(WEIGHTS), 3, r"holds no \*\.safetensors; pickled weights are never loaded"),
    "a pickle of that name": (pickled(WEIGHTS, WEIGHTS), 3, r"no whole file of safetensors"),
    "an index that is no JSON": (indexed("{"), 3, rf"{INDEX}: no JSON"),
    "an index of nothing": (indexed("{}"), 3, rf"{INDEX}: no weight_map"),
    "a part that is away": (
        indexed('{"weight_map": {"x": "model-00002-of-00002.safetensors"}}'),
        3,
        r"names 'model-00002-of-00002.safetensors', expected a \*\.safetensors beside it",
    ),
    "an index that leads out": (indexed('{"weight_map": {"x": "../../x.safetensors"}}'), 3, r"names '\.\./\.\./x"),
    "an index of a pickle": (indexed('{"weight_map": {"x": "pytorch_model.bin"}}'), 3, r"names 'pytorch_model.bin'"),
}
WORDS = {
    "no JSON": (holds("tokenizer.json", "{"), 3, r"cannot load the tokenizer"),
    "a list": (holds("tokenizer.json", "[]"), 3, r"cannot load the tokenizer"),
    "absent": (gone("tokenizer.json"), 3, r"the tokenizer of .* knows no <\|video_pad\|>"),
    "settings that are a list": (holds("tokenizer_config.json", "[]"), 3, r"cannot load the tokenizer"),
    "generation": (holds("generation_config.json", "[]"), 3, r"cannot load model"),
}
KINDS = {"config": CONFIGS, "weights": FILES, "words": WORDS}
CASES = {f"{kind}: {name}": case for kind, cases in KINDS.items() for name, case in cases.items()}


# -- the verbs that meet it


def said_by(words, capsys) -> tuple[int, str]:
    """The exit code, and the one line."""
    code = omni([*map(str, words), "--quiet"])
    captured = capsys.readouterr()
    *others, line = (line for line in captured.err.splitlines() if line and "it/s]" not in line)  # a bar, on a terminal
    assert (captured.out, others, line[:7]) == ("", [], "error: ")
    return code, line


def asked(model: Path) -> list[str]:
    values = {"model": json.dumps(str(model)), "precision": "float32", **SETTINGS}
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def routes(made: Made, base: Path, merged: Path):
    """Every verb that opens a folder of weights which nobody vouches for."""
    place, profile = base.parent, ["--profile", "cpu-tiny"]
    clip = open_shards(made.shards).manifest.recordings[0].id
    infer = ["infer", clip, "--data", made.data, "--out", place / "out"]
    runs_of = ["--runs", place / "runs", "--run", "r"]
    yield base, ["train", *profile, "--shards", made.shards, *asked(base), *runs_of]
    yield base, [*infer, *profile, *asked(base)]
    yield merged, [*infer, "--model", merged]


@pytest.mark.parametrize("case", CASES)
def test_a_models_folder_that_is_damaged_or_hostile_is_one_line(case, made, tmp_path, capsys):
    damage, expected, message = CASES[case]
    base, merged = tmp_path / "base", tmp_path / "merged"
    for folder, origin in ((base, made.run.folder.parent.parent / "base"), (merged, made.run.folder / "merged")):
        shutil.copytree(origin, folder)
        damage(folder)
    for folder, words in routes(made, base, merged):
        code, line = said_by(words, capsys)
        assert code == expected, line
        assert str(folder) in line
        assert re.search(message, line), line
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("runs/r/final*"))


def test_an_old_index_beside_a_file_of_all_weights_is_not_heeded(made, tmp_path):
    """The library reads the one file, whatever other files are there."""
    base = tmp_path / "base"
    shutil.copytree(made.run.folder.parent.parent / "base", base)
    (base / INDEX).write_text('{"weight_map": {"x": "model-00001-of-00002.safetensors"}}')
    save_file({"position.weight": torch.arange(4)}, base / "other.safetensors")
    assert qwen_vl.load_model(str(base), torch.float32).name_or_path == str(base)
    assert qwen_vl.weights_fingerprint(str(base))


def test_weights_packed_by_eight_are_not_too_few(made, tmp_path):
    """As AWQ keeps them; whether they can be read is the library's to say."""
    base = tmp_path / "base"
    shutil.copytree(made.run.folder.parent.parent / "base", base)
    weights(lambda held: {name: torch.zeros(-(-weight.numel() // 8)) for name, weight in held.items()})(base)
    config(quantization_config={"quant_method": "awq", "bits": 4, "version": "gemm"})(base)
    with pytest.raises(OmniError, match="requires gptqmodel"):
        qwen_vl.load_model(str(base), torch.float32)


# -- what another hand sealed


def resealed(origin: Path, folder: Path, damage) -> Path:
    """Copy a run, damage its weights, and say that they are whole."""
    shutil.copytree(origin, folder)
    final = folder / "final"
    shutil.copy(receipt_path(origin / "final"), receipt_path(final))
    facts = {key: value for key, value in read_json(receipt_path(final)).items() if key not in ("files", RECEIPT_PROOF)}
    damage(final)
    runs.seal_folder(final, **facts)
    return folder


ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTERS = {
    "another base": (
        config(ADAPTER_CONFIG, base_model_name_or_path="evil/base"),
        r"names the base 'evil/base', expected",
    ),
    "no JSON": (holds(ADAPTER_CONFIG, "{"), r"adapter_config\.json: no JSON"),
    "another kind": (config(ADAPTER_CONFIG, peft_type="IA3"), r"is of type 'IA3', expected 'LORA'"),
    "another rank": (config(ADAPTER_CONFIG, r=3), r"does not match its base model: "),
    "a rank that is none": (config(ADAPTER_CONFIG, r="evil"), r"does not match its base model: "),
    "an unknown key": (config(ADAPTER_CONFIG, runtime_config="evil"), r"does not match its base model: "),
    "cut": (cut(-10, ADAPTER), r"no whole file of safetensors"),
    "whole numbers": (
        weights(lambda held: {name: weight.to(torch.int32) for name, weight in held.items()}, ADAPTER),
        r"is of type I32, expected one of F64",
    ),
    "other shapes": (weights(wider, ADAPTER), r"does not match its base model: "),
    "lacks a weight": (weights(lambda held: dict([*held.items()][1:]), ADAPTER), r"does not match its base model: "),
    "a pickle": (pickled(ADAPTER, "adapter_model.bin"), r"adapter_model\.safetensors: no whole file of safetensors"),
}


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("recipe", ["vlm", "distill"])
def test_an_adapter_that_another_hand_sealed_is_one_line(case, recipe, request, tmp_path, capsys):
    made, (damage, message) = request.getfixturevalue("made" if recipe == "vlm" else "student"), ADAPTERS[case]
    folder = resealed(made.run.folder, tmp_path / "r", damage)
    shutil.rmtree(folder / "merged", ignore_errors=True)
    receipt_path(folder / "merged").unlink(missing_ok=True)
    clip = open_shards(made.shards).manifest.recordings[0].id
    for words in (
        ["infer", clip, "--data", made.data, "--out", tmp_path / "out", "--run", folder],
        ["eval", folder, "--no-blind"],
        ["merge", folder],
        ["export", folder],
    ):
        code, line = said_by(words, capsys)
        assert code == 3, (words, line)
        assert re.search(message, line), (words, line)
    assert not (tmp_path / "canary").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith((".merged", "merged"))]
    assert not list(folder.glob("export/*"))


STUDENTS = {
    "no JSON": (holds("config.json", "{"), r"config\.json: no JSON"),
    "a list": (holds("config.json", "[]"), r"config\.json: found no object"),
    "no backbone": (config(backbone=None), r"cannot build the driving net of .*'backbone'"),
    "an unknown backbone": (config(backbone__model_type="evil"), r"cannot build the driving net of .*evil"),
    "a negative width": (config(hidden=-1), r"cannot build the driving net of"),
    "another width": (config(hidden=8), r"size mismatch for"),
    "cut": (cut(-10), r"no whole file of safetensors"),
    "a header of 2^60 bytes": (header(1 << 60), r"no whole file of safetensors"),
    "whole numbers": (as_type(torch.int64), r"is of type I64, expected"),
    "sixteen bits": (as_type(torch.float16), r"is of type torch.float16, expected torch.float32"),
    "lacks weights": (weights(lambda held: dict([*held.items()][:-3])), r"3 weights are missing and 0 unknown"),
    "a pickle": (pickled(WEIGHTS), r"pickled weights are never loaded|expected config.json and model.safetensors"),
}


@pytest.mark.parametrize("case", STUDENTS)
def test_a_student_that_is_damaged_or_hostile_is_one_line(case, student, tmp_path, capsys):
    base, (damage, message) = tmp_path / "base", STUDENTS[case]
    shutil.copytree(student.run.folder.parent.parent / "base", base)
    damage(base)
    sets = [f"sample.cameras={FRONT}", "sample.window=5", "sample.stride=4", "split.validation=0.5", "tune.mode=dora"]
    sets += ["train.warmup_steps=1", "train.max_steps=1"]
    words = [word for value in [*sets, f"model={json.dumps(str(base))}"] for word in ("--set", value)]
    runs_of = ["--runs", tmp_path / "runs", "--run", "r"]
    code, line = said_by(["train", "--profile", "cpu-tiny", "--shards", student.shards, *words, *runs_of], capsys)
    assert code == 3, line
    assert re.search(message, line), line
    assert not (tmp_path / "canary").exists()
