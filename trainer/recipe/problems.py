"""Turns pydantic's validation errors into messages for the user, one line per problem."""

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from halfbyte.trainer.recipe.document import MAX_PROBLEMS, Document, KeyPath, dotted
from halfbyte.trainer.recipe.schema import Node, SchemaTree
from halfbyte.trainer.wording import in_prose, nearest, shown


def report(error: ValidationError, document: Document, tree: SchemaTree) -> None:
    """Adds pydantic's errors to the document's problems, at most one per field. Only counts the last of very many."""
    reported = set(document.unread)
    for detail in error.errors(include_url=False):
        path = _field(detail, document.data)
        if path not in reported:
            # pydantic reports a value that fits no member of a union once per member.
            reported.add(path)
            if len(document.problems) < MAX_PROBLEMS:
                document.problem(path, _message(detail, path, document, tree))
            else:
                document.more += 1


def _field(detail: ErrorDetails, data: Any) -> KeyPath:
    """Returns the field of an error: its location without the union members that pydantic puts in between."""
    path: list[str | int] = []
    for index, key in enumerate(detail["loc"], start=1):
        inside = isinstance(data, dict) and key in data
        inside |= isinstance(data, list) and isinstance(key, int) and key < len(data)
        if inside:
            data = data[key]
        elif detail["type"] != "missing" or index < len(detail["loc"]):
            continue
        path.append(key)
    if detail["type"] == "union_tag_invalid":
        path.append("name")
    inner = detail.get("ctx", {}).get("field", "")
    path += [int(key) if key.isdecimal() else key for key in inner.split(".") if key]
    return tuple(path)


def _message(detail: ErrorDetails, path: KeyPath, document: Document, tree: SchemaTree) -> str:
    if detail["type"] == "extra_forbidden":
        return _unknown_key(path, document, tree)
    if detail["type"] in ("conflict", "value_error"):
        return detail["msg"].removeprefix("Value error, ")
    node = tree.at(path, document.data)
    assert node is not None, f"{dotted(path)} passed validation's unknown-key check but is in no schema"
    if detail["type"] == "missing":
        meaning = tree.meaning(node)
        return f"missing, expected {tree.expected(node)}{f': {meaning}' if meaning else ''}"
    if detail["type"] == "union_tag_not_found":
        return f"no name given, expected {tree.expected(node)}"
    if detail["loc"][-1] == "[key]":  # pydantic's mark of a mapping's key that is not accepted
        return f"got {shown(path[-1])} as a key, expected {tree.expected_key(path[:-1], document.data)}"
    value = document.at(path)
    near = nearest(value, map(str, node.get("enum", []))) if isinstance(value, str) else None
    return f"got {shown(value)}, expected {tree.expected(node)}" + (
        f"; did you mean '{near}'?" if near else ""
    )


def _unknown_key(path: KeyPath, document: Document, tree: SchemaTree) -> str:
    key = str(path[-1])
    section = tree.at(path[:-1], document.data)
    assert section is not None, f"{dotted(path)} is an unknown key of an unknown section"
    name = document.at((*path[:-1], "name"))
    known = tree.properties(section, name)
    if near := nearest(key, known):
        return f"unknown key; did you mean '{near}'?"
    if owners := [other for other, node in tree.variants(section).items() if key in node["properties"]]:
        return f"{name} has no such setting, only {in_prose(owners)} has; expected {in_prose(known)}"
    if elsewhere := _elsewhere(key, tree):
        return f"unknown key; did you mean {in_prose(elsewhere)}?"
    return f"unknown key, expected {in_prose(known)}"


def _elsewhere(key: str, tree: SchemaTree) -> list[str]:
    """Suggests fields of any section: with this name, else a similar name, else these words in the description."""
    fields: list[tuple[KeyPath, Node]] = list(tree.fields())
    similar = nearest(key, {str(path[-1]) for path, _ in fields})
    words = key.replace("_", " ").lower()
    for found in (
        [path for path, _ in fields if path[-1] == key],
        [path for path, _ in fields if path[-1] == similar],
        [path for path, node in fields if words in node.get("description", "").lower()],
    ):
        if found:
            return [dotted(path) for path in found[:3]]
    return []
