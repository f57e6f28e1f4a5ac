"""Hardware profiles: what one machine can hold, and in a section per recipe what suits it there.

A profile is a TOML file. The shipped ones live in `profiles/` of the source tree and inside the wheel.
"""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import Field

from omni_cli.config import Layer, Settings, nearest, read_layer, resolve
from omni_cli.errors import UsageError

Accelerator = Literal["cpu", "cuda", "rocm"]
_PACKAGE = Path(__file__).parent
_FOLDERS = (_PACKAGE / "_profiles", _PACKAGE.parent / "profiles")  # inside a wheel; beside the package in a checkout


class Machine(Settings):
    """What a profile promises about the hardware."""

    accelerator: Accelerator
    memory_gib: float = Field(gt=0)  # of the accelerator, or of the process on a CPU
    precision: Literal["bfloat16", "float16", "float32"]
    unified_memory: bool = False


class Profile(Settings):
    """One machine, and a table of settings for each recipe that is prepared for it."""

    name: str
    summary: str
    run_on: tuple[str, ...]  # hardware this profile was really run on; empty means nobody did
    machine: Machine
    vlm: dict[str, Any] = Field(default_factory=dict)
    fusion: dict[str, Any] = Field(default_factory=dict)
    distill: dict[str, Any] = Field(default_factory=dict)
    control: dict[str, Any] = Field(default_factory=dict)

    def recipe_layer(self, recipe: str) -> Layer:
        """Return the settings that this profile gives one recipe.

        Raises:
            UsageError: the profile has no section for it.
        """
        table: Mapping[str, Any] = getattr(self, recipe)
        if not table:
            raise UsageError(f"profile {self.name} has no [{recipe}] section; choose another with --profile")
        return Layer(f"profile {self.name}", {"precision": self.machine.precision, **table})


def profile_files() -> dict[str, Path]:
    """Return the shipped profiles by name."""
    folder = next(folder for folder in _FOLDERS if folder.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_profile(name: str) -> Profile:
    """Load a profile by its name, or from a TOML file given by path.

    Raises:
        UsageError: there is no such profile, or it is wrong.
    """
    shipped = profile_files()
    if name.endswith(".toml"):
        layer = read_layer(Path(name))
    elif name in shipped:
        layer = read_layer(shipped[name])
    else:
        raise UsageError(f"unknown profile {name!r}; {nearest(name, shipped)} (or the path of a TOML file)")
    return resolve(Profile, [layer]).value


def found_accelerator() -> tuple[Accelerator, float]:
    """Return this machine's accelerator and its memory in GiB, from the vendor's own tool."""
    for tool, query, accelerator in (
        ("nvidia-smi", ["--query-gpu=memory.total", "--format=csv,noheader,nounits"], "cuda"),
        ("rocm-smi", ["--showmeminfo", "vram", "--csv"], "rocm"),
    ):
        if shutil.which(tool) is None:
            continue
        output = subprocess.run([tool, *query], capture_output=True, text=True, check=False, timeout=30).stdout
        if sizes := _memory_gib(output, accelerator):
            return ("cuda" if accelerator == "cuda" else "rocm"), max(sizes)
    return "cpu", psutil.virtual_memory().total / 2**30


def default_profile() -> str:
    """Return the name of the shipped profile that fits the machine found: the largest memory that it has."""
    accelerator, memory_gib = found_accelerator()
    loaded = [load_profile(name) for name in profile_files()]
    fitting = [p for p in loaded if p.machine.accelerator == accelerator and p.machine.memory_gib <= memory_gib * 1.05]
    if not fitting:
        return "cpu-tiny"
    return max(fitting, key=lambda p: (p.machine.memory_gib, p.machine.precision == "bfloat16", p.name)).name


def check_machine(profile: Profile) -> None:
    """Refuse a profile that this machine cannot run.

    Raises:
        UsageError: the accelerator is another one, or has too little memory.
    """
    if reason := misfit(profile, *found_accelerator()):
        raise UsageError(
            f"profile {profile.name} {reason}; use --profile {default_profile()}, or --dry-run to see the plan"
        )


def misfit(profile: Profile, accelerator: Accelerator, memory_gib: float) -> str:
    """Return why a machine cannot run a profile, or an empty text where it can."""
    wanted = profile.machine
    if wanted.accelerator not in ("cpu", accelerator):
        return f"needs a {wanted.accelerator} accelerator, this machine has {accelerator}"
    if memory_gib * 1.05 < wanted.memory_gib:
        return f"needs {wanted.memory_gib:.0f} GiB, this machine has {memory_gib:.0f} GiB"
    return ""


def _memory_gib(output: str, accelerator: str) -> list[float]:
    if accelerator == "cuda":
        return [int(line) / 1024 for line in output.split() if line.isdigit()]
    cells = [line.split(",")[1] for line in output.splitlines() if line.startswith("card")]
    return [int(cell) / 2**30 for cell in cells if cell.isdigit()]
