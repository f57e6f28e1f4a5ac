"""Which names of a repository may become paths here. A repository is written by strangers; a name may be an attack."""

import re
import unicodedata
from collections.abc import Callable, Collection

from omni_cli.files import RECEIPT_SUFFIX, TEMPORARY_MARK

_LONGEST_PATH_BYTES = 1024
_LONGEST_NAME_BYTES = 180  # 255 on most disks, less what a receipt's temporary name adds
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\.|$)", re.IGNORECASE)
_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode categories: control, format, surrogate, separators of lines


def unsafe_path_reason(path: str, reserved: Collection[str] = ()) -> str | None:
    """Return why a repository's path must not become a path of ours, or None where it may.

    The rules are those of POSIX and of Windows at once, so that a folder that was fetched here can be copied there.

    Args:
        path: as the repository lists it, `/` between its parts.
        reserved: what the folder's top level keeps for omni's own records, whatever the case of its letters.
    """
    parts = path.split("/")
    if not path or len(path.encode(errors="replace")) > _LONGEST_PATH_BYTES:
        return "an empty or overlong path"
    if path.casefold() in {name.casefold() for name in reserved}:
        return "a name of omni's own records"
    return next((reason for part in parts if (reason := _unsafe_name_reason(part))), None)


def _unsafe_name_reason(name: str) -> str | None:
    return next((reason for is_unsafe, reason in _RULES if is_unsafe(name)), None)


def _is_hidden_or_ours(name: str) -> bool:
    return name.startswith(".") or TEMPORARY_MARK in name or name.casefold().endswith(RECEIPT_SUFFIX)


def _is_changed_by_windows(name: str) -> bool:
    return name[-1] in ". " or name[0] == " " or _WINDOWS_DEVICE.match(name) is not None


_RULES: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda name: name in ("", ".", ".."), "a path that is absolute or leaves its folder"),
    (lambda name: any(unicodedata.category(letter) in _INVISIBLE for letter in name), "invisible characters"),
    (lambda name: any(letter in name for letter in '\\:*?"<>|'), "a backslash, a drive letter or a wildcard"),
    (lambda name: len(name.encode()) > _LONGEST_NAME_BYTES, "an overlong name"),
    (_is_hidden_or_ours, "a hidden name, or one of omni's own records"),
    (_is_changed_by_windows, "a name that Windows changes or refuses"),
    (lambda name: not unicodedata.is_normalized("NFC", name), "letters that are spelled in two ways"),
)
