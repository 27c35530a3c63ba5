"""YAML 1.2's scalars with PyYAML."""

import re
from typing import Any

import yaml

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")

# Python refuses to convert thousands of digits; past forty they count as a float, and are refused as one.
_INT = re.compile(r"^(?:[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40})$")

_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)

# Unicode's controls of direction: what stands behind one is shown elsewhere than it is.
_REORDERING = re.compile(r"[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

SCALARS = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT}

TAG = "tag:yaml.org,2002:"


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.2's plain values, and no aliases: they would hide where a value comes from."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own attribute, replaced as a whole

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            problem = "a recipe has no aliases; write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return super().compose_node(parent, index)


class RecipeDumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would not read back as text, or would be shown in another order."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML folds these line breaks into spaces unless they are written as escapes.
        quoted = _REORDERING.search(text) or any(mark in text for mark in "\x85\u2028\u2029")
        return self.represent_scalar(TAG + "str", text, '"' if quoted else None)

    def write_double_quoted(self, text: str, split: bool = True) -> None:
        unicode = self.allow_unicode
        if _REORDERING.search(text):
            # PyYAML itself would write these characters as they are.
            self.allow_unicode = False
        super().write_double_quoted(text, split)
        self.allow_unicode = unicode


def scalar(text: str) -> Any:
    """One plain value, as the same letters in a recipe file would be read."""
    for kind, pattern in SCALARS.items():
        if pattern.match(text):
            return converted(kind, text)
    return text


def converted(kind: str, text: str) -> Any:
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text, 10)
    # Python writes infinity and NaN without YAML's dot.
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
