"""How many floating-point operations a second a device could do at best."""

from dataclasses import dataclass

import torch

from omni_cli.stages.bench.timing import measure

_SIDE, _ROUNDS = 1536, 5
_TERA = 1e12
# Dense, without the sparsity that vendors' headlines count twice; a 16-bit product summed in float32.
# By the whole name: an NVL, a Laptop or a D of the same chip is slower, and is measured.
_A100 = (312.0, "NVIDIA A100 data sheet, 16-bit tensor cores")
_SHEETS: dict[str, tuple[float, str]] = {
    "NVIDIA H200": (989.4, "NVIDIA H200 data sheet, 16-bit tensor cores"),
    "NVIDIA H100 80GB HBM3": (989.4, "NVIDIA H100 SXM data sheet, 16-bit tensor cores"),
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "AMD Instinct MI300X": (1307.4, "AMD Instinct MI300X data sheet, 16-bit matrix cores"),
    "NVIDIA GeForce RTX 4090": (165.2, "NVIDIA Ada architecture paper, 16-bit tensor cores with 32-bit sums"),
}


@dataclass(frozen=True)
class Peak:
    """A device's best, and where the number is from."""

    flops_per_s: float
    source: str


def peak_of(dtype: torch.dtype) -> Peak:
    """Return the best of this machine's device in a type: of its data sheet, else as a large product measures it."""
    if torch.cuda.is_available() and dtype in (torch.bfloat16, torch.float16):
        return _of_sheet(torch.cuda.get_device_name()) or _measured(dtype)
    return _measured(dtype)


def _of_sheet(name: str) -> Peak | None:
    tera, source = _SHEETS.get(name, (0.0, ""))
    return Peak(tera * _TERA, source) if source else None


def _measured(dtype: torch.dtype) -> Peak:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = _SIDE if device == "cpu" else 8192
    left, right = (torch.rand(side, side, dtype=dtype, device=device) for _ in range(2))
    timing = measure({"product": lambda: left @ right}, _ROUNDS)["product"]
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    source = f"measured in this run: the fastest of {_ROUNDS} products of {side} x {side}, {dtype}{threads}"
    return Peak(2.0 * side**3 / min(timing.seconds), source)
