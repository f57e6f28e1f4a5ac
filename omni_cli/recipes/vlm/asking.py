"""Windows of a recording that no shard holds, as rows to be asked about."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from omni_cli.errors import DataError
from omni_cli.formats.video import Uint8Array
from omni_cli.recipe import Asked, Questions, Row
from omni_cli.samples import views
from omni_cli.samples.sync import PlannedWindow
from omni_cli.samples.tiling import TiledPreprocess
from omni_cli.scene.recording import Recording

# recording, windows, ego motion over each -> what is known of their answers
TruthTeller = Callable[[Recording, Sequence[PlannedWindow], Sequence[Mapping[str, float]]], Sequence[Mapping[str, Any]]]
RowMaker = Callable[..., Row]  # pictures, start_speed_mps: speed at the first instant


def questions(
    recording: Recording,
    preprocess: TiledPreprocess,
    stride: int,
    max_age_us: int,
    *,
    make_row: RowMaker,
    tell_truth: TruthTeller,
) -> Questions:
    """Return the windows of a recording or a mosaic; pictures are decoded while they are asked for.

    Raises:
        DataError: a camera is missing, no window is left, or the speed that the prompt tells is not known.
    """
    plan = views.plan_views(recording, preprocess, stride=stride, max_age_us=max_age_us)
    if preprocess.past_speed and not views.has_motion(recording):
        raise DataError(
            f"{recording.id}: the model is told the speed at the first frame, which a plain video does not hold; "
            "give the id of a recording under --data, or a model trained with sample.past_speed = false"
        )
    motion = views.known_motion(recording, plan.windows)
    truth = tell_truth(recording, plan.windows, motion)
    asked = _asked(views.tiled_pictures(recording, preprocess, plan.windows), plan.windows, motion, truth, make_row)
    return Questions(len(plan.windows), asked, plan.dropped)


def _asked(
    pictures: Iterator[Uint8Array],
    windows: Sequence[PlannedWindow],
    motion: Sequence[Mapping[str, float]],
    truth: Sequence[Mapping[str, Any]],
    make_row: RowMaker,
) -> Iterator[Asked]:
    for window, shown, known, told in zip(windows, pictures, motion, truth, strict=True):
        row = make_row(pictures=torch.from_numpy(shown), start_speed_mps=known.get("start_speed_mps", 0.0))
        yield Asked(window, row, told)
