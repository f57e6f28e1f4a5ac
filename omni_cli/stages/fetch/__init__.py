"""`omni fetch`: raw data from the hub, from a folder, or from the synthetic world, whole, verified and only once."""

from typing import Any

from omni_cli.config import nearest
from omni_cli.errors import UsageError
from omni_cli.report import Console
from omni_cli.stages.fetch.comma2k19 import import_comma2k19
from omni_cli.stages.fetch.dgp import import_dgp
from omni_cli.stages.fetch.hub import fetch_hub
from omni_cli.stages.fetch.imports import import_physical_ai_av
from omni_cli.stages.fetch.openpilot import import_openpilot
from omni_cli.stages.fetch.purge import PurgeRequest, purge
from omni_cli.stages.fetch.request import FetchRequest
from omni_cli.stages.fetch.selection import camera_names, feature_names, parse_size
from omni_cli.stages.fetch.synthetic import fetch_synthetic
from omni_cli.world.clip import SyntheticSpec

__all__ = [
    "FetchRequest",
    "PurgeRequest",
    "SyntheticSpec",
    "camera_names",
    "feature_names",
    "fetch",
    "parse_size",
    "purge",
]

SOURCES = ("physical_ai_av", "synthetic", "openpilot", "comma2k19", "dgp")


def fetch(request: FetchRequest, console: Console) -> dict[str, Any]:
    """Bring a source's raw data to `DATA/raw/SOURCE`; run again, it finishes what is missing and nothing else.

    Returns:
        The paths and bytes of what is there now, what was fetched and skipped, and what is absent upstream.

    Raises:
        UsageError: the request cannot be.
        DataError: what was found is not this source's data.
        OmniError: access, network or disk; or files that failed.
    """
    if request.workers < 1:
        raise UsageError(f"--workers {request.workers}: expected 1 or more")
    if request.features and request.source != "physical_ai_av":
        raise UsageError(f"--features: {request.source} has none to choose from; leave it out")
    match request.source:
        case "physical_ai_av" if request.origin is not None:
            return import_physical_ai_av(request, request.origin, console)
        case "physical_ai_av":
            return fetch_hub(request, console)
        case "synthetic" if request.origin is None:
            return fetch_synthetic(request, console)
        case "openpilot" if request.origin is not None:
            return import_openpilot(request, request.origin, console)
        case "comma2k19" if request.origin is not None:
            return import_comma2k19(request, request.origin, console)
        case "dgp" if request.origin is not None:
            return import_dgp(request, request.origin, console)
        case "dgp":
            raise UsageError("DGP scenes, such as DDAD's, are imported: omni fetch --source dgp --from SCENES")
        case "comma2k19":
            raise UsageError("comma2k19 is a torrent, then imported: omni fetch --source comma2k19 --from CHUNKS")
        case "openpilot":
            raise UsageError("openpilot routes are imported: omni fetch --source openpilot --from ROUTES")
        case "synthetic":
            raise UsageError("the synthetic world is rendered, not imported: leave out --from")
    raise UsageError(f"cannot fetch {request.source!r}; {nearest(request.source, SOURCES)}")
