"""Models on the hub, at any revision: `ORGANISATION/NAME`, or `ORGANISATION/NAME@REVISION`."""

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from omni_cli.models.families import split_revision
from omni_cli.models.model_folders import reading

_OF_A_MODEL = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")


def fetch_with(card: str, model: str) -> Path | None:
    """Return the folder of the hub's cache that holds a whole model and a file `card`; None where it has no such file.

    Raises:
        OmniError: there is no such model or revision, or the hub cannot be reached.
    """
    if fetch_file(card, model) is None:
        return None
    name, revision = split_revision(model)
    with reading("fetch model", model):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_OF_A_MODEL)))


def fetch_file(path: str, model: str) -> Path | None:
    """Return where the hub's cache holds one file of a model; None where that has no such file.

    Raises:
        OmniError: there is no such model or revision, or the hub cannot be reached.
    """
    name, revision = split_revision(model)
    with reading("fetch model", model):
        try:
            return Path(hf_hub_download(name, path, revision=revision))
        except EntryNotFoundError:  # or nothing at all of it is here and nothing can be fetched, which its loader says
            return None
