"""One training in several processes, as `torchrun` starts them: which one this is, and how all decide together.

Each process is a rank. The first writes, talks and looks after what is on the disk; the others follow it. What one of
them alone might decide (a signal, a bad step, a checkpoint that verifies) is decided by all, or they would wait for
each other for ever. Weights, order and steps do not depend on how many there are: see `Share` and `order`.
"""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from omni_cli import files
from omni_cli.errors import DataError, OmniError, Preempted, UsageError, refused_by_machine
from omni_cli.models.modes import evaluating
from omni_cli.recipe import TrainSettings
from omni_cli.report import counted

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # with the first, which may cut shards; a process that ends is noticed at once
_INTERRUPTED = 130
_TOLD = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # beside their number, by torchrun
_LOST = re.compile(r"[Cc]onnection (closed|reset) by peer|Broken pipe|Timed out waiting|NCCL|\[.*gloo.*\]")


@dataclass(frozen=True)
class Ranks:
    """The processes of one training, seen from one of them.

    Attributes:
        index: of this one.
        count: of all.
        group: through which they talk, on their hosts, whatever they train on; None: there is one.
    """

    index: int = 0
    count: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.index == 0

    def gpus_here(self) -> int:
        """Return how many of them train on this machine."""
        return int(os.environ["LOCAL_WORLD_SIZE"]) if self.count > 1 and "LOCAL_WORLD_SIZE" in os.environ else 1

    def gather(self, value: T) -> list[T]:
        """Return the value of every rank, by rank; all must call it."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def decide(self, make: Callable[[], T]) -> T:
        """Return on every rank what the first makes; where that fails, all end, and the first says why."""
        if self.count == 1:
            return make()
        if not self.is_first:
            code, value = self._hear()
            if code:
                self._end(code)
            return value  # type: ignore[no-any-return]  # what the first made
        try:
            made = make()
        except BaseException as error:
            self._tell((_exit_code(error), None))
            raise
        self._tell((0, made))
        return made

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Run a block on every rank; where it fails on any, the first says why, and all end.

        Of what all of them met it is said once; a bug is told by whoever met it, with its traceback.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        ours = _told(own)
        told = sorted((each for each in self.gather(ours) if each), key=lambda each: not each[1])  # bugs last
        if own and (self.is_first or (ours and not ours[1])):
            raise own
        if told:
            code, line = told[0]
            if self.is_first and line:
                raise _retold(code, line)
            self._end(code)

    def fail(self, error: BaseException) -> NoReturn:
        """End all ranks for what all of them met; the first says it.

        Raises:
            BaseException: the error, on the first.
        """
        if self.is_first:
            raise error
        self._end(_exit_code(error))

    def _end(self, code: int) -> NoReturn:
        """End once the rank that failed has ended: until then it says why, and torchrun ends all as one ends."""
        with suppress(RuntimeError):
            distributed.barrier(group=self.group)
        sys.exit(code)

    @contextmanager
    def noticing_loss(self) -> Iterator[None]:
        """Say in one line that another rank has ended; a library tells it in the words of a socket.

        Raises:
            OmniError: one has.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _LOST.search(str(error)):
                raise
            raise OmniError(
                f"process {self.index} of {self.count} lost another one, which says itself why it ended; what is saved "
                "is good: run the same command again"
            ) from None

    def _hear(self) -> tuple[int, Any]:
        heard: list[Any] = [None]
        with self.noticing_loss():
            distributed.broadcast_object_list(heard, src=0, group=self.group)
        code, value = heard[0]
        return code, value

    def _tell(self, told: tuple[int, Any]) -> None:
        distributed.broadcast_object_list([told], src=0, group=self.group)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED
    return error.exit_code if isinstance(error, OmniError) else 1


def _told(error: Exception | None) -> tuple[int, str] | None:
    """Return an exit code and the line that says why; of a bug no line; None where nothing failed."""
    if error is None:
        return None
    if isinstance(error, OSError):
        return _exit_code(error), refused_by_machine(error) or ""
    return _exit_code(error), str(error) if isinstance(error, OmniError) else ""


def _retold(code: int, line: str) -> OmniError:
    """Return the error that another rank met."""
    kinds = {kind.exit_code: kind for kind in (UsageError, DataError, Preempted)}
    return kinds.get(code, OmniError)(line)


ALONE = Ranks()


@dataclass(frozen=True)
class Share:
    """What one rank takes of a step of the optimiser: micro-batches of so many windows."""

    batch_size: int
    accumulation: int


def share_of(settings: TrainSettings, count: int) -> Share:
    """Return the share of each of `count` ranks; the windows of a step are batch_size x accumulation, however many.

    Micro-batches stay as large as they are where enough of them are in a step; else they become smaller.

    Raises:
        UsageError: the windows of a step cannot be divided so.
    """
    size, accumulation = settings.batch_size, settings.accumulation
    together = math.gcd(accumulation, count)  # ranks that take whole micro-batches of one round
    pieces = count // together
    if size % pieces:
        raise UsageError(
            f"{count} processes cannot share a step of {size} x {accumulation} windows "
            f"(train.batch_size x train.accumulation) evenly; start as many as divide {size * accumulation}"
        )
    return Share(size // pieces, accumulation // together)


def asked_for() -> int:
    """Return how many processes a launcher says that it started; 1 without one.

    Raises:
        UsageError: it says no number, or not which this one is and how they find each other.
    """
    said = os.environ.get("WORLD_SIZE") or "1"
    if not said.isdecimal() or said == "0":
        raise UsageError(f"WORLD_SIZE = {said!r}: expected the number of processes, as torchrun sets it")
    if missing := [name for name in _TOLD if said != "1" and name not in os.environ]:
        raise UsageError(
            f"WORLD_SIZE = {said} and no {missing[0]}: several processes are started by torchrun, which sets both"
        )
    rank = os.environ.get("RANK", "0")
    if said != "1" and not (rank.isdecimal() and int(rank) < int(said)):
        raise UsageError(f"RANK = {rank!r} of WORLD_SIZE = {said}: expected a number below it, as torchrun sets it")
    return int(said)


def with_share(recipe: Any, count: int) -> Any:
    """Return a recipe whose step is what one of `count` ranks takes of it; errors as of `share_of`."""
    share = share_of(recipe.train, count)
    one = {"batch_size": share.batch_size, "accumulation": share.accumulation}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=one)})


@contextmanager
def joined(settings: TrainSettings) -> Iterator[Ranks]:
    """Join the processes that a launcher started beside this one, until the block ends.

    Raises:
        UsageError: they cannot share the windows of a step, or there is no GPU for each.
    """
    count = asked_for()
    if count == 1:
        yield ALONE
        return
    share_of(settings, count)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        _take_gpu()
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    ranks = Ranks(distributed.get_rank(), count, group)
    with ranks.noticing_loss():
        yield ranks
        ranks.gather(None)  # one that leaves while another still talks ends it
    distributed.destroy_process_group()


def _take_gpu() -> None:
    """Take the GPU of this process's number on its machine.

    Raises:
        UsageError: there are fewer than processes here, which all of them find, and the first of them says.
    """
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    here = max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if here > gpus:
        raise UsageError(f"{here} processes on a machine with {counted(gpus, 'GPU')}; start one for each GPU")
    torch.cuda.set_device(local)


def check_norms(recipe: Any, model: nn.Module, ranks: Ranks) -> None:
    """Refuse a model that normalises by its batch: each rank has windows of its own, and would learn another one.

    Args:
        recipe: what learns, and how.
        model: as it was built, in any mode.
        ranks: of the training.

    Raises:
        UsageError: one of several ranks would train it.
    """
    if ranks.count == 1:
        return
    with evaluating(model):  # which sets back what is set here
        model.train()
        is_apart = any(module.training for module in model.modules() if isinstance(module, _BatchNorm))
    if is_apart:
        raise UsageError(
            f"{recipe.model}, tune.mode = {recipe.tune.mode}: its BatchNorm layers learn from the windows of one "
            f"process alone, and {ranks.count} would not stay alike; train it in one process, or an adapter of it"
        )


def seed_apart(ranks: Ranks, seed: int, step: int) -> None:
    """Let each rank draw dropout of its own, from a step on.

    Args:
        ranks: of the training.
        seed: of the training.
        step: at which it begins, or goes on after it was saved by another number of ranks.
    """
    drawn = files.hash_json([seed, step, ranks.index, ranks.count])
    torch.manual_seed(int(drawn[:15], 16))


def through(wrapper: nn.Module, module: nn.Module, call: Callable[[nn.Module], T]) -> T:
    """Return what `call` makes of a module, called inside the wrapper's forward.

    What keeps ranks alike (DistributedDataParallel, the hooks of `fully_shard`) sees only its own forward, and our
    losses call parts of a model. For one call the module's forward leads to ours, as in Lightning's
    `_ForwardRedirection` (lightning/pytorch/strategies/strategy.py).

    Args:
        wrapper: that holds the module, or the module.
        module: that learns.
        call: is given the module as it always is.
    """
    of_its_own = module.__dict__.get("forward")  # accelerate puts one there for autocast

    def restored() -> None:
        module.__dict__.pop("forward", None)
        if of_its_own is not None:
            module.__dict__["forward"] = of_its_own

    def redirected(called: Callable[[nn.Module], T]) -> T:
        restored()
        return called(module)

    module.__dict__["forward"] = redirected
    try:
        found: T = wrapper(call)  # on a GPU DistributedDataParallel (torch 2.13) must be given something
    finally:
        restored()
    return found
