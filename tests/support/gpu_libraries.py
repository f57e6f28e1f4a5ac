"""Hand-written stand-ins for the vendors' libraries, which need a GPU, with the names, arguments and units of theirs.

Sources read: nvidia-ml-py 13.615.71, `pynvml.py`; amdsmi 7.0.2, `amdsmi_interface.py` and `amdsmi_exception.py`. That
the names and the parameters of the first are its own is tested; the second cannot be imported without ROCm.
"""

import enum
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace


@dataclass
class Gpu:
    """What one fake GPU would say."""

    address: str
    busy_percent: int = 87
    memory_bytes: int = 3 << 30
    power_w: float = 412.5
    temperature_c: int = 61
    energy_j: float = 1000.0
    refuses: set[str] = field(default_factory=set)  # functions


class NVMLError(Exception):
    pass


def pynvml(gpus: list[Gpu]) -> ModuleType:
    """NVML for some GPUs; a handle is the GPU itself."""
    library = ModuleType("pynvml")

    def refused(gpu: Gpu, name: str) -> None:
        if name in gpu.refuses:
            raise NVMLError("Not Supported")

    def nvmlInit() -> None: ...

    def nvmlDeviceGetHandleByPciBusId(pciBusId: str) -> Gpu:
        for gpu in gpus:
            if gpu.address == pciBusId:
                return gpu
        raise NVMLError("Not Found")

    def nvmlDeviceGetUtilizationRates(handle: Gpu) -> SimpleNamespace:
        refused(handle, "nvmlDeviceGetUtilizationRates")
        return SimpleNamespace(gpu=handle.busy_percent, memory=12)

    def nvmlDeviceGetMemoryInfo(handle: Gpu, version: int | None = None) -> SimpleNamespace:
        refused(handle, "nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(total=80 << 30, free=0, used=handle.memory_bytes)

    def nvmlDeviceGetPowerUsage(handle: Gpu) -> int:
        refused(handle, "nvmlDeviceGetPowerUsage")
        return round(handle.power_w * 1000)  # milliwatts

    def nvmlDeviceGetTemperature(handle: Gpu, sensor: int) -> int:
        assert sensor == library.NVML_TEMPERATURE_GPU
        refused(handle, "nvmlDeviceGetTemperature")
        return handle.temperature_c

    def nvmlDeviceGetTotalEnergyConsumption(handle: Gpu) -> int:
        refused(handle, "nvmlDeviceGetTotalEnergyConsumption")
        return round(handle.energy_j * 1000)  # millijoules

    for name, value in list(locals().items()):
        if name.startswith("nvml"):
            setattr(library, name, value)
    library.NVMLError, library.NVML_TEMPERATURE_GPU = NVMLError, 0
    return library


class AmdSmiException(Exception):
    pass


class AmdSmiTemperatureType(enum.IntEnum):
    EDGE = 0
    HOTSPOT = 1
    JUNCTION = 1
    VRAM = 2


class AmdSmiTemperatureMetric(enum.IntEnum):
    CURRENT = 0


def amdsmi(gpus: list[Gpu], *, before_rocm_6_4: bool = False, is_mi300: bool = True) -> ModuleType:
    """AMD SMI for some GPUs; a handle is the GPU itself."""
    library = ModuleType("amdsmi")

    def refused(gpu: Gpu, name: str) -> None:
        if name in gpu.refuses:
            raise AmdSmiException("2 | AMDSMI_STATUS_NOT_SUPPORTED - Feature not supported")

    def amdsmi_init() -> None: ...

    def amdsmi_get_processor_handle_from_bdf(bdf: str) -> Gpu:
        return next(gpu for gpu in gpus if gpu.address == bdf)

    def amdsmi_get_gpu_activity(processor_handle: Gpu) -> dict:
        refused(processor_handle, "amdsmi_get_gpu_activity")
        return {"gfx_activity": processor_handle.busy_percent, "umc_activity": 3, "mm_activity": "N/A"}

    def amdsmi_get_gpu_vram_usage(processor_handle: Gpu) -> dict:
        refused(processor_handle, "amdsmi_get_gpu_vram_usage")
        return {"vram_total": 196592, "vram_used": processor_handle.memory_bytes >> 20}  # MiB

    def amdsmi_get_power_info(processor_handle: Gpu) -> dict:
        refused(processor_handle, "amdsmi_get_power_info")
        watts = round(processor_handle.power_w)
        now, mean = (watts, "N/A") if is_mi300 else (0xFFFFFFFF, watts)
        return {"socket_power": watts, "current_socket_power": now, "average_socket_power": mean, "power_limit": 750}

    def amdsmi_get_temp_metric(processor_handle: Gpu, sensor_type: int, metric: int) -> int:
        assert isinstance(sensor_type, AmdSmiTemperatureType)
        assert isinstance(metric, AmdSmiTemperatureMetric)
        refused(processor_handle, "amdsmi_get_temp_metric")
        return processor_handle.temperature_c

    def amdsmi_get_energy_count(processor_handle: Gpu) -> dict:
        refused(processor_handle, "amdsmi_get_energy_count")
        name = "power" if before_rocm_6_4 else "energy_accumulator"
        counted = round(processor_handle.energy_j * 1e6 / 15.3)  # in units of 15.3 microjoules
        return {name: counted, "counter_resolution": 15.3, "timestamp": 1}

    for name, value in list(locals().items()):
        if name.startswith("amdsmi_"):
            setattr(library, name, value)
    library.AmdSmiException = AmdSmiException
    library.AmdSmiTemperatureType, library.AmdSmiTemperatureMetric = AmdSmiTemperatureType, AmdSmiTemperatureMetric
    return library
