"""What the Hub answers when it does not do what was asked: tried again, or told with the page to open."""

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

# The client's HTTP library: httpx below huggingface_hub 2, httpx2 from there on.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_HTTP: Any = importlib.import_module(HTTP_ERROR.__module__.partition(".")[0])
_DROPPED = (_HTTP.TimeoutException, _HTTP.NetworkError, _HTTP.RemoteProtocolError)
_PASSING = (408, 429, 500, 502, 503, 504)  # as the client has it for the calls that it repeats itself

_PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds
_LONGEST = 900.0
_SHOWN = 300  # characters of what the Hub says
_QUERY = re.compile(r"(https?://[^\s?]+)\?[^\s)]*")  # an address for files is signed there

Access = Literal["read", "write"]


def with_retries(call: Callable[[], T]) -> T:
    """The result of a call that the client makes once, made again where a fault may pass.

    The client repeats uploads and listings by itself, and that of Xet storage whatever it does, for minutes; who am I,
    what is there, create, commit and much of a download the client does not.
    """
    for pause in _PAUSES:
        try:
            return call()
        except (HTTP_ERROR, OSError, json.JSONDecodeError) as error:
            met = _met(error)
            wait = _wait(met, pause)
            if wait is None:
                raise
            log.warning("the Hub: %s; again in %g s", _described(met), wait)
            time.sleep(wait)
    return call()


@contextmanager
def hub_errors(doing: str, repository: str | None = None, access: Access = "write") -> Iterator[None]:
    """Within it, whatever the client raises becomes one HubError: what was being done, what is wrong, what to do.

    access: what is wanted of the repository.
    """
    try:
        yield
    except HubError:
        raise
    except LocalTokenNotFoundError as error:
        raise HubError(
            f"{doing}: not logged in to the Hub; make a token that may write at {tokens_page()}, then log in with"
            " `hf auth login` or set HF_TOKEN"
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{doing}: HF_HUB_OFFLINE is set; unset it to reach the Hub") from error
    except (RuntimeError, LocalEntryNotFoundError) as error:
        # The client wraps what happens to an upload, and to a download of what it has not either.
        if isinstance(error.__cause__, (OSError, HTTP_ERROR, ValueError)):
            with hub_errors(doing, repository, access):
                raise error.__cause__ from None
        if isinstance(error, LocalEntryNotFoundError):
            raise HubError(f"{doing}: {_clean(str(error))}") from error
        # Xet storage's client, which knows no finer kinds.
        raise HubError(
            f"{doing}: the transfer failed: {_clean(str(error))}; check the connection and try again, or set"
            " HF_HUB_DISABLE_XET=1 to go without Xet storage"
        ) from error
    except (OSError, HTTP_ERROR, ValueError, KeyError) as error:
        raise HubError(f"{doing}: {_described(error)}{_advice(error, repository, access)}") from error


def tokens_page() -> str:
    """Where tokens are made and given rights."""
    return f"{constants.ENDPOINT}/settings/tokens"


def page(repository: str, kind: str = "model") -> str:
    """The page of a repository."""
    return f"{constants.ENDPOINT}/{'' if kind == 'model' else f'{kind}s/'}{repository}"


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error came with."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _met(error: Exception) -> Exception:
    """What the client met with: it wraps that where the files are not in its cache either."""
    cause = error.__cause__
    return cause if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, Exception) else error


def _wait(error: Exception, pause: float) -> float | None:
    """Seconds until it is worth trying again: what the Hub asks for, else `pause`; None: it is not."""
    # The client raises an OSError of no number where a file has not the length that was announced.
    if isinstance(error, (*_DROPPED, json.JSONDecodeError)) or (type(error) is OSError and not error.errno):
        return pause
    if status_of(error) not in _PASSING:
        return None
    asked = _asked_for(error)
    wait = pause if asked is None else asked + 1.0
    return wait if wait <= _LONGEST else None


def _asked_for(error: Exception) -> float | None:
    """Seconds that the Hub's answer says to wait, by Retry-After or its rate limit."""
    headers = error.response.headers  # type: ignore[attr-defined]
    retry_after = headers.get("Retry-After", "")
    if retry_after.isdigit():
        return float(retry_after)
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def _described(error: Exception) -> str:
    status = status_of(error)
    if status is not None:
        said = getattr(error, "server_message", None)
        return f"the Hub answered {status}" + (f" ({_clean(said)})" if said else "")
    if isinstance(error, UnicodeEncodeError):
        return "the token holds characters that no token has"
    if isinstance(error, json.JSONDecodeError | KeyError):
        return "the Hub's answer could not be understood"
    if isinstance(error, HTTP_ERROR):
        # Without its text, which may quote headers, and the token is in one.
        return f"no answer from {constants.ENDPOINT} ({type(error).__name__})"
    return _clean(str(error)) or type(error).__name__


def _advice(error: Exception, repository: str | None, access: Access) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f": see {tokens_page()}, then `hf auth login` or HF_TOKEN"
    status = status_of(error)
    where = constants.ENDPOINT if repository is None else page(repository)
    if status is not None and status < 500 and _asked_elsewhere(error):
        # Where files are kept, at an address that holds for a while.
        again = (
            "push again, and what is uploaded" if access == "write" else "start again, and what is downloaded"
        )
        return f"; {again} already is not sent twice"
    if status == 401:
        return f"; the token is not valid (any longer): see {tokens_page()}, then `hf auth login` or HF_TOKEN"
    if status == 403:
        return f"; give the token the right to {access} there at {tokens_page()}, or see {where}"
    if status in (404, 410):
        return f"; see whether it is there, and yours to {access}: {where}"
    if status in (409, 412):
        return f"; something else changed it at the same time: see {where}, and try again"
    if status == 429:
        asked = _asked_for(error)
        return "; too many requests: try again " + (
            "later" if asked is None else f"in {asked / 60:.0f} minutes"
        )
    if status is not None and status >= 500:
        return "; trouble at the Hub (https://status.huggingface.co): try again later"
    if status is None and isinstance(error, (HTTP_ERROR, ConnectionError)):
        return "; check the connection and try again"
    # What the machine itself refuses is no matter of the Hub's.
    return "" if getattr(error, "errno", None) else f"; see {where}"


def _asked_elsewhere(error: Exception) -> bool:
    return not str(error.response.request.url).startswith(constants.ENDPOINT)  # type: ignore[attr-defined]


def _clean(text: str) -> str:
    """One line that ends somewhere and holds neither a token nor a signature."""
    token = get_token()
    if token:
        text = text.replace(token, "(token)")
    text = _QUERY.sub(r"\1", " ".join("".join(c if c.isprintable() else " " for c in text).split()))
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
