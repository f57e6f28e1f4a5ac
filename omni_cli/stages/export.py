"""`omni export`: a run as a folder for the hub's own tools, or as ONNX programs that were compared with the model.

Every folder has a model card, and may be pushed to a hub where the licence of the data lets it.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.errors import OmniError, UsageError
from omni_cli.models.hub_files import forget_local_base
from omni_cli.recipe import Exportable, Rehearsed, require
from omni_cli.report import Console, counted
from omni_cli.stages import licences, models, programs, runs
from omni_cli.stages.cards import HERE, README, Published, card_text, measured_data, put_card
from omni_cli.stages.disk import check_room
from omni_cli.stages.memory import warn_of_more
from omni_cli.stages.merge import MergeRequest, merge
from omni_cli.stages.origins import check_right, origin_of
from omni_cli.stages.push import PushRequest, check_repository, push

ONNX_CARD = models.ONNX_CARD
ADAPTER = "adapter"  # of a run that has one, where its recipe is exported for the hub's tools
_FORMAT = 2  # of an exported folder; 1, of omni 0.5, lacks what vLLM reads and a licence in omni.json
_ONNX_FORMAT = 3  # of one of programs; until omni 0.6 those of a vision-language model were its tower alone


@dataclass(frozen=True)
class ExportRequest:
    """What a user asked of `omni export`."""

    format: str | None = None  # None: the first that the recipe has
    out: Path | None = None  # None: RUN/export/FORMAT
    opset: int = 20
    batches: tuple[int, ...] = (1,)  # numbers of windows; one ONNX file each where the recipe fixes them inside it
    dtype: str = "float32"  # of the ONNX program's weights and input
    push: PushRequest | None = None  # where it is to go


@dataclass(frozen=True)
class Job:
    """One run to be exported in one form."""

    recipe: Exportable
    run: runs.Run
    request: ExportRequest
    form: str
    console: Console

    @property
    def folder(self) -> Path:
        """Where the export lies."""
        return self.request.out or self.run.folder / "export" / self.form

    def facts(self) -> dict[str, Any]:
        """Return what the receipt says that the export was made from."""
        asked = _asked(self.form, self.request)
        made_as = _ONNX_FORMAT if self.form == "onnx" else _FORMAT
        return {"run_weights": models.weights_key(self.run), "format": made_as, "asked": asked}


def export(recipe: Any, run: runs.Run, request: ExportRequest, console: Console) -> dict[str, Any]:
    """Export a finished run, and push it where that is asked.

    Raises:
        UsageError: an unknown format or option, the packages for ONNX are not installed, or the licence of the data
            forbids to push.
        OmniError: the exported program answers otherwise, and nothing is published; or the hub refuses.
    """
    exportable: Exportable = require(recipe, Exportable)  # type: ignore[type-abstract]  # a protocol names it
    job = Job(exportable, run, request, _chosen_form(exportable, run, request), console)
    if request.push:
        check_repository(request.push.repository)
        check_right(origin_of(run), request.push.licence)
    done = models.made_from(job.folder, **job.facts())
    if request.push and request.push.dry_run:
        return {"run": str(run.folder), **_rehearse_push(job, request.push, is_made=bool(done))}
    if done:
        console.say(f"{job.folder} is exported from these weights; nothing to do")
    else:
        done = _make(job)
    result = {"export": str(job.folder), "run": str(run.folder), **done["result"]}
    if request.push:
        return {**result, "push": _push(job, request.push)}
    _renew_card(job)
    return result


def _chosen_form(exportable: Exportable, run: runs.Run, request: ExportRequest) -> str:
    known, form = exportable.export_formats, request.format or exportable.export_formats[0]
    if form == ADAPTER and "hf" in known:
        if exportable.tune.mode == "full":
            raise UsageError(f"--format {ADAPTER}: run {run.name} was tuned in full and has none; use --format hf")
    elif form not in known:
        raise UsageError(f"--format {form}: recipe {run.manifest.recipe} is exported as {' or '.join(known)}")
    return form


def _make(job: Job) -> dict[str, Any]:
    """Make the folder and publish it; return the facts of its receipt."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    made = {"hf": _export_hf, ADAPTER: _export_adapter, "onnx": _export_onnx}[job.form](job)
    job.console.say(f"exported to {job.folder}")
    return made


def _push(job: Job, request: PushRequest) -> dict[str, Any]:
    """Push a folder whose card names the repository; where that fails, it names what it named before."""
    before = _renew_card(job, repository=request.repository, override=_override(job))
    try:
        return push(job.folder, request, job.console)
    except OmniError:
        _renew_card(job, repository=before.get("repository", HERE))
        raise


def _renew_card(job: Job, *, repository: str | None = None, override: str | None = None) -> dict[str, Any]:
    """Write the card anew where a report or a name on a hub has come since; the weights stay as they are.

    A licence that somebody named to push all the same stays in the receipt and in the card. Returns the receipt that
    was there before.
    """
    with models.held(job.folder, "writing the card of"):
        receipt = files.read_receipt(job.folder) or {}
        override = override or receipt.get("licence_override")
        source = repository or receipt.get("repository", HERE)
        published = Published(job.form, source, override, receipt.get("parity", {}))
        put_card(job.folder, card_text(job.recipe, job.run, published), licence_override=override, repository=source)
    return receipt


def _override(job: Job) -> str | None:
    """Return the licence that is named to push all the same, where one is needed."""
    origin, measured, pushed = origin_of(job.run), measured_data(job.run), job.request.push
    forbidding = licences.forbidding([*origin.licences, *(measured.licences if measured else ())])
    return pushed.licence if pushed and (forbidding or not origin.source) else None


def _rehearse_push(job: Job, request: PushRequest, *, is_made: bool) -> dict[str, Any]:
    """Say what would be pushed; a folder that is not made yet is told by what it would be made of."""
    origin, override = origin_of(job.run), _override(job)
    told = ", ".join(origin.licences) or ("no licence is noted" if origin.source else "licence not known")
    named = f"; pushed all the same as {override!r} is named" if override else "; it may be pushed"
    job.console.say(f"data: {origin.source or 'not known'}, {told}{named}")
    facts = {"export": str(job.folder), "licences": list(origin.licences), "licence_override": override}
    if is_made:
        return {**facts, "is_made": True, "push": push(job.folder, request, job.console)}
    listed = (files.read_receipt(job.run.final) or {})["files"]
    size = sum(file["size"] for file in listed.values())
    weights = f"{counted(len(listed), 'file')} of {size / 1e6:.1f} MB in {job.run.final}"
    job.console.say(f"would first make {job.folder} of {weights}, and then push it to {request.repository}")
    would = {"repository": request.repository, "dry_run": True, "files": sorted(listed), "bytes": size}
    return {**facts, "is_made": False, "push": would}


def parse_batches(text: str) -> tuple[int, ...]:
    """Read `4` as (4,) and `1-8` as 1 to 8.

    Raises:
        UsageError: it is neither.
    """
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or not 1 <= int(first) <= int(last or first) <= 64:
        raise UsageError(f"--batch {text}: expected a number of windows such as 1, or a range such as 1-8 (64 at most)")
    return tuple(range(int(first), int(last or first) + 1))


def parse_push(repository: str | None, *, public: bool, licence: str | None, dry_run: bool) -> PushRequest | None:
    """Return what --push-to-hub and the options beside it ask for.

    Raises:
        UsageError: one of those is given without it.
    """
    if repository is not None:
        return PushRequest(repository, public, licence, dry_run)
    given = {"--public": public, "--licence": licence, "--dry-run": dry_run}
    if lone := next((option for option, value in given.items() if value), None):
        raise UsageError(f"{lone}: it is an option of --push-to-hub; name the repository with --push-to-hub ORG/NAME")
    return None


def _asked(form: str, request: ExportRequest) -> dict[str, Any]:
    if form in ("hf", ADAPTER):
        return {"format": form}
    return {"format": form, "opset": request.opset, "batches": list(request.batches), "dtype": request.dtype}


def _export_hf(job: Job) -> dict[str, Any]:
    """Copy the whole model, merged first where the run is an adapter, and add what the hub's processors read."""
    source, parity = job.run.final, dict[str, Any]()
    if job.recipe.tune.mode != "full":
        merged = merge(job.recipe, job.run, MergeRequest(), job.console)
        source, parity = Path(merged["model"]), merged["parity"]
    with models.publish_folder(job.folder, "exporting to") as (made, facts):
        shutil.copytree(source, made, dirs_exist_ok=True)
        job.recipe.write_processor_files(made, job.run.manifest.preprocess)
        models.write_model_card(made, job.recipe, job.run, parity)
        facts.update(_finished(job, made, parity))
    return facts


def _export_adapter(job: Job) -> dict[str, Any]:
    """Copy the adapter, and add what the hub's processors read."""
    with models.publish_folder(job.folder, "exporting to") as (made, facts):
        shutil.copytree(job.run.final, made, dirs_exist_ok=True)
        forget_local_base(made)
        job.recipe.write_processor_files(made, job.run.manifest.preprocess)
        facts.update(_finished(job, made, {}))
    return facts


def _finished(job: Job, made: Path, parity: Mapping[str, Any]) -> dict[str, Any]:
    """Write the card; return what the receipt says of a folder of weights."""
    files.write_text(made / README, card_text(job.recipe, job.run, Published(job.form, parity=parity)))
    result = {"format": job.form, "files": sorted(path.name for path in made.iterdir())}
    return {**job.facts(), "parity": dict(parity), "result": result}


def _export_onnx(job: Job) -> dict[str, Any]:
    """Write the recipe's programs, each compared with torch on seeded inputs before any is published."""
    recipe, run, request = job.recipe, job.run, job.request
    runtime, preprocess = programs.ready(request.opset, request.dtype), run.manifest.preprocess
    weights = recipe.size(preprocess).weights
    warn_of_more(programs.peak_bytes(weights, request.dtype), f"an export of {weights:,} weights to ONNX", job.console)
    built = programs.load(recipe, run, job.console)
    planned = recipe.programs(built, preprocess, request.batches)
    needed = programs.needed_bytes(planned, request.dtype)
    check_room(job.folder, needed, what="ONNX programs need", option="--out")
    with models.publish_folder(job.folder, "exporting to") as (made, facts):
        writer = programs.Writer(made, runtime, request.opset, request.dtype)
        written = []
        with job.console.progress("export", len(planned), "programs") as bar:
            for program in planned:
                written.append(writer.write(program))
                bar.advance()
        rehearsed = recipe.rehearse(built, preprocess, planned, writer.run, request.dtype)
        if built.tokenizer is not None:
            built.tokenizer.save_pretrained(made)
        told = {"programs": written, **_rehearsed_facts(rehearsed)}
        files.write_json(made / ONNX_CARD, {**_onnx_card(run, request), **told})
        files.write_text(made / README, card_text(recipe, run, Published(job.form)))
        facts |= {**job.facts(), "result": {"format": job.form, **told}}
    _say_differences(written, rehearsed, job.console)
    return facts


def _rehearsed_facts(rehearsed: Rehearsed) -> dict[str, Any]:
    agree = {} if rehearsed.choices_agree is None else {"choices_agree": rehearsed.choices_agree}
    return {"rehearsed": dict(rehearsed.apart), **agree}


def _say_differences(written: Sequence[dict[str, Any]], rehearsed: Rehearsed, console: Console) -> None:
    worst = max(program["max_difference"] for program in written)
    console.say(f"{len(written)} programs, outputs differ from torch by {worst:.1e} at most")
    for what, difference in rehearsed.apart.items():
        console.say(f"{what}: differ by {difference:.1e} of the largest number of a kind at most")
    if rehearsed.choices_agree is not None:
        console.say(f"first choices agree at {rehearsed.choices_agree:.1%} of the answered places")


def _onnx_card(run: runs.Run, request: ExportRequest) -> dict[str, Any]:
    preprocess = run.manifest.preprocess
    return {
        "format": 1,
        "from_run": run.name,
        "recipe": run.manifest.recipe,
        "opset": request.opset,
        "dtype": request.dtype,
        "window": preprocess.facts(),
        "preprocess": preprocess.model_dump(mode="json"),
    }
