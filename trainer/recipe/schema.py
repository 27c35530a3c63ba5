"""Makes the recipe's JSON Schema and looks up in it which fields exist and what each accepts."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from halfbyte.trainer.recipe.document import KeyPath
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.wording import in_prose

Node = dict[str, Any]


class SchemaTree:
    """The recipe's JSON Schema, as pydantic generates it, with look-ups."""

    def __init__(self, schema: Node) -> None:
        self.schema = schema

    def resolve(self, node: Node) -> Node:
        """Returns the node, or the target of its `$ref`. A description next to the reference takes precedence."""
        if "$ref" not in node:
            return node
        target: Node = self.schema["$defs"][node["$ref"].rpartition("/")[2]]
        return target | {key: value for key, value in node.items() if key != "$ref"}

    def variants(self, node: Node) -> dict[str, Node]:
        """Returns the registered classes of a choice by name; an empty dict for any other node."""
        classes = [self.resolve(option) for option in self.resolve(node).get("oneOf", [])]
        return {option["properties"]["name"]["const"]: option for option in classes}

    def properties(self, node: Node, name: Any = None) -> dict[str, Node]:
        """Returns the fields of a section. For a choice: the fields of the class `name`, or of all if it is unknown."""
        variants = self.variants(node)
        if not variants:
            # A section that may be null is one of the options of its field.
            return {
                key: value
                for option in self._options(node)
                for key, value in option.get("properties", {}).items()
            }
        if isinstance(name, str) and name in variants:
            return dict(variants[name]["properties"])
        fields: dict[str, Node] = {}
        for variant in variants.values():
            fields |= variant["properties"]
        return fields | {"name": {"enum": list(variants)}}

    def required(self, node: Node) -> set[str]:
        """Returns the fields of a section that have no default; the section may also be null."""
        return {name for option in self._options(node) for name in option.get("required", [])}

    def item_properties(self, node: Node) -> dict[str, Node]:
        """Returns the fields of the sections in a list; an empty dict for any other node."""
        items = self.resolve(node).get("items")
        return {} if items is None else self.properties(items)

    def at(self, path: KeyPath, data: Any) -> Node | None:
        """Returns the node of a field, None if unknown. `data` holds the recipe's values, which name the choices."""
        node = self.schema
        for key in path:
            if isinstance(key, int):
                array = next(option for option in self._options(node) if option.get("type") == "array")
                node = self.resolve(array["items"] if "items" in array else array["prefixItems"][key])
                continue
            fields = self.properties(node, data.get("name") if isinstance(data, dict) else None)
            free = [option["additionalProperties"] for option in self._mappings(node)]
            if key in fields:
                node = self.resolve(fields[key])
            elif free:
                node = self.resolve(free[0])
            else:
                return None
            data = data.get(key) if isinstance(data, dict) else None
        return node

    def fields(self) -> Iterator[tuple[KeyPath, Node]]:
        """Yields every field of every section, including the settings of every class of every choice."""
        for section, outer in self.properties(self.schema).items():
            for name, inner in self.properties(outer).items():
                yield (section, name), self.resolve(inner)
                for deeper, node in (self.properties(inner) | self.item_properties(inner)).items():
                    yield (section, name, deeper), self.resolve(node)

    def expected(self, node: Node) -> str:
        """Describes what the node accepts, for the end of `got '1e-4x', expected ...`."""
        node = self.resolve(node)
        if "anyOf" in node:
            return in_prose([self.expected(option) for option in node["anyOf"]])
        if "enum" in node:
            return in_prose([str(value) for value in node["enum"]])
        if variants := self.variants(node):
            return f"a mapping with a name, such as {{name: {next(iter(variants))}}}; names: {in_prose(variants)}"
        kind = node.get("type")
        if kind in ("integer", "number"):
            return _number(node)
        if kind == "array":
            item = self.resolve(node["prefixItems"][0] if "prefixItems" in node else node["items"])
            if item["type"] == "object":
                first = next(iter(item["properties"]))
                return f"a list of mappings, such as [{{{first}: ...}}, {{{first}: ...}}]"
            return f"a list of {'texts' if item['type'] == 'string' else 'numbers'}, such as [one, two]"
        if kind == "object" and isinstance(node.get("additionalProperties"), dict):
            example = next(iter(node["examples"][0])) if "examples" in node else "name"
            return f"a mapping, such as {{{example}: {self.expected(node['additionalProperties'])}}}"
        if kind == "string" and "format" in node:
            return {"path": "a path", "regex": "a regular expression"}[node["format"]]
        words = {
            "string": "text",
            "boolean": "true or false",
            "null": "null",
            "object": "a section of fields",
        }
        return words[str(kind)]

    def expected_key(self, path: KeyPath, data: Any) -> str:
        """Describes the keys that a mapping accepts, for the end of a message as in `expected`."""
        node = self.at(path, data)
        assert node is not None, "only known mappings have keys"
        return f"one such as {next(iter(self._mappings(node)[0]['examples'][0]))}"

    def meaning(self, node: Node) -> str:
        """Returns the first sentence of the description, worded as the end of a longer sentence."""
        text: str = self.resolve(node).get("description", "")
        text = text.partition(". ")[0].rstrip(".")
        return text[:1].lower() + text[1:]

    def _mappings(self, node: Node) -> list[Node]:
        """Returns the options of a node that accept any key."""
        return [
            option for option in self._options(node) if isinstance(option.get("additionalProperties"), dict)
        ]

    def _options(self, node: Node) -> list[Node]:
        node = self.resolve(node)
        return [self.resolve(option) for option in node.get("anyOf", [node])]


def _number(node: Node) -> str:
    noun = "whole number" if node["type"] == "integer" else "number"
    low, high = node.get("minimum"), node.get("maximum")
    above, below = node.get("exclusiveMinimum"), node.get("exclusiveMaximum")
    text = f"a positive {noun}" if above == 0 else f"a {noun}"
    if "multipleOf" in node:
        text += f" divisible by {node['multipleOf']}"
    limits = []
    if low is not None and high is not None:
        limits.append(f"from {low} to {high}")
    elif low is not None:
        limits.append(f"{low} or more")
    elif high is not None:
        limits.append(f"{high} or less")
    if below is not None:
        limits.append(f"less than {below}")
    return f"{text}, {' and '.join(limits)}" if limits else text


class _Schema(GenerateJsonSchema):
    # Titles would only repeat the field's name, and editors show them above the description.
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@cache
def json_schema() -> Node:
    """Returns the JSON Schema with which editors check recipes; do not change it."""
    schema = Recipe.model_json_schema(schema_generator=_Schema)
    return {"$schema": GenerateJsonSchema.schema_dialect, **_unwrapped(schema)}


def json_schema_text() -> str:
    """Returns the text of recipes/recipe.schema.json."""
    return json.dumps(json_schema(), indent=2) + "\n"


def _unwrapped(node: Any) -> Any:
    """Joins each description into one line, without the line breaks of the source."""
    if isinstance(node, list):
        return [_unwrapped(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: " ".join(value.split()) if key == "description" and isinstance(value, str) else _unwrapped(value)
        for key, value in node.items()
    }
