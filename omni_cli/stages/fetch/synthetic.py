"""Chunks of the synthetic world, rendered instead of fetched: one worker a clip, one chunk written when it is whole."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from omni_cli import files
from omni_cli.errors import OmniError, UsageError
from omni_cli.formats.physical_ai_av import CAMERAS, MOST_CHUNKS
from omni_cli.report import Console, counted
from omni_cli.stages.fetch import landing
from omni_cli.stages.fetch.request import FetchRequest
from omni_cli.stages.fetch.selection import parse_chunks
from omni_cli.stages.pool import run_pool
from omni_cli.world.clip import SyntheticSpec
from omni_cli.world.dataset import ClipFiles, render_clip, write_chunk, write_indices

SPEC_FILE = "synthetic.json"
_SECONDS_A_CLIP = 3600.0


def fetch_synthetic(request: FetchRequest, console: Console) -> dict[str, Any]:
    """Render the chunks asked for that are not there, whole and verified.

    Raises:
        UsageError: chunks cannot be, or the folder holds another world.
        OmniError: a clip could not be rendered.
    """
    if request.clips or not request.chunks:
        raise UsageError("the synthetic world is asked for by chunks: omni fetch --source synthetic --chunks 2")
    chunks = parse_chunks(request.chunks, range(MOST_CHUNKS))
    spec, folder = _spec(request), request.folder
    with request.held():
        made = _read_made(folder, spec)
        missing = [chunk for chunk in chunks if not _is_whole(folder, made.get(chunk))]
        if not request.dry_run:
            _render(request, spec, missing, made, console)
            _index(folder, spec, sorted(made))
    result = _result(request, chunks, len(missing), made)
    verb, there = "would render" if request.dry_run else "rendered", len(chunks) - len(missing)
    what = f"{counted(len(missing), 'chunk')} of {counted(spec.clips_per_chunk, 'clip')}"
    console.say(f"{verb} {what}; {there} already there; {folder}")
    return result


def _spec(request: FetchRequest) -> SyntheticSpec:
    cameras = tuple(camera for camera in CAMERAS if camera in (request.cameras or CAMERAS))
    return replace(request.synthetic, cameras=cameras)


def _read_made(folder: Path, spec: SyntheticSpec) -> dict[int, list[str]]:
    """Return the files of each chunk that an earlier call finished.

    Raises:
        UsageError: the folder holds another world.
    """
    path = folder / SPEC_FILE
    if not path.is_file():
        return {}
    record = files.read_json(path)
    wanted = _facts(spec)
    held = _facts(SyntheticSpec()) | record["spec"]  # an older record lacks what was not yet an option
    differing = [key for key in sorted(wanted.keys() | held.keys()) if wanted.get(key) != held.get(key)]
    if differing:
        differences = "; ".join(f"{key}: {held.get(key)} there, {wanted.get(key)} asked for" for key in differing)
        raise UsageError(f"{folder} holds another synthetic world ({differences}); use another --data, or delete it")
    return {int(chunk): names for chunk, names in record["chunks"].items()}


def _facts(spec: SyntheticSpec) -> dict[str, Any]:
    """Return the spec as JSON gives it back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(spec).items()}


def _is_whole(folder: Path, names: Sequence[str] | None) -> bool:
    return bool(names) and all(landing.is_landed(folder / name) for name in names or ())


def _render(
    request: FetchRequest, spec: SyntheticSpec, missing: Sequence[int], made: dict[int, list[str]], console: Console
) -> None:
    items = [(chunk, index) for chunk in missing for index in range(spec.clips_per_chunk)]
    workers = min(request.workers, os.cpu_count() or 1)
    finished: dict[int, list[ClipFiles]] = {chunk: [] for chunk in missing}
    with console.progress("render", len(items), "clips") as step:
        for outcome in run_pool(partial(_clip, spec), items, workers=workers, timeout_s=_SECONDS_A_CLIP):
            if outcome.error is not None or outcome.result is None:
                raise OmniError(f"clip {outcome.item} of the synthetic world failed: {outcome.error}; run again")
            chunk = outcome.item[0]
            finished[chunk].append(outcome.result)
            if len(finished[chunk]) == spec.clips_per_chunk:
                _write(request.folder, spec, chunk, finished.pop(chunk), made)
            step.advance(1)


def _index(folder: Path, spec: SyntheticSpec, chunks: Sequence[int]) -> None:
    """Write the indices of all chunks that are there; one that says the same already is left untouched."""
    with tempfile.TemporaryDirectory() as scratch:
        for fresh in write_indices(Path(scratch), spec, chunks):
            path = folder / fresh.relative_to(scratch)
            if files.verified_receipt(path, expect=files.read_receipt(fresh)) is None:
                files.write_bytes(path, fresh.read_bytes())
                files.write_receipt(path)


def _clip(spec: SyntheticSpec, item: tuple[int, int]) -> ClipFiles:
    return render_clip(spec, *item)


def _write(
    folder: Path, spec: SyntheticSpec, chunk: int, clips: Sequence[ClipFiles], made: dict[int, list[str]]
) -> None:
    paths = write_chunk(folder, spec, chunk, clips)
    made[chunk] = sorted(str(path.relative_to(folder)) for path in paths)
    record = {"spec": _facts(spec), "chunks": {str(number): names for number, names in sorted(made.items())}}
    files.write_json(folder / SPEC_FILE, record)


def _result(
    request: FetchRequest, chunks: Sequence[int], rendered: int, made: Mapping[int, Sequence[str]]
) -> dict[str, Any]:
    paths = [request.folder / name for chunk in chunks for name in made.get(chunk, ())]
    return {
        "source": request.source,
        "folder": str(request.folder),
        "dry_run": request.dry_run,
        "chunks": list(chunks),
        "clips": len(chunks) * request.synthetic.clips_per_chunk,
        "paths": [str(path) for path in paths],
        "bytes": sum(path.stat().st_size for path in paths if path.is_file()),
        "fetched": rendered,
        "skipped": len(chunks) - rendered,
    }
