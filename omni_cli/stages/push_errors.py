"""What a failed push means, in one line with what to do; no token, signed address or text of a server is in it."""

from collections.abc import Iterator

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from omni_cli.errors import OmniError, UsageError, refused_by_machine

_TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_AGAIN = "what has arrived is kept: run the same command again"


def explain_push(error: BaseException, repository: str, host: str) -> OmniError:
    """Return the error to raise for a push that failed for good.

    Args:
        error: what huggingface_hub raised; its own text is never used.
        repository: where it was to go.
        host: the hub's name, without credentials.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            return _explain_answer(cause.response.status_code, repository, host)
        if isinstance(cause, OfflineModeIsEnabled):
            return OmniError(f"HF_HUB_OFFLINE is set, so nothing was pushed to {repository}; unset it and run again")
    for cause in causes:
        if isinstance(cause, OSError) and (line := refused_by_machine(cause, repository)):
            return OmniError(line)
    kind = type(causes[-1]).__name__
    return OmniError(f"{host} broke off or cannot be reached ({kind}) for {repository}; check the network; {_AGAIN}")


def _explain_answer(status: int, repository: str, host: str) -> OmniError:
    organisation = repository.partition("/")[0]
    if status == 400:
        return OmniError(
            f"{host} answers 400 for {repository}: it takes what was sent for invalid, and would again; look at the "
            "header of README.md, and report it if omni wrote it so"
        )
    if status == 401:
        return OmniError(
            f"{host} answers 401 for {repository}: the token was refused; make a new write token at {_TOKENS_PAGE}, "
            "and run `hf auth login` or set HF_TOKEN"
        )
    if status == 403:
        return OmniError(
            f"{host} answers 403 for {repository}: this token may not write to {organisation}; make one with write "
            f"access at {_TOKENS_PAGE}, or push to an organisation of your own"
        )
    if status == 409:
        return UsageError(
            f"{host} has something else than a model that this account may see under the name {repository}; choose "
            "another name"
        )
    if status == 412:
        return OmniError(f"{repository} was changed by another push meanwhile; run the same command again")
    return OmniError(f"{host} answers {status} for {repository}; {_AGAIN}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
