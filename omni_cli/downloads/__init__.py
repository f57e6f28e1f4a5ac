"""The Hugging Face hub as omni uses it: a pinned commit, promised hashes, patient retries, one-line errors.

huggingface_hub lists, resolves and authenticates. The bytes come through a loop of our own: measured on 2.4.0, its
downloader compares sizes only, starts again from zero after a kill, and gives up on one reset connection.

    hub.py        what can be asked: a commit, the promises for files, a file, a range of one
    transfer.py   one answer of a server, checked and appended to what is there
    partial.py    what is there of a file, across kills and processes
    retries.py    how long to wait, and when to give up
    messages.py   what a failure means and what to do

No text of a library's exception reaches a message: it may hold a token or a signed address.
"""

from omni_cli.downloads.hub import Hub, open_hub
from omni_cli.downloads.messages import FileAbsentError, RevisionGoneError, TransferError
from omni_cli.downloads.meter import Meter, StoppedError
from omni_cli.downloads.partial import claimed, sweep
from omni_cli.downloads.paths import unsafe_path_reason
from omni_cli.downloads.remote import RemoteFile
from omni_cli.downloads.retries import Patience

__all__ = [
    "FileAbsentError",
    "Hub",
    "Meter",
    "Patience",
    "RemoteFile",
    "RevisionGoneError",
    "StoppedError",
    "TransferError",
    "claimed",
    "open_hub",
    "sweep",
    "unsafe_path_reason",
]
