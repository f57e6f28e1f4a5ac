"""ONNX programs on the device that was asked for, or a refusal; ONNX Runtime itself falls back without a word."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omni_cli.errors import DataError, OmniError, UsageError

CPU = "CPUExecutionProvider"
# What each name means to ONNX Runtime, best first; ROCm's own provider left it in 1.23, MIGraphX stayed.
PROVIDERS: Mapping[str, tuple[str, ...]] = {
    "cuda": ("CUDAExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider",),
    "rocm": ("MIGraphXExecutionProvider", "ROCMExecutionProvider"),
    "cpu": (CPU,),
}
AUTO = "auto"
_AUTO_ORDER = ("cuda", "rocm", "cpu")  # TensorRT builds an engine for minutes: only where it is asked for
_DTYPES = {
    "tensor(uint8)": np.uint8,
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
_ERROR_SEVERITY = 3  # ONNX Runtime's own warnings go to stderr past every console; an error is ours to word


_GPU_MEMORY = "cuda"  # ONNX Runtime's name for the memory of AMD's GPUs too


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a program."""

    name: str
    shape: tuple[int | None, ...]  # None: free
    dtype: npt.DTypeLike


@dataclass(frozen=True)
class OnnxSession:
    """A program ready to run."""

    path: Path
    session: Any  # onnxruntime.InferenceSession
    provider: str  # the name that runs it: a key of PROVIDERS
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]  # metadata_props
    note: str = ""  # what the user should be told of the provider; empty: nothing

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Return the outputs in the program's order."""
        return list(self.session.run(None, dict(inputs)))

    def bind(self, inputs: Mapping[str, npt.NDArray[Any]]) -> "BoundRun":
        """Lay inputs where the provider computes, and let it leave the outputs there."""
        memory = "cpu" if self.provider == "cpu" else _GPU_MEMORY
        value_of, binding = _onnxruntime().OrtValue.ortvalue_from_numpy, self.session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, value_of(array, memory, 0))
        for name in self.outputs:
            binding.bind_output(name, memory, 0)
        return BoundRun(self.session, binding)


@dataclass(frozen=True)
class BoundRun:
    """A program whose inputs and outputs stay in the memory of what computes it."""

    session: Any  # onnxruntime.InferenceSession
    binding: Any  # onnxruntime.IOBinding

    @property
    def devices(self) -> tuple[str, ...]:
        """Return where the outputs of the last run lie, by ONNX Runtime's names of devices."""
        return tuple(dict.fromkeys(value.device_name() for value in self.binding.get_outputs()))

    def run(self) -> None:
        """Compute, and return when it is done."""
        self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()

    def outputs(self) -> list[npt.NDArray[Any]]:
        """Copy the outputs of the last run to the host, in the program's order."""
        return list(self.binding.copy_outputs_to_cpu())


def open_session(path: Path, providers: str = AUTO, *, threads: int = 0) -> OnnxSession:
    """Load an ONNX program.

    Args:
        path: the .onnx file.
        providers: `auto` (the fastest that works here), or one of PROVIDERS, which then must work.
        threads: for one operator on the CPU; 0 leaves the number to ONNX Runtime.

    Raises:
        UsageError: ONNX Runtime is not installed, lacks the provider, or there is no such file.
        DataError: the file is no ONNX program.
        OmniError: the provider is there and does not start.
    """
    runtime = _onnxruntime()
    if not path.is_file():
        raise _no_file(path)
    if providers != AUTO:
        return _open(runtime, path, providers, threads)
    failures: list[str] = []
    for name in [name for name in _AUTO_ORDER if name in _available(runtime) and name != "cpu"]:
        try:
            return _open(runtime, path, name, threads)
        except OmniError as error:  # it is here and does not start: the CPU does the work, and the user is told why
            failures.append(str(error))
    return replace(_open(runtime, path, "cpu", threads), note="; ".join(failures))


def open_on_each(
    path: Path, providers: Sequence[str], *, threads: int = 0
) -> tuple[dict[str, OnnxSession], tuple[str, ...]]:
    """Load an ONNX program once on each of several providers.

    Args:
        path: the .onnx file.
        providers: keys of PROVIDERS.
        threads: see `open_session`.

    Returns:
        The sessions by provider, and why each of the other providers does not run it.

    Raises:
        UsageError: ONNX Runtime is not installed, or there is no such file.
        DataError: the file is no ONNX program.
    """
    if not path.is_file():
        raise _no_file(path)
    sessions: dict[str, OnnxSession] = {}
    failures: list[str] = []
    for name in providers:
        try:
            sessions[name] = open_session(path, name, threads=threads)
        except DataError:
            raise
        except OmniError as error:
            failures.append(str(error))
    return sessions, tuple(failures)


def available() -> list[str]:
    """Return the keys of PROVIDERS that this ONNX Runtime was built with; whether they start is another question.

    Raises:
        UsageError: ONNX Runtime is not installed.
    """
    return _available(_onnxruntime())


def check_provider(asked: str, running: Sequence[str], path: Path) -> None:
    """Compare the providers that ONNX Runtime set up with the one that was asked for.

    Raises:
        OmniError: it fell back to another.
    """
    if not set(PROVIDERS[asked]) & set(running):
        raise OmniError(
            f"{path}: asked ONNX Runtime for {asked}, it runs on {', '.join(running)}: the libraries of {asked} do not "
            f"load here; install those that your onnxruntime was built for, or ask for {AUTO} or cpu"
        )


def _open(runtime: Any, path: Path, asked: str, threads: int) -> OnnxSession:
    if asked not in PROVIDERS:
        raise UsageError(f"providers {asked}: expected {AUTO}, {', '.join(PROVIDERS)}")
    if asked not in (available := _available(runtime)):
        raise UsageError(f"providers {asked}: this onnxruntime {runtime.__version__} has {', '.join(available)}; "
                         f"install the onnxruntime package built for {asked}, or ask for {AUTO}")  # fmt: skip
    session = _load(runtime, path, asked, threads)
    check_provider(asked, session.get_providers(), path)
    return OnnxSession(
        path,
        session,
        asked,
        {value.name: _spec(value, path) for value in session.get_inputs()},
        {value.name: _spec(value, path) for value in session.get_outputs()},
        session.get_modelmeta().custom_metadata_map,
    )


def _load(runtime: Any, path: Path, asked: str, threads: int) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERROR_SEVERITY
    names = [name for name in PROVIDERS[asked] if name in runtime.get_available_providers()]
    try:
        chain = [*dict.fromkeys([*names, CPU])]  # an operator that the provider lacks runs on the CPU
        return runtime.InferenceSession(str(path), options, providers=chain, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's errors have no common base below Exception
        why = " ".join(str(error).split()).rpartition("failed:")[2]
        refused = DataError if asked == "cpu" else OmniError  # elsewhere the provider may be to blame
        raise refused(
            f"{path}: ONNX Runtime cannot load it on {asked}: {why[:200]}; expected an ONNX program"
        ) from None


def _no_file(path: Path) -> UsageError:
    return UsageError(f"{path}: no such file; expected an ONNX program")


def _onnxruntime() -> Any:
    if importlib.util.find_spec("onnxruntime") is None:
        raise UsageError("an ONNX program needs onnxruntime; install it with: pip install 'omni-cli[onnx]'")
    return importlib.import_module("onnxruntime")


def _available(runtime: Any) -> list[str]:
    found = set(runtime.get_available_providers())
    return [name for name, aliases in PROVIDERS.items() if found & set(aliases)]


def _spec(value: Any, path: Path) -> TensorSpec:
    if value.type not in _DTYPES:
        raise DataError(f"{path}: '{value.name}' is a {value.type}; expected one of {', '.join(_DTYPES)}")
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return TensorSpec(value.name, shape, _DTYPES[value.type])
