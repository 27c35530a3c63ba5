"""The recipe's JSON Schema as a tree to look things up in: which fields there are, and what each accepts."""

import json
from collections.abc import Iterator
from typing import Any

from halfbyte.trainer.recipe_file import KeyPath
from halfbyte.trainer.registry import in_prose

Node = dict[str, Any]


class SchemaTree:
    """A JSON Schema as pydantic writes it for the recipe."""

    def __init__(self, schema: Node) -> None:
        self.schema = schema

    def resolve(self, node: Node) -> Node:
        """The node itself, or what its `$ref` points at; a description beside the reference wins."""
        if "$ref" not in node:
            return node
        target: Node = self.schema["$defs"][node["$ref"].rpartition("/")[2]]
        return target | {key: value for key, value in node.items() if key != "$ref"}

    def properties(self, node: Node, chosen: str | None = None) -> dict[str, Node]:
        """The fields of a section; of a choice those under the name `chosen`, or under any name."""
        node = self.resolve(node)
        fields: dict[str, Node] = dict(node.get("properties", {}))
        for name, variant in self.variants(node).items():
            if chosen in (None, name):
                fields |= variant["properties"]
        return fields

    def variants(self, node: Node) -> dict[str, Node]:
        """The registered classes of a choice, by name; empty for any other node."""
        node = self.resolve(node)
        mapping = node.get("discriminator", {}).get("mapping", {})
        return {name: self.resolve({"$ref": reference}) for name, reference in mapping.items()}

    def at(self, path: KeyPath, data: Any) -> Node | None:
        """The node at a field's path, choices taken as `data` names them; None for an unknown field."""
        node = self.schema
        for key in path:
            if isinstance(key, int):
                arrays = [option for option in self._options(node) if option.get("type") == "array"]
                if not arrays:
                    return None
                node = self.resolve(
                    arrays[0]["items"] if "items" in arrays[0] else arrays[0]["prefixItems"][key]
                )
                data = data[key] if isinstance(data, list) and key < len(data) else None
                continue
            chosen = data.get("name") if isinstance(data, dict) else None
            fields = self.properties(node, chosen if chosen in self.variants(node) else None)
            if key not in fields:
                return None
            node = self.resolve(fields[key])
            data = data.get(key) if isinstance(data, dict) else None
        return node

    def fields(self) -> Iterator[KeyPath]:
        """Every field of every section, and of every choice under any name."""
        for section, outer in self.properties(self.schema).items():
            for name, inner in self.properties(outer).items():
                yield section, name
                for deeper in self.properties(inner):
                    yield section, name, deeper

    def expected(self, node: Node) -> str:
        """What the node accepts, as the end of `got '1e-4x', expected ...`."""
        node = self.resolve(node)
        if "anyOf" in node:
            return in_prose([self.expected(option) for option in node["anyOf"]])
        if "enum" in node:
            return in_prose([str(value) for value in node["enum"]])
        if "const" in node:
            return str(node["const"])
        if variants := self.variants(node):
            return (
                f"a name with its settings, as {{name: {next(iter(variants))}}}; names: {in_prose(variants)}"
            )
        kind = node.get("type")
        if kind in ("integer", "number"):
            return _number(node)
        if kind == "array":
            return "a list, as [one, two]"
        if kind == "string":
            return {"path": "a path", "regex": "a regular expression"}.get(node.get("format", ""), "text")
        return {"boolean": "true or false", "null": "null", "object": "a section of fields"}[str(kind)]

    def _options(self, node: Node) -> list[Node]:
        node = self.resolve(node)
        return [self.resolve(option) for option in node.get("anyOf", [node])]


def _number(node: Node) -> str:
    noun = "whole number" if node["type"] == "integer" else "number"
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, below = node.get("maximum"), node.get("exclusiveMaximum")
    text = f"a positive {noun}" if above == 0 else f"a {noun}"
    if node.get("multipleOf"):
        text += f" divisible by {node['multipleOf']}"
    limits = []
    if low is not None:
        limits.append(f"{low} or more")
    if above:
        limits.append(f"more than {above}")
    if high is not None:
        limits.append(f"at most {high}")
    if below is not None:
        limits.append(f"less than {below}")
    return f"{text}, {' and '.join(limits)}" if limits else text


def shown(value: Any) -> str:
    """A value as the recipe would write it, cut where it is long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
