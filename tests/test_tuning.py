"""Which parts of a model learn, by what kind of adapter, and how fast."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from omni_cli.__main__ import run
from omni_cli.errors import DataError, OmniError
from omni_cli.models import adapters, parts, qwen_vl
from omni_cli.recipe import OwnRate
from omni_cli.recipes.vlm import Vlm
from omni_cli.stages import runs
from omni_cli.stages.merge import MergeRequest, merge
from omni_cli.stages.train import TrainRequest, rates, train
from tests.support.pipeline import QUIET, Made, make_run, tiny_recipe, write_synthetic
from tests.test_models import make_rows

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
VISION_LINEARS = {
    "qwen2_5_vl": ("qkv", "proj", "gate_proj", "up_proj", "down_proj"),
    "qwen3_vl": ("qkv", "proj", "linear_fc1", "linear_fc2"),
}


def tuned(
    family: str = "qwen2_5_vl", *, precision: str = "float32", train: dict[str, Any] | None = None, **tune
) -> Vlm:
    sample = {"cameras": "4-cam", "window": 4, "canvas_px": 112}
    asked = {"rank": 4, "alpha": 8, **tune}
    return Vlm(model=f"tiny:{family}", precision=precision, sample=sample, tune=asked, train=train or {})


def learn(vlm: Vlm, model: torch.nn.Module, *, steps: int = 2, rate: float = 1e-2) -> None:
    """Take steps, and check gradients at the last."""
    preprocess = vlm.preprocess()
    batch = vlm.collate(make_rows(vlm, [3.0, 17.5]), preprocess)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = vlm.loss(model.train(), batch, preprocess)
        (loss.total / loss.count).backward()
        optimizer.step()
    adapters.check_gradients(model)


def outputs(vlm: Vlm, model: torch.nn.Module) -> torch.Tensor:
    preprocess = vlm.preprocess()
    with torch.no_grad():
        return vlm.outputs(model.eval(), vlm.collate(make_rows(vlm, [3.0, 17.5]), preprocess), preprocess)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["lora", "dora"])
def test_rank_stabilised_is_scaled_by_the_root_of_the_rank(family: str, mode: str) -> None:
    """arXiv 2312.03732; merged by PEFT it is the same function as adapted."""
    vlm = tuned(family, mode=mode, rank_stabilised=True, vision_targets=("qkv",))
    model = vlm.build(vlm.preprocess()).model
    scales = {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}
    assert scales == {8 / math.sqrt(4)}
    learn(vlm, model)
    expected = outputs(vlm, model)
    with adapters.disabled(model):
        without = outputs(vlm, model)
    merged = outputs(vlm, adapters.merge(model))
    assert float((merged - expected).abs().max()) < 1e-4
    assert float((without - expected).abs().max()) > 0.1


def test_a_scale_that_was_not_asked_for_is_found(tmp_path: Path) -> None:
    vlm, plain = tuned(rank_stabilised=True), tuned()
    vlm.save(vlm.build(vlm.preprocess()), tmp_path)
    with pytest.raises(OmniError, match=r"has rank 4 and scale 4\.0; asked for 4 and 2\.0"):
        plain.load(plain.preprocess(), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "frozen", [("vision",), ("merger",), ("language",), ("vision", "merger"), ("vision", "language")]
)
def test_a_frozen_part_gets_no_gradient_and_all_else_does(family: str, frozen: tuple[str, ...]) -> None:
    """pain 4; what learns is told apart by the library's own modules."""
    vlm = tuned(family, mode="full", freeze=frozen)
    model = vlm.build(vlm.preprocess()).model
    visual = model.model.visual
    mergers = [visual.merger, *getattr(visual, "deepstack_merger_list", ())]
    of_mergers = {weight for merger in mergers for weight in merger.parameters()}
    of_part = {
        "merger": of_mergers,
        "vision": set(visual.parameters()) - of_mergers,
        "language": {*model.model.language_model.parameters(), *model.lm_head.parameters()},
    }
    for part, weights in of_part.items():
        assert {weight.requires_grad for weight in weights} == {part not in frozen}
    learning = sum(weight.numel() for part in of_part if part not in frozen for weight in of_part[part])
    assert adapters.trainable_count(model) == learning == vlm.size(vlm.preprocess()).learning
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    learn(vlm, model, steps=1)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == (not weight.requires_grad), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["lora", "dora", "full"])
def test_a_vision_tower_learns_under_gradient_checkpointing(family: str, mode: str) -> None:
    """pain 4, second half: all of it has a gradient, and the same one as without."""
    linears = VISION_LINEARS[family]
    vlm = tuned(family, mode=mode, vision_targets=linears, train_merger=True)
    preprocess, gradients = vlm.preprocess(), []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = vlm.build(preprocess).model
        if is_checkpointed:
            model.activation_checkpointing_enable()
            model.enable_input_require_grads()
        learn(vlm, model)
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name
    tower = [name for name in gradients[0] if ".visual.blocks." in name]
    if mode != "full":
        assert len(tower) == 3 * len(linears) * (3 if mode == "dora" else 2)  # of three layers
    assert vlm.size(preprocess).learning == adapters.trainable_count(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_frozen_tower_nothing_is_kept_where_its_merger_learns(family: str) -> None:
    """pain 4: checkpointing makes the library ask for gradients of the tower's input, and the merger's is wanted."""
    vlm = tuned(family, train_merger=True)
    model = vlm.build(vlm.preprocess()).model.train()
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    seen = []
    visual = qwen_vl.base_of(model).model.visual
    visual.blocks[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output.requires_grad))
    learn(vlm, model)
    assert seen
    assert not any(seen)


def test_adapters_may_sit_on_the_tower_alone() -> None:
    vlm = tuned(targets=(), vision_targets=("qkv", "proj"))
    model = vlm.build(vlm.preprocess()).model
    assert set(parts.learning_counts(model)) == {"vision"}
    learn(vlm, model)


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        (
            {"mode": "full", "freeze": ("vision", "merger", "language")},
            "tune.freeze = .*: nothing would learn; leave a ",
        ),
        ({"mode": "lora", "freeze": ("vision",)}, "tune.freeze = .*: beside an adapter the model is frozen as it is"),
        ({"mode": "full", "freeze": ("visoin",)}, "tune.freeze.0 = 'visoin': .* did you mean 'vision'"),
        (
            {"vision_targets": ("qvk",)},
            "tune.vision_targets: 'qvk' is no layer of the vision tower; did you mean 'qkv'",
        ),
        ({"targets": ()}, "tune.targets: 'nothing' is no layer of the language model"),
    ],
)
def test_what_cannot_be_tuned_so_is_refused_in_one_line(tune, said, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [f"--set=tune.{key}={json.dumps(value)}" for key, value in tune.items()]
    assert run(["train", "--profile", "cpu-tiny", "--dry-run", "--set=tune.mode=lora", *settings]) == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["tune.mode=lora", "train.vision_learning_rate=1e-5"],
            "vision_learning_rate is set, and the vision tower does",
        ),
        (["tune.mode=dora", "train.merger_learning_rate=1e-5"], "the merger does not learn; let it with tune.train_me"),
        (["tune.freeze=['vision']", "train.vision_learning_rate=1e-5"], "the vision tower does not learn"),
    ],
)
def test_a_rate_of_what_does_not_learn_is_refused(settings, said, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "--profile", "cpu-tiny", "--dry-run"]
    assert run([*command, *(f"--set={each}" for each in settings)]) == 2
    assert re.search(f"train: .*{said}", capsys.readouterr().err)


def groups_of(model: torch.nn.Module, own: tuple[OwnRate, ...], folder: Path, **arguments: Any) -> Any:
    trainer = type("T", (rates.OwnRates, Trainer), {})(
        model=model, args=TrainingArguments(str(folder), report_to="none", use_cpu=True, **arguments)
    )
    trainer.own_rates = own
    return trainer.create_optimizer()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_part_learns_at_its_rate_and_decays_as_the_library_would(family: str, tmp_path: Path) -> None:
    vlm = tuned(family, mode="full", train={"vision_learning_rate": 1e-5, "merger_learning_rate": 3e-5})
    built = vlm.build(vlm.preprocess())
    told = {"learning_rate": 1e-4, "weight_decay": 0.1}
    decay = {
        w: g["weight_decay"] for g in groups_of(built.model, (), tmp_path, **told).param_groups for w in g["params"]
    }
    optimizer = groups_of(built.model, built.own_rates, tmp_path, **told)
    seen = {w: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for w in g["params"]}
    expected = {"vision": 1e-5, "merger": 3e-5, "language": 1e-4}
    assert len(seen) == len(decay) == len(list(built.model.parameters()))
    for name, weight in built.model.named_parameters():
        assert seen[weight] == (expected[parts.part_of(name)], decay[weight]), name
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    counts = parts.learning_counts(built.model)
    told_rates = ", ".join(f"{part} {expected[part]:g} ({counts[part]:,} weights)" for part in sorted(counts))
    assert built.notes == (f"learning rates: {told_rates}",)


def test_a_weight_in_no_group_or_in_one_of_another_rate_is_an_error() -> None:
    model = torch.nn.Linear(2, 2)
    own = (OwnRate("vision", 1e-5, frozenset({"weight"})),)
    left_out = torch.optim.SGD([model.weight], lr=1e-4)
    with pytest.raises(OmniError, match="weight bias is in 0 groups of the optimizer, expected 1"):
        rates.divide_groups(left_out, model, own)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with pytest.raises(OmniError, match=r"weight weight has the rate 0\.0001, expected 1e-05"):
        rates.check_groups(optimizer, model, own)
    rates.divide_groups(optimizer, model, own)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-5]
    optimizer.param_groups[0]["params"].append(model.weight)
    with pytest.raises(OmniError, match="weight weight is in 2 groups of the optimizer"):
        rates.check_groups(optimizer, model, own)
    frozen = torch.nn.Linear(2, 2).requires_grad_(requires_grad=False)
    with pytest.raises(OmniError, match="weight weight has the rate none: it does not learn"):
        rates.divide_groups(torch.optim.SGD([torch.zeros(1)], lr=1.0), frozen, own)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """A run whose parts learn at three rates, with checkpointed towers; saved after two and four steps."""
    folder = tmp_path_factory.mktemp("rates")
    write_synthetic(folder, cameras=("camera_front_wide_120fov",))
    own = {"vision_learning_rate": 1e-3, "merger_learning_rate": 3e-3, "learning_rate": 1e-2}
    steps = {"batch_size": 2, "max_steps": 4, "save_steps": 2, "log_steps": 1, "workers": 0, "warmup_ratio": 0.0}
    base = tiny_recipe(cameras="1-cam")
    train_settings = type(base.train)(**own, **steps, gradient_checkpointing=True)
    tune = {"rank": 4, "alpha": 8, "rank_stabilised": True, "vision_targets": ("qkv", "proj"), "train_merger": True}
    tuned = base.model_copy(update={"train": train_settings, "tune": type(base.tune)(mode="dora", **tune)})
    return make_run(folder, tuned, data=folder)


def test_a_stopped_run_with_rates_of_parts_goes_on_bit_for_bit(made, tmp_path: Path) -> None:
    """pain 12"""
    shutil.copytree(made.run.folder, folder := tmp_path / "run")
    (folder / "final.receipt.json").unlink()
    (folder / runs.CHECKPOINTS / "checkpoint-4.receipt.json").unlink()
    train(made.recipe, TrainRequest(made.shards, made.data, tmp_path, "run", "test"), QUIET)
    weights, again = (load_file(run / runs.FINAL / "adapter_model.safetensors") for run in (made.run.folder, folder))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


def test_the_history_has_the_rates_of_parts(made) -> None:
    lines = [json.loads(line) for line in (made.run.folder / runs.HISTORY).read_text().splitlines()]
    for line in lines:
        assert line["vision_learning_rate"] == pytest.approx(line["learning_rate"] / 10)
        assert line["merger_learning_rate"] == pytest.approx(line["learning_rate"] * 0.3)


def test_magnitudes_in_tower_and_language_model_have_moved(made) -> None:
    """pain 17"""
    vlm = made.recipe
    fresh = dict(vlm.build(vlm.preprocess()).model.named_parameters())
    published = load_file(made.run.final / "adapter_model.safetensors")
    moved = {name: weight for name, weight in published.items() if "lora_magnitude" in name}
    assert len(moved) == 2 * 4 + 3 * 2
    assert all(not torch.equal(w, fresh[n.replace("_vector", "_vector.default.weight")]) for n, w in moved.items())


def test_every_kind_of_change_is_merged(made, tmp_path: Path) -> None:
    """Adapters on tower and language model, the scale of rsLoRA and a whole merger, against PEFT's own merge."""
    said = merge(made.recipe, made.run, MergeRequest(out=tmp_path / "merged"), QUIET)
    vlm = made.recipe
    expected = vlm.load(vlm.preprocess(), made.run.final).model.merge_and_unload()
    merged = dict(
        vlm.of_whole_model(said["model"]).load(vlm.preprocess(), Path(said["model"])).model.named_parameters()
    )
    base = dict(vlm.load_base(vlm.preprocess()).named_parameters())
    changed = set()
    for name, weight in expected.named_parameters():
        assert torch.allclose(weight, merged[name], atol=1e-6), name
        if not torch.equal(merged[name], base[name]):
            changed.add(parts.part_of(name))
    assert changed == set(parts.TITLES)


@pytest.mark.parametrize("mode", ["lora", "dora"])
def test_an_adapter_learns_in_float32_beside_sixteen_bits(mode: str) -> None:
    """pain 17: what a step in bfloat16 would round away arrives."""
    vlm = tuned(mode=mode, precision="bfloat16")
    model = vlm.build(vlm.preprocess()).model
    learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in learning.values()} == {torch.float32}
    with adapters.types_kept(model):
        for weight in learning.values():
            weight.data = weight.data.to(torch.bfloat16)  # as TRL does
    assert {weight.dtype for weight in learning.values()} == {torch.float32}
    name, weight = next(iter(learning.items()))
    weight.data = weight.data.to(torch.bfloat16)
    with pytest.raises(
        OmniError, match=re.escape(f"adapter weight {name} is of type torch.bfloat16; expected float32")
    ):
        adapters.check_types(model)


def test_what_learns_stays_on_the_device_that_a_trainer_moves_it_to() -> None:
    """A Trainer moves the model when it is built; on a machine without a GPU `meta` is the other device."""
    vlm = tuned(mode="lora", precision="bfloat16")
    model = vlm.build(vlm.preprocess()).model
    with adapters.types_kept(model):
        model.to("meta")
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merger_beside_an_adapter_learns_in_float32(family: str, tmp_path: Path) -> None:
    """pain 17: at this rate bfloat16 would round most updates away; what is loaded is what was saved."""
    vlm = tuned(family, precision="bfloat16", train_merger=True)
    model = vlm.build(vlm.preprocess()).model
    merger = {name: w for name, w in model.named_parameters() if "modules_to_save" in name}
    before = {name: weight.detach().clone() for name, weight in merger.items()}
    learn(vlm, model, rate=1e-5)
    moved = sum(int((weight != before[name]).sum()) for name, weight in merger.items())
    assert moved > 0.9 * sum(weight.numel() for weight in merger.values())
    expected = outputs(vlm, model)
    with adapters.disabled(model):
        assert not torch.equal(outputs(vlm, model), expected)
    vlm.save(vlm.build(vlm.preprocess()), tmp_path)  # with the tokenizer
    model.save_pretrained(tmp_path)
    loaded = vlm.load(vlm.preprocess(), tmp_path).model
    assert torch.equal(outputs(vlm, loaded), expected)
    merged = adapters.merge(loaded)
    assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16}
    assert torch.allclose(outputs(vlm, merged), expected, atol=0.05 * float(expected.abs().max()))


def renamed(folder: Path, old: str, new: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): w for name, w in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_with_the_names_of_an_older_library_is_refused(family: str, tmp_path: Path) -> None:
    """pain 15: before transformers 4.52 there was no `language_model` in them; loaded so nothing would be adapted."""
    vlm = tuned(family)
    vlm.save(vlm.build(vlm.preprocess()), tmp_path)
    renamed(tmp_path, "model.language_model.layers", "model.layers")
    with pytest.raises(DataError, match="does not match its base model"):
        vlm.load(vlm.preprocess(), tmp_path)


def test_an_adapter_for_some_of_the_layers_is_refused(tmp_path: Path) -> None:
    """pain 15: one that was trained on fewer layers, or of which one tensor is called otherwise."""
    vlm = tuned()
    vlm.save(vlm.build(vlm.preprocess()), tmp_path / "one")
    renamed(tmp_path / "one", "layers.1.self_attn.q_proj", "layers.1.self_attn.query")
    with pytest.raises(DataError, match="does not match its base model"):
        vlm.load(vlm.preprocess(), tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "fewer")
    base = vlm.load_base(vlm.preprocess())
    get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model\.layers\.0\.self_attn\.[qkvo]_proj")
    ).save_pretrained(tmp_path / "fewer")
    with pytest.raises(OmniError, match="adapter sits on 1 layers named q_proj; the language model has 2"):
        vlm.load(vlm.preprocess(), tmp_path / "fewer")


def test_the_parts_of_every_family() -> None:
    for name, part in {
        "model.visual.blocks.0.attn.qkv.weight": "vision",
        "base_model.model.model.visual.blocks.0.attn.qkv.lora_A.default.weight": "vision",
        "model.visual.deepstack_merger_list.0.norm.weight": "merger",
        "base_model.model.model.visual.merger.modules_to_save.default.mlp.0.weight": "merger",
        "model.visual.patch_embed.proj.weight": "vision",
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight": "vision",
        "model.multi_modal_projector.linear_1.weight": "merger",
        "model.image_newline": "merger",
        "model.language_model.layers.0.mlp.up_proj.weight": "language",
        "lm_head.weight": "language",
    }.items():
        assert parts.part_of(name) == part
