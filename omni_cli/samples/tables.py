"""The two tables of a shard, as Arrow schemas.

`frames` holds each picture once; `windows` says which pictures a model looks at, when each was truly seen, and what it
should have answered. Targets are structured, so that a shard serves any tokenizer. No column is ever null.
"""

from dataclasses import dataclass, field

import pyarrow as pa

FRAMES = pa.schema(
    [
        pa.field("camera", pa.string(), nullable=False),
        pa.field("frame_index", pa.int32(), nullable=False),  # in the camera's video
        pa.field("timestamp_us", pa.int64(), nullable=False),  # true time of that frame
        pa.field("width_px", pa.int32(), nullable=False),
        pa.field("height_px", pa.int32(), nullable=False),
        pa.field("pixels", pa.large_binary(), nullable=False),  # height x width x 3 uint8 RGB
    ]
)

# What every recipe's windows begin with; a recipe appends the columns of its targets.
WINDOW_COLUMNS = (
    pa.field("window", pa.int32(), nullable=False),  # 0, 1, 2 ... inside the recording
    pa.field("start_us", pa.int64(), nullable=False),  # first and last instant of the time grid
    pa.field("end_us", pa.int64(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("frames", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),  # rows of `frames`,
    # time-major: frames[k * num_cameras + c] is camera c at instant k
    pa.field("timestamps_us", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False),  # likewise
    pa.field("max_age_us", pa.int64(), nullable=False),  # largest (instant - true time) in the window
    pa.field("max_skew_us", pa.int64(), nullable=False),  # largest spread between cameras at one instant
)

EGO_MOTION_COLUMNS = (
    pa.field("dx_m", pa.float64(), nullable=False),  # displacement in the rig frame at the window's first instant
    pa.field("dy_m", pa.float64(), nullable=False),
    pa.field("dyaw_rad", pa.float64(), nullable=False),
    pa.field("displacement_m", pa.float64(), nullable=False),  # chord, negative when the car moved backward
    pa.field("path_length_m", pa.float64(), nullable=False),
    pa.field("mean_speed_mps", pa.float64(), nullable=False),  # mean forward speed over the window, signed
    pa.field("start_speed_mps", pa.float64(), nullable=False),  # forward speed at the window's first instant
)


def windows_schema(targets: tuple[pa.Field, ...]) -> pa.Schema:
    """Return the schema of a recipe's windows."""
    return pa.schema([*WINDOW_COLUMNS, *targets])


@dataclass(frozen=True)
class ShardTables:
    """One recording, ready to be written."""

    frames: pa.Table
    windows: pa.Table
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> windows that were refused
