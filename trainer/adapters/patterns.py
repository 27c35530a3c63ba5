"""Refuses regular expressions that would match layers' names for hours, from a recipe or a downloaded adapter.

Python's `re`, with which PEFT matches, tries all ways to divide a name among the quantifiers of a pattern:
`(a+)+b` doubles its time with each letter, and nothing can interrupt it. So a pattern with quantifiers is
first tried on the same names in a separate process, which the system ends after a second of computing.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from halfbyte.trainer.errors import RecipeError

Method = Literal["match", "fullmatch"]

_SECONDS = 1
_ESCAPED = re.compile(r"\\.", re.DOTALL)
# Prints the number of each pattern before it is tried. A process that reaches the limit is ended by SIGXCPU, for which
# it would write a core file.
_PROGRAM = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_CPU, ({_SECONDS}, {_SECONDS + 1}))
patterns, names, method = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    match = getattr(re.compile(pattern), method)
    for name in names:
        match(name)
"""


def peft_regex(pattern: str) -> str:
    """Returns PEFT's regular expression for a pattern, which matches the end of a layer's name."""
    return rf"(.*\.)?({pattern})$"


def fault_of(pattern: str) -> str | None:
    """Returns why a text is not a regular expression; None if it is one."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error) or type(error).__name__
    return None


def refuse_slow(where: str, patterns: Sequence[str], names: Sequence[str], method: Method) -> None:
    """Checks that all patterns can be matched with all names in a moment.

    where: what messages begin with, before the pattern. method: `fullmatch` for a whole name, `match` for
        PEFT's ends of names.

    Raises:
        RecipeError: a pattern takes too long, or is not a regular expression inside PEFT's.
    """
    own = {pattern: pattern if method == "fullmatch" else peft_regex(pattern) for pattern in patterns}
    for pattern, whole in own.items():
        fault = fault_of(whole)
        if fault is not None:
            raise RecipeError(f"{where} {pattern!r:.200}, which is not a regular expression: {fault}")
    repeating = [pattern for pattern in own if any(mark in _ESCAPED.sub("", pattern) for mark in "*+?{")]
    if not repeating:
        return
    slow = _first_slow(tuple(own[pattern] for pattern in repeating), tuple(names), method)
    if slow is not None:
        raise RecipeError(
            f"{where} {repeating[slow]!r:.200}, which takes longer than {_SECONDS} s to match with the names of"
            " layers; use fewer of *, + and ?, and none inside of another, as in (a+)+"
        )


@lru_cache(maxsize=32)  # plans add the same adapters many times
def _first_slow(patterns: tuple[str, ...], names: tuple[str, ...], method: Method) -> int | None:
    """Returns the number of the first pattern that takes too long, or None."""
    work = json.dumps([patterns, names, method])
    # -I and -S: starts in a moment, and imports nothing from the current folder.
    tried = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _PROGRAM], input=work, capture_output=True, text=True, check=False
    )
    if tried.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return int(tried.stdout.split()[-1])
    assert tried.returncode == 0, tried.stderr
    return None
