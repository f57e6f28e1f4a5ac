"""Windows of a recording that no shard holds, as rows to be asked about."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from omni_cli.errors import DataError
from omni_cli.recipe import Asked, Questions, Row
from omni_cli.samples import prompts, views
from omni_cli.samples.sync import PlannedWindow
from omni_cli.samples.tiling import TiledPreprocess
from omni_cli.scene.recording import Recording

RowMaker = Callable[[Tensor, float], Row]  # pictures, speed at the first instant in m/s -> row


def questions(
    recording: Recording, preprocess: TiledPreprocess, stride: int, max_age_us: int, make_row: RowMaker
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
    return Questions(len(plan.windows), _asked(recording, preprocess, plan.windows, motion, make_row), plan.dropped)


def _asked(
    recording: Recording,
    preprocess: TiledPreprocess,
    windows: Sequence[PlannedWindow],
    motion: Sequence[Mapping[str, float]],
    make_row: RowMaker,
) -> Iterator[Asked]:
    columns = prompts.ANSWERED[preprocess.labels]
    pictures = views.window_canvases(recording, preprocess, windows)
    for window, canvases, known in zip(windows, pictures, motion, strict=True):
        row = make_row(torch.from_numpy(canvases), known.get("start_speed_mps", 0.0))
        yield Asked(window, row, {name: known[name] for name in columns if name in known})
