"""Text of users as Markdown: whatever it holds, it is shown as it is and never read as markup, HTML or a link."""

import re
from collections.abc import Sequence

# What CommonMark and GFM give meaning to inside a line; none to a character written as a reference. Of an address it is
# the colon or the dot after www that makes it a link.
_MARKUP = re.compile(r"[\\`*_~|<>\[\]&!#$@:]|(?<=www)\.", re.IGNORECASE)


def escaped(text: str) -> str:
    """The text within a line or a cell of a table; line ends and control characters become spaces."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", line)


def fenced(text: str, language: str) -> str:
    """The text as a block of code, whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
