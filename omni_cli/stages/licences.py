"""Data under a licence that ends, forbids copies elsewhere, and asks to know where every copy lies.

Source: NVIDIA Autonomous Vehicle Dataset License Agreement, 3 (results of benchmarking are confidential), 4.6 (no
redistribution, no derivative works), 4.8 (keep track of copies), 4.9 and 8 (ends 12 months after the first download;
then destroy all copies).
"""

from collections.abc import Iterable
from pathlib import Path

from omni_cli.errors import DataError, UsageError
from omni_cli.formats.fetched import read_origin
from omni_cli.formats.physical_ai_av import LICENCE, REPOSITORY
from omni_cli.sources.physical_ai_av import find_root
from omni_cli.stages.ledger import SHARDS, register_copy

SOURCE = "physical_ai_av"  # the one source whose licence ends
_ENDING = frozenset({LICENCE})
_FORBIDDEN = "its section 4.6 forbids redistribution and derivative works, its section 3 to tell results"


def check_push(provenance_licences: Iterable[str], override: str | None) -> None:
    """Refuse to push to a hub what was made of data whose licence forbids it.

    Args:
        provenance_licences: of all data that an artefact was made of.
        override: the licence that the user names to push all the same; None: nobody did.

    Raises:
        UsageError: one of the licences forbids it, and the override does not name that one.
    """
    for licence in forbidding(provenance_licences):
        if override != licence:
            raise UsageError(
                f"made of data under the {licence}: {_FORBIDDEN}; nothing is pushed, to a private repository neither; "
                f'if its licensor gave you the right, name the licence: --licence "{licence}"'
            )


def forbidding(licences: Iterable[str]) -> tuple[str, ...]:
    """Return those licences that forbid to share what is made of the data: of several, the strictest counts."""
    return tuple(sorted(_ENDING.intersection(licences)))


def implied(source: str) -> tuple[str, ...]:
    """Return the licence of a source's data where nothing was noted of it; none of what users recorded themselves."""
    return (LICENCE,) if source == SOURCE else ()


def ends(licence: str) -> bool:
    """Return whether a licence ends, so that every copy must be known and destroyed."""
    return licence in _ENDING


def register_shards(data: Path, source: str, raw: Path, out: Path) -> None:
    """Enter a shard folder into the ledger of DATA before the first shard is in it, where its raw data ask for that.

    Args:
        data: the folder with the ledger.
        source: the source's name.
        raw: its raw data.
        out: the shard folder.
    """
    facts = _facts(source, raw)
    licence = str(facts.get("licence", "".join(implied(source))))
    if ends(licence):
        register_copy(data, source, out, SHARDS, repository=str(facts.get("repository", REPOSITORY)), licence=licence,
                      revision=str(facts.get("revision", "unknown")), since=facts.get("first_fetched"))  # fmt: skip


def _facts(source: str, raw: Path) -> dict[str, str]:
    """Return what `omni fetch` noted of a folder's origin; nothing where it was not fetched by it."""
    if source not in (SOURCE, "synthetic"):
        return {}
    try:
        root = find_root(raw)
    except DataError:
        return {}
    return read_origin(root)
