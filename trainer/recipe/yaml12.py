"""Makes PyYAML read and write scalars by the rules of YAML 1.2 rather than 1.1."""

import re
from typing import Any, NoReturn

import yaml

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")

# Python refuses to convert thousands of digits to an int. More than forty match _FLOAT and fail validation there.
_INT = re.compile(r"^(?:[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40})$")

_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)

# Unicode's direction controls, after which text is displayed in another order than it is stored.
_REORDERING = re.compile(r"[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

SCALARS = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT}

TAG = "tag:yaml.org,2002:"


MAX_VALUES = 10_000
MAX_DEPTH = 50


class RecipeLoader(yaml.SafeLoader):
    """Reads plain values by YAML 1.2, and refuses aliases, which would hide where a value is written.

    Also refuses more values and deeper nesting than any recipe has, before they take long to read.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own attribute, replaced as a whole

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._values = 0
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            self._refuse(f"more than {MAX_VALUES:,} keys and values")
        if self._depth == MAX_DEPTH:
            self._refuse(f"nested too deeply, more than {MAX_DEPTH} levels")
        if self.check_event(yaml.AliasEvent):
            self._refuse("YAML aliases are not supported in recipes; write the value out")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _refuse(self, problem: str) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)


class RecipeDumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would misread, and escapes characters that change the display order."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Represents a string, with double quotes where escapes are needed."""
        # PyYAML folds these line breaks into spaces unless they are written as escapes.
        quoted = _REORDERING.search(text) or any(mark in text for mark in "\x85\u2028\u2029")
        return self.represent_scalar(TAG + "str", text, '"' if quoted else None)

    def write_double_quoted(self, text: str, split: bool = True) -> None:
        unicode = self.allow_unicode
        if _REORDERING.search(text):
            # With allow_unicode PyYAML would write these characters unescaped.
            self.allow_unicode = False
        super().write_double_quoted(text, split)
        self.allow_unicode = unicode


def scalar(text: str) -> Any:
    """Converts plain text to the value that the same text has in a recipe file."""
    for kind, pattern in SCALARS.items():
        if pattern.match(text):
            return converted(kind, text)
    return text


def converted(kind: str, text: str) -> Any:
    """Converts text that matches the pattern of `kind`, a key of SCALARS, to its Python value."""
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text, 10)
    # Python writes infinity and NaN without YAML's dot.
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
