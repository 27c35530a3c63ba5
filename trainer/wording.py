"""Phrases that error messages share."""

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Families import diffusers, which takes seconds: only those a run uses are imported, when it uses them.
    pass

import json
from typing import Any


def in_prose(names: Iterable[str]) -> str:
    """Alternatives as a reader expects them: `mse, huber or l1`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` is probably a slip of the hand for."""
    matches = difflib.get_close_matches(name.lower().replace("-", "_"), list(names), n=1)
    return matches[0] if matches else None


def unknown_name(kind: str, name: str, names: Iterable[str]) -> str:
    names = list(names)
    near = nearest(name, names)
    hint = f"; did you mean '{near}'?" if near else ""
    return f"unknown {kind} '{name}', expected {in_prose(names)}{hint}"


def shown(value: Any) -> str:
    """A value as a recipe would write it, cut where it is long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
