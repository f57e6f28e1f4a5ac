"""LoRA and DoRA on a driving net: on which layers, how many weights, the same function once merged, what is refused."""

import json
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.models import adapters, driving_losses, driving_net
from omni_cli.models.adapters import DRIVING_NET, AdapterSpec
from omni_cli.models.driving_net import DrivingNet
from tests.support.driving import tiny_student

FAMILIES = ("resnet", "convnextv2", "dinov2")
MODES = ("lora", "dora")
RANK, ALPHA = 2, 8


def make_net(family: str = "resnet", hidden: int = 16) -> DrivingNet:
    return driving_net.new_net(f"tiny:{family}", num_hypotheses=2, hidden=hidden, seed=0)


def make_spec(net: nn.Module, mode: str = "dora", rank: int = RANK) -> AdapterSpec:
    targets = tuple(adapters.driving_targets(net))
    return AdapterSpec(rank, ALPHA, 0.0, targets, use_dora=mode == "dora", place=DRIVING_NET)


def make_inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (1, 3, 2, 6, 128, 256), generator=generator, dtype=torch.uint8)
    return pictures, torch.eye(8)[None, :2], torch.tensor([[1.0, 0.0]])


@torch.no_grad()
def everything(net: nn.Module, seed: int = 0) -> list[torch.Tensor]:
    seen, plans = net(*make_inputs(seed))
    return [*seen, *plans]


def differences(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """The largest difference of each output, against its own size: paths go to 100 m, logits to 1."""
    pairs = zip(found, expected, strict=True)
    return [((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs]


def plan_loss(net: nn.Module) -> torch.Tensor:
    _, plans = net(*make_inputs())
    losses = driving_losses.plan_losses(plans, torch.ones(2, 33, 2), torch.tensor([33, 20]))
    return losses["plan"].total + losses["plan_choice"].total


@torch.no_grad()
def shake(net: nn.Module) -> None:
    """Give an adapter random weights, and all that it sits on random biases, so that nothing is left at zero."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in net.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "lora_magnitude" in name:
            weight.mul_(1 + 0.2 * noise.clamp(-2, 2))
        elif "lora_" in name:
            weight.copy_(noise * 0.3 / weight[0].numel() ** 0.5)
        elif name.endswith(".bias"):
            weight.add_(0.1 * noise)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_adapted(family: str, mode: str, tmp_path: Path) -> None:
    net = make_net(family)
    everything(net.train())  # so that its norms have statistics of their own
    spec = make_spec(net, mode)
    base_folder = tmp_path / "base"
    driving_net.save_net(net, base_folder)
    adapted = adapters.attach(net, spec)
    shake(adapted)
    adapted.eval()
    expected = [everything(adapted, seed) for seed in (0, 1)]
    with adapters.disabled(adapted):
        moved = differences(everything(adapted), expected[0])
    merged = adapters.merge(adapted)
    assert type(merged) is DrivingNet
    assert min(difference for difference in moved if difference) > 3e-4  # scales begin almost still
    for seed in (0, 1):
        assert max(differences(everything(merged, seed), expected[seed])) < 1e-5
    driving_net.save_net(merged, tmp_path / "merged")
    again = driving_net.load_net(tmp_path / "merged").eval()
    assert max(differences(everything(again), everything(merged))) == 0
    assert set(again.state_dict()) == set(driving_net.load_net(base_folder).state_dict())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_what_was_asked_for(family: str, mode: str) -> None:
    """Hits and count from the plain net's shapes; after a step every part of it has a gradient, and nothing else."""
    net = make_net(family)
    net.freeze_heads(())
    spec = make_spec(net, mode)
    expected = 0
    for name, weight in net.named_parameters():
        if name.removesuffix(".weight") in spec.targets:
            expected += RANK * (weight[0].numel() + len(weight)) + (len(weight) if mode == "dora" else 0)
    assert {"policy.memory.input_projection", "policy.memory.hidden_projection", "policy.plan.2"} < set(spec.targets)
    assert {"vision.squeeze", "vision.project"} < set(spec.targets)
    assert not any("heads" in name for name in spec.targets)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    adapted = adapters.attach(net, spec).train()
    assert adapters.trainable_count(adapted) == expected > 0
    optimizer = torch.optim.SGD([w for w in adapted.parameters() if w.requires_grad], lr=1e-5)
    for _ in range(2):
        optimizer.zero_grad()
        plan_loss(adapted).backward()
        optimizer.step()
    adapters.check_gradients(adapted)
    assert all(torch.equal(buffer, before[name]) for name, buffer in adapters.merge(adapted).named_buffers())


@pytest.mark.parametrize("mode", MODES)
def test_training_mode_changes_nothing_of_an_adapted_net(mode: str) -> None:
    """A frozen batch norm that used the batch's own statistics would make training and merged weights two nets."""
    net = make_net("resnet")
    everything(net.train())
    adapted = adapters.attach(net, make_spec(net, mode))
    shake(adapted)
    assert max(differences(everything(adapted.train()), everything(adapted.eval()))) == 0


def test_what_cannot_be_adapted_is_left_out_by_name() -> None:
    net = make_net("convnextv2")
    left_out = adapters.left_out(net)
    depthwise = {name: module.groups for name, module in net.named_modules() if name.endswith(".dwconv")}
    assert left_out == {name: f"a convolution in {groups} groups" for name, groups in depthwise.items()}
    assert min(depthwise.values()) > 1
    layers = {name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert set(adapters.driving_targets(net)) == layers - set(depthwise)
    counts = ", ".join(f"{count} x a convolution in {one} groups" for one, count in Counter(depthwise.values()).items())
    said = f"no adapter sits on {len(depthwise)} layers, which PEFT cannot adapt and merge: {counts}"
    assert adapters.left_out_notes(net) == (said,)
    for family in ("resnet", "dinov2"):
        assert not adapters.left_out(make_net(family))
        assert adapters.left_out_notes(make_net(family)) == ()


def notes_of(recipe) -> tuple[str, ...]:
    notes = recipe.build(recipe.preprocess()).notes
    assert recipe.size(recipe.preprocess()).notes == notes
    return notes


def test_a_recipe_notes_what_its_adapter_leaves_out_unless_the_user_chose_it(tmp_path) -> None:
    driving_net.save_net(make_net("convnextv2"), tmp_path)
    adapted = {"mode": "dora", "model": str(tmp_path)}
    assert notes_of(tiny_student(**adapted)) == adapters.left_out_notes(make_net("convnextv2")) != ()
    assert notes_of(tiny_student(**adapted, tune={"targets": ("policy.plan.2",)})) == ()
    assert notes_of(tiny_student("convnextv2")) == ()


def test_an_adapter_on_a_base_that_never_drove_is_told() -> None:
    (said,) = notes_of(tiny_student("resnet", mode="dora"))
    assert said.startswith("the base never learned to drive")
    assert notes_of(tiny_student("resnet")) == ()


BAD = {
    "a convolution in 2 groups": {"groups": 2},
    "a convolution in 4 groups": {"groups": 4},
    r"a convolution with dilation \(2, 2\)": {"dilation": 2, "padding": 2},
    "a convolution that pads with 'reflect'": {"padding": 1, "padding_mode": "reflect"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reason", BAD)
def test_a_layer_that_peft_gets_wrong_is_refused(reason: str, mode: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, **BAD[reason]))
    spec = AdapterSpec(4, ALPHA, 0.0, ("0",), use_dora=mode == "dora", place=DRIVING_NET)
    with pytest.raises(UsageError, match=rf"tune\.targets: 0 is {reason}, which PEFT cannot adapt and merge; leave it"):
        adapters.attach(model, spec)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reason", BAD)
def test_peft_still_gets_it_wrong(reason: str, mode: str) -> None:
    """Where this fails, PEFT has learned it: the refusal can go."""
    torch.manual_seed(0)
    model, pictures = nn.Sequential(nn.Conv2d(4, 4, 3, **BAD[reason])), torch.randn(1, 4, 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["0"], use_dora=mode == "dora"))
    shake(adapted)
    try:
        expected = adapted(pictures)
        merged = adapted.merge_and_unload()
        wrong = (merged(pictures) - expected).abs().max() > 1e-3
    except (RuntimeError, NotImplementedError):
        wrong = True
    assert wrong


@pytest.mark.parametrize(
    "options", [{"stride": 2, "padding": 1}, {"padding": "same"}, {"bias": False}, {"padding": (2, 0)}]
)
@pytest.mark.parametrize("mode", MODES)
def test_other_convolutions_merge_exactly(options: dict, mode: str) -> None:
    torch.manual_seed(0)
    model, pictures = nn.Sequential(nn.Conv2d(4, 6, 3, **options)), torch.randn(2, 4, 9, 9)
    adapted = adapters.attach(model, AdapterSpec(3, ALPHA, 0.0, ("0",), use_dora=mode == "dora", place=DRIVING_NET))
    shake(adapted)
    with torch.no_grad():
        expected = adapted(pictures)
        assert torch.allclose(adapters.merge(adapted)(pictures), expected, atol=1e-5)


def test_dora_on_an_output_without_weights_is_refused() -> None:
    net = make_net()
    with torch.no_grad():
        net.policy.plan[2].weight[7] = 0
    with pytest.raises(UsageError, match=r"tune\.targets: policy\.plan\.2 has an output whose weights are all zero"):
        adapters.attach(net, make_spec(net))
    adapters.attach(make_net(), make_spec(make_net(), "lora"))


def test_names_that_are_no_layers_are_refused() -> None:
    net = make_net("dinov2")
    wrong = AdapterSpec(RANK, ALPHA, 0.0, ("policy.plan.3",), place=DRIVING_NET)
    with pytest.raises(
        UsageError, match=r"'policy\.plan\.3' is no layer of the driving net; did you mean 'policy\.plan"
    ):
        adapters.attach(net, wrong)
    with pytest.raises(UsageError, match=r"'vision\.norm' is no layer of the driving net"):
        adapters.attach(net, AdapterSpec(RANK, ALPHA, 0.0, ("vision.norm",), place=DRIVING_NET))


def test_a_wrong_adapter_is_found() -> None:
    net = make_net("dinov2")
    spec = make_spec(net)
    adapted = adapters.attach(net, spec)
    with pytest.raises(OmniError, match=r"has rank 2 and scale 4\.0; asked for 3 and 2\.6"):
        adapters.verify(adapted, AdapterSpec(3, ALPHA, 0.0, spec.targets, use_dora=True, place=DRIVING_NET))
    with pytest.raises(OmniError, match="weights are trainable; what was asked for has"):
        adapters.verify(adapted, AdapterSpec(RANK, ALPHA, 0.0, spec.targets, place=DRIVING_NET))
    fewer = tuple(name for name in spec.targets if name != "policy.plan.2")
    with pytest.raises(OmniError, match=r"adapter sits on base_model\.model\.policy\.plan\.2; expected"):
        adapters.verify(adapted, AdapterSpec(RANK, ALPHA, 0.0, fewer, use_dora=True, place=DRIVING_NET))
    policy = adapted.base_model.model.policy
    policy.plan[2] = policy.plan[2].base_layer
    with pytest.raises(OmniError, match=r"adapter sits on 0 layers named policy\.plan\.2; the driving net has 1"):
        adapters.verify(adapted, spec)


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_comes_back_from_its_folder(mode: str, tmp_path: Path) -> None:
    net = make_net("convnextv2")
    spec = make_spec(net, mode)
    adapted = adapters.attach(net, spec)
    shake_adapter_only(adapted)
    adapted.save_pretrained(tmp_path)
    expected = everything(adapted.eval())
    again = adapters.load(make_net("convnextv2"), tmp_path, spec).eval()
    assert max(differences(everything(again), expected)) == 0
    assert adapters.trainable_count(again) == adapters.trainable_count(adapted)


def shake_adapter_only(adapted: nn.Module) -> None:
    kept = {name: weight.clone() for name, weight in adapted.named_parameters() if "lora_" not in name}
    shake(adapted)
    adapted.load_state_dict(kept, strict=False)


def test_an_adapter_that_does_not_fit_its_base_is_refused(tmp_path: Path) -> None:
    net = make_net("dinov2")
    spec = make_spec(net)
    adapters.attach(net, spec).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"does not match its base model: size mismatch"):
        adapters.load(make_net("dinov2", hidden=24), tmp_path, spec)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    del weights["base_model.model.policy.plan.2.lora_magnitude_vector"]
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(DataError, match=r"does not match its base model: Found missing adapter keys .*policy\.plan\.2"):
        adapters.load(make_net("dinov2"), tmp_path, spec)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"]


def test_half_the_bits_keep_magnitudes_whole() -> None:
    """In 16 bits a magnitude near 1 would move by steps of 1/256 or not at all (trl#7268)."""
    net = make_net().to(torch.bfloat16)
    adapted = adapters.attach(net, make_spec(net)).train()
    kept = {n: w.clone() for n, w in adapted.named_parameters() if "magnitude" in n}
    assert {weight.dtype for weight in kept.values()} == {torch.float32}
    optimizer = torch.optim.Adam([w for w in adapted.parameters() if w.requires_grad], lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        (plan_loss(adapted) + sum(part.float().mean() for part in adapted(*make_inputs())[0])).backward()
        optimizer.step()
    adapters.check_gradients(adapted)
    moved = {
        name for name, weight in adapted.named_parameters() if name in kept and not torch.equal(weight, kept[name])
    }
    assert moved == set(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_counted_without_a_weight(family: str) -> None:
    """A dry run asks for it on a net that has shapes alone."""
    real = make_net(family)
    empty = driving_net.empty_net(real.layout)
    counts = [adapters.trainable_count(adapters.attach(net, make_spec(net))) for net in (empty, real)]
    assert counts[0] == counts[1]
