"""The two tables of a shard, as Arrow schemas.

`frames` holds each picture once; `windows` says which pictures a model looks at, when each was truly seen, and what it
should have answered. Targets are structured, so that a shard serves any tokenizer. No column is ever null.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

FRAME_ROWS_PER_BATCH = 32
FRAMES = pa.schema(
    [
        pa.field("camera", pa.string(), nullable=False),  # or the view of one, where it gives several
        pa.field("frame_index", pa.int32(), nullable=False),  # in the camera's video
        pa.field("timestamp_us", pa.int64(), nullable=False),  # true time of that frame
        pa.field("width_px", pa.int32(), nullable=False),
        pa.field("height_px", pa.int32(), nullable=False),
        pa.field("pixels", pa.large_binary(), nullable=False),  # uint8, Preprocess.picture_shape
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


def _per_step(name: str, type_: pa.DataType) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("item", type_, nullable=False)), nullable=False)


# Of the car's poses around a window's last instant, in the rig frame at that instant: x forward, y left, z up
WAYPOINT_COLUMNS = (
    _per_step("future_xyz_m", pa.float64()),  # 64 x 3, after 0.1, 0.2 ... 6.4 s
    _per_step("future_yaw_rad", pa.float64()),  # 64
    _per_step("history_xyz_m", pa.float64()),  # 16 x 3, 1.5, 1.4 ... 0 s before; the last is zero
    _per_step("history_yaw_rad", pa.float64()),  # 16
    _per_step("acceleration_mps2", pa.float64()),  # 64, of the unicycle that drives the future
    _per_step("curvature_per_m", pa.float64()),  # 64
    pa.field("end_speed_mps", pa.float64(), nullable=False),  # forward, by the history; where the actions begin
)
REASONING_COLUMNS = (pa.field("reasoning", pa.string(), nullable=False),)  # why the car drives on as it does

# Of the n steps of a window, one after the other, each at the true time of its newer frame; in calib
STEP_COLUMNS = (
    _per_step("driven_xy_m", pa.float32()),  # n x 33 x 2 path truly driven after the step, at the model's times
    _per_step("driven_points", pa.int32()),  # n: how many of its points the log reaches
    _per_step("speed_mps", pa.float32()),  # n forward
    _per_step("yaw_rate_radps", pa.float32()),  # n left positive
    _per_step("target_xy_m", pa.float32()),  # n x 33 x 2 path that the teacher gives
    _per_step("target_points", pa.int32()),  # n
    _per_step("desire_pulse", pa.int32()),  # n: the desire that began, or 0
    _per_step("counts", pa.int32()),  # n: 1 where the step may be learned from and measured
    _per_step("scene_is_known", pa.int32()),  # n, or nothing where the teacher does not tell of the road
    _per_step("scene_lane_lines_m", pa.float32()),  # n x 4 x 33 x 2
    _per_step("scene_lane_line_prob", pa.float32()),  # n x 4
    _per_step("scene_road_edges_m", pa.float32()),  # n x 2 x 33 x 2
    _per_step("scene_lead", pa.float32()),  # n x 3 x 4
    _per_step("scene_lead_prob", pa.float32()),  # n x 3
    pa.field("left_hand_traffic", pa.int32(), nullable=False),  # 0 or 1
)


def windows_schema(targets: tuple[pa.Field, ...]) -> pa.Schema:
    """Return the schema of a recipe's windows."""
    return pa.schema([*WINDOW_COLUMNS, *targets])


@dataclass(frozen=True)
class Frames:
    """The frames of a recording, made while they are asked for: its pictures together may exceed the memory."""

    num_rows: int
    batches: Callable[[], Iterator[pa.RecordBatch]]  # FRAME_ROWS_PER_BATCH rows each, the last one fewer

    def read_all(self) -> pa.Table:
        """Return the whole table, for a recording that is known to be short.

        Raises:
            DataError: a video is damaged.
        """
        return pa.Table.from_batches(self.batches(), FRAMES)


@dataclass(frozen=True)
class ShardTables:
    """One recording, ready to be written."""

    frames: Frames
    windows: pa.Table
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> windows that were refused
    facts: dict[str, str] = field(default_factory=dict)  # what was chosen for this recording, for provenance
