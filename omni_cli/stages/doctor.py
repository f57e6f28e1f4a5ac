"""What `omni doctor` checks: that this machine has what omni needs, and what would mend it where it has not.

A check never raises: whatever is wrong becomes a row of the table. The value of a token is never read out.
"""

import ctypes.util
import importlib
import importlib.metadata
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from omni_cli.formats.ffmpeg import load_torchcodec
from omni_cli.profiles import default_profile, found_accelerator
from omni_cli.report import Console
from omni_cli.telemetry import accelerator_names, installed_version, machine_facts

State = Literal["ok", "note", "broken"]
DISTRIBUTION = "omni-cli"
OLDEST_PYTHON = (3, 11)
LITTLE_DISK_GIB = 20.0  # a small fetch with its shards
NO_DISK_GIB = 1.0
ONLINE_TIMEOUT_S = 10.0
_NOT_FOR_USERS = ("dev",)


@dataclass(frozen=True)
class DoctorRequest:
    """Where data and runs would go, and whether to touch the network."""

    data: Path
    runs: Path
    online: bool = False


@dataclass(frozen=True)
class Check:
    """One finding; a note is something that only some users miss."""

    name: str
    found: str
    state: State = "ok"
    remedy: str = ""


def doctor(request: DoctorRequest, console: Console) -> dict[str, Any]:
    """Check this machine and show a table; return the findings and how many are broken."""
    checks = list(_checks(request))
    rows = [(check.name, check.state, check.found, check.remedy) for check in checks]
    console.table("This machine", ("check", "state", "found", "what to do"), rows)
    broken = [check for check in checks if check.state == "broken"]
    for check in broken:
        console.warn(f"{check.name}: {check.found}; {check.remedy}")
    return {"checks": [asdict(check) for check in checks], "broken": len(broken), "machine": machine_facts()}


def _checks(request: DoctorRequest) -> Iterator[Check]:
    yield _python()
    yield from _packages()
    yield _torch()
    yield from _attention()
    yield _video()
    yield _machine()
    yield _disk("disk for --data", request.data, "OMNI_DATA")
    yield _disk("disk for --runs", request.runs, "OMNI_RUNS")
    yield from _extras()
    yield from _four_bit()
    yield _token()
    if request.online:
        yield _hub()


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        return Check("python", found, "broken", "install Python 3.11 or later")
    return Check("python", found)


def _packages() -> Iterator[Check]:
    try:
        requirements = _requirements(extra="")
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", f"{DISTRIBUTION} is not installed", "broken", "pip install -e . in the checkout")
        return
    wrong = [_mismatch(requirement) for requirement in requirements if not _satisfied(requirement)]
    yield from wrong
    if not wrong:
        yield Check("packages", f"all {len(requirements)} that omni needs")


def _mismatch(requirement: Requirement) -> Check:
    found = installed_version(requirement.name) or "not installed"
    return Check(requirement.name, found, "broken", f"pip install '{requirement.name}{requirement.specifier}'")


def _satisfied(requirement: Requirement) -> bool:
    found = installed_version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _requirements(extra: str) -> list[Requirement]:
    """Return what an extra of omni adds, or what omni itself needs where the extra is empty."""
    every = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or ()]
    if not extra:
        return [each for each in every if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [
        e for e in every if e.marker and e.marker.evaluate({"extra": extra}) and not e.marker.evaluate({"extra": ""})
    ]


def _torch() -> Check:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken build fails in many ways, and each is a finding
        return Check("torch", _one_line(error), "broken", "reinstall torch for this machine: README, Install")
    if torch.cuda.is_available():
        return Check("torch", f"{torch.__version__}, {torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    if found_accelerator()[0] != "cpu":
        found = f"{torch.__version__} does not see {', '.join(accelerator_names())}"
        return Check("torch", found, "note", "install torch's build for this GPU: README, Install")
    return Check("torch", f"{torch.__version__}, on the CPU")


def _attention() -> Iterator[Check]:
    """Check that a fused kernel computes attention: torch says nothing where none does, and is many times slower."""
    try:
        torch, kernels = importlib.import_module("torch"), importlib.import_module("omni_cli.models.attention_kernels")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = kernels.chosen_kernels(device, torch.bfloat16)
    except Exception as error:  # as for torch
        yield Check("attention", _one_line(error), "broken", "reinstall torch for this machine: README, Install")
        return
    found = ", ".join(f"{name} {kernel}" for name, kernel in chosen.items()) + f" on {device}"
    if kernels.UNFUSED in chosen.values():
        remedy = "slow, and much memory: on AMD set TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1; else update torch"
        yield Check("attention", found, "note", remedy)
    else:
        yield Check("attention", found)


def _video() -> Check:
    ffmpeg = "the system's FFmpeg" if ctypes.util.find_library("avcodec") else "the FFmpeg inside PyAV's wheel"
    try:
        load_torchcodec()
    except Exception as error:  # as for torch: whatever stops the import is the finding
        remedy = "install the torchcodec that matches torch: .ci/constraints.txt has a tested pair"
        return Check("torchcodec", _one_line(error), "broken", remedy)
    return Check("torchcodec", f"{installed_version('torchcodec')} on {ffmpeg}")


def _machine() -> Check:
    accelerator, memory_gib = found_accelerator()
    return Check("profile", f"{default_profile()} fits {accelerator}, {memory_gib:.0f} GiB")


def _disk(name: str, folder: Path, variable: str) -> Check:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free_gib = shutil.disk_usage(existing).free / 2**30
    found = f"{free_gib:.1f} GiB free at {folder}"
    elsewhere = f"free some, or name another folder with {variable}"
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Check(name, f"{existing} cannot be written", "broken", f"name another folder with {variable}")
    if free_gib < NO_DISK_GIB:
        return Check(name, found, "broken", elsewhere)
    return Check(name, found, *(("note", elsewhere) if free_gib < LITTLE_DISK_GIB else ("ok", "")))


def _extras() -> Iterator[Check]:
    try:
        names = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return  # said by the check of the packages
    for extra in (name for name in names if name not in _NOT_FOR_USERS):
        missing = [each.name for each in _requirements(extra) if not _satisfied(each)]
        install = f"pip install '{DISTRIBUTION}[{extra}]'"
        yield (
            Check(f"extra {extra}", f"without {', '.join(missing)}", "note", install)
            if missing
            else Check(f"extra {extra}", "installed")
        )


def _four_bit() -> Iterator[Check]:
    """Check the products that a quantised model is made of, where what makes them is installed."""
    if (version := installed_version("bitsandbytes")) is None:
        return  # said by the check of the extras
    try:
        torch, quantised = importlib.import_module("torch"), importlib.import_module("omni_cli.models.quantised")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        worst = quantised.check_products(device, torch.bfloat16)
    except Exception as error:  # as for torch
        yield Check("4-bit products", _one_line(error), "broken", "do not use quantization = nf4 here until mended")
        return
    yield Check("4-bit products", f"bitsandbytes {version} on {device}: at most {worst:.1%} off the dequantised ones")


def _token() -> Check:
    try:
        token = importlib.import_module("huggingface_hub").get_token()
    except Exception as error:  # an unreadable token file, a broken package
        return Check("hub token", _one_line(error), "note", "hf auth login")
    if token:
        return Check("hub token", "set")
    return Check("hub token", "not set", "note", "hf auth login, for gated data such as PhysicalAI-AV")


def _hub() -> Check:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=ONLINE_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        return Check("hub", f"answers (HTTP {error.code})")
    except (OSError, ValueError) as error:
        return Check(
            "hub", _one_line(error), "note", "check the network, HF_ENDPOINT and the proxy; local work goes on"
        )
    return Check("hub", "answers")


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
