"""What a model is shown instead of the truth, to prove that its pictures, their places and their order matter.

A window's pictures are (num_frames, views, ...), whatever the recipe: both axes can be put out of order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from omni_cli.report import Console
from omni_cli.samples.dataset import WindowDataset
from omni_cli.scores.controls import derangement, swap_between_groups
from omni_cli.stages.evaluate.asking import Pictures
from omni_cli.stages.evaluate.request import CAMERAS_SHUFFLED, MODEL, REPEATED, SWAPPED, TIME_SHUFFLED, Controls

_BLOCK_US = 5_000_000  # of one recording: where there is no other, pictures are swapped between stretches of it
_TIME, _CAMERAS = 0, 1  # axes of a window's pictures


def shown(dataset: WindowDataset, controls: Controls, console: Console) -> dict[str, Pictures]:
    """Return what the model is shown by the name of each condition: the truth first, then each control that is wanted.

    A control that these windows cannot have is left out with a line that says why.
    """
    made: dict[str, Pictures] = {MODEL: dataset.pictures}
    for name, make in _WANTED[controls].items():
        found = make(dataset)
        if isinstance(found, str):
            tell = console.warn if name == SWAPPED else console.say  # without it nothing proves that pictures matter
            tell(f"no control with {found}")
        else:
            made[name] = found
    return made


def _swapped(dataset: WindowDataset) -> Pictures | str:
    groups = _groups(dataset)
    if len(set(groups)) < 2:
        return f"swapped pictures: all windows are of {_BLOCK_US / 1e6:g} s of one recording"
    others = swap_between_groups(groups)
    return lambda index: dataset.pictures(int(others[index]))


def _repeated(dataset: WindowDataset) -> Pictures | str:
    return lambda index: dataset.pictures(index)[:1].expand(dataset.preprocess.window_shape)


def _time_shuffled(dataset: WindowDataset) -> Pictures | str:
    if dataset.preprocess.num_frames < 2:
        return "shuffled time: a window is one frame"
    return _Shuffled(dataset, _TIME)


def _cameras_shuffled(dataset: WindowDataset) -> Pictures | str:
    cameras, views = len(dataset.preprocess.cameras), len(dataset.preprocess.views)
    if cameras < 2 or cameras != views:
        return "shuffled cameras: the model looks through one"
    return _Shuffled(dataset, _CAMERAS)


@dataclass(frozen=True)
class _Shuffled:
    """A window's own pictures, of which none is where it belongs on one axis; each window has an order of its own."""

    dataset: WindowDataset
    axis: int

    def __call__(self, index: int) -> Tensor:
        """Return the pictures of a window so."""
        pictures = self.dataset.pictures(index)
        order = derangement(pictures.shape[self.axis], np.random.default_rng((self.axis, index)))
        return pictures[order] if self.axis == _TIME else pictures[:, order]


def _groups(dataset: WindowDataset) -> list[str]:
    if len(dataset.entries) > 1:
        return [dataset.recording_of(index) for index in range(len(dataset))]
    return [str(dataset.row(index)["start_us"] // _BLOCK_US) for index in range(len(dataset))]


_BASIC: Mapping[str, Callable[[WindowDataset], Pictures | str]] = {SWAPPED: _swapped, REPEATED: _repeated}
_WANTED: Mapping[Controls, Mapping[str, Callable[[WindowDataset], Pictures | str]]] = {
    "all": {**_BASIC, CAMERAS_SHUFFLED: _cameras_shuffled, TIME_SHUFFLED: _time_shuffled},
    "basic": _BASIC,
    "none": {},
}
