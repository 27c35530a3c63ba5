"""Configures the Hub client: a timeout for stalled connections, no signed URLs in logs, optional progress bars."""

import logging
import re

import huggingface_hub
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.tqdm import disable_progress_bars

STALLED = 300.0
"""Seconds without data after which a connection counts as dropped. The client's default has no limit."""

_QUERY = re.compile(r"\?\S+")


def prepare_client(*, bars: bool) -> None:
    """Sets the client's timeout and strips query strings from the URLs it logs.

    Without `bars`, hides progress bars.
    """
    huggingface_hub.set_client_factory(_client)
    if not bars:
        disable_progress_bars()
    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(existing, _WithoutQueries) for existing in handler.filters):
            handler.addFilter(_WithoutQueries())


def _client():  # type: ignore[no-untyped-def]  # returns a client of httpx or httpx2, see HTTP_ERROR in `failures`
    client = default_client_factory()
    client.timeout = STALLED
    return client


class _WithoutQueries(logging.Filter):
    """Removes the query strings of URLs from log records, because upload URLs carry a signature."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = _QUERY.sub("", record.getMessage()), ()
        return True
