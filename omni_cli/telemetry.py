"""What a number depends on: the host, its accelerators and the versions, as facts for manifests and `omni doctor`.

No host name, user or path is among them: manifests are published with models.
"""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    *("omni-cli", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "pyarrow", "numpy"),
    *("torchcodec", "av", "huggingface_hub", "safetensors", "bitsandbytes", "onnx", "onnxruntime"),
)
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
