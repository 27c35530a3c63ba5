"""Escapes user text for Markdown, so it is displayed literally and never parsed as markup, HTML or a link."""

import re
from collections.abc import Sequence

# The characters that have a meaning inside a line in CommonMark and GFM. As character references they have
# none. The colon, or the dot after www, is what makes a URL a link.
_MARKUP = re.compile(r"[\\`*_~|<>\[\]&!#$@:]|(?<=www)\.", re.IGNORECASE)


def escaped(text: str) -> str:
    """Escapes the text for use in a line or a table cell. Line ends and control characters become spaces."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", line)


def fenced(text: str, language: str) -> str:
    """Formats the text as a code block whose fence is longer than every run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table. The cells must already be Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
