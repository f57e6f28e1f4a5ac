"""Rope ids of a prompt with video, for Qwen2.5-VL and Qwen3-VL: made here, stored with every row, always passed.

Left to itself the library restarts the text after a video below the video's own time ids (transformers 5.x), or drops
to one-dimensional positions without a word (Qwen2.5-VL without token types). Serving stacks continue at max() + 1;
so do we. Source of the formula: arXiv 2502.13923 section 2.1.2 (time ids aligned to absolute time) and transformers
4.57 `Qwen2_5_VLModel.get_rope_index`.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor


def rope_ids(
    input_ids: Sequence[int],
    *,
    video_token: int,
    grid: tuple[int, int, int],
    merge: int,
    time_step: float,
) -> Tensor:
    """Return positions (4, length): text positions, then time, height and width ids.

    Args:
        input_ids: tokens of one sample; every run of `video_token` is one or more whole temporal grids.
        video_token: id of the placeholder.
        grid: patches (time, height, width) of the sample's one video.
        merge: patches a side that become one token.
        time_step: time ids between two grids: tokens_per_second * seconds_per_grid for Qwen2.5-VL, truncated to
            integers after multiplication; any value for Qwen3-VL, whose runs hold a single grid.

    Raises:
        ValueError: the placeholders do not match the grid.
    """
    _, height, width = grid[0], grid[1] // merge, grid[2] // merge
    found = sum(token == video_token for token in input_ids)
    if found != grid[0] * height * width:
        raise ValueError(f"{found} video tokens, the grid {grid} needs {grid[0] * height * width}")
    pieces, offset = [], 0
    for is_video, run in groupby(input_ids, key=lambda token: token == video_token):
        length = sum(1 for _ in run)
        ids = _video_ids(length, height, width, time_step) if is_video else torch.arange(length).expand(3, -1)
        pieces.append(ids + offset)
        offset = int(pieces[-1].max()) + 1
    return torch.cat([torch.arange(len(input_ids))[None], torch.cat(pieces, dim=1)])


def text_ids(input_ids: Sequence[int], *, video_token: int, video_tokens: int) -> Tensor:
    """Return positions (4, length) of a model with one-dimensional rope ids: four times the text positions.

    Raises:
        ValueError: the placeholders are not as many as the tokens of the video.
    """
    found = sum(token == video_token for token in input_ids)
    if found != video_tokens:
        raise ValueError(f"{found} video tokens, the window has {video_tokens}")
    return torch.arange(len(input_ids)).expand(4, -1)


def _video_ids(length: int, height: int, width: int, time_step: float) -> Tensor:
    grids = length // (height * width)
    time = (torch.arange(grids) * time_step).long().view(-1, 1, 1).expand(-1, height, width)
    rows = torch.arange(height).view(1, -1, 1).expand(grids, -1, width)
    columns = torch.arange(width).view(1, 1, -1).expand(grids, height, -1)
    return torch.stack([time.reshape(-1), rows.reshape(-1), columns.reshape(-1)])
