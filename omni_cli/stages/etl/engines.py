"""Who runs the units: a supervised pool on this machine, or one such pool a core on the machines of a Ray cluster.

A unit is made by the same code under every engine, and its bytes are a function of its inputs and the settings. So an
engine only has to run each unit at least once; no picture travels through one.
"""

import importlib
import importlib.util
import os
import secrets
import signal
import socket
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from omni_cli.errors import OmniError, UsageError
from omni_cli.stages.etl.identity import OPENING_S
from omni_cli.stages.etl.memory import worker_bytes
from omni_cli.stages.etl.plan import Job, Unit
from omni_cli.stages.etl.refusals import ATTEMPTS, CountCrash
from omni_cli.stages.etl.unit import UnitResult, run_unit
from omni_cli.stages.pool import Failure, Listen, Outcome, Pool
from omni_cli.telemetry import usable_cores

Engine = Literal["local", "ray"]
UnitOutcome = Outcome[Unit, UnitResult]
_LOST = "the machine or process under it was lost"
_DOES_NOT_START = "a worker of the Ray cluster does not start ({}); install the same omni-cli on all its machines"
_ALONE = "leave --engine away"
_REACH_S = 10.0


def run_units(
    job: Job,
    units: Sequence[Unit],
    *,
    engine: Engine,
    workers: int | None,
    worker_gb: float | None,
    listen: Listen[Unit] | None = None,
) -> Iterator[UnitOutcome]:
    """Run every unit; yield what became of each, in the order of completion.

    Args:
        job: with paths that every worker sees.
        units: what to run.
        engine: where.
        workers: processes; 0 runs the units in this process. None: one for each core, or for each CPU of the cluster.
        worker_gb: limit of a worker's private memory in GiB; None: an equal share of its machine.
        listen: told now and then how much of a unit is done, 0 to 1; Ray's workers tell it of none.

    Raises:
        UsageError: Ray is asked for, and not installed, or its cluster is not there.
        OmniError: a machine of the cluster has another omni.
    """
    if not units:
        return
    if engine == "ray":
        yield from _run_on_ray(job, units, workers, worker_gb)
    else:
        count = usable_cores() if workers is None else workers
        with _pool(job, min(count, len(units)), worker_bytes(count, worker_gb), listen) as pool:
            yield from pool.run(units)


def _pool(job: Job, workers: int, memory_bytes: int, listen: Listen[Unit] | None = None) -> Pool[Unit, UnitResult]:
    return Pool(partial(run_unit, job), workers, ATTEMPTS, OPENING_S, memory_bytes, CountCrash(job), listen)


class UnitActor:
    """One CPU of a Ray cluster: a supervisor with one worker, so that units crash, hang and grow as they do locally."""

    def __init__(self, job: Job, worker_gb: float | None) -> None:
        self._pool = _pool(job, 1, worker_bytes(usable_cores(), worker_gb))

    def run(self, unit: Unit) -> UnitOutcome:
        """Run one unit to its end."""
        (outcome,) = self._pool.run([unit])
        return outcome


def _run_on_ray(job: Job, units: Sequence[Unit], workers: int | None, worker_gb: float | None) -> Iterator[UnitOutcome]:
    """Keep one unit running on each actor. One that is lost costs an attempt of its unit, and is replaced."""
    count, todo, lost = CountCrash(job), deque(units), Counter[Unit]()
    with _cluster(workers) as ray:
        shared, actor_class = ray.put(job), ray.remote(num_cpus=1)(UnitActor)
        cpus = int(ray.cluster_resources().get("CPU", 0))  # of a cluster that grows when it is asked: none yet
        places = min(workers or max(cpus, 1), len(units))
        actors = deque(actor_class.remote(shared, worker_gb) for _ in range(places))
        running: dict[Future[UnitOutcome], tuple[Any, Unit]] = {}
        while todo or running:
            while todo and actors:
                actor, unit = actors.popleft(), todo.popleft()
                running[actor.run.remote(unit).future()] = actor, unit
            # ray.wait would answer a signal with a SystemError now and then: no handler may raise inside it
            ended = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            actor, unit = running.pop(ended)
            try:
                outcome = ended.result()
                actors.append(actor)
            except ray.exceptions.RayActorError as error:
                if error.actor_init_failed:  # no unit's fault: another omni there, or none
                    raise OmniError(_DOES_NOT_START.format(_last_line(error))) from None
                actors.append(actor_class.remote(shared, worker_gb))
                lost[unit] += 1
                spent = max(count(unit, Failure(_LOST, "", "")), lost[unit])
                if spent < ATTEMPTS:
                    todo.append(unit)
                    continue
                outcome = Outcome(unit, None, _LOST, spent)
            yield outcome


@contextmanager
def _cluster(workers: int | None) -> Iterator[Any]:
    """Yield the module `ray`, connected to the cluster that RAY_ADDRESS names, or to one of our own on this machine."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--engine ray needs ray; install it with: pip install 'omni-cli[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address, options = os.environ.get("RAY_ADDRESS"), {"log_to_driver": False, "logging_level": "ERROR"}
    if not address:
        options |= {"num_cpus": workers or usable_cores(), "include_dashboard": False}
        if "RAY_AUTH_MODE" not in os.environ:  # nobody else on this machine gets in
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    ray = importlib.import_module("ray")
    try:
        _connect(ray, address, options)
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str | None, options: dict[str, Any]) -> None:
    heard = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            _reach(address)
        ray.init(address or "local", **options)
    except (OSError, RuntimeError, ValueError) as error:
        where, remedy = (f"RAY_ADDRESS={address}", "name a cluster that runs, or none") if address else ("Ray", _ALONE)
        raise UsageError(f"{where}: no cluster ({_last_line(error)}); {remedy}") from None
    except SystemExit:  # ray's answer to SIGTERM while it starts; ours follows
        signal.signal(signal.SIGTERM, heard)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, heard)  # ray puts its own in its place


def _reach(address: str) -> None:
    """Try a cluster's HOST:PORT, since ray itself would try for ever; other forms it refuses itself.

    Raises:
        OSError: nobody listens there.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]
