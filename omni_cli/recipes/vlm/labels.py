"""What each kind of labels means: how a recording is cut, which columns it gives, and how answers are judged."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyarrow as pa

from omni_cli.recipes.vlm.answers import Answers, Quantities
from omni_cli.recipes.vlm.forecast import Forecast
from omni_cli.samples.prompts import ANSWERED
from omni_cli.samples.reasoning import reasoning_tables
from omni_cli.samples.tables import EGO_MOTION_COLUMNS, REASONING_COLUMNS, ShardTables
from omni_cli.samples.tiling import Labels
from omni_cli.samples.waypoints import WAYPOINT_TARGETS, waypoint_tables
from omni_cli.samples.windows import ego_motion_tables


@dataclass(frozen=True)
class LabelKind:
    """One kind of labels."""

    make_tables: Callable[..., ShardTables]  # a `TableMaker` once stride and max_age_us are filled in
    columns: tuple[pa.Field, ...]
    answers: Answers


LABELS: Mapping[Labels, LabelKind] = {
    "ego-motion": LabelKind(ego_motion_tables, EGO_MOTION_COLUMNS, Quantities(ANSWERED["ego-motion"])),
    "speed": LabelKind(ego_motion_tables, EGO_MOTION_COLUMNS, Quantities(ANSWERED["speed"])),
    "waypoints": LabelKind(waypoint_tables, WAYPOINT_TARGETS, Forecast(says_why=False)),
    "reasoning": LabelKind(reasoning_tables, (*WAYPOINT_TARGETS, *REASONING_COLUMNS), Forecast(says_why=True)),
}
