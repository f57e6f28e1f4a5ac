"""README.md of a published folder: the model card of the hub, which says what the weights are and what they are not.

What comes from data, names and settings is escaped; no path, host or token is in it, and no time, so that the same run
has the same card. Source of the header: https://huggingface.co/docs/hub/model-cards, by huggingface_hub's own classes.
"""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from omni_cli import __version__, files
from omni_cli.errors import OmniError
from omni_cli.formats.physical_ai_av import LICENCE, REPOSITORY
from omni_cli.recipe import About, Metric
from omni_cli.report import counted
from omni_cli.samples.preprocess import Preprocess
from omni_cli.stages import licences, models, runs
from omni_cli.stages.evaluate import EVAL, REPORT_FILE, metric_title, verdicts
from omni_cli.stages.origins import DataOrigin, noted_origin, origin_of
from omni_cli.world.dataset import LICENCE as MADE_BY_OMNI

README = "README.md"
HERE = models.HERE  # how a folder is named in its own card before it is pushed
_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~])")
_LISTED_LICENCES = ("apache-2.0", "mit")  # of those that bases have; the hub takes others by name
_FREE_LICENCES = (MADE_BY_OMNI, "MIT")  # of data: what was learned from them bears no other for it
_ADAPTED = {"targets": "on", "vision_targets": "in the vision tower on"}
_DATA_SETS = {LICENCE: REPOSITORY}
_LIMITS = (
    "This is a study of what can be learned from driving video. It is **not for a car**: nothing here was tested for "
    "driving, and nothing must steer, brake or warn by it. It knows the cameras, places and weather of its data; "
    "elsewhere its errors are not known."
)


@dataclass(frozen=True)
class Published:
    """What a folder is published as."""

    form: str  # merged, hf, adapter or onnx
    source: str = HERE  # its name on a hub, once it has one
    licence_override: str | None = None  # the licence that whoever pushes it names, to do so all the same
    parity: Mapping[str, Any] = field(default_factory=dict)  # of the merge that it comes from


def card_text(recipe: Any, run: runs.Run, published: Published) -> str:
    """Return the card of a folder: a header that a hub reads, and what people should know.

    Args:
        recipe: the run's.
        run: where the weights come from.
        published: what the folder is.

    Raises:
        DataError: the run does not say what it learned from.
    """
    preprocess, origin = run.manifest.preprocess, origin_of(run)
    about: About = recipe.about(preprocess, published.form, published.source)
    report, override = _report(run), published.licence_override
    results = _results(report, recipe.metrics, about.task) if report and may_be_told(report, override) else []
    header = _header(about, run, origin, results, override)
    sections = (
        (None, f"{about.does} Made with omni {__version__}."),
        ("Base", _base(about)),
        ("Data", _data(run, origin, override)),
        ("What it looks at", _looks_at(preprocess, about)),
        ("Training", _training(recipe, run)),
        ("Metrics", _metrics(report, recipe.metrics, override)),
        ("Merge", _parity(published.parity)),
        ("How to load it", _loading(about)),
        ("Limits", _LIMITS),
    )
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections if text)
    return f"---\n{header.to_yaml()}\n---\n\n# {escape(run.name)}\n\n{body}\n"


def put_card(folder: Path, text: str, **facts: Any) -> None:
    """Write the card into a sealed folder, and the facts into its receipt; what is so already is left as it is.

    Between the two writes the folder has no receipt: killed there, it is made again. The caller holds the folder.

    Raises:
        OmniError: another process took its receipt away, and was stopped.
    """
    receipt = files.read_receipt(folder)
    if receipt is None:
        raise OmniError(f"{folder}: another omni was stopped while it wrote there; run the same command again")
    path = folder / README
    is_same = path.is_file() and path.read_text() == text
    if is_same and all(receipt.get(key) == value for key, value in facts.items()):
        return
    files.receipt_path(folder).unlink(missing_ok=True)
    files.write_text(path, text)
    listed = {**receipt["files"], README: runs.file_facts(path)}
    files.put_receipt(folder, {**receipt, **facts, "files": listed})


def escape(text: object) -> str:
    """Return a text as Markdown shows it, in one line: nothing in it is markup, HTML or a link."""
    plain = " ".join(str(text).split())
    return html.escape(_SPECIAL.sub(r"\\\1", plain), quote=False)


def _header(
    about: About, run: runs.Run, origin: DataOrigin, results: list[EvalResult], override: str | None
) -> ModelCardData:
    known: dict[str, Any] = _licence(about, origin, override)
    data_sets = [_DATA_SETS[licence] for licence in origin.licences if licence in _DATA_SETS]
    return ModelCardData(
        base_model=about.base or None,
        datasets=data_sets or None,
        library_name=about.library,
        pipeline_tag=about.task,
        tags=["omni", "driving", run.manifest.recipe],
        model_name=run.name if results else None,
        eval_results=results or None,
        **known,
    )


def _licence(about: About, origin: DataOrigin, override: str | None) -> dict[str, str]:
    """Return how the header names the licence of the weights: that of their base is theirs only if no other binds."""
    noted = [licence for licence in origin.licences if licence not in _FREE_LICENCES]
    binding = noted if origin.source or not override else list(dict.fromkeys([*noted, override]))
    if not binding:
        if not about.licence or about.licence in _LISTED_LICENCES:
            return {"license": about.licence} if about.licence else {}
        return {"license": "other", "license_name": about.licence}
    own = [about.licence] if about.licence and about.licence not in _LISTED_LICENCES else []
    return {"license": "other", "license_name": "; ".join([*binding, *own])}


def _base(about: About) -> str:
    licence = about.licence or "not known to omni: see where the base comes from"
    return f"Base weights: {escape(about.base_told)}. Licence of the base weights: {escape(licence)}."


def _data(run: runs.Run, origin: DataOrigin, override: str | None) -> str:
    learned = run.learned()
    amount = f"{counted(learned.windows, 'window')} of {counted(len(learned.recordings), 'recording')}"
    lines = [
        f"Source: {escape(origin.source or 'not known')}.",
        f"Licence of the data: {escape(_licence_told(origin))}.",
        f"It learned from {amount}; recordings were split by {escape(run.manifest.shards.split_rule)}.",
    ]
    if override:
        lines.append(f"Pushed by someone who claims the right to do so under: {escape(override)}.")
    return _bullets(lines)


def _licence_told(origin: DataOrigin) -> str:
    if origin.licences:
        return "; ".join(origin.licences)
    return "none is noted" if origin.source else "not known"


def _looks_at(preprocess: Preprocess, about: About) -> str:
    told = [f"{escape(name)}: {escape(value)}" for name, value in preprocess.described()]
    named = ", ".join(escape(camera) for camera in preprocess.cameras)
    lines = _bullets([f"cameras by name, row by row: {named}", *told])
    if not about.asked:
        return lines
    answer = f"What it answers, by its format (the numbers are no measurement):\n\n{_fenced(about.answered)}"
    return f"{lines}\n\nWhat it is asked beside the pictures:\n\n{_fenced(about.asked)}\n\n{answer}"


def _training(recipe: Any, run: runs.Run) -> str:
    train = recipe.train
    receipt = files.read_receipt(run.final) or {}
    return _bullets([
        f"tuned: {escape(_tuned(recipe))}",
        f"steps: {receipt.get('steps')}, batches of {train.batch_size} x {train.accumulation}",
        f"learning rate: {train.learning_rate:g}, {escape(train.schedule)}, seed {train.seed}",
        *_chosen(receipt),
        f"last loss: {receipt.get('loss', float('nan')):.4f}",
    ])  # fmt: skip


def _tuned(recipe: Any) -> str:
    """Return which weights learned, and what the rest was kept in meanwhile."""
    asked: dict[str, Any] = recipe.tune.model_dump()
    if asked["mode"] == "full":
        frozen = ", ".join(asked.get("freeze", ()))
        return f"in full, but for {frozen}" if frozen else "in full"
    told = [f"{asked['mode']}, rank {asked['rank']}, alpha {asked['alpha']}"]
    told += ["rank-stabilised"] if asked["rank_stabilised"] else []
    told += [f"{title}: {', '.join(asked[key])}" for key, title in _ADAPTED.items() if asked.get(key)]
    told += ["the merger in full"] if asked.get("train_merger") else []
    told += [f"its base in {quantization}"] if (quantization := _quantization(recipe)) != "none" else []
    return "; ".join(told)


def _quantization(recipe: Any) -> str:
    return str(recipe.model_dump().get("quantization", "none"))


def _chosen(receipt: Mapping[str, Any]) -> list[str]:
    """Return which step's the weights are, where they are not those of the last."""
    if not receipt.get("chosen_on"):
        return []
    loss = f"their loss of {receipt['validation_loss']:.4f} on split {escape(receipt['chosen_on'])}"
    return [f"weights: those of step {receipt['published_step']}, chosen by {loss}; the loss below is not theirs"]


def _report(run: runs.Run) -> dict[str, Any] | None:
    """Return the sealed report of these very weights; None where there is none."""
    folder = run.folder / EVAL
    if models.made_from(folder, run_weights=models.weights_key(run)) is None:
        return None
    report: dict[str, Any] = files.read_json(folder / REPORT_FILE)
    return report


def measured_data(run: runs.Run) -> DataOrigin | None:
    """Return what the data are that a card tells numbers of; None where it tells none."""
    report = _report(run)
    return noted_origin(report) if report else None


def may_be_told(report: Mapping[str, Any], override: str | None) -> bool:
    """Say whether a report's numbers may be published: the licence of what was measured can forbid it."""
    origin = noted_origin(report)
    return bool(origin.source) and set(licences.forbidding(origin.licences)) <= {override}


def _results(report: Mapping[str, Any], metrics: Sequence[Metric], task: str) -> list[EvalResult]:
    model, source = report["conditions"][0], noted_origin(report).source
    named = f"{report['windows']} windows of {source}, split {report['split']}"
    return [
        EvalResult(
            task_type=task,
            dataset_type=source,
            dataset_name=named,
            metric_type=metric.key,
            metric_name=metric_title(metric),
            metric_value=model[metric.key],
        )
        for metric in metrics
        if model.get(metric.key) is not None and model["unreadable"] < 1.0
    ]


def _metrics(report: dict[str, Any] | None, metrics: Sequence[Metric], override: str | None) -> str:
    if report is None:
        return "Not evaluated: no sealed report of `omni eval` is of these weights."
    origin = noted_origin(report)
    if not may_be_told(report, override):
        return _not_told(origin)
    counts = f"{counted(report['windows'], 'window')} of {counted(report['recordings'], 'recording')}"
    of = f"{counts} of {escape(origin.source)}"
    told = f"On {of}, split {escape(report['split'])} (by {escape(report['split_rule'])}); in brackets 95 % intervals."
    shown = [metric for metric in metrics if metric.is_shown]
    header = ["who answers", *map(metric_title, shown), "unreadable answers"]
    rows = [[line["name"], *(_score(line, metric.key) for metric in shown), f"{line['unreadable']:.1%}"]
            for line in report["conditions"]]  # fmt: skip
    notes = [escape(line) for line in verdicts(report, shown[0])]
    if report.get("chosen_on"):
        notes.append("the weights were chosen by their loss on this very split, which flatters them a little")
    of_rows = "`model` is this one; the other lines see nothing, or the wrong pictures, and are what it must beat."
    return "\n\n".join(part for part in (told, _table(header, rows), of_rows, _bullets(notes)) if part)


def _not_told(origin: DataOrigin) -> str:
    if not origin.source:
        return "Measured, and not told: the report does not say under which licence the measured data are."
    named = escape("; ".join(licences.forbidding(origin.licences)))
    return f"Measured, and not told: on data under the {named}, which forbids to tell results."


def _score(line: Mapping[str, Any], key: str) -> str:
    if line["unreadable"] == 1.0:
        return "no answer"
    value, interval = line.get(key), line.get(f"{key}_interval")
    if value is None:
        return "n/a"
    return f"{value:.2f}" if interval is None else f"{value:.2f} ({interval[0]:.2f} .. {interval[1]:.2f})"


def _parity(parity: Mapping[str, Any]) -> str:
    numbers = {key: value for key, value in parity.items() if isinstance(value, int | float)}
    if not numbers:
        return ""
    rows = [[key.replace("_", " "), f"{value:.3g}"] for key, value in numbers.items()]
    return f"Compared with the adapted model before it was published:\n\n{_table(['what', 'value'], rows)}"


def _loading(about: About) -> str:
    return "\n\n".join(
        part
        for one in about.loading
        for part in (f"With {one.title}:", one.told, _fenced(one.code, one.language))
        if part
    )


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell if cell == "---" else escape(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _fenced(text: str, language: str = "text") -> str:
    """Return a block of code that no run of backticks in the text can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
