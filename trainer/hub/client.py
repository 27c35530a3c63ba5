"""The Hub's client as it is used here: quiet where nobody watches, and never waiting for ever."""

import logging
import re

import huggingface_hub
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.tqdm import disable_progress_bars

STALLED = 300.0
"""Seconds without a byte after which a connection counts as dropped; the client itself would wait on."""

_QUERY = re.compile(r"\?\S+")


def prepare_client(*, bars: bool) -> None:
    """Settles how the client connects, what of an address it logs, and whether it may draw bars of transfers."""
    huggingface_hub.set_client_factory(_client)
    if not bars:
        disable_progress_bars()
    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(one, _WithoutQueries) for one in handler.filters):
            handler.addFilter(_WithoutQueries())


def _client():  # type: ignore[no-untyped-def]  # of the library that the client speaks HTTP with, see `hub_answers`
    client = default_client_factory()
    client.timeout = STALLED
    return client


class _WithoutQueries(logging.Filter):
    """Addresses for uploads carry a signature."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = _QUERY.sub("", record.getMessage()), ()
        return True
