"""Messages quoted in the troubleshooting page exist in the source."""

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from repository import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.findall(r"^### `(.+)`$", PAGE.read_text(), re.MULTILINE)


@cache
def strings() -> tuple[str, ...]:
    """Returns every text in the source, with a NUL character for each value that is put into it.

    Not at import: every test process imports this file, and one of them needs the texts.
    """
    return tuple(_strings())


def _strings() -> Iterator[str]:
    for top in ("trainer", "quant", "kernels"):
        for file in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def occurs(quoted: str) -> bool:
    """Returns True if one text of the source has the parts of a quoted message, in their order."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in quoted.split("...")), re.DOTALL)
    return any(pattern.search(text) for text in strings())


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_message_exists(quoted: str) -> None:
    assert occurs(quoted), f"{PAGE.name} quotes a message that no source file has; quote the new wording"


def test_there_are_messages_of_every_kind() -> None:
    assert len(QUOTED) >= 30
    assert not occurs("this text ... is in no message")
