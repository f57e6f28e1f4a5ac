"""In which order windows are learned from by several ranks: each step learns from the windows that one rank would.

accelerate's `BatchSamplerShard` (1.15) evens out the end of an epoch with windows from its beginning, which then count
twice, or gives some ranks less, which then wait for ever; and a resumed epoch is not told its number.
"""

import math
from collections.abc import Iterator

from accelerate.data_loader import DataLoaderShard, SeedableRandomSampler
from torch.utils.data import BatchSampler

from omni_cli.stages.train.ranks import Ranks, Share

_KEPT = ("num_workers", "collate_fn", "pin_memory", "worker_init_fn", "multiprocessing_context", "prefetch_factor")


class Dealt(BatchSampler):
    """The micro-batches of one rank.

    The order is one rank's; a step is the next batch_size x accumulation windows of it, cut into micro-batches that are
    dealt to the ranks in turn. In the last step of an epoch a rank that gets one less has a spare one instead, of the
    number `spare`, which counts nothing.

    Args:
        windows: how many there are, numbered from 0.
        seed: of their order.
        share: of each rank.
        ranks: of the training.
    """

    def __init__(self, windows: int, seed: int, share: Share, ranks: Ranks) -> None:
        self._order = SeedableRandomSampler(range(windows), data_seed=seed)
        self._share, self._ranks = share, ranks
        self._batches = math.ceil(windows / share.batch_size)
        self.spare = windows

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(self._batches / self._ranks.count)

    def __iter__(self) -> Iterator[list[int]]:
        order, size = list(self._order), self._share.batch_size
        for batch in range(self._ranks.index, len(self) * self._ranks.count, self._ranks.count):
            yield order[batch * size : (batch + 1) * size] or [self.spare]


def dealt(loader: DataLoaderShard, windows: int, seed: int, share: Share, ranks: Ranks) -> DataLoaderShard:
    """Return a loader of one rank's micro-batches, in all else like the one that the Trainer made."""
    kept = {name: getattr(loader, name) for name in _KEPT}
    batches = Dealt(windows, seed, share, ranks)
    return DataLoaderShard(loader.dataset, device=loader.device, batch_sampler=batches, **kept)
