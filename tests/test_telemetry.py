"""What is read of GPUs, processors and memory, and how it is added up over the sessions of a run.

No GPU ran any of this: the vendors' libraries are stood in for by `tests/support/gpu_libraries.py`.
"""

import inspect
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from omni_cli import telemetry
from omni_cli.report import Console
from omni_cli.stages.train.telemetry import Meter, Recorder, read_telemetry, readers_for
from tests.support import gpu_libraries
from tests.support.gpu_libraries import Gpu
from tests.support.pipeline import QUIET

FIRST, SECOND = "0000:3b:00.0", "0000:af:00.0"


def nvidia(monkeypatch, *gpus: Gpu) -> telemetry.Gpus:
    monkeypatch.setitem(sys.modules, "pynvml", gpu_libraries.pynvml(list(gpus)))
    return telemetry.nvidia_gpus([gpus[-1].address])


def amd(monkeypatch, *gpus: Gpu, **how) -> telemetry.Gpus:
    monkeypatch.setitem(sys.modules, "amdsmi", gpu_libraries.amdsmi(list(gpus), **how))
    return telemetry.amd_gpus([gpus[-1].address])


@pytest.mark.parametrize("open_reader", [nvidia, amd])
def test_a_gpu_is_read_in_shares_bytes_watts_and_joules(monkeypatch, open_reader) -> None:
    other = Gpu(FIRST, busy_percent=1, memory_bytes=1, power_w=1, temperature_c=1, energy_j=1)
    reader = open_reader(monkeypatch, other, Gpu(SECOND, power_w=412, energy_j=153.0))
    (read,) = reader.read()["gpus"]
    assert read.pop("energy_j") == pytest.approx(153.0, rel=1e-6)
    assert read == {"utilisation_share": 0.87, "memory_bytes": 3 << 30, "power_w": 412, "temperature_c": 61}


def test_an_older_amd_library_and_gpu_tell_the_same_under_other_names(monkeypatch) -> None:
    (read,) = amd(monkeypatch, Gpu(FIRST, power_w=300, energy_j=153.0), before_rocm_6_4=True, is_mi300=False).read()[
        "gpus"
    ]
    assert read["power_w"] == 300
    assert read["energy_j"] == pytest.approx(153.0, rel=1e-6)


@pytest.mark.parametrize(
    ("open_reader", "refused"),
    [
        (nvidia, {"nvmlDeviceGetUtilizationRates", "nvmlDeviceGetTotalEnergyConsumption"}),
        (amd, {"amdsmi_get_gpu_activity", "amdsmi_get_energy_count"}),
    ],
)
def test_what_a_gpu_does_not_support_is_absent_and_never_zero(monkeypatch, open_reader, refused) -> None:
    (read,) = open_reader(monkeypatch, Gpu(FIRST, refuses=refused)).read()["gpus"]
    assert sorted(read) == ["memory_bytes", "power_w", "temperature_c"]


def test_the_fake_of_nvml_has_the_names_and_parameters_of_the_real_one() -> None:
    import pynvml as real

    fake = gpu_libraries.pynvml([])
    for name in [name for name in vars(fake) if name.startswith("nvml")]:
        theirs = inspect.signature(getattr(real, name))
        assert [*inspect.signature(getattr(fake, name)).parameters] == [*theirs.parameters], name
    assert fake.NVML_TEMPERATURE_GPU == real.NVML_TEMPERATURE_GPU
    assert issubclass(real.NVMLError, Exception)


def on_gpu(monkeypatch, vendor_module: str) -> None:
    place = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xAF, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: place)
    monkeypatch.setattr(torch.version, "hip", "6.4" if vendor_module == "amdsmi" else None)


@pytest.mark.parametrize("module", ["pynvml", "amdsmi"])
def test_the_gpu_that_trains_is_the_one_that_is_read(monkeypatch, module) -> None:
    """Whatever CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES call it: torch knows where it sits."""
    library = getattr(gpu_libraries, module)([Gpu(FIRST, busy_percent=1), Gpu(SECOND, busy_percent=99)])
    on_gpu(monkeypatch, module)
    monkeypatch.setitem(sys.modules, module, library)
    host, gpus = readers_for(torch.device("cuda", 0), QUIET)
    assert gpus.read()["gpus"][0]["utilisation_share"] == 0.99
    assert host.what == "processor"


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("pynvml", "NVIDIA GPU: not measured without its library; install it with: pip install 'omni-cli[nvidia]'"),
        ("amdsmi", "AMD GPU: not measured without its library; install it with: pip install /opt/rocm/share/amd_smi"),
    ],
)
def test_a_library_that_lacks_is_named_with_what_to_install(monkeypatch, capsys, module, said) -> None:
    on_gpu(monkeypatch, module)
    monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    assert [reader.what for reader in readers_for(torch.device("cuda", 0), Console())] == ["processor"]
    assert said in capsys.readouterr().err


def test_a_library_without_its_driver_costs_one_line(monkeypatch, capsys) -> None:
    """The real NVML wrapper, on a machine that has no driver."""
    pytest.importorskip("pynvml")
    on_gpu(monkeypatch, "pynvml")
    assert len(readers_for(torch.device("cuda", 0), Console())) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_energy_is_the_counters_difference_else_power_over_time() -> None:
    counted, integrated = Meter(), Meter()
    for at_s, counter_j, power_w in ((0.0, 1000.0, 100.0), (0.5, 1060.0, 140.0), (1.5, 1200.0, 60.0)):
        counted.add(at_s, counter_j, power_w)
        integrated.add(at_s, None, power_w)
    assert counted.joules == 200.0
    assert integrated.joules == 0.5 * (100 + 140) / 2 + 1.0 * (140 + 60) / 2  # the trapezoidal rule
    counted.add(2.0, 5.0, 50.0)  # its driver was loaded anew
    assert counted.joules == 200.0
    assert counted.add(2.5, 30.0, 50.0) == 50.0
    assert Meter().add(0.0, 1.0, 1.0) is None


def package(folder: Path, zone: str, name: str, energy_uj: int) -> Path:
    (folder / zone).mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", str(energy_uj)), ("max_energy_range_uj", "999999")):
        (folder / zone / file).write_text(f"{text}\n")
    return folder / zone / "energy_uj"


def test_the_processors_energy_is_that_of_its_packages_and_wraps(tmp_path) -> None:
    counter = package(tmp_path, "intel-rapl:0", "package-0", 900_000)
    package(tmp_path, "intel-rapl:0:0", "core", 7)
    package(tmp_path, "intel-rapl:1", "psys", 7)  # holds package-0
    host = telemetry.Host(tmp_path)
    counter.write_text("100000\n")
    assert host.read()["cpu_energy_j"] == pytest.approx(0.2)
    assert "cpu_energy_j" not in telemetry.Host(tmp_path / "none").read()


def test_what_a_training_started_is_part_of_it() -> None:
    before = telemetry.Host().read()["process_memory_bytes"]
    busy = "import time; kept = bytearray(80 << 20); end = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    child = subprocess.Popen([sys.executable, "-c", busy])
    try:
        while psutil.Process(child.pid).memory_info().rss < 80 << 20:
            time.sleep(0.01)
        spent_s, began_s, host = psutil.Process(child.pid).cpu_times().user, time.monotonic(), telemetry.Host()
        while psutil.Process(child.pid).cpu_times().user < spent_s + 0.2:
            time.sleep(0.02)
        read, passed_s = host.read(), time.monotonic() - began_s
    finally:
        child.kill()
        child.wait()
    assert read["process_memory_bytes"] > before + (75 << 20)
    assert read["process_cpu_share"] * telemetry.usable_cores() * passed_s >= 0.15
    assert 0 <= read["machine_cpu_share"] <= 1
    assert host.read()["process_memory_bytes"] < before + (75 << 20)  # it has ended


class Counted:
    """A reader whose GPU has drawn 100 J at every reading."""

    what = "fake GPU"

    def __init__(self, fails_at: int = 10**9) -> None:
        self.reads, self.fails_at = 0, fails_at
        self.masks, self.threads, self.is_closed = [], set(), False

    def read(self) -> dict:
        self.reads += 1
        self.masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        self.threads.add(threading.current_thread().name)
        if self.reads >= self.fails_at:
            raise gpu_libraries.NVMLError("GPU is lost")
        return {"gpus": [{"power_w": 50.0, "energy_j": 100.0 * self.reads}]}

    def close(self) -> None:
        self.is_closed = True


def record(path: Path, reader: Counted, reads: int, *, console: Console = QUIET, step: int = 0) -> None:
    recorder = Recorder(path, [reader], console, {"device": "fake"}, step=step, interval_s=0.002)
    with recorder.running():
        while reader.reads < reads:
            recorder.step = step + reader.reads
            time.sleep(0.001)


def test_time_and_energy_are_those_of_all_sessions(tmp_path) -> None:
    path = tmp_path / "telemetry.jsonl"
    sessions = [Counted(), Counted()]
    record(path, sessions[0], 4)
    with path.open("a") as stream:
        stream.write('{"elapsed_s": 99999, "sess')  # what a kill left
    record(path, sessions[1], 4, step=2)
    lines = read_telemetry(path)
    assert len(lines) == sum(1 + session.reads for session in sessions)
    elapsed_s = [line["elapsed_s"] for line in lines]
    assert elapsed_s == sorted(elapsed_s)
    assert [line["session"] for line in lines if "opened" in line] == [1, 2]
    assert [line["step"] for line in lines if "opened" in line] == [0, 2]
    spent_j = sum(100.0 * (session.reads - 1) for session in sessions)  # the first of a session knows none before it
    assert lines[-1]["gpu_energy_j"] == spent_j
    assert "energy_j" not in lines[-1]["gpus"][0]
    assert all(session.is_closed for session in sessions)
    assert not [thread for thread in threading.enumerate() if thread.name == "telemetry"]


def test_signals_are_for_the_thread_that_trains(tmp_path) -> None:
    reader = Counted()
    record(tmp_path / "telemetry.jsonl", reader, 2)
    assert reader.threads == {"telemetry"}
    assert all({signal.SIGTERM, signal.SIGINT} <= mask for mask in reader.masks)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_reader_that_fails_is_dropped_with_one_line(tmp_path, capsys) -> None:
    path, reader = tmp_path / "telemetry.jsonl", Counted(fails_at=3)
    record(path, reader, 3, console=Console())
    assert reader.reads == 3
    assert capsys.readouterr().err == "warning: fake GPU: no longer measured: GPU is lost\n"
    assert json.loads(path.read_text().splitlines()[-1])["gpu_energy_j"] == 100.0
    assert "gpus" not in read_telemetry(path)[-1]


def test_a_disk_that_refuses_ends_the_telemetry_alone(tmp_path, capsys) -> None:
    path = tmp_path / "telemetry.jsonl"
    path.mkdir()
    with Recorder(path, [Counted()], Console(), {}, interval_s=0.002).running():
        time.sleep(0.05)
    assert capsys.readouterr().err == (
        "warning: telemetry.jsonl: Is a directory; the training goes on without telemetry\n"
    )


def test_damaged_lines_are_no_lines(tmp_path) -> None:
    path = tmp_path / "telemetry.jsonl"
    good = {"elapsed_s": 1.0, "session": 1, "step": 3}
    path.write_bytes(json.dumps(good).encode() + b'\n\0\0\0\n[]\n{"step": 4}\n{"elapsed_s": "x"}\nnull\n')
    assert read_telemetry(path) == [good]
