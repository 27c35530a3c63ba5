"""Handles failed Hub requests: retries temporary failures, and explains the others in one HubError."""

import importlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils._http import parse_ratelimit_headers

from halfbyte.trainer.errors import HubError

log = logging.getLogger(__name__)

T = TypeVar("T")

# The client's HTTP library is httpx before huggingface_hub 2 and httpx2 from version 2 on.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_HTTP: Any = importlib.import_module(HTTP_ERROR.__module__.partition(".")[0])
_DROPPED = (_HTTP.TimeoutException, _HTTP.NetworkError, _HTTP.RemoteProtocolError)
_TEMPORARY = (408, 429, 500, 502, 503, 504)  # the statuses that the client itself retries

_PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry
_LONGEST_WAIT = 900.0  # seconds
_MAX_CHARACTERS = 300  # of a message that is quoted from the Hub
_QUERY = re.compile(r"(https?://[^\s?]+)\?[^\s)]*")  # the query string of a file's URL holds its signature

Access = Literal["read", "write"]


def with_retries(call: Callable[[], T]) -> T:
    """Calls the Hub, retrying up to four times while the failure may be temporary, and returns the result.

    Waits 1, 2, 4 and 8 seconds between the attempts, or as long as the Hub asks for, up to 900 seconds. The
    last failure is raised unchanged.

    Use it for calls that the client does not retry: whoami, repository information, create, commit and most
    of a download. The client retries uploads and listings, and the Xet storage client retries everything for
    minutes.
    """
    for pause in _PAUSES:
        try:
            return call()
        except (HTTP_ERROR, OSError, json.JSONDecodeError) as error:
            cause = _cause(error)
            wait = _wait(cause, pause)
            if wait is None:
                raise
            log.warning("the Hub: %s; retrying in %g s", _described(cause), wait)
            time.sleep(wait)
    return call()


@contextmanager
def hub_errors(doing: str, repository: str | None = None, access: Access = "write") -> Iterator[None]:
    """Converts every error that the Hub client raises in the block into one HubError.

    The message states what the trainer was doing (`doing`), what went wrong and what to do.

    Args:
        doing: The start of the message, such as "downloading owner/name".
        repository: The repository, as owner/name, whose page the message links to.
        access: The access that the block needs to the repository.

    Raises:
        HubError: The block raised an error of the client. A HubError from the block passes unchanged.
    """
    try:
        yield
    except HubError:
        raise
    except LocalTokenNotFoundError as error:
        raise HubError(
            f"{doing}: not logged in to the Hub; create a token with write access at {tokens_page()}, then log in"
            " with `hf auth login` or set HF_TOKEN"
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{doing}: HF_HUB_OFFLINE is set; unset it to reach the Hub") from error
    except (RuntimeError, LocalEntryNotFoundError) as error:
        # The client wraps the errors of uploads, and of downloads of files that are not in its cache.
        if isinstance(error.__cause__, (OSError, HTTP_ERROR, ValueError)):
            with hub_errors(doing, repository, access):
                raise error.__cause__ from None
        if isinstance(error, LocalEntryNotFoundError):
            raise HubError(f"{doing}: {_clean(str(error))}") from error
        # The Xet storage client raises a plain RuntimeError for every failure.
        raise HubError(
            f"{doing}: the transfer failed: {_clean(str(error))}; check the connection and try again, or set"
            " HF_HUB_DISABLE_XET=1 to transfer without Xet storage"
        ) from error
    except (OSError, HTTP_ERROR, ValueError, KeyError) as error:
        raise HubError(f"{doing}: {_described(error)}{_advice(error, repository, access)}") from error


def tokens_page() -> str:
    """Returns the URL of the page where tokens are created and edited."""
    return f"{constants.ENDPOINT}/settings/tokens"


def page(repository: str, kind: str = "model") -> str:
    """Returns the URL of a repository's page."""
    return f"{constants.ENDPOINT}/{'' if kind == 'model' else f'{kind}s/'}{repository}"


def status_of(error: Exception) -> int | None:
    """Returns the HTTP status of an error, or None if there was no response."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _cause(error: Exception) -> Exception:
    """Returns the failure itself: the client wraps it when the files are not in its cache either."""
    cause = error.__cause__
    return cause if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, Exception) else error


def _wait(error: Exception, pause: float) -> float | None:
    """Returns the seconds to wait before a retry: as the Hub asks for, else `pause`. None: do not retry."""
    # The client raises an OSError without errno when a file's length differs from the announced length.
    if isinstance(error, (*_DROPPED, json.JSONDecodeError)) or (type(error) is OSError and not error.errno):
        return pause
    if status_of(error) not in _TEMPORARY:
        return None
    requested = _requested_wait(error)
    wait = pause if requested is None else requested + 1.0
    return wait if wait <= _LONGEST_WAIT else None


def _requested_wait(error: Exception) -> float | None:
    """Returns the seconds to wait according to the response's Retry-After or rate limit headers, if any."""
    headers = error.response.headers  # type: ignore[attr-defined]
    retry_after = headers.get("Retry-After", "")
    if retry_after.isdigit():
        return float(retry_after)
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def _described(error: Exception) -> str:
    status = status_of(error)
    if status is not None:
        message = getattr(error, "server_message", None)
        return f"the Hub responded with status {status}" + (f" ({_clean(message)})" if message else "")
    if isinstance(error, UnicodeEncodeError):
        return "the token contains characters that are not allowed in a token"
    if isinstance(error, json.JSONDecodeError | KeyError):
        return "the Hub's response has an unexpected format"
    if isinstance(error, HTTP_ERROR):
        # Leave out the error's text: it may quote the request headers, and one of them holds the token.
        return f"no response from {constants.ENDPOINT} ({type(error).__name__})"
    return _clean(str(error)) or type(error).__name__


def _advice(error: Exception, repository: str | None, access: Access) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"; get the token from {tokens_page()}, then log in with `hf auth login` or set HF_TOKEN"
    status = status_of(error)
    url = constants.ENDPOINT if repository is None else page(repository)
    if status is not None and status < 500 and _is_file_storage(error):
        # File storage uses signed URLs that expire after a while.
        return (
            "; push again: files that are already uploaded are not sent twice"
            if access == "write"
            else "; start again: files that are already downloaded are not fetched twice"
        )
    if status == 401:
        return (
            f"; the token is invalid or has expired: create a token at {tokens_page()}, then log in with"
            " `hf auth login` or set HF_TOKEN"
        )
    if status == 403:
        return f"; give the token {access} access to the repository at {tokens_page()}, or see {url}"
    if status in (404, 410):
        return f"; check that it exists and that you have {access} access: {url}"
    if status in (409, 412):
        return f"; the repository changed at the same time: see {url}, and try again"
    if status == 429:
        requested = _requested_wait(error)
        return "; too many requests: try again " + (
            "later" if requested is None else f"in {requested / 60:.0f} minutes"
        )
    if status is not None and status >= 500:
        return "; the Hub has a problem (see https://status.huggingface.co): try again later"
    if status is None and isinstance(error, (HTTP_ERROR, ConnectionError)):
        return "; check the connection and try again"
    # An errno comes from this machine, such as a full disk. The Hub's page would not help.
    return "" if getattr(error, "errno", None) else f"; see {url}"


def _is_file_storage(error: Exception) -> bool:
    """Returns True if the failed request went to file storage and not to the Hub's API."""
    return not str(error.response.request.url).startswith(constants.ENDPOINT)  # type: ignore[attr-defined]


def _clean(text: str) -> str:
    """Returns the text as one line of limited length without the token and without signatures of URLs."""
    token = get_token()
    if token:
        text = text.replace(token, "(token)")
    text = _QUERY.sub(r"\1", " ".join("".join(c if c.isprintable() else " " for c in text).split()))
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + "…"
