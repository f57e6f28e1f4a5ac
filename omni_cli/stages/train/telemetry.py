"""What the machine does while a training runs: read twice a second in a thread, one line a sample in telemetry.jsonl.

The file is only ever appended to: what a kill or a roll back made useless was paid for all the same, and counts. Each
session begins with a line of what it runs on. Nothing of it is part of what the weights are, or of their receipts.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Self, TextIO

import psutil
import torch
from torch import nn

from omni_cli import files, telemetry
from omni_cli.models.adapters import trainable_count, weight_count
from omni_cli.report import Console
from omni_cli.stages.checkpoints import read_history
from omni_cli.stages.runs import TELEMETRY, Run
from omni_cli.stages.train.ranks import ALONE, Ranks

INTERVAL_S = 0.5
_PATIENCE_S = 5.0  # with a reader, when the training is over
_SYNC_EVERY = 10  # samples: no more is lost with the power
_PLACE = ("elapsed_s", "session", "step")  # of every line
_OPEN = {"NVIDIA": telemetry.nvidia_gpus, "AMD": telemetry.amd_gpus}
_INSTALL = {
    "NVIDIA": "pip install 'omni-cli[nvidia]'",
    "AMD": "pip install /opt/rocm/share/amd_smi, which comes with ROCm",
}


class Meter:
    """Adds up energy: by a counter where there is one, else power over time."""

    def __init__(self) -> None:
        self.joules = 0.0
        self.is_known = False
        self._last: tuple[float, float | None, float | None] = (0.0, None, None)

    def add(self, at_s: float, counter_j: float | None, power_w: float | None) -> float | None:
        """Take a reading into account; return the mean power since the last one, None where it is not known.

        Args:
            at_s: when it was, on any clock that never goes back.
            counter_j: a counter that began at some other time; one that went back began anew.
            power_w: what is drawn now.
        """
        (before_s, before_j, before_w), self._last = self._last, (at_s, counter_j, power_w)
        passed_s = at_s - before_s
        if counter_j is not None and before_j is not None:
            spent_j = max(counter_j - before_j, 0.0)
        elif power_w is not None and before_w is not None:
            spent_j = passed_s * (power_w + before_w) / 2  # the trapezoidal rule
        else:
            return None
        self.is_known = True
        self.joules += spent_j
        return spent_j / passed_s if passed_s > 0 else None


class Recorder:
    """The thread that samples, and the file that it appends to.

    Args:
        path: of the file.
        readers: what is asked; one that fails is dropped, with one line.
        console: says so.
        opened: the facts of this session, for its first line.
        step: that training goes on from.
        elapsed_s: how long the run was trained before, where the file does not know it.
        interval_s: between two samples.
    """

    def __init__(
        self,
        path: Path,
        readers: Sequence[telemetry.Reader],
        console: Console,
        opened: Mapping[str, Any],
        *,
        step: int = 0,
        elapsed_s: float = 0.0,
        interval_s: float,
    ) -> None:
        self.step = step  # whoever counts them sets it
        self._path, self._readers, self._console = path, list(readers), console
        self._opened, self._interval_s = opened, interval_s
        self._before: dict[str, Any] = {}
        for line in read_telemetry(path):
            self._before |= line
        self._before["elapsed_s"] = max(self._before.get("elapsed_s", 0.0), elapsed_s)
        self._meters = {"gpu": list[Meter](), "cpu": [Meter()]}
        self._began_s = time.monotonic()
        self._stop = threading.Event()

    @property
    def elapsed_s(self) -> float:
        """How long this run has been trained, in all its sessions and with all that was lost."""
        return round(float(self._before["elapsed_s"]) + time.monotonic() - self._began_s, 3)

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Sample until the block ends."""
        thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join(_PATIENCE_S)  # a vendor's library may wait for ever for a GPU that hangs

    def _run(self) -> None:
        """Write until told to stop; signals are for the thread that trains."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            cut_torn_end(self._path)
            with self._path.open("a") as stream:
                self._write(stream)
        except OSError as error:
            self._console.warn(f"{self._path.name}: {error.strerror}; the training goes on without telemetry")
        for reader in self._readers:
            reader.close()

    def _write(self, stream: TextIO) -> None:
        """Write the session's facts, a sample at each interval, and one at the end."""
        _append(stream, self._place() | {"opened": self._opened}, is_synced=True)
        for number in count(1):
            is_last = self._stop.wait(self._interval_s)
            _append(stream, self.sample(), is_synced=is_last or number % _SYNC_EVERY == 0)
            if is_last:
                return

    def sample(self) -> dict[str, Any]:
        """Return one line."""
        line = self._place()
        for reader in tuple(self._readers):
            try:
                line |= reader.read()
            except Exception as error:  # whatever a vendor's library raises, the training goes on
                self._readers.remove(reader)
                self._console.warn(f"{reader.what}: no longer measured: {one_line(error)}")
        self._add_energy(line)
        return line | {"sampling_cpu_s": round(time.thread_time(), 4)}

    def _place(self) -> dict[str, Any]:
        return {"elapsed_s": self.elapsed_s, "session": self._before.get("session", 0) + 1, "step": self.step}

    def _add_energy(self, line: dict[str, Any]) -> None:
        """Put joules over all sessions in the place of the counters of this one."""
        gpus, meters = line.get("gpus", []), self._meters["gpu"]
        meters += [Meter() for _ in gpus[len(meters) :]]
        for gpu, meter in zip(gpus, meters, strict=False):
            meter.add(line["elapsed_s"], gpu.pop("energy_j", None), gpu.get("power_w"))
        power_w = self._meters["cpu"][0].add(line["elapsed_s"], line.pop("cpu_energy_j", None), None)
        if power_w is not None:
            line["cpu_power_w"] = round(power_w, 2)
        for kind, each in self._meters.items():
            key = f"{kind}_energy_j"
            if any(meter.is_known for meter in each):
                line[key] = round(self._before.get(key, 0.0) + sum(meter.joules for meter in each), 3)


def recorder_of(run: Run, device: torch.device, model: nn.Module, console: Console, ranks: Ranks = ALONE) -> Recorder:
    """Return what records a session of a run.

    Args:
        run: that is trained, whose history ends where it goes on.
        device: that trains it.
        model: that learns.
        console: for what cannot be measured.
        ranks: of the training.
    """
    opened = {
        **telemetry.machine_facts(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else telemetry.cpu_name(),
        "weights": weight_count(model),
        "trainable_weights": trainable_count(model),
        **({"processes": ranks.count} if ranks.count > 1 else {}),
    }
    last = [{"step": 0, "elapsed_s": 0.0}, *read_history(run.folder)][-1]
    step, elapsed_s = int(last["step"]), last.get("elapsed_s", 0.0)
    path, readers = run.folder / TELEMETRY, readers_for(device, console, beside=ranks.gpus_here())
    return Recorder(path, readers, console, opened, step=step, elapsed_s=elapsed_s, interval_s=INTERVAL_S)


def readers_for(device: torch.device, console: Console, *, beside: int = 1) -> list[telemetry.Reader]:
    """Return what reads the processor and the GPUs that train; where the latter's library lacks, one line says so.

    Args:
        device: of this process.
        console: told of it.
        beside: how many processes train on this machine, each on the GPU of its number.
    """
    try:
        host = [telemetry.Host()]
    except (OSError, psutil.Error) as error:
        console.warn(f"processor: not measured: {one_line(error)}")
        host = []
    if device.type != "cuda":
        return [*host]
    vendor = "AMD" if torch.version.hip else "NVIDIA"
    try:
        devices = [device] if beside == 1 else [torch.device("cuda", index) for index in range(beside)]
        gpus = _OPEN[vendor]([_pci_address(torch.cuda.get_device_properties(each)) for each in devices])
    except ModuleNotFoundError:
        console.warn(f"{vendor} GPU: not measured without its library; install it with: {_INSTALL[vendor]}")
    except Exception as error:  # whatever a vendor's library raises, the training goes on
        console.warn(f"{vendor} GPU: not measured: {one_line(error)}")
    else:
        return [*host, gpus]
    return [*host]


def _pci_address(properties: Any) -> str:
    """Return where a device sits, as the kernel writes it; torch/numa/binding.py reads the same properties."""
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def read_telemetry(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's telemetry; what a kill or a failed disk left of one is no line."""
    if not path.is_file():
        return []
    return [line for text in path.read_bytes().splitlines() if (line := _parse(text)) is not None]


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or any(not isinstance(line.get(key), int | float) for key in _PLACE):
        return None
    return line


def cut_torn_end(path: Path) -> None:
    """Take off what a kill left of a last line, which the next one would be glued to."""
    if path.is_file():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def _append(stream: TextIO, line: Mapping[str, Any], *, is_synced: bool) -> None:
    stream.write(files.canonical_json(line) + "\n")
    stream.flush()
    if is_synced:
        os.fsync(stream.fileno())


def one_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
