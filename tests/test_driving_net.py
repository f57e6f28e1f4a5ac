"""The driving net: its memory against torch's, its unrolling against a car's loop, its backbones, folders and norms."""

import json
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
)

from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.formats.driving_model import T_IDXS_S
from omni_cli.models import adapters, backbones, driving_losses, driving_net, qwen_vl
from omni_cli.models.driving_net import DrivingNet, Plans, VisionOutputs

FAMILIES = ("resnet", "convnextv2", "dinov2")


def make_net(family: str = "resnet", num_hypotheses: int = 2, hidden: int = 16, seed: int = 0) -> DrivingNet:
    return driving_net.new_net(f"tiny:{family}", num_hypotheses=num_hypotheses, hidden=hidden, seed=seed)


def make_inputs(rows: int, steps: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (rows, steps + 1, 2, 6, 128, 256), generator=generator, dtype=torch.uint8)
    desire = torch.eye(8)[torch.randint(0, 8, (rows, steps), generator=generator)]
    return pictures, desire, torch.eye(2)[torch.randint(0, 2, (rows,), generator=generator)]


def everything(net: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    seen, plans = net(*inputs)
    return [*seen, *plans]


def labels_for(steps: int) -> tuple[driving_losses.VisionLabels, torch.Tensor, torch.Tensor]:
    ones = torch.ones
    seen = driving_losses.VisionLabels(
        ones(steps, dtype=torch.bool), ones(steps, 4, 33, 2), ones(steps, 4), ones(steps, 2, 33, 2), ones(steps, 3, 4),
        ones(steps, 3),
    )  # fmt: skip
    return seen, torch.ones(steps, 33, 2), torch.full((steps,), 33)


def whole_loss(net: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    seen, plans = net(*inputs)
    vision, path, points = labels_for(len(plans.logit))
    losses = driving_losses.plan_losses(plans, path, points) | driving_losses.vision_losses(seen, vision)
    return sum((one.total / one.count for one in losses.values()), torch.tensor(0.0))


def test_the_memory_is_torchs_gru() -> None:
    ours, theirs = driving_net.Gru(7, 5), nn.GRU(7, 5, batch_first=True)
    ours.input_projection.load_state_dict({"weight": theirs.weight_ih_l0, "bias": theirs.bias_ih_l0})
    ours.hidden_projection.load_state_dict({"weight": theirs.weight_hh_l0, "bias": theirs.bias_hh_l0})
    steps = torch.randn(4, 25, 7, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states, _ = theirs(steps)
        for length in (1, 2, 25):
            found = ours(ours.input_projection(steps[:, :length]))
            assert torch.allclose(found, states[:, length - 1], atol=1e-6)


@torch.no_grad()
def drive(net: DrivingNet, pictures: torch.Tensor, desire: torch.Tensor, traffic: torch.Tensor) -> list[Any]:
    """What a car does: one look at a time, its features pushed into a queue of 25 that starts with zeros."""
    features, pulses = deque([torch.zeros(512)] * 25, maxlen=25), deque([torch.zeros(8)] * 25, maxlen=25)
    said = []
    for step in range(len(desire)):
        img, big_img = (torch.cat([pictures[step, view], pictures[step + 1, view]])[None] for view in (0, 1))
        seen = net.vision(img, big_img)
        features.append(seen.features[0])
        pulses.append(desire[step])
        plans = net.policy(torch.stack(list(features))[None], torch.stack(list(pulses))[None], traffic[None])
        said.append([*seen, *plans])
    return said


@pytest.mark.parametrize(("family", "rows", "steps"), [("resnet", 2, 27), ("convnextv2", 2, 3), ("dinov2", 3, 2)])
def test_unrolling_is_driving(family: str, rows: int, steps: int) -> None:
    """27 steps push the first ones out of the buffer; rows know nothing of each other."""
    net, inputs = make_net(family).eval(), make_inputs(rows, steps)
    with torch.no_grad():
        unrolled = everything(net, inputs)
    for row in range(rows):
        for step, said in enumerate(drive(net, *(tensor[row] for tensor in inputs))):
            for found, expected in zip(unrolled, said, strict=True):
                assert torch.allclose(found[row * steps + step], expected[0], rtol=1e-4, atol=1e-4)


def test_a_step_older_than_the_buffer_is_forgotten_and_a_younger_one_is_not() -> None:
    net, (pictures, desire, traffic) = make_net("dinov2").eval(), make_inputs(1, 26)
    with torch.no_grad():
        plans = net(pictures, desire, traffic)[1].mean_m
        other = desire.clone()
        other[0, 0] = 1 - desire[0, 0]
        moved = net(pictures, other, traffic)[1].mean_m
    assert torch.equal(plans[25], moved[25])
    assert not torch.equal(plans[24], moved[24])
    assert not torch.equal(plans[25], net(pictures, desire, 1 - traffic)[1].mean_m[25])


def test_a_look_is_computed_once() -> None:
    net, looks = make_net("dinov2"), []
    net.vision.backbone.register_forward_hook(lambda _module, inputs, _output: looks.append(len(inputs[0])))
    net(*make_inputs(2, 3))
    assert looks == [6]


def test_outputs_have_the_real_models_shapes() -> None:
    seen, plans = make_net(num_hypotheses=3)(*make_inputs(1, 2))
    expected = [(512,), (4, 33, 2), (4, 33, 2), (4,), (2, 33, 2), (2, 33, 2), (3, 4), (3, 4), (3,)]
    assert [tuple(tensor.shape) for tensor in seen] == [(2, *shape) for shape in expected]
    assert [tuple(tensor.shape) for tensor in plans] == [(2, 3, 33, 2), (2, 3, 33, 2), (2, 3)]
    assert not seen.lead[..., 3].any()


@torch.no_grad()
def still(net: DrivingNet, value: float) -> tuple[VisionOutputs, Plans]:
    """Let every head say the same number whatever is seen."""
    for head in (*net.vision.heads.values(), net.policy.plan):
        head[-1].weight.zero_()
        head[-1].bias.fill_(value)
    found: tuple[VisionOutputs, Plans] = net(*make_inputs(1, 1))
    return found


def test_zero_means_a_plausible_drive() -> None:
    seen, plans = still(make_net().eval(), 0.0)
    times = torch.tensor(T_IDXS_S, dtype=torch.float32)
    assert torch.allclose(plans.mean_m[0, 0, :, 0], 10 * times)
    assert not plans.mean_m[..., 1].any()
    assert torch.allclose(plans.log_scale[0, 1, [0, -1]].exp(), torch.tensor([[1.0, 0.25], [101.0, 50.25]]))
    assert torch.allclose(seen.lane_lines_m[0, :, 5, 0], torch.tensor([-5.4, -1.8, 1.8, 5.4]))
    assert torch.allclose(seen.road_edges_m[0, :, 5], torch.tensor([[-6.0, 1.2], [6.0, 1.2]]))
    assert torch.allclose(seen.lane_lines_log_scale[0, 0, -1].exp(), torch.tensor([0.5 + 3.84 + 36.864, 2.02]))
    assert torch.allclose(seen.lead[0, 0], torch.tensor([40.0, 0.0, 10.0, 0.0]))


@pytest.mark.parametrize("value", [-1e6, 1e6])
def test_scales_are_bounded_whatever_a_head_says(value: float) -> None:
    seen, plans = still(make_net().eval(), value)
    for scales in (plans.log_scale, seen.lane_lines_log_scale, seen.road_edges_log_scale, seen.lead_log_scale):
        assert scales.max() < 11
        assert scales.min() > -8
    assert not torch.equal(seen.lead_log_scale, torch.zeros_like(seen.lead_log_scale))
    assert torch.allclose(seen.lead_log_scale[..., 3].exp(), torch.tensor(3.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_net_learns_with_every_weight(family: str) -> None:
    net, inputs = make_net(family, hidden=32), make_inputs(2, 2)
    assert 10_000 < adapters.weight_count(net.vision.backbone) < 300_000
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = whole_loss(net, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    adapters.check_gradients(net)
    assert losses[-1] < losses[0] - 40  # measured: 69 to 83 lower


def test_heads_without_labels_are_frozen() -> None:
    net = make_net("dinov2")
    net.freeze_heads(("leads",))
    frozen = {name for name, weight in net.named_parameters() if not weight.requires_grad}
    assert {name.rsplit(".", 2)[0] for name in frozen} == {"vision.heads.lane_lines", "vision.heads.road_edges"}
    net.freeze_heads(driving_net.HEADS)
    assert all(weight.requires_grad for weight in net.parameters())


def statistics(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.named_buffers() if "running" in name}


def test_a_norm_that_learns_moves_its_statistics() -> None:
    net, inputs = make_net(), make_inputs(1, 2)
    before = statistics(net)
    net.train()(*inputs)
    assert before
    assert not any(torch.equal(after, before[name]) for name, after in statistics(net).items())


def test_a_frozen_norm_keeps_its_statistics() -> None:
    net, inputs = make_net(), make_inputs(1, 2)
    net.train()(*inputs)
    net.requires_grad_(requires_grad=False)
    before = statistics(net)
    trained = everything(net.train(), inputs)
    assert all(torch.equal(after, before[name]) for name, after in statistics(net).items())
    assert all(map(torch.equal, trained, everything(net.eval(), inputs)))


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = make_net(seed=1), make_net(seed=1), make_net(seed=2)
    assert torch.equal(torch.rand(1), expected)
    weights = [net.state_dict()["vision.project.weight"] for net in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_half_the_bits_say_nearly_the_same(family: str) -> None:
    net, inputs = make_net(family).eval(), make_inputs(1, 2)
    with torch.no_grad():
        exact = everything(net, inputs)
        placed = everything(qwen_vl.place(make_net(family).eval(), "cpu", "bfloat16"), inputs)
        cast = everything(make_net(family).eval().to(torch.bfloat16), inputs)
    for expected, *found in zip(exact, placed, cast, strict=True):
        for each in found:
            assert each.dtype == torch.float32
            assert (each - expected).norm() < 0.05 * expected.norm() + 0.1


# -- backbones

TINY_RGB = {
    "resnet": (ResNetModel, ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
    "convnextv2": (
        ConvNextV2ForImageClassification,
        ConvNextV2Config(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], num_labels=3),
    ),
    "dinov2": (Dinov2Model, Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56)),
}


@pytest.fixture
def rgb_folder(request, tmp_path) -> Path:
    """A published backbone in miniature: it looks at red, green and blue."""
    build, config = TINY_RGB[request.param]
    torch.manual_seed(0)
    build(config).save_pretrained(tmp_path)
    return tmp_path


def grey_and_coloured() -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of one colour each: packed YUV in the newest narrow picture of two looks, and RGB as ImageNet has it."""
    yuv = torch.tensor([[128.0, 128, 128], [90, 150, 110]])
    looks = torch.randint(0, 256, (1, 24, 128, 256)).repeat(2, 1, 1, 1).float()  # the other pictures are the same noise
    looks[:, 6:10] = yuv[:, :1, None, None]
    looks[:, 10:12] = yuv[:, 1:, None, None]
    luma, blue, red = 1.164 * (yuv[:, 0] - 16), yuv[:, 1] - 128, yuv[:, 2] - 128
    rgb = torch.stack([luma + 1.596 * red, luma - 0.392 * blue - 0.813 * red, luma + 2.017 * blue], dim=1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return looks, ((rgb - mean) / std)[:, :, None, None].expand(-1, -1, 128, 256)


@pytest.mark.parametrize("rgb_folder", FAMILIES, indirect=True)
def test_an_inflated_stem_sees_what_it_saw(rgb_folder: Path) -> None:
    """From grey to a colour, the stem's answer changes by exactly as much as the published stem's."""
    net = driving_net.new_net(str(rgb_folder), num_hypotheses=1, hidden=8, seed=0)
    published = AutoModel.from_pretrained(rgb_folder).state_dict()
    ours = net.vision.backbone.model.state_dict()
    (stem,) = (name for name, weight in ours.items() if weight.ndim == 4 and weight.shape[1] == 24)
    looks, rgb = grey_and_coloured()
    found = nn.functional.conv2d((looks - 128) / 64, ours[stem])
    expected = nn.functional.conv2d(rgb, published[stem])
    assert torch.allclose(found[1] - found[0], expected[1] - expected[0], atol=1e-5)
    assert (expected[1] - expected[0]).abs().max() > 0.01
    assert all(torch.equal(ours[name], published[name]) for name in set(ours) - {stem})
    net(*make_inputs(1, 1))


@pytest.mark.parametrize("rgb_folder", ["dinov2"], indirect=True)
def test_a_picture_need_not_be_whole_patches(rgb_folder: Path) -> None:
    net = driving_net.new_net(str(rgb_folder), num_hypotheses=1, hidden=8, seed=0)
    assert net.vision.backbone.grid == (9, 18)  # of 14 px in 128 x 256


def test_a_backbone_of_our_own_keeps_its_stem(tmp_path) -> None:
    backbone = make_net().vision.backbone
    backbone.model.save_pretrained(tmp_path)
    net = driving_net.new_net(str(tmp_path), num_hypotheses=2, hidden=16, seed=7)
    found, expected = net.vision.backbone.state_dict(), backbone.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rgb_folder", ["resnet"], indirect=True)
def test_a_backbone_that_lacks_a_weight_is_refused(rgb_folder: Path) -> None:
    weights = load_file(rgb_folder / "model.safetensors")
    del weights["encoder.stages.1.layers.0.layer.1.convolution.weight"]
    save_file(weights, rgb_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 of its weights, first encoder\.stages\.1\.layers\.0\.layer\.1"):
        driving_net.new_net(str(rgb_folder), num_hypotheses=1, hidden=8, seed=0)


@pytest.mark.fault("F24")
@pytest.mark.parametrize("rgb_folder", ["resnet"], indirect=True)
def test_pickled_weights_are_never_loaded(rgb_folder: Path) -> None:
    torch.save(load_file(rgb_folder / "model.safetensors"), rgb_folder / "pytorch_model.bin")
    (rgb_folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"holds no \*\.safetensors; pickled weights are never loaded"):
        driving_net.new_net(str(rgb_folder), num_hypotheses=1, hidden=8, seed=0)


def test_backbones_that_cannot_be_are_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"tiny:vgg: no such tiny model; expected tiny:\(resnet\|convnextv2\|dinov2\)"):
        backbones.backbone_config("tiny:vgg")
    with pytest.raises(OmniError, match=r"cannot read the configuration of backbone .*; expected tiny:"):
        backbones.backbone_config(str(tmp_path / "absent"))
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="family 'vit' is not supported; expected tiny:"):
        backbones.backbone_config(str(tmp_path))
    ResNetConfig(num_channels=12).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"looks at 12 channels; expected 3 \(RGB\) or 24"):
        backbones.backbone_config(str(tmp_path))


# -- folders


# In millions, with a head of 1000 classes. Source: table of models in the README of facebookresearch/ConvNeXt-V2.
PUBLISHED = {"atto": 3.7, "femto": 5.2, "pico": 9.1, "nano": 15.6, "tiny": 28.6, "base": 89, "large": 198, "huge": 660}


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_published_shape_that_is_known_has_the_published_number_of_weights(size: str) -> None:
    with torch.device("meta"):
        backbone = backbones.Backbone(backbones.planned_config(f"facebook/convnextv2-{size}-22k-224"))
    count = sum(weight.numel() for weight in backbone.parameters())
    stem = backbone.model.get_parameter("embeddings.patch_embeddings.weight")
    as_published = count - stem[:, 3:].numel() + 1000 * (backbone.width + 1)
    assert as_published / 1e6 == pytest.approx(PUBLISHED[size], rel=1e-2)
    assert backbone.grid == (4, 8)


def test_a_plan_is_what_the_hub_tells_where_it_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the very name is read, however it differs from what is published, and so is one of another name."""
    monkeypatch.chdir(tmp_path)
    for name in ("facebook/convnextv2-tiny-22k-224", "other/convnextv2-tiny-22k-224"):
        ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2).save_pretrained(tmp_path / name)
        assert backbones.planned_config(name)["hidden_sizes"] == [8, 16]
        assert backbones.planned_config(name) == backbones.backbone_config(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_net_comes_back_from_its_folder(family: str, tmp_path) -> None:
    net, inputs = make_net(family), make_inputs(1, 2)
    net.train()(*inputs)  # moves the statistics of its norms
    driving_net.save_net(net, tmp_path / "net")
    again = driving_net.load_net(tmp_path / "net")
    assert again.layout == net.layout
    assert all(weight.requires_grad for weight in again.parameters())
    with torch.no_grad():
        assert all(map(torch.equal, everything(net.eval(), inputs), everything(again.eval(), inputs)))
    driving_net.save_net(again, tmp_path / "again")
    assert {p.name: p.read_bytes() for p in (tmp_path / "net").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }
    assert len(qwen_vl.weights_fingerprint(str(tmp_path / "net"))) == 64


def test_an_empty_net_has_shapes_alone() -> None:
    config = driving_net.driving_net_config("tiny:convnextv2", num_hypotheses=2, hidden=16)
    empty, real = driving_net.empty_net(config), make_net("convnextv2")
    assert {n: w.shape for n, w in empty.state_dict().items()} == {n: w.shape for n, w in real.state_dict().items()}
    assert all(weight.is_meta for weight in empty.parameters())


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    for name, weight in changes.items():
        weights.pop(name, None)
        if weight is not None:
            weights[name] = weight
    save_file(weights, folder / "model.safetensors")


def test_folders_that_are_no_whole_net_are_refused(tmp_path) -> None:
    folder = tmp_path / "net"
    driving_net.save_net(make_net("dinov2"), folder)
    with pytest.raises(DataError, match=r"no driving net; expected config\.json and model\.safetensors"):
        driving_net.load_net(tmp_path)
    kept = (folder / "model.safetensors").read_bytes()
    change(folder, **{"policy.plan.0.bias": None})
    with pytest.raises(DataError, match=r"1 weights are missing and 0 unknown, first policy\.plan\.0\.bias; take"):
        driving_net.load_net(folder)
    change(folder, **{"policy.plan.0.bias": torch.zeros(16), "stray": torch.zeros(1)})
    with pytest.raises(DataError, match="0 weights are missing and 1 unknown, first stray"):
        driving_net.load_net(folder)
    change(folder, **{"policy.plan.0.bias": torch.zeros(17), "stray": None})
    with pytest.raises(DataError, match=r"size mismatch for policy\.plan\.0\.bias"):
        driving_net.load_net(folder)
    (folder / "model.safetensors").write_bytes(kept[: len(kept) // 2])
    with pytest.raises(DataError, match=r"model\.safetensors: .*; take the folder again"):
        driving_net.load_net(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    assert not driving_net.is_net_folder(folder)
    shutil.rmtree(folder)
    assert not driving_net.is_net_folder(folder)
