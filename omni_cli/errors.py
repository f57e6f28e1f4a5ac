"""The errors a user can act on; anything else that escapes is our bug and shows a traceback.

    OmniError            1   something failed that a re-run or another input may mend
    ├── UsageError       2   wrong option, key, value or name
    ├── DataError        3   data refused: what was found, what was expected, what to do
    └── Preempted       75   stopped by a signal after saving: run the same command again

Every message says what was found, what was expected and what to do, in one line.
"""

import errno

# What the machine refuses is no bug of ours wherever it happens.
_REMEDIES = {
    errno.EROFS: "choose another folder",
    errno.EACCES: "choose another folder, or ask for the right to it",
    errno.EPERM: "choose another folder, or ask for the right to it",
    errno.EEXIST: "a folder was expected there; choose another",
    errno.ENOTDIR: "a folder was expected there; choose another",
    errno.EISDIR: "a file was expected there; choose another",
    errno.ENOSPC: "free the disk and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EMFILE: "allow more of them with ulimit -n and run the same command again",
    errno.ENAMETOOLONG: "a name there is too long for this machine; give a shorter one",
    errno.EIO: "the disk failed; choose another folder, or mend it and run the same command again",
}


def refused_by_machine(error: OSError, place: object = "a file") -> str | None:
    """Return the line for what a disk or its rights refuse, None for any other error.

    Args:
        error: as it was raised.
        place: what was written, where the error does not say.
    """
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{error.filename or place}: {str(error.strerror).lower()}; {remedy}" if remedy else None


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of a library says, the name of its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class OmniError(Exception):
    """Base of every error whose message is written for the user."""

    exit_code = 1


class UsageError(OmniError):
    """The command line, a profile or a config file asks for something that cannot be."""

    exit_code = 2


class DataError(OmniError):
    """Input data were refused."""

    exit_code = 3


class Preempted(OmniError):
    """The work was stopped by a signal and its state saved."""

    exit_code = 75
