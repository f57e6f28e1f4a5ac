"""`audit.html`: one file that needs no other, for people. Every word in it that came from data is escaped."""

import base64
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_cli.report import counted
from omni_cli.stages.audit import drawing
from omni_cli.stages.checks.findings import Finding, table_rows
from omni_cli.stages.checks.remedies import REMEDIES

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#222}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin:2rem 0 .6rem;border-bottom:1px solid #ddd}
p.sum{font-size:1.05rem}.bad{color:#c0392b;font-weight:600}.good{color:#2e7d4f;font-weight:600}
table{border-collapse:collapse;width:100%;font-size:13.5px}td,th{text-align:left;padding:.35rem .6rem;
vertical-align:top;border-bottom:1px solid #eee;overflow-wrap:anywhere}th{color:#666;font-weight:600}
td.n{text-align:right;white-space:nowrap}td.c{white-space:nowrap;font-family:ui-monospace,monospace}
.refuse{border-left:4px solid #c0392b}.warn{border-left:4px solid #e8b33a}
img{max-width:100%}.row{display:flex;flex-wrap:wrap;gap:1rem}.row>div{flex:1 1 500px}
.worst{margin:.9rem 0}.worst b{font-family:ui-monospace,monospace}.worst small{color:#555}.none{color:#888}
"""


@dataclass(frozen=True)
class Worst:
    """A recording that stands out, and some of its pictures (JPEG), or why there are none."""

    recording: str
    camera: str
    findings: tuple[Finding, ...]
    picture: bytes | None
    why_none: str = ""


@dataclass(frozen=True)
class Section:
    """One source folder's recordings."""

    folder: str
    recordings: tuple[str, ...]
    there: Mapping[str, Sequence[str]]  # recording -> cameras that were read
    statistics: Mapping[str, Any]
    findings: tuple[Finding, ...]
    worst: tuple[Worst, ...]


def page(result: Mapping[str, Any], findings: Sequence[Finding], sections: Sequence[Section]) -> str:
    """Return the report.

    Args:
        result: the audit's JSON.
        findings: all of them.
        sections: one a source folder.
    """
    parts = [_summary(result), _findings_table(findings), *(_section(section) for section in sections)]
    title = html.escape(f"audit of {result['path']}")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{title}</h1>{"".join(parts)}</body></html>\n'


def worst_recordings(findings: Sequence[Finding], most: int) -> list[tuple[str, tuple[Finding, ...]]]:
    """Return the recordings with the most refusals, then the most warnings, and what was found of each."""
    refusals = Counter(found.recording for found in findings if found.severity == "refuse" and found.recording)
    warnings = Counter(found.recording for found in findings if found.severity == "warn" and found.recording)
    ranked = sorted(refusals | warnings, key=lambda name: (-refusals[name], -warnings[name], name))
    return [(name, tuple(one for one in findings if one.recording == name)) for name in ranked[:most]]


def _summary(result: Mapping[str, Any]) -> str:
    tone = "bad" if result["refused"] else "good"
    read = result["read"]
    mode = "every picture decoded" if result["deep"] else "headers, tables and sizes; --deep decodes and hashes"
    if result["subset"]:
        mode = f"pictures and hashes of the subset {html.escape(result['subset'])}"
    hashed = f"{read['files']} of {read['of_files']} files with receipts hashed, {_size(read['bytes'])} of "
    return (
        f'<p class="sum">{result["audited"]} audited, <span class="{tone}">{result["refused"]} refused</span>, '
        f"{result['warned']} with warnings, {result['quarantined']} in quarantine.</p>"
        f"<p>Read: {mode}; {hashed}{_size(read['of_bytes'])}.</p>"
    )


def _findings_table(findings: Sequence[Finding]) -> str:
    if not findings:
        return '<h2>Findings</h2><p class="good">Nothing was found.</p>'
    head = "".join(f"<th>{name}</th>" for name in ("code", "", "found", "units", "examples", "what to do"))
    rows = "".join(
        _finding_row(*row) for row in sorted(table_rows(findings), key=lambda row: (row[1], -row[3], row[0]))
    )
    return f"<h2>Findings</h2><table><tr>{head}</tr>{rows}</table>"


def _finding_row(code: str, severity: str, count: int, units: int, examples: str) -> str:
    told = html.escape(examples).replace("\n", "<br>")
    return (
        f'<tr class="{severity}"><td class="c">{html.escape(code)}</td><td>{severity}</td><td class="n">{count}</td>'
        f'<td class="n">{units}</td><td>{told}</td><td>{html.escape(REMEDIES.get(code, ""))}</td></tr>'
    )


def _section(section: Section) -> str:
    told, cameras = section.statistics, sorted({name for found in section.there.values() for name in found})
    cameras = sorted({*cameras, *(found.camera for found in section.findings if found.camera)})
    state = drawing.states(section.recordings, cameras, section.there, section.findings)
    rows = [*(drawing.short(camera) for camera in cameras), "motion, index"]
    body = _picture(
        drawing.png(drawing.coverage(section.recordings, rows, state)), "coverage of cameras and recordings"
    )
    return (
        f"<h2>{html.escape(section.folder)}</h2>{body}{_facts(told)}"
        f'<div class="row">{_plots(told)}</div>{_camera_table(told["cameras"])}{_worst(section.worst)}'
    )


def _plots(told: Mapping[str, Any]) -> str:
    drawn = []
    if sum(told["skew_ms"]["counts"]):
        drawn.append((drawing.histogram(told["skew_ms"], "skew between cameras, every 0.1 s [ms]"), "camera skew"))
    if len(told["cameras"]) > 1:
        drawn.append((drawing.phases(told["cameras"]), "phase of each camera"))
    if sum(told["speed_mps"]["counts"]):
        drawn.append((drawing.histogram(told["speed_mps"], "speed [m/s]"), "speed"))
    if sum(told["curvature_per_m"]["counts"]):
        label = "curvature while moving [1/m], left positive"
        drawn.append((drawing.histogram(told["curvature_per_m"], label, is_log=True), "curvature"))
    return "".join(f"<div>{_picture(drawing.png(figure), name)}</div>" for figure, name in drawn)


def _facts(told: Mapping[str, Any]) -> str:
    motion, rigs = told["motion"], ", ".join(f"{count} {html.escape(name)}" for name, count in told["rigs"].items())
    lines = [f"{counted(told['recordings'], 'recording')} measured", f"{motion['kilometres']:.1f} km driven"]
    lines.append(
        f"{motion['with_horizon']} with 1.6 s of motion behind and 6.4 s ahead, {motion['horizon_s']:.0f} s in all"
    )
    lines += [f"motion logged up to {motion['past_video_s']:.1f} s past the video"] if motion["past_video_s"] else []
    lines += [f"rigs: {rigs}"] if rigs else []
    return f"<p>{'; '.join(lines)}.</p>"


def _camera_table(cameras: Mapping[str, Mapping[str, Any]]) -> str:
    if not cameras:
        return ""
    head = ("camera", "recordings", "frames", "rate [Hz]", "jitter [ms]", "phase [ms]", "decoded", "black", "frozen")
    rows = "".join(_camera_row(name, told) for name, told in cameras.items())
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{rows}</table>"


def _camera_row(name: str, told: Mapping[str, Any]) -> str:
    phase, jitter = told["phase_ms"], told["jitter_ms"]
    cells = [
        *(
            told["recordings"],
            told["frames"],
            f"{told['rate_hz']:.2f}",
            f"{jitter['median']:.2f}, max {jitter['max']:.2f}",
        ),
        f"{phase['min']:.1f} / {phase['median']:.1f} / {phase['max']:.1f}",
        *(told.get(key, "") for key in ("decoded", "black", "frozen")),
    ]
    return f'<tr><td class="c">{html.escape(name)}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _worst(worst: Sequence[Worst]) -> str:
    if not worst:
        return ""
    return "<h2>The worst recordings</h2>" + "".join(_worst_one(one) for one in worst)


def _worst_one(one: Worst) -> str:
    told = "; ".join(dict.fromkeys(f"{found.code} {drawing.short(found.camera)}".strip() for found in one.findings))
    shown = f'<p class="none">no picture: {html.escape(one.why_none)}</p>'
    if one.picture is not None:
        shown = _picture(one.picture, f"pictures of {one.recording}", "jpeg")
    camera = html.escape(drawing.short(one.camera))
    name = f"<b>{html.escape(one.recording)}</b> {camera}"
    return f'<div class="worst">{name}<br><small>{html.escape(told)}</small>{shown}</div>'


def _picture(content: bytes, name: str, kind: str = "png") -> str:
    return f'<img alt="{html.escape(name)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"
