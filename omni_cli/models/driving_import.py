"""openpilot's own driving model as a student: a vision and a policy in ONNX become torch modules that can be adapted.

onnx2fx translates an ONNX program, `fx_layers` makes layers of its convolutions and products. They can be adapted and
trained; norms, scales and other constants stay as they are. What comes out is compared with ONNX Runtime, or refused: a
wrong translation must not become the start of a training run.

The pairs of v0.10.1 to v0.10.3 are taken, and what `omni export` writes, which is one of them.
"""

import importlib
import importlib.util
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from omni_cli import files
from omni_cli.errors import DataError, UsageError
from omni_cli.formats.driving_model import (
    FEATURE_LEN,
    MEAN_SHAPES,
    POLICY_INPUTS,
    POLICY_SLICES,
    VISION_INPUTS,
    VISION_SLICES,
    InputSpec,
)
from omni_cli.models import driving_net
from omni_cli.models.driving_export import example_inputs
from omni_cli.models.driving_net import CONFIG, HEADS, PROGRAMS, WEIGHTS, DrivingNet, Plans, VisionOutputs
from omni_cli.models.driving_parity import Apart, furthest_apart
from omni_cli.models.fx_layers import with_layers
from omni_cli.models.teacher_graphs import Graph, open_graphs, sidecar_of

_KIND = "driving-import-1"
_LOG_SQRT_2 = math.log(2) / 2
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 2e-2  # of the largest number of its kind; a float16 program runs in float32 here
_PROBE_STEPS, _PROBE_SEED = 2, 20_262
_ELSE = "a model of another generation can teach (sample.teacher), and cannot be adapted"


class ImportedProgram(nn.Module):
    """An ONNX program from named inputs (b, ...) to one output (b, width), for any b.

    Args:
        body: the program, in torch.
        names: of its inputs, in its order.
        is_free: it was written for any b; else it is mapped over the steps.
    """

    def __init__(self, body: fx.GraphModule, names: tuple[str, ...], *, is_free: bool) -> None:
        super().__init__()
        self.body = body
        self.names = names
        self.is_free = is_free

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the program.

        Raises:
            UsageError: its weights were cast.
        """
        if any(weight.dtype != torch.float32 for weight in self.body.parameters()):
            raise UsageError("--dtype: an imported program's constants are float32; leave it out")
        given = [inputs[name] for name in self.names]
        with given[0].device:  # where onnx2fx makes tensors of shapes, which index what lies there
            if self.is_free or given[0].shape[0] == 1:
                said: Tensor = self.body(*given)
                return said
            mapped: Tensor = torch.vmap(self._one, randomness="different")(*given)
            return mapped

    def _one(self, *given: Tensor) -> Tensor:
        said: Tensor = self.body(*(tensor[None] for tensor in given))
        return said[0]


class ImportedVision(driving_net.VisionNet):
    """An imported program in the place of a vision net. Its heads have no weights of their own: see `freeze_heads`."""

    def __init__(self, program: ImportedProgram, slices: Mapping[str, slice]) -> None:
        nn.Module.__init__(self)  # its parts are not those of a configuration
        self.program = program
        self.slices = dict(slices)
        self.carries = _shared_parts(slices, VISION_SLICES)
        self.heads = nn.ModuleDict({name: nn.Identity() for name in HEADS})

    def forward(self, img: Tensor, big_img: Tensor) -> VisionOutputs:
        """Look, as `VisionNet.forward` does."""
        return self.say(img, big_img)[0]

    def say(self, img: Tensor, big_img: Tensor) -> tuple[VisionOutputs, dict[str, Tensor]]:
        """Look, as `VisionNet.say` does."""
        said = self.program({"img": img, "big_img": big_img}).float()
        return self._seen(said), {name: said[:, self.slices[name]] for name in self.carries}

    def _seen(self, said: Tensor) -> VisionOutputs:
        part = {name: said[:, place] for name, place in self.slices.items()}
        lead, lead_log_scale = _laplace(part["lead"], "lead")  # (b, 3, 6, 4): the first of its six points is now
        return VisionOutputs(
            part["hidden_state"],
            *_laplace(part["lane_lines"], "lane_lines"),
            part["lane_lines_prob"][:, 1::2],  # of a line's two scores openpilot reads the second
            *_laplace(part["road_edges"], "road_edges"),
            lead[:, :, 0],
            lead_log_scale[:, :, 0],
            part["lead_prob"],
        )


class ImportedPolicy(driving_net.PolicyNet):
    """An imported program in the place of a policy; it states one plan."""

    def __init__(self, program: ImportedProgram, slices: Mapping[str, slice]) -> None:
        nn.Module.__init__(self)  # its parts are not those of a configuration
        self.num_hypotheses = 1
        self.program = program
        self.slices = dict(slices)
        self.carries = _shared_parts(slices, POLICY_SLICES)

    def project(self, features: Tensor, desire_pulse: Tensor) -> Tensor:
        """Return what the program is told of each step, (b, steps, 520); it computes nothing of a step by itself."""
        return torch.cat([features, desire_pulse.to(features.dtype)], dim=2)

    def decide(self, projected: Tensor, traffic_convention: Tensor) -> Plans:
        """Return the plan from the steps in mind (b, 25, 520), moved along x to begin at the camera as labels are.

        openpilot's begin up to 1.5 m behind or before it (samples/step_labels.py, `from_the_camera`).
        """
        features, desire_pulse = projected[..., :FEATURE_LEN], projected[..., FEATURE_LEN:]
        return self.say(features, desire_pulse, traffic_convention)[0]

    def say(
        self, features_buffer: Tensor, desire_pulse: Tensor, traffic_convention: Tensor
    ) -> tuple[Plans, dict[str, Tensor]]:
        """Plan, as `PolicyNet.say` does."""
        told = {"desire_pulse": desire_pulse, "traffic_convention": traffic_convention}
        said = self.program({"features_buffer": features_buffer, **told}).float()
        return self._plans(said), {name: said[:, self.slices[name]] for name in self.carries}

    def _plans(self, said: Tensor) -> Plans:
        mean, log_scale = _laplace(said[:, self.slices["plan"]], "plan")
        xy_m = torch.stack([mean[..., 0] - mean[:, :1, 0], mean[..., 1]], dim=2)
        return Plans(xy_m[:, None], log_scale[:, None, :, :2], said.new_zeros(said.shape[0], 1))


class ImportedNet(DrivingNet):
    """A student whose two parts are imported programs.

    Args:
        vision: the one.
        policy: the other.
        sources: by name the files that both were made from, as they were: weights that are trained belong to them.
    """

    def __init__(self, vision: ImportedVision, policy: ImportedPolicy, sources: Mapping[str, bytes]) -> None:
        nn.Module.__init__(self)  # its parts are not those of a configuration
        self.vision = vision
        self.policy = policy
        self.takes_any_batch = vision.program.is_free and policy.program.is_free
        self.sources = dict(sources)

    def freeze_heads(self, labelled: Collection[str]) -> None:
        """Freeze every weight that no labelled answer depends on, by a backward pass from all of these.

        Which answers share a layer was its authors' choice, and only gradients tell.
        """
        inputs = example_inputs({**VISION_INPUTS, **POLICY_INPUTS}, _PROBE_STEPS, _PROBE_SEED)
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        with torch.enable_grad():
            seen = self.vision(inputs["img"], inputs["big_img"])
            memory = torch.cat([inputs["features_buffer"][:, 1:], seen.features[:, None]], dim=1)
            plans = self.policy(memory, inputs["desire_pulse"], inputs["traffic_convention"])
            answers = [plans.mean_m, plans.log_scale, *_scene(seen, labelled)]
            total = torch.stack([answer.square().mean() for answer in answers]).sum()
            found = torch.autograd.grad(total, weights, allow_unused=True)
        for weight, gradient in zip(weights, found, strict=True):
            weight.requires_grad_(gradient is not None and bool(gradient.any()))

    def save_layout(self, folder: Path) -> None:
        """Write the files that the net was made from, and that its weights belong to them."""
        for name, content in self.sources.items():
            (folder / name).write_bytes(content)
        files.write_json(folder / CONFIG, {"kind": _KIND})


def import_net(folder: Path) -> ImportedNet:
    """Make a student of the pair of ONNX programs in a folder; weights that omni trained may lie beside them.

    Raises:
        UsageError: onnx2fx or ONNX Runtime is not installed.
        DataError: they are no pair that is known, onnx2fx cannot translate one, or it says something else in torch.
    """
    graphs = open_graphs([folder / name for name in PROGRAMS], "cpu", threads=1)
    vision, policy = (
        _import(graph, specs) for graph, specs in zip(graphs, (VISION_INPUTS, POLICY_INPUTS), strict=True)
    )
    paths = [path for graph in graphs for path in (graph.session.path, sidecar_of(graph.session.path))]
    net = ImportedNet(
        ImportedVision(vision, graphs[0].slices),
        ImportedPolicy(policy, graphs[1].slices),
        {path.name: path.read_bytes() for path in paths if path.is_file()},
    )
    if (folder / WEIGHTS).is_file():
        driving_net.fill_weights(net, folder / WEIGHTS)
    return net


def parity(program: ImportedProgram, graph: Graph, specs: Mapping[str, InputSpec]) -> Apart:
    """Return in which kind of number torch and ONNX Runtime differ most over noise.

    torch sees several steps at once, ONNX Runtime one after the other, so that steps which mix show too.
    """
    inputs = example_inputs(specs, _PROBE_STEPS, _PROBE_SEED)
    arrays = {name: inputs[name].numpy().astype(spec.dtype) for name, spec in graph.session.inputs.items()}
    rows = [{name: array[[step]] for name, array in arrays.items()} for step in range(_PROBE_STEPS)]
    wanted = np.concatenate([graph.session.run(row)[0] for row in rows]).astype(np.float32)
    with torch.no_grad():
        return furthest_apart(program(inputs).numpy(), wanted, graph.slices)


def _import(graph: Graph, specs: Mapping[str, InputSpec]) -> ImportedProgram:
    _check_contract(graph, specs)
    path, inputs = graph.session.path, graph.session.inputs
    translated = _translate(path)
    dtypes = {np.dtype(spec.dtype) for spec in (*inputs.values(), *graph.session.outputs.values())}
    is_half = np.dtype(np.float16) in dtypes or any(weight.dtype == torch.float16 for weight in translated.buffers())
    tolerance = _HALF_TOLERANCE if is_half else _TOLERANCE
    is_free = all(spec.shape[0] is None for spec in inputs.values())
    program = ImportedProgram(with_layers(translated), tuple(inputs), is_free=is_free).eval()
    try:
        apart = parity(program, graph, specs)
    except RuntimeError as error:
        raise DataError(f"{path}: what onnx2fx made of it does not run: {_first(error)}; {_ELSE}") from None
    if not apart.share <= tolerance:
        raise DataError(
            f"{path}: in torch it says something else than in ONNX Runtime: {apart.kind} by {apart.share:.1e} of its "
            f"largest number, {tolerance:.0e} allowed; {_ELSE}"
        )
    return program


def _check_contract(graph: Graph, specs: Mapping[str, InputSpec]) -> None:
    """Check that a program is fed as v0.10.1 to v0.10.3 feed it, and states one hypothesis of everything."""
    found = {name: spec.shape[1:] for name, spec in graph.session.inputs.items()}
    several = [
        name
        for name, place in graph.slices.items()
        if name in MEAN_SHAPES and place.stop - place.start != 2 * math.prod(MEAN_SHAPES[name])
    ]
    if found != {name: spec.shape[1:] for name, spec in specs.items()} or several:
        what = f"several hypotheses of {several[0]}" if several else f"the inputs {', '.join(found)}"
        raise DataError(
            f"{graph.session.path}: a program with {what}; expected the pair of v0.10.1 to v0.10.3; {_ELSE}"
        )


def _translate(path: Path) -> fx.GraphModule:
    if importlib.util.find_spec("onnx2fx") is None:
        raise UsageError(
            f"{path}: an ONNX model as a student needs onnx2fx; install it with: pip install 'omni-cli[onnx]'"
        )
    onnx2fx: Any = importlib.import_module("onnx2fx")
    try:
        translated: fx.GraphModule = onnx2fx.convert(str(path))
    except onnx2fx.Onnx2FxError as error:
        raise DataError(f"{path}: onnx2fx {onnx2fx.__version__}: {_first(error)}; {_ELSE}") from None
    return translated


def _first(error: Exception) -> str:
    return str(error).splitlines()[0].strip()


def _laplace(raw: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return means and logarithms of Laplace's b, from (b, 2 n): openpilot says a standard deviation, b sqrt(2)."""
    mean, log_std = raw.reshape(-1, 2, *MEAN_SHAPES[name]).unbind(dim=1)
    return mean, log_std - _LOG_SQRT_2


def _shared_parts(slices: Mapping[str, slice], contract: Mapping[str, slice]) -> tuple[str, ...]:
    """Return the parts of a program that v0.10.3 has too, and in the same width; `pad` means nothing."""
    widths = {name: place.stop - place.start for name, place in slices.items() if name != "pad"}
    return tuple(name for name, place in contract.items() if widths.get(name) == (place.stop or 0) - place.start)


def _scene(seen: VisionOutputs, labelled: Collection[str]) -> list[Tensor]:
    said = {
        "lane_lines": [seen.lane_lines_m, seen.lane_lines_log_scale, seen.lane_line_logit],
        "road_edges": [seen.road_edges_m, seen.road_edges_log_scale],
        "leads": [seen.lead[..., :3], seen.lead_log_scale[..., :3], seen.lead_logit],  # not its acceleration
    }
    return [answer for name in labelled for answer in said[name]]
