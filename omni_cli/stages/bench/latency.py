"""How long programs take: a run's in torch, the same exported, and its teacher's, by provider and batch size.

*Host to host* begins and ends with arrays in the host's memory. *Device only* begins with inputs in the memory of what
computes, leaves the outputs there, and ends when the device is done. All ways are timed in turn, in one process. Where
a model is several programs, a car runs them one after the other: their sum, round by round, is its latency.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from omni_cli import files
from omni_cli.errors import DataError, UsageError
from omni_cli.models import onnx_runtime
from omni_cli.models.onnx_runtime import OnnxSession
from omni_cli.recipe import Exportable, Program, Taught, require
from omni_cli.stages import models, runs
from omni_cli.stages.bench.inputs import Inputs
from omni_cli.stages.bench.timing import Line, Part, measure, summed
from omni_cli.stages.programs import as_type

HOST, DEVICE = "host to host", "device only"
TORCH, ONNX = "torch", "ONNX"
MODEL, TEACHER = "model", "teacher"
WHOLE = "whole"  # all programs of a model, one after the other
SIZES = (1, 8)  # samples at once, where a program takes any number
WARMUPS = 3  # the first calls of a program choose kernels and claim memory
ROUNDS = 20  # for each repeat asked for: a 99th percentile is of a hundred
_SEED = 20_262
_DTYPES = {"float32": torch.float32, "float16": torch.float16}
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Way:
    """One program on one device, given so many samples at once in one place."""

    of: str  # MODEL or TEACHER
    program: str
    runner: str
    provider: str
    samples: int
    path: str
    device: str  # in whose memory the outputs were
    run: Callable[[], object]

    @property
    def setting(self) -> str:
        """All but the program: ways of one setting add up to a model's."""
        where = f" ({self.device})" if self.path == DEVICE else ""
        return f"{self.runner} {self.provider} b{self.samples}, {self.path}{where}"

    def facts(self) -> dict[str, Any]:
        """Return the way for a report."""
        return {name: getattr(self, name) for name in ("of", "runner", "provider", "samples", "path", "device")}


def bench_export(inputs: Inputs, repeats: int) -> Part:
    """Time the exported programs beside the same modules in torch and the teacher's programs.

    Raises:
        UsageError: the newest run has no ONNX export, or a teacher's file is not there.
        DataError: a teacher's file is no ONNX program.
    """
    folder, run = find_export(inputs), inputs.run
    if folder is None or run is None:
        raise UsageError(_no_export(inputs))
    card, rounds = files.read_json(folder / models.ONNX_CARD), repeats * ROUNDS
    teacher, no_teacher = _teacher_files(inputs)
    left_out: set[str] = set()
    ways = [*_of_run(inputs, run, folder, card, left_out), *_of_teacher(teacher, left_out)]
    work = {f"{way.of} {way.program}: {way.setting}": way.run for way in ways}
    once_s = sum(timing.median_s for timing in measure(work, repeats=1).values())
    inputs.console.say(f"{len(work)} ways, {rounds} rounds of all in turn: about {once_s * (WARMUPS + rounds):.0f} s")
    timings = measure(work, rounds, WARMUPS)
    pairs = zip(ways, timings.items(), strict=True)
    each = [(way, Line(name, timing, {"samples": way.samples}, way.facts())) for way, (name, timing) in pairs]
    wholes, lines = _wholes(each), [line for _, line in each]
    baseline = wholes[0]
    for note in (*sorted(left_out), *filter(None, [no_teacher])):
        inputs.console.say(note)
    told = f"teacher {', '.join(map(str, teacher))}" if teacher else "no teacher"
    settings = {"warmups": WARMUPS, "rounds": rounds, "baseline": baseline.what, "left_out": sorted(left_out),
                "teacher": list(map(str, teacher)) or no_teacher}  # fmt: skip
    on = (
        f"{folder}, {card['dtype']}, {told}, on noise; {WARMUPS} warm-ups, then {rounds} rounds of all in turn; "
        f"the baseline of the ratios, in samples a second, is {baseline.what}"
    )
    lines += [whole for whole in wholes if whole not in lines]
    return Part("export", on, tuple(lines), _ratios(wholes, baseline), settings)


def _no_export(inputs: Inputs) -> str:
    recipe = inputs.recipe
    if inputs.run is not None:
        return f"run {inputs.run.folder} has no ONNX export of its weights; make one: omni export {inputs.run.name}"
    settings = f"recipe {recipe.name}, model {recipe.model}, tuned in {recipe.tune.mode}"
    return f"no run of {settings} is here; name one with --run NAME, or make it with: omni train"


def find_export(inputs: Inputs) -> Path | None:
    """Return the folder of the finished ONNX export of the run that is measured, or None."""
    if inputs.run is None:
        return None
    folder = inputs.run.folder / "export" / "onnx"
    return folder if models.made_from(folder, run_weights=models.weights_key(inputs.run)) else None


def _of_run(inputs: Inputs, run: runs.Run, folder: Path, card: Mapping[str, Any], left_out: set[str]) -> Iterator[Way]:
    """Yield the ways of a run's programs; those of torch, on the best device, come first."""
    trained = run.recipe_settings(type(inputs.recipe))
    recipe: Exportable = require(trained, Exportable)  # type: ignore[type-abstract]  # a protocol names it
    built, dtype = recipe.load_to_merge(inputs.preprocess, run.final), _DTYPES[card["dtype"]]
    if recipe.tune.mode != "full":
        built = recipe.merge(built)  # as it was for the export
    written = {Path(one["file"]).stem: one["windows"] for one in card["programs"]}
    sizes = sorted(size for size in written.values() if size != "any") or SIZES
    planned = [
        (size, program)
        for size in dict.fromkeys(sizes)
        for program in recipe.programs(built, inputs.preprocess, [size])
        if program.name in written  # until omni 0.6 the tower alone
    ]
    given = [{name: as_type(tensor, dtype).numpy() for name, tensor in one.inputs.items()} for _, one in planned]
    for device in dict.fromkeys((models.best_device(), "cpu")):
        for (size, program), arrays in zip(planned, given, strict=True):
            yield from _in_torch(program, size, arrays, dtype, device)
    for (size, program), arrays in zip(planned, given, strict=True):
        yield from _on_each(MODEL, folder / f"{program.name}.onnx", {size: arrays}, left_out)


def _of_teacher(paths: Sequence[Path], left_out: set[str]) -> Iterator[Way]:
    for path in paths:
        session = onnx_runtime.open_session(path, "cpu")
        fixed = {length for spec in session.inputs.values() if (length := spec.shape[0]) is not None}
        if len(fixed) > 1:
            raise DataError(f"{path}: its inputs are of {sorted(fixed)} samples at once; expected one number for all")
        sizes = fixed or SIZES
        yield from _on_each(TEACHER, path, {size: _noise(session, size) for size in sizes}, left_out)


def _teacher_files(inputs: Inputs) -> tuple[tuple[Path, ...], str]:
    """Return the teacher's files, or none and why."""
    if inputs.teacher:
        return _distinct(inputs.teacher), ""
    if not isinstance(inputs.recipe, Taught):
        return (), f"no teacher is measured: recipe {inputs.recipe.name} learns from no other model"
    try:
        return inputs.recipe.teacher_files(), ""
    except UsageError as error:
        return (), f"no teacher is measured: {error}; name its files with --teacher A.onnx,B.onnx"


def _distinct(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the files of one model.

    Raises:
        UsageError: two have the same name, so that they are not one model's.
    """
    names = [path.stem for path in paths]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--teacher: names two files called {twice[0]}; expected the files of one model, each once")
    return paths


def _in_torch(program: Program, size: int, arrays: Arrays, dtype: torch.dtype, device: str) -> list[Way]:
    module = program.module if device == "cpu" else copy.deepcopy(program.module)  # which the CPU is still to run
    module = module.to(device, dtype)
    there = [torch.from_numpy(array).to(device) for array in arrays.values()]

    def device_only() -> Sequence[torch.Tensor]:
        with torch.no_grad():
            outputs: Sequence[torch.Tensor] = module(*there)
        return outputs

    def host_to_host() -> list[npt.NDArray[Any]]:
        with torch.no_grad():
            outputs = module(*(torch.from_numpy(array).to(device) for array in arrays.values()))
        return [output.cpu().numpy() for output in outputs]

    where = _told(device_only()[0].device.type)
    name = _plain(program.name, size)
    return [Way(MODEL, name, TORCH, device, size, HOST, "host", host_to_host),
            Way(MODEL, name, TORCH, device, size, DEVICE, where, device_only)]  # fmt: skip


def _on_each(of: str, path: Path, given: Mapping[int, Arrays], left_out: set[str]) -> Iterator[Way]:
    """Yield the ways of an ONNX program on every provider that is here; those that do not run it are noted."""
    sessions, failures = onnx_runtime.open_on_each(path, onnx_runtime.available(), threads=torch.get_num_threads())
    left_out.update(f"left out: {failure}" for failure in failures)
    for session in sessions.values():
        for size, arrays in given.items():
            yield from _in_onnx(of, _plain(path.stem, size), session, size, arrays)


def _in_onnx(of: str, name: str, session: OnnxSession, size: int, arrays: Arrays) -> list[Way]:
    bound = session.bind(arrays)
    bound.run()
    where = _told(", ".join(bound.devices))
    return [Way(of, name, ONNX, session.provider, size, HOST, "host", lambda: session.run(arrays)),
            Way(of, name, ONNX, session.provider, size, DEVICE, where, bound.run)]  # fmt: skip


def _told(device: str) -> str:
    return "cpu, the host" if device == "cpu" else device


def _plain(name: str, size: int) -> str:
    """Return a program's name without its number of windows, which the setting tells."""
    return name.removesuffix(f"-b{size}")


def _noise(session: OnnxSession, size: int) -> dict[str, npt.NDArray[Any]]:
    """Return seeded inputs: bytes over their whole range, numbers from 0 to 1."""
    numbers, arrays = np.random.default_rng(_SEED), {}
    for name, spec in session.inputs.items():
        shape = (size, *(length for length in spec.shape[1:] if length is not None))
        if len(shape) < len(spec.shape):
            raise DataError(f"{session.path}: '{name}' is {list(spec.shape)}; only its first axis may have any length")
        highest = 256 if spec.dtype == np.uint8 else 2
        is_whole = np.issubdtype(spec.dtype, np.integer)
        values = numbers.integers(0, highest, shape) if is_whole else numbers.random(shape)
        arrays[name] = values.astype(spec.dtype)
    return arrays


def _wholes(each: Iterable[tuple[Way, Line]]) -> list[Line]:
    """Return the latency of each model in each setting in which all of its programs run."""
    settings: dict[tuple[str, str], list[tuple[Way, Line]]] = {}
    for way, line in each:
        settings.setdefault((way.of, way.setting), []).append((way, line))
    programs = {of: max(len(those) for (whose, _), those in settings.items() if whose == of) for of, _ in settings}
    return [_whole(those) for (of, _), those in settings.items() if len(those) == programs[of]]


def _whole(those: Sequence[tuple[Way, Line]]) -> Line:
    way, line = those[0]
    if len(those) == 1:
        return line
    name = f"{way.of} {WHOLE}: {way.setting}"
    return Line(name, summed([one.timing for _, one in those]), line.amounts, line.notes)


def _ratios(wholes: Sequence[Line], baseline: Line) -> dict[str, float]:
    base = baseline.rates()["samples"]
    return {f"{line.what} / baseline": line.rates()["samples"] / base for line in wholes if line is not baseline}
