"""What an audit finds, and how many findings become a table that a person can read."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from omni_cli.stages.checks.facts import RecordingFacts

Severity = Literal["refuse", "warn"]
_EXAMPLES = 2


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, with what was found and what was expected."""

    severity: Severity  # refuse: no later stage may use the recording or artefact; warn: they may, and should know
    code: str  # short and stable, for scripts
    detail: str
    recording: str = ""  # empty where it concerns a whole file or folder
    camera: str = ""
    place: str = ""  # the folder that was audited
    file: str = ""  # relative to that folder: the whole file that is damaged, where one is

    def about(self, recording: str, camera: str = "") -> "Finding":
        """Return the same finding, said of a recording and a camera."""
        return replace(self, recording=recording, camera=camera)

    def as_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return asdict(self)

    @property
    def unit(self) -> tuple[str, str]:
        """What is refused by it: a recording of a folder, or else the file that the detail names."""
        return self.place, self.recording or self.detail


@dataclass(frozen=True)
class Checked:
    """What checking some recordings gave."""

    findings: tuple[Finding, ...] = ()
    facts: tuple[RecordingFacts, ...] = ()


def refuse(code: str, detail: str, file: str = "") -> Finding:
    """Make a finding that bars its recording or artefact."""
    return Finding("refuse", code, detail, file=file)


def warn(code: str, detail: str) -> Finding:
    """Make a finding that a user should know of."""
    return Finding("warn", code, detail)


def is_refused(findings: Iterable[Finding]) -> bool:
    """Say whether any finding bars its subject."""
    return any(finding.severity == "refuse" for finding in findings)


def reasons(findings: Sequence[Finding]) -> dict[str, str]:
    """Return recording -> why it is refused, all reasons in one line."""
    by_recording: dict[str, list[str]] = defaultdict(list)
    for finding in findings:
        if finding.severity == "refuse" and finding.recording:
            camera = f" {finding.camera}" if finding.camera else ""
            by_recording[finding.recording].append(f"{finding.code}{camera}: {finding.detail}")
    return {recording: "; ".join(found) for recording, found in sorted(by_recording.items())}


def table_rows(findings: Sequence[Finding]) -> list[tuple[str, str, int, int, str]]:
    """Return one row a severity and code: those, how many findings, in how many units, and the first examples."""
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.severity, finding.code].append(finding)
    return [
        (code, severity, len(group), len({finding.unit for finding in group}), _examples(group))
        for (severity, code), group in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1]))
    ]


def _examples(group: Sequence[Finding]) -> str:
    lines = [
        " ".join(part for part in (finding.recording, finding.camera) if part) + f" {finding.detail}"
        for finding in group[:_EXAMPLES]
    ]
    more = f" ... and {len(group) - _EXAMPLES} more" if len(group) > _EXAMPLES else ""
    return "\n".join(line.strip() for line in lines) + more
