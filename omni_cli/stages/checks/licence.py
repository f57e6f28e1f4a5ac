"""Whether the licence of the data still runs. Pure functions of dates."""

import calendar
import datetime
from collections.abc import Iterator

from omni_cli.stages.checks.findings import Finding, warn

MONTHS = 12  # from the first download; facts/physicalai-av.md 1.1
_WARNED_MONTHS = 11
_PURGE = "omni fetch --purge"


def licence_findings(first_fetched: str, today: datetime.date) -> Iterator[Finding]:
    """Warn when a licence is about to end, and when it has.

    Args:
        first_fetched: the day of the first download, in ISO 8601.
        today: the day of the check.
    """
    try:
        first = datetime.date.fromisoformat(first_fetched)
    except ValueError:
        yield warn(
            "licence-unknown", f"first fetched on {first_fetched!r}, which is no date; its licence may have ended"
        )
        return
    end, remedy = months_after(first, MONTHS), f"destroy all copies with: {_PURGE}"
    if today >= end:
        yield warn("licence-ended", f"first fetched on {first}, its licence ended on {end}; {remedy}")
    elif today >= months_after(first, _WARNED_MONTHS):
        days = (end - today).days
        yield warn(
            "licence-ends", f"first fetched on {first}, its licence ends on {end}, in {days} days; then {remedy}"
        )


def months_after(day: datetime.date, months: int) -> datetime.date:
    """Return the same day of a later month, or that month's last."""
    year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    return datetime.date(year, month + 1, min(day.day, calendar.monthrange(year, month + 1)[1]))
