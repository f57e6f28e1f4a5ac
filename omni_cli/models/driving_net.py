"""The driving student, in openpilot's two parts: a vision net that looks, and a policy that remembers and plans.

Both speak the contract of the real models (facts: v0.10.3): 24 channels of raw uint8 become 512 features, lane lines,
road edges and leads; the features of 25 steps become a plan. Unlike the real policy this one may state several plans,
each a Laplace distribution at every point, and how likely each is. Coordinates are calib: x forward, y right, z down.
What its raw numbers stand for is in `driving_units`.
"""

import importlib
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from omni_cli import files
from omni_cli.errors import DataError
from omni_cli.formats.driving_model import (
    DESIRES,
    FEATURE_LEN,
    HISTORY_STEPS,
    NUM_POINTS,
    TRAFFIC_CONVENTIONS,
)
from omni_cli.models import driving_units as units
from omni_cli.models.backbones import Backbone, backbone_config, load_pretrained
from omni_cli.models.driving_units import NUM_EDGES, NUM_LEADS, NUM_LINES
from omni_cli.models.families import is_tiny
from omni_cli.models.model_folders import read_object, reading

HEADS = ("lane_lines", "road_edges", "leads")  # of the vision net; each learns only where its labels are
WEIGHTS, CONFIG = "model.safetensors", "config.json"
PROGRAMS = ("driving_vision.onnx", "driving_policy.onnx")  # as openpilot and `omni export` name them
FIRST_WEIGHTS = "first weights 2"  # how a seed becomes weights; another way of drawing them is another base
_KIND = "driving-net-1"
_MAP_NUMBERS = 1024  # what of a feature map reaches the features: all its cells, in few channels
_MIN_MAP_CHANNELS = 8


class VisionOutputs(NamedTuple):
    """What the vision net sees at each of b steps; scales are logarithms of Laplace's b, probabilities are logits."""

    features: Tensor  # (b, 512)
    lane_lines_m: Tensor  # (b, 4, 33, 2) y and z at X_IDXS_M: outer left, left, right, outer right
    lane_lines_log_scale: Tensor  # (b, 4, 33, 2)
    lane_line_logit: Tensor  # (b, 4)
    road_edges_m: Tensor  # (b, 2, 33, 2) left, right
    road_edges_log_scale: Tensor  # (b, 2, 33, 2)
    lead: Tensor  # (b, 3, 4) x, y [m], speed [m/s], acceleration (always 0: nothing teaches it) at 0, 2 and 4 s
    lead_log_scale: Tensor  # (b, 3, 4)
    lead_logit: Tensor  # (b, 3)


class Plans(NamedTuple):
    """What the policy means to do at each of b steps: m plans and how likely each is."""

    mean_m: Tensor  # (b, m, 33, 2) x and y at T_IDXS_S
    log_scale: Tensor  # (b, m, 33, 2)
    logit: Tensor  # (b, m)


@dataclass(frozen=True)
class DrivingNetConfig:
    """What a driving net is made of."""

    backbone: Mapping[str, Any]  # a configuration of transformers
    num_hypotheses: int = 5
    hidden: int = 256  # width of the memory and inside every head


class Head(nn.Sequential):
    """Two layers from features to numbers."""

    def __init__(self, width: int, hidden: int, numbers: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, numbers))


class VisionNet(nn.Module):
    """From two narrow and two wide pictures to features, and to what stands on the road."""

    carries: tuple[str, ...] = ()  # parts of a car's model that it says as an imported program does

    def __init__(self, config: DrivingNetConfig) -> None:
        super().__init__()
        self.backbone = Backbone(config.backbone)
        cells = math.prod(self.backbone.grid)
        channels = max(_MIN_MAP_CHANNELS, _MAP_NUMBERS // cells)
        self.squeeze = nn.Conv2d(self.backbone.width, channels, 1)
        self.project = nn.Linear(channels * cells, FEATURE_LEN)
        self.norm = nn.LayerNorm(FEATURE_LEN)  # the buffer's zeros before a drive's start are then its mean
        line = NUM_POINTS * 2 * 2  # y and z, mean and scale
        sizes = NUM_LINES * (line + 1), NUM_EDGES * line, NUM_LEADS * (3 * 2 + 1)  # of a lead: x, y and speed
        heads = {name: Head(FEATURE_LEN, config.hidden, size) for name, size in zip(HEADS, sizes, strict=True)}
        self.heads = nn.ModuleDict(heads)

    def forward(self, img: Tensor, big_img: Tensor) -> VisionOutputs:
        """Look.

        Args:
            img: (b, 12, 128, 256) uint8, narrow: the packed picture of 0.2 s ago, then the one of now.
            big_img: the same of the wide view.
        """
        seen = functional.gelu(self.squeeze(self.backbone(torch.cat([img, big_img], dim=1))))
        features = self.norm(self.project(seen.flatten(1)))
        lanes, edges, leads = (self.heads[name](features).float() for name in HEADS)
        return VisionOutputs(
            features.float(),
            *units.lane_lines(lanes[:, :-NUM_LINES]),
            lanes[:, -NUM_LINES:],
            *units.road_edges(edges),
            *units.leads(leads[:, :-NUM_LEADS]),
            leads[:, -NUM_LEADS:],
        )

    def say(self, img: Tensor, big_img: Tensor) -> tuple[VisionOutputs, dict[str, Tensor]]:
        """Return what is seen, and each part (b, numbers) that it `carries`."""
        return self(img, big_img), {}


class Gru(nn.Module):
    """A gated recurrent unit (Cho et al. 2014, arXiv:1406.1078) as `torch.nn.GRU` computes it, made of dense layers.

    So adapters reach its projections. Their weights lie as torch's do: reset, update and new gate, one below the other.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.input_projection = nn.Linear(width, 3 * hidden)
        self.hidden_projection = nn.Linear(hidden, 3 * hidden)

    def forward(self, projected: Tensor) -> Tensor:
        """Return the last state (b, hidden) after inputs (b, steps, 3 hidden) that `input_projection` has seen."""
        state = projected.new_zeros(projected.shape[0], self.hidden)  # not len(): the exporter takes it for a constant
        for inputs in projected.unbind(dim=1):
            reset_in, update_in, new_in = inputs.chunk(3, dim=1)
            reset, update, new = self.hidden_projection(state).chunk(3, dim=1)
            gate = torch.sigmoid(update_in + update)
            fresh = torch.tanh(new_in + torch.sigmoid(reset_in + reset) * new)
            state = fresh + gate * (state - fresh)
        return state


class PolicyNet(nn.Module):
    """From the features of the last 25 steps to plans."""

    carries: tuple[str, ...] = ()  # parts of a car's model that it says as an imported program does

    def __init__(self, config: DrivingNetConfig) -> None:
        super().__init__()
        self.num_hypotheses = config.num_hypotheses
        self.memory = Gru(FEATURE_LEN + DESIRES, config.hidden)
        numbers = config.num_hypotheses * (NUM_POINTS * 2 * 2 + 1)  # x and y, mean and scale; a weight
        self.plan = Head(config.hidden + TRAFFIC_CONVENTIONS, config.hidden, numbers)
        self._begin_with_even_scales()

    def forward(self, features_buffer: Tensor, desire_pulse: Tensor, traffic_convention: Tensor) -> Plans:
        """Plan.

        Args:
            features_buffer: (b, 25, 512), the newest last; zeros before the start.
            desire_pulse: (b, 25, 8) of the same steps.
            traffic_convention: (b, 2) one-hot: right-hand, left-hand traffic.
        """
        return self.decide(self.project(features_buffer, desire_pulse), traffic_convention)

    def say(
        self, features_buffer: Tensor, desire_pulse: Tensor, traffic_convention: Tensor
    ) -> tuple[Plans, dict[str, Tensor]]:
        """Return the plans, and each part (b, numbers) that it `carries`."""
        return self(features_buffer, desire_pulse, traffic_convention), {}

    def project(self, features: Tensor, desire_pulse: Tensor) -> Tensor:
        """Return what the memory makes of each step by itself, (b, steps, 3 hidden)."""
        inputs = torch.cat([features, desire_pulse], dim=2).to(next(self.parameters()).dtype)
        projected: Tensor = self.memory.input_projection(inputs)
        return projected

    def _begin_with_even_scales(self) -> None:
        """Let every scale start near its spread: all would move at once, and the features with them, before means do.

        Near, since DoRA needs a direction of every output's weights.
        """
        means = self.num_hypotheses * NUM_POINTS * 2
        *_, weight, bias = self.plan.parameters()
        with torch.no_grad():
            weight[means : 2 * means] *= 0.01
            bias[means : 2 * means] = 0

    def decide(self, projected: Tensor, traffic_convention: Tensor) -> Plans:
        """Return plans from the projected inputs (b, 25, 3 hidden) of the steps in mind."""
        state = self.memory(projected)
        raw = self.plan(torch.cat([state, traffic_convention.to(state.dtype)], dim=1)).float()
        numbers, logit = raw[:, : -self.num_hypotheses], raw[:, -self.num_hypotheses :]
        mean, log_scale = units.plans(numbers, self.num_hypotheses)
        return Plans(mean, log_scale, logit)


class DrivingNet(nn.Module):
    """The student: `vision` and `policy` are what a car runs, a call unrolls both over rows of steps to train them."""

    takes_any_batch = True  # when traced; what was made for one number of steps is traced for one

    def __init__(self, config: DrivingNetConfig) -> None:
        super().__init__()
        self.layout = config
        self.vision = VisionNet(config)
        self.policy = PolicyNet(config)

    def forward(
        self, pictures: Tensor, desire_pulse: Tensor, traffic_convention: Tensor
    ) -> tuple[VisionOutputs, Plans]:
        """Look and plan at every step of b rows, as a car would that starts at each row's first step.

        Each look is computed once. The buffer of 25 steps slides inside its row, with zeros before the row's start.

        Args:
            pictures: (b, n + 1, 2, 6, 128, 256) uint8: packed pictures, narrow and wide, at the ends of n steps.
            desire_pulse: (b, n, 8).
            traffic_convention: (b, 2) one-hot.

        Returns:
            what is seen and planned at the b n steps, step k of row r at r n + k.
        """
        num_rows, num_steps = desire_pulse.shape[:2]
        looks = torch.cat([pictures[:, :-1], pictures[:, 1:]], dim=3).flatten(0, 1)  # (b n, 2, 12, 128, 256)
        seen: VisionOutputs = self.vision(looks[:, 0], looks[:, 1])
        before = (0, 0, HISTORY_STEPS - 1, 0)
        features = functional.pad(seen.features.view(num_rows, num_steps, -1), before)
        projected = self.policy.project(features, functional.pad(desire_pulse, before))
        buffers = projected.unfold(1, HISTORY_STEPS, 1).flatten(0, 1).transpose(1, 2)
        return seen, self.policy.decide(buffers, traffic_convention.repeat_interleave(num_steps, dim=0))

    def freeze_heads(self, labelled: Collection[str]) -> None:
        """Let only those of the `HEADS` learn that have labels to learn from."""
        for name, head in self.vision.heads.items():
            head.requires_grad_(requires_grad=name in labelled)

    def save_layout(self, folder: Path) -> None:
        """Write what the net is made of, without its weights."""
        files.write_json(folder / CONFIG, {"kind": _KIND, **asdict(self.layout)})

    def train(self, mode: bool = True) -> "DrivingNet":
        """Set training mode, in which the statistics of a frozen norm stay as they are.

        Else an adapted net would lean on statistics that its merged twin has not.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self


def driving_net_config(backbone: str, *, num_hypotheses: int, hidden: int) -> DrivingNetConfig:
    """Return what a net over a backbone is made of: `tiny:FAMILY`, a folder or a hub id.

    Raises:
        UsageError: the backbone is of no known family.
        OmniError: it is not here and the hub cannot be reached.
    """
    return DrivingNetConfig(backbone_config(backbone), num_hypotheses, hidden)


def new_net(backbone: str, *, num_hypotheses: int, hidden: int, seed: int) -> DrivingNet:
    """Build a net with weights drawn from a seed, leaving the global generator as it was; a backbone's are loaded.

    Raises:
        UsageError: the backbone is of no known family.
        OmniError: it is not here and the hub cannot be reached.
        DataError: its folder lacks weights.
    """
    config = driving_net_config(backbone, num_hypotheses=num_hypotheses, hidden=hidden)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DrivingNet(config)
    if not is_tiny(backbone):
        load_pretrained(net.vision.backbone, backbone)
    return net


def empty_net(config: DrivingNetConfig) -> DrivingNet:
    """Return a net whose weights have shapes and no storage."""
    with torch.device("meta"):
        return DrivingNet(config)


def save_net(net: DrivingNet, folder: Path) -> None:
    """Write weights and configuration into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in net.state_dict().items()}, folder / WEIGHTS)
    net.save_layout(folder)


def is_net_folder(folder: Path) -> bool:
    """Say whether `save_net` wrote a folder's configuration, or it holds openpilot's pair of ONNX programs.

    Raises:
        DataError: its configuration is damaged.
    """
    path = folder / CONFIG
    return has_programs(folder) or (path.is_file() and read_object(path).get("kind") == _KIND)


def has_programs(folder: Path) -> bool:
    """Say whether a folder holds openpilot's pair of ONNX programs."""
    return all((folder / name).is_file() for name in PROGRAMS)


def programs_fingerprint(folder: Path) -> str:
    """Return a hash of a folder's ONNX programs, the slices beside them and the weights that omni trained for them."""
    found = [path for path in folder.iterdir() if path.suffix in (".onnx", ".pkl", ".safetensors")]
    return files.hash_json({path.name: files.sha256_of(path) for path in sorted(found)})


def load_net(folder: Path) -> DrivingNet:
    """Load what `save_net` wrote, or import openpilot's pair of ONNX programs.

    Raises:
        UsageError: see `driving_import.import_net`.
        DataError: it is no such folder, or its weights are not those of its configuration; likewise.
    """
    if has_programs(folder):
        # when it is needed: it builds on this module, and on an extra
        imported: DrivingNet = importlib.import_module("omni_cli.models.driving_import").import_net(folder)
        return imported
    if not is_net_folder(folder) or not (folder / WEIGHTS).is_file():
        raise DataError(f"{folder}: no driving net; expected {CONFIG} and {WEIGHTS} that omni wrote")
    kept = read_object(folder / CONFIG)
    with reading("build the driving net of", str(folder)):
        net = empty_net(DrivingNetConfig(kept["backbone"], kept["num_hypotheses"], kept["hidden"]))
    fill_weights(net, folder / WEIGHTS)
    return net


def fill_weights(net: DrivingNet, path: Path) -> None:
    """Put a file's weights into a net that may have none.

    Raises:
        DataError: they are not those of the net.
    """
    try:
        weights, types = load_file(path), {name: weight.dtype for name, weight in net.state_dict().items()}
        # assigned, since there may be nothing to copy into
        missing, unexpected = net.load_state_dict(weights, strict=False, assign=True)
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise DataError(f"{path}: {reason}; take the folder again from where it came") from None
    if wrong := missing + unexpected:
        raise DataError(
            f"{path}: {len(missing)} weights are missing and {len(unexpected)} unknown, first {wrong[0]}; "
            "take the folder again from where it came"
        )
    if other := [name for name, weight in weights.items() if weight.dtype != types[name]]:
        raise DataError(
            f"{path}: {other[0]} is of type {weights[other[0]].dtype}, expected {types[other[0]]}; "
            "take the folder again from where it came"
        )
