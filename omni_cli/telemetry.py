"""What a number depends on: the host, its accelerators and the versions, as facts for manifests and `omni doctor`.

No host name, user or path is among them: manifests are published with models. And what the machine does at a moment, by
the vendors' own libraries: load, memory, power, energy. No GPU was at hand to run their readers on: they are tested
against fakes that follow the sources of nvidia-ml-py 13.615.71 and amdsmi 7.0.2.
"""

import contextlib
import importlib
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil

PACKAGES = (
    *("omni-cli", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "pyarrow", "numpy"),
    *("torchcodec", "av", "huggingface_hub", "safetensors", "bitsandbytes", "onnx", "onnxruntime"),
)
_TREE_EVERY_S = 10.0
_SHORTEST_S = 0.1  # the kernel counts processor time in hundredths of a second
_NAME_QUERIES = (
    ("nvidia-smi", ("--query-gpu=name", "--format=csv,noheader")),
    ("rocm-smi", ("--showproductname", "--csv")),
)


def machine_facts() -> dict[str, Any]:
    """Return the facts of this host that a run manifest keeps; JSON-able, cheap, and without importing torch."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_count": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerators": accelerator_names(),
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Return the version of each package that shapes a number, where it is installed."""
    return {name: found for name in PACKAGES if (found := installed_version(name))}


def installed_version(package: str) -> str | None:
    """Return the version of a package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def usable_cores() -> int:
    """Return the number of cores that this process may use, which a container or a job may limit."""
    return len(os.sched_getaffinity(0))


def cpu_name() -> str:
    """Return the processor's model name as the kernel tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def accelerator_names() -> list[str]:
    """Return the product name of every GPU, from the vendor's own tool; empty on a CPU."""
    for tool, query in _NAME_QUERIES:
        if shutil.which(tool):
            found = subprocess.run([tool, *query], capture_output=True, text=True, check=False, timeout=30)
            if names := _product_names(tool, found.stdout):
                return names
    return []


def _product_names(tool: str, output: str) -> list[str]:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if tool == "nvidia-smi":
        return [line for line in lines if "failed" not in line.lower()]
    return [line.split(",")[1] for line in lines if line.startswith("card")]


class Reader(Protocol):
    """Reads one kind of device, as it is now. It may raise whatever its library does: who asks then drops it."""

    @property
    def what(self) -> str:
        """What it reads, for people."""

    def read(self) -> dict[str, Any]:
        """Return what is measured now, by the names of a line of telemetry; what cannot be measured is not among it."""

    def close(self) -> None:
        """Give back what it holds."""


Measure = Callable[[Any, Any], Any]  # (library, device) -> a number, or what the library says instead of one


class Gpus:
    """What all GPUs of one vendor have in common: devices, and the measures that they support.

    What a device does not support is found out once, at the start, and never asked for again.
    """

    def __init__(
        self, what: str, library: Any, devices: Sequence[Any], measures: Mapping[str, Measure], refusal: type[Exception]
    ) -> None:
        self.what = what
        self._library = library
        self._asked = [(device, self._supported(device, measures, refusal)) for device in devices]

    def _supported(self, device: Any, measures: Mapping[str, Measure], refusal: type[Exception]) -> dict[str, Measure]:
        supported = {}
        for name, measure in measures.items():
            with contextlib.suppress(refusal):
                measure(self._library, device)
                supported[name] = measure
        return supported

    def read(self) -> dict[str, Any]:
        """Return `gpus`, one table a device: utilisation_share, memory_bytes, power_w, temperature_c, energy_j.

        The last is a counter, which began at some other time.
        """
        return {"gpus": [self._read(device, measures) for device, measures in self._asked]}

    def _read(self, device: Any, measures: Mapping[str, Measure]) -> dict[str, float]:
        read = {name: measure(self._library, device) for name, measure in measures.items()}
        return {name: value for name, value in read.items() if isinstance(value, int | float)}  # amdsmi says "N/A"

    def close(self) -> None:
        """Leave the library as it is: torch uses it too."""


# nvidia-ml-py 13.615.71: power in mW, energy in mJ since the driver was loaded (NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION),
# memory in bytes, temperature in degrees Celsius, utilisation in % of the last sample period.
_NVIDIA: Mapping[str, Measure] = {
    "utilisation_share": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    "memory_bytes": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    "power_w": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
    "temperature_c": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    "energy_j": lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3,
}
_AMD_UNKNOWN = ("N/A", 0xFFFF, 0xFFFFFFFF)


def _amd_power_w(amdsmi: Any, gpu: Any) -> Any:
    """Return what an MI300 tells, or the mean that older ones tell instead (amdsmi.h, amdsmi_power_info_t)."""
    told = amdsmi.amdsmi_get_power_info(gpu)
    known = [told[name] for name in ("current_socket_power", "average_socket_power") if told[name] not in _AMD_UNKNOWN]
    return known[0] if known else "N/A"


def _amd_share(amdsmi: Any, gpu: Any) -> Any:
    active = amdsmi.amdsmi_get_gpu_activity(gpu)["gfx_activity"]
    return "N/A" if active in _AMD_UNKNOWN else active / 100


def _amd_energy_j(amdsmi: Any, gpu: Any) -> float:
    """Return counter x resolution, which is in microjoules; the counter's name changed with ROCm 6.4."""
    told = amdsmi.amdsmi_get_energy_count(gpu)
    count = told["energy_accumulator"] if "energy_accumulator" in told else told["power"]
    return float(count * told["counter_resolution"] / 1e6)


# amdsmi 7.0.2: power in W, activity in %, memory in MiB; temperature in degrees Celsius, as torch.cuda.temperature
# passes it on.
_AMD: Mapping[str, Measure] = {
    "utilisation_share": _amd_share,
    "memory_bytes": lambda amdsmi, gpu: amdsmi.amdsmi_get_gpu_vram_usage(gpu)["vram_used"] << 20,
    "power_w": _amd_power_w,
    "temperature_c": lambda amdsmi, gpu: amdsmi.amdsmi_get_temp_metric(
        gpu, amdsmi.AmdSmiTemperatureType.JUNCTION, amdsmi.AmdSmiTemperatureMetric.CURRENT
    ),
    "energy_j": _amd_energy_j,
}


def nvidia_gpus(pci_addresses: Sequence[str]) -> Gpus:
    """Return a reader of NVIDIA's GPUs by NVML.

    Args:
        pci_addresses: domain:bus:device.function in hexadecimal, as CUDA tells them of the devices that it uses:
            CUDA_VISIBLE_DEVICES, whether by number or UUID, and CUDA_DEVICE_ORDER are followed by that.
    """
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    devices = [nvml.nvmlDeviceGetHandleByPciBusId(address) for address in pci_addresses]
    return Gpus("NVIDIA GPU", nvml, devices, _NVIDIA, nvml.NVMLError)


def amd_gpus(pci_addresses: Sequence[str]) -> Gpus:
    """Return a reader of AMD's GPUs by AMD SMI; the argument is as for NVIDIA's."""
    with contextlib.redirect_stdout(sys.stderr):  # it prints there where its library lacks, and stdout holds data
        amdsmi = importlib.import_module("amdsmi")
    amdsmi.amdsmi_init()
    devices = [amdsmi.amdsmi_get_processor_handle_from_bdf(address) for address in pci_addresses]
    return Gpus("AMD GPU", amdsmi, devices, _AMD, amdsmi.AmdSmiException)


class Host:
    """Reads the processor and the memory, of this process with all that it started, and of the whole machine."""

    what = "processor"

    def __init__(self, powercap: Path = Path("/sys/class/powercap")) -> None:
        self._packages = [package for path in sorted(powercap.glob("intel-rapl:*")) if (package := _package(path))]
        self._energy_uj = [package.read_uj() for package in self._packages]
        self._total_uj = 0
        self._looked_s = -math.inf
        self._look_again()
        self._at_s, self._cpu_s, self._machine_s = time.monotonic(), self._tree_state()[0], _machine_cpu_s()

    def read(self) -> dict[str, Any]:
        """Return shares of all usable cores and of all cores of the machine, bytes, and joules since the start."""
        self._look_again()
        spent_s, memory_bytes = self._tree_state()
        memory = {"process_memory_bytes": memory_bytes, "machine_memory_bytes": psutil.virtual_memory().used}
        energy = {"cpu_energy_j": self._energy_j()} if self._packages else {}
        return {**self._cpu_shares(spent_s), **memory, **energy}

    def close(self) -> None:
        """Hold nothing."""

    def _look_again(self) -> None:
        """List the children anew, now and then: that looks at every process of the machine."""
        if time.monotonic() - self._looked_s >= _TREE_EVERY_S:
            self._looked_s = time.monotonic()
            self._tree = [psutil.Process(), *psutil.Process().children(recursive=True)]

    def _tree_state(self) -> tuple[dict[int, float], int]:
        """Return the processor time of each process, and the memory of them all; what they share counts for each."""
        spent_s, memory_bytes = {}, 0
        for process in self._tree:
            with contextlib.suppress(psutil.Error), process.oneshot():  # it has ended: no more of it
                times = process.cpu_times()
                memory_bytes += process.memory_info().rss
                spent_s[process.pid] = times.user + times.system
        return spent_s, memory_bytes

    def _cpu_shares(self, spent_s: Mapping[int, float]) -> dict[str, float]:
        """Return how busy the cores were since the last call; nothing where that was a moment ago."""
        passed_s = time.monotonic() - self._at_s
        if passed_s < _SHORTEST_S:
            return {}
        busy_s = sum(each_s - self._cpu_s[pid] for pid, each_s in spent_s.items() if pid in self._cpu_s)
        machine_s = _machine_cpu_s()
        of_machine = [after - before for after, before in zip(machine_s, self._machine_s, strict=True)]
        self._at_s, self._cpu_s, self._machine_s = time.monotonic(), dict(spent_s), machine_s
        shares = {"process_cpu_share": busy_s / passed_s / usable_cores()}
        return shares | ({"machine_cpu_share": of_machine[0] / of_machine[1]} if of_machine[1] > 0 else {})

    def _energy_j(self) -> float:
        now_uj = [package.read_uj() for package in self._packages]
        for package, before, after in zip(self._packages, self._energy_uj, now_uj, strict=True):
            self._total_uj += (after - before) % package.wraps_at_uj
        self._energy_uj = now_uj
        return self._total_uj / 1e6


def _machine_cpu_s() -> tuple[float, float]:
    """Return the time that all cores of the machine were busy, and their time in all, since it was started."""
    times = psutil.cpu_times()
    guest_s = times.guest + times.guest_nice  # of virtual machines: the kernel counts it as user's and nice's too
    total_s = sum(times) - guest_s
    return total_s - times.idle - times.iowait, total_s


class _Package(NamedTuple):
    """The energy counter of one processor package (Linux, Documentation/power/powercap): microjoules, and it wraps."""

    counter: Path
    wraps_at_uj: int

    def read_uj(self) -> int:
        return int(self.counter.read_text())


def _package(zone: Path) -> _Package | None:
    """Return a zone's counter where it is a whole package's and may be read, which is often root's right alone."""
    try:
        if not (zone / "name").read_text().startswith("package"):
            return None
        package = _Package(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()) + 1)
        package.read_uj()
    except OSError:
        return None
    return package
