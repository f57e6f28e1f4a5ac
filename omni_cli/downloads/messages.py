"""What a failed request means, in one line with what to do; neither tokens nor signed addresses are in it."""

import httpx2
from huggingface_hub import get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from omni_cli.downloads.retries import (
    ExpiredAddressError,
    NotAHubError,
    TooSlowError,
    UnexpectedAnswerError,
    WrongContentError,
    asked_pause_s,
)
from omni_cli.errors import OmniError, UsageError, refused_by_machine

_TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_LOG_IN = "run `hf auth login` or set HF_TOKEN"


class FileAbsentError(OmniError):
    """The hub has no such file at this commit."""


class RevisionGoneError(UsageError):
    """The hub has no such branch, tag or commit, or has it no more."""


class TransferError(OmniError):
    """One file could not be fetched, others may."""


def explain(cause: BaseException, what: str, repository: str, host: str) -> OmniError:
    """Return the error to raise for a failure that is final.

    Args:
        cause: what a request raised; its own text is never used.
        what: the file or the repository that was asked for.
        repository: its name.
        host: the hub's name, without credentials.
    """
    if isinstance(cause, HfHubHTTPError):
        return _explain_answer(cause, what, repository, host)
    if isinstance(cause, WrongContentError | ExpiredAddressError | UnexpectedAnswerError):
        return _explain_file(cause, what, host)
    if isinstance(cause, NotAHubError | httpx2.InvalidURL | httpx2.TooManyRedirects):
        return OmniError(f"{host} does not answer like a hub for {what}; check HF_ENDPOINT and your proxy")
    if isinstance(cause, OfflineModeIsEnabled):
        return OmniError(f"HF_HUB_OFFLINE is set and {what} is not here: unset it, or import it with --from DIR")
    if isinstance(cause, OSError) and cause.errno is not None:
        return OmniError(refused_by_machine(cause, what) or f"{what}: {cause.strerror}; run the same command again")
    kind = "too slow" if isinstance(cause, TooSlowError) else type(cause).__name__
    return OmniError(
        f"cannot reach {host} ({kind}) for {what}; check the network and HF_ENDPOINT, then run the same command "
        "again, or import files you have with --from DIR"
    )


def _explain_file(cause: BaseException, what: str, host: str) -> OmniError:
    if isinstance(cause, WrongContentError):
        return TransferError(f"{what}: its content differs from the hub's hash, {cause.times} times over; run again")
    if isinstance(cause, ExpiredAddressError):
        return TransferError(f"{what}: the storage refuses every address that {host} signs; check this machine's clock")
    return TransferError(f"{what}: {cause}; check HF_ENDPOINT and your proxy, then run the same command again")


def _explain_answer(cause: HfHubHTTPError, what: str, repository: str, host: str) -> OmniError:
    status = cause.response.status_code
    if isinstance(cause, RemoteEntryNotFoundError):
        return FileAbsentError(f"{what}: not in {repository} at this commit")
    if isinstance(cause, RevisionNotFoundError):
        return RevisionGoneError(f"{repository} has no such revision; give a branch, tag or commit with --revision")
    if status in (401, 403) and not _is_unknown(cause):
        return (_explain_token if status == 401 else _explain_gate)(cause, what, repository, host)
    if isinstance(cause, RepositoryNotFoundError):
        return UsageError(
            f"{host} has no dataset {repository} that this account may see; check HF_ENDPOINT, the repository's name "
            "and whose token it is"
        )
    return _explain_status(cause, what, host)


def _explain_status(cause: HfHubHTTPError, what: str, host: str) -> OmniError:
    status, asked_s = cause.response.status_code, asked_pause_s(cause)
    if status == 429:
        when = f"in {asked_s:.0f} s" if asked_s else "in five minutes"
        return TransferError(f"{what}: {host} limits the rate (429); run again {when}, or with --workers 2")
    return TransferError(f"{what}: {host} answers {status}; run the same command again")


def _is_unknown(cause: HfHubHTTPError) -> bool:
    headers = cause.response.headers
    is_token_known = get_token() is not None and "credentials" not in headers.get("X-Error-Message", "")
    return headers.get("X-Error-Code") == "RepoNotFound" and is_token_known


def _explain_token(_: HfHubHTTPError, what: str, repository: str, host: str) -> OmniError:
    """Tell a missing token from a refused one; a hub answers 401 to both."""
    page = f"https://{host}/datasets/{repository}"
    if get_token() is None:
        return OmniError(
            f"{host} answers 401 for {what}: no token was found; accept the terms at {page}, make a read token at "
            f"{_TOKENS_PAGE}, and {_LOG_IN}"
        )
    return OmniError(
        f"{host} answers 401 for {what}: the token was refused, it is expired, revoked or mistyped; make a new one at "
        f"{_TOKENS_PAGE}, and {_LOG_IN}"
    )


def _explain_gate(cause: HfHubHTTPError, what: str, repository: str, host: str) -> OmniError:
    """Tell apart why a good token may not read: the hub says it in words only."""
    said = cause.response.headers.get("X-Error-Message", "").lower()
    page = f"https://{host}/datasets/{repository}"
    reasons = {
        "disabled": f"the repository was disabled; read {page}",
        "rejected": f"the authors took this account's access back, or refused it; ask them at {page}",
        "awaiting": f"the authors have not yet answered this account's request; wait for them, see {page}",
        "token settings": f"the token may not read gated repositories; allow it at {_TOKENS_PAGE}",
    }
    terms = f"this account has not accepted the dataset's terms; accept them at {page} and run the same command again"
    reason = next((reason for word, reason in reasons.items() if word in said), terms)
    return OmniError(f"{host} answers 403 for {what}: {reason}")
