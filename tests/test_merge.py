"""A merged model is the adapted one, to the last logit that arithmetic allows; or it is not published."""

import itertools
import json
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.files import receipt_path
from omni_cli.recipes.vlm import Vlm
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.shards import open_shards
from omni_cli.stages import models, runs
from omni_cli.stages.evaluate import EvalRequest, evaluate
from omni_cli.stages.merge import MergeRequest, merge
from omni_cli.stages.parity import Parity, check_parity, count_changed, probe
from tests.support.folders import tree
from tests.support.injection import needs_strace, run_traced
from tests.support.pipeline import QUIET, Made, make_run, tiny_recipe, write_synthetic

ADAPTERS = {"qwen2_5_vl": "lora", "qwen3_vl": "dora"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Raw data of one camera, and a base model in a folder."""
    folder = tmp_path_factory.mktemp("merge")
    write_synthetic(folder / "data", cameras=("camera_front_wide_120fov",))
    base = tiny_recipe(cameras="1-cam")
    base.save(base.build(base.preprocess()), folder / "base")
    return folder


@pytest.fixture(scope="module", params=ADAPTERS)
def made(request, folder) -> Made:
    family = request.param
    recipe = tiny_recipe(family, cameras="1-cam", mode=ADAPTERS[family])
    return make_run(folder / family, recipe, data=folder / "data")


@pytest.fixture(scope="module")
def merged(made):
    result = merge(made.recipe, made.run, MergeRequest(), QUIET)
    return result, made.run.folder / "merged"


@pytest.fixture
def on_a_folder(folder, tmp_path):
    """A run whose base is a folder of weights that may change."""
    base = tmp_path / "base"
    base.mkdir()
    for path in (folder / "base").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    recipe = tiny_recipe(cameras="1-cam", mode="lora", model=str(base))
    return base, make_run(tmp_path, recipe, data=folder / "data")


def test_the_merge_is_exact_and_says_so(merged):
    result, folder = merged
    parity = result["parity"]
    assert parity["adapter_moves"] > 0.01
    assert parity["merged"] < 2e-5
    assert (parity["changed_weights"], parity["choices_agree"]) == (0, 1.0)
    assert (parity["kl_mean"] < 1e-10, parity["kl_adapter"] > 1e-3) == (True, True)
    assert 0 < parity["kl_windows"] <= 4  # of the run's own shards, beside the noise
    assert result["model"] == str(folder)
    assert json.loads(receipt_path(folder).read_text())["parity"] == parity
    assert runs.verified_folder(folder)


def test_transformers_loads_the_merge_and_computes_the_adapted_logits(made, merged):
    _, folder = merged
    preprocess = made.run.manifest.preprocess
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pictures = torch.randint(0, 256, preprocess.window_shape, dtype=torch.uint8)
    row = made.recipe.prompt_row(pictures, preprocess, tokenizer, 7.0)
    adapted = made.recipe.load(preprocess, made.run.final)
    batch = made.recipe.collate([row], preprocess)
    inputs = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "pixel_values_videos": preprocess.pixel_values(pictures[None]),
        "video_grid_thw": torch.tensor([preprocess.grid]),
        "mm_token_type_ids": (batch["input_ids"] == tokenizer.convert_tokens_to_ids("<|video_pad|>")).long() * 2,
    }
    with torch.no_grad():
        found = model(**inputs).logits
        expected = adapted.model(**inputs).logits
    assert torch.allclose(found, expected, atol=2e-5)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    memory = made.recipe.merge(made.recipe.load_to_merge(preprocess, made.run.final))
    with torch.no_grad():
        assert torch.allclose(memory.model(**inputs).logits, found, atol=2e-5)


def test_a_lora_merge_is_base_plus_scaled_product(on_a_folder):
    base, made = on_a_folder
    merge(made.recipe, made.run, MergeRequest(), QUIET)
    before, after = load_file(base / "model.safetensors"), load_file(made.run.folder / "merged" / "model.safetensors")
    adapter = load_file(made.run.final / "adapter_model.safetensors")
    scale = made.recipe.tune.alpha / made.recipe.tune.rank
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 2 * 4  # layers x projections
    for name in changed:
        key = next(key for key in adapter if ".".join(name.split(".")[-5:-1]) in key and "lora_A" in key)
        product = adapter[key.replace("lora_A", "lora_B")] @ adapter[key]
        assert torch.allclose(after[name], before[name] + scale * product, atol=1e-6)


@pytest.mark.fault("F30")
def test_a_second_merge_does_nothing_and_a_damaged_one_is_made_again(made, merged):
    _, folder = merged
    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert merge(made.recipe, made.run, MergeRequest(), QUIET) == merged[0]
    assert weights.stat().st_mtime_ns == before
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="does not match its receipt; make it again with: omni merge"):
        models.open_model(folder)
    merge(made.recipe, made.run, MergeRequest(), QUIET)
    assert weights.read_bytes() == content
    receipt_path(folder).unlink()  # as if killed before the folder was sealed
    merge(made.recipe, made.run, MergeRequest(), QUIET)
    assert runs.verified_folder(folder)
    assert not list(folder.parent.glob(".merged*"))


@needs_strace
@pytest.mark.storm
@pytest.mark.fault("F1", "F30")
def test_killed_wherever_it_names_something_a_merge_is_made_again_the_same(on_a_folder, tmp_path):
    """Over an older model, which it takes away: what has no receipt is no model."""
    _, made = on_a_folder
    out = tmp_path / "model"
    again = partial(merge, made.recipe, made.run, MergeRequest(out), QUIET)
    again()
    whole = tree(out)
    for place in itertools.count(1):
        receipt_path(out).unlink()
        code = run_traced(again, f"inject=rename,unlink:signal=SIGKILL:when={place}")
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert not runs.verified_folder(out)
        again()
        assert tree(out) == whole
    assert place > 4
    assert sorted(path.name for path in tmp_path.glob("*model*")) == ["model", receipt_path(out).name]


def test_the_merged_model_gives_the_answers_of_the_run(made, merged):
    _, folder = merged
    model = models.open_model(folder)
    recipe = model.recipe_settings(Vlm)
    assert (recipe.tune.mode, recipe.model, model.card.from_run) == ("full", str(folder), made.run.name)
    preprocess = model.card.preprocess
    assert preprocess == made.run.manifest.preprocess
    shards = open_shards(made.shards)
    dataset = WindowDataset(shards, "val", made.recipe.sidecar_key(preprocess))
    rows = [dataset[index] for index in range(2)]
    said = recipe.predict(recipe.load(preprocess, folder), rows, preprocess)
    assert said == made.recipe.predict(made.recipe.load(preprocess, made.run.final), rows, preprocess)


def test_a_run_in_bfloat16_is_merged_into_what_its_base_has_more_of(on_a_folder, tmp_path):
    """The files are in float32, and stay so; both models are compared as those hold them, nothing is rounded."""
    base, made = on_a_folder
    half = made.recipe.model_copy(update={"precision": "bfloat16"})
    parity = merge(half, made.run, MergeRequest(tmp_path / "half"), QUIET)["parity"]
    assert 0 < parity["merged"] < parity["allowed"] < 1
    assert (parity["kl_mean"] < 1e-10, parity["kl_mean_allowed"]) == (True, 1e-6)
    whole = merge(made.recipe, made.run, MergeRequest(), QUIET)["model"]
    stored = [load_file(folder / "model.safetensors") for folder in (tmp_path / "half", Path(whole), base)]
    assert all(torch.equal(weight, stored[1][name]) for name, weight in stored[0].items())
    assert {weight.dtype for each in stored for weight in each.values()} == {torch.float32}


def test_another_base_is_refused(on_a_folder):
    base, made = on_a_folder
    weights = load_file(base / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="adapter does not match its base"):
        evaluate(made.recipe, made.run, EvalRequest(blind=False), QUIET)
    with pytest.raises(DataError, match=r"adapter does not match its base: run run was trained on \w+, .* train again"):
        merge(made.recipe, made.run, MergeRequest(), QUIET)
    assert not (made.run.folder / "merged").exists()


def test_an_adapter_that_learned_nothing_is_not_merged(on_a_folder):
    _, made = on_a_folder
    path = made.run.final / "adapter_model.safetensors"
    weights = {name: tensor * (0 if "lora_B" in name else 1) for name, tensor in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    runs.seal_folder(made.run.final)
    with pytest.raises(OmniError, match="the adapter does not change a single output"):
        merge(made.recipe, made.run, MergeRequest(), QUIET)
    assert not (made.run.folder / "merged").exists()


def test_a_run_in_full_has_nothing_to_merge(folder, tmp_path):
    made = make_run(tmp_path, tiny_recipe(cameras="1-cam"), data=folder / "data")
    with pytest.raises(UsageError, match="tuned in full: nothing to merge, its weights are whole; use: omni export"):
        merge(made.recipe, made.run, MergeRequest(), QUIET)
    with pytest.raises(UsageError, match=r"is a run; ask it with --run .* \(expected a model of omni, with an omni"):
        models.open_model(made.run.folder)


def test_a_folder_of_others_is_not_replaced(made, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is there and omni did not make it; choose another folder with --out"):
        merge(made.recipe, made.run, MergeRequest(tmp_path), QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_cannot_be_sealed_is_not_left_behind(tmp_path):
    def publish():
        with models.publish_folder(tmp_path / "m", "writing") as (made, facts):
            (made / "weights").write_text("w")
            facts["no_json"] = object()

    with pytest.raises(TypeError, match="not JSON"):
        publish()
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_folder_is_named(made, folder, tmp_path):
    with pytest.raises(UsageError, match="is an adapter without its base; make a model of its run with: omni merge"):
        models.open_model(made.run.final)
    with pytest.raises(UsageError, match="is a model that omni did not make; ask it zero-shot with --set model="):
        models.open_model(folder / "base")
    with pytest.raises(UsageError, match="is not a model"):
        models.open_model(tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        models.open_model(tmp_path / "absent")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_moves": 0.0}, "does not change a single output"),
        ({"merged": 2e-3}, "merged outputs differ by 2.0e-03 .* nothing is published"),
        ({"merged": float("inf")}, "merged outputs differ by inf"),
        ({"adapter_moves": 1e-5, "merged": 5e-5}, "moves them by 1.0e-05: to round .* as much as was learned; keep"),
        ({"choices_agree": 0.98}, "first choice agrees at 98.0% of the positions, 100% expected"),
        ({"changed_weights": 1}, "the written model differs from the merged one in 1 weight, its outputs by 7.0e-07"),
        ({"changed_weights": 2, "reloaded": None}, "from the merged one in 2 weights; check the disk, and merge again"),
        ({"reloaded": 2e-3}, "in 0 weights, its outputs by 2.0e-03; check the disk"),
        ({"reloaded": float("nan")}, "its outputs by nan"),
    ],
)
@pytest.mark.fault("F30")
def test_a_merge_that_changes_the_answers_is_refused(changes, message):
    good = {"adapter_moves": 0.5, "merged": 1e-6, "allowed": 1e-3, "choices_agree": 1.0, "choices_needed": 1.0}
    good |= {"changed_weights": 0, "reloaded": 7e-7}
    check_parity(Parity(**good))
    with pytest.raises(OmniError, match=message):
        check_parity(Parity(**{**good, **changes}))


def test_a_weight_of_another_bit_is_counted():
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False)
    other.weight = one.weight
    assert (count_changed(one, one), count_changed(one, other)) == (0, 1)
    other.weight = torch.nn.Parameter(torch.nextafter(one.weight.detach(), torch.tensor(9.0)))
    assert count_changed(one, other) == 2


def test_the_probe_is_the_same_every_time(made):
    preprocess = made.run.manifest.preprocess
    built = made.recipe.load(preprocess, made.run.final)
    one, other = (probe(made.recipe, built, preprocess) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one[0], one[1])
