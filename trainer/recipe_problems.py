"""pydantic's findings in the user's terms: one line a problem, with the place it was written."""

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from halfbyte.trainer.recipe_file import Document, KeyPath, dotted
from halfbyte.trainer.recipe_schema import SchemaTree, shown
from halfbyte.trainer.registry import nearest, unknown_name


def report(error: ValidationError, document: Document, tree: SchemaTree) -> None:
    """Adds each of pydantic's errors to the document's problems, once a field."""
    reported: set[KeyPath] = set()
    for detail in error.errors(include_url=False):
        path = _field(detail, document.data)
        if path not in reported:
            # A value that fits no member of a union comes once for each member.
            reported.add(path)
            document.problem(path, _message(detail, path, document, tree))


def _field(detail: ErrorDetails, data: Any) -> KeyPath:
    """The field an error is about: its location without the union members pydantic names on the way."""
    path: list[str | int] = []
    for index, key in enumerate(detail["loc"], start=1):
        inside = key in data if isinstance(data, dict) else isinstance(data, list) and isinstance(key, int)
        if inside:
            data = data[key]
        elif detail["type"] != "missing" or index < len(detail["loc"]):
            continue
        path.append(key)
    named = detail.get("ctx", {}).get("field", "")
    return (*path, *named.split(".")) if named else tuple(path)


def _message(detail: ErrorDetails, path: KeyPath, document: Document, tree: SchemaTree) -> str:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return _unknown_key(path, document, tree)
    if kind in ("conflict", "value_error"):
        return detail["msg"].removeprefix("Value error, ")
    node = tree.at(path, document.data)
    assert node is not None, f"{dotted(path)} passed validation's unknown-key check but is in no schema"
    if kind == "missing":
        return f"missing, expected {tree.expected(node)}"
    if kind == "union_tag_not_found":
        return f"no name given, expected {tree.expected(node)}"
    if kind == "union_tag_invalid":
        return unknown_name(
            str(path[-1]).removesuffix("s"), str(detail["input"]["name"]), tree.variants(node)
        )
    return f"got {shown(detail['input'])}, expected {tree.expected(node)}{_spelling(detail['input'], node)}"


def _spelling(value: Any, node: dict[str, Any]) -> str:
    near = nearest(value, map(str, node.get("enum", []))) if isinstance(value, str) else None
    return f"; did you mean '{near}'?" if near else ""


def _unknown_key(path: KeyPath, document: Document, tree: SchemaTree) -> str:
    *parents, key = path
    section: Any = document.data
    for parent in parents:
        section = section[parent]
    enclosing = tree.at(tuple(parents), document.data)
    chosen = section.get("name") if enclosing and tree.variants(enclosing) else None
    known = tree.properties(enclosing, chosen) if enclosing else {}
    if near := nearest(str(key), known):
        return f"unknown key; did you mean '{near}'?"
    everywhere = {dotted(field): str(field[-1]) for field in tree.fields()}
    elsewhere = [field for field, last in everywhere.items() if last == key]
    if not elsewhere and (similar := nearest(str(key), set(everywhere.values()))):
        elsewhere = [field for field, last in everywhere.items() if last == similar]
    if elsewhere:
        return f"unknown key; did you mean {' or '.join(elsewhere)}?"
    return f"unknown key, expected {', '.join(known)}"
