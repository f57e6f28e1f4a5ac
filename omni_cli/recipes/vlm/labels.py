"""What each kind of labels means: how a recording is cut, which columns it gives, and how answers are judged."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from omni_cli.recipes.vlm.answers import Answers, Quantities
from omni_cli.recipes.vlm.forecast import Forecast
from omni_cli.samples.prompts import ANSWERED
from omni_cli.samples.reasoning import reasoning_tables, reasoning_windows
from omni_cli.samples.tables import EGO_MOTION_COLUMNS, REASONING_COLUMNS, ShardTables
from omni_cli.samples.tiling import Labels
from omni_cli.samples.waypoints import REACH, WAYPOINT_TARGETS, waypoint_tables, waypoint_windows
from omni_cli.samples.windows import AT_HAND, ChosenWindows, Reach, TableMaker, choose_windows, ego_motion_tables


@dataclass(frozen=True)
class LabelKind:
    """One kind of labels."""

    choose: Callable[..., ChosenWindows]  # these two are a `TableMaker` once stride and max_age_us are filled in
    cut: Callable[..., ShardTables]
    columns: tuple[pa.Field, ...]
    answers: Answers
    reach: Reach = AT_HAND

    def table_maker(self, *, stride: int, max_age_us: int) -> TableMaker:
        """Return what cuts a recording into windows with these labels."""
        how = {"stride": stride, "max_age_us": max_age_us}
        return TableMaker(partial(self.choose, **how), partial(self.cut, **how), self.reach)


_EGO_MOTION = (choose_windows, ego_motion_tables, EGO_MOTION_COLUMNS)
_WAYPOINTS = (waypoint_windows, waypoint_tables, WAYPOINT_TARGETS)
_REASONING = (reasoning_windows, reasoning_tables, (*WAYPOINT_TARGETS, *REASONING_COLUMNS))
LABELS: Mapping[Labels, LabelKind] = {
    "ego-motion": LabelKind(*_EGO_MOTION, Quantities(ANSWERED["ego-motion"])),
    "speed": LabelKind(*_EGO_MOTION, Quantities(ANSWERED["speed"])),
    "waypoints": LabelKind(*_WAYPOINTS, Forecast(says_why=False), REACH),
    "reasoning": LabelKind(*_REASONING, Forecast(says_why=True), REACH),
}
