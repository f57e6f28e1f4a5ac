"""The errors a user can act on; anything else that escapes is our bug and shows a traceback.

    OmniError            1   something failed that a re-run or another input may mend
    ├── UsageError       2   wrong option, key, value or name
    ├── DataError        3   data refused: what was found, what was expected, what to do
    └── Preempted       75   stopped by a signal after saving: run the same command again

Every message says what was found, what was expected and what to do, in one line.
"""


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
