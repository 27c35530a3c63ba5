"""Formats lists, values and unknown names for error messages."""

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any


def in_prose(names: Iterable[str]) -> str:
    """Joins alternatives for a sentence: `mse, huber or l1`. `names` must not be empty."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Returns the one of `names` that `name` is probably a typo of; None if none is similar."""
    matches = difflib.get_close_matches(name.lower().replace("-", "_"), list(names), n=1)
    return matches[0] if matches else None


def unknown_name(kind: str, name: str, names: Iterable[str]) -> str:
    """Returns the message for a `name` that is none of `names`, with the most similar one as a suggestion."""
    names = list(names)
    near = nearest(name, names)
    hint = f"; did you mean '{near}'?" if near else ""
    return f"unknown {kind} '{name}', expected {in_prose(names)}{hint}"


def shown(value: Any) -> str:
    """Formats a value roughly as in a recipe, cut to at most 60 characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return printable(text)


def printable(value: object) -> str:
    """Returns text as one line, with escapes for characters that a terminal would obey instead of showing.

    These are control characters, line separators, half characters and those that change the direction of text, in
    names of files, keys and captions.
    """
    text = str(value)
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
