"""The reference page of the recipe, made from its schema: every field with what it accepts, default and meaning."""

import json
import sys
from collections.abc import Iterator
from typing import Any

from halfbyte.trainer.recipe.schema import Node, SchemaTree, json_schema


def reference_page() -> str:
    """recipes/REFERENCE.md, in Markdown."""
    return "\n".join(_lines(SchemaTree(json_schema()))) + "\n"


def _lines(tree: SchemaTree) -> Iterator[str]:
    yield "# The recipe, field by field"
    yield ""
    yield "Made by `python -m halfbyte.trainer.recipe.reference_page`; a test keeps it current. Any field can"
    yield "also be set on the command line:"
    yield "`train RECIPE train.steps=10 objective.loss.name=huber 'lora.targets=[to_q, to_k]'`."
    for section, node in tree.properties(tree.schema).items():
        yield ""
        yield f"## {section}"
        yield ""
        yield tree.resolve(node)["description"]
        if tree.variants(node):
            yield ""
            yield from _choice(tree, node)
            continue
        yield ""
        yield from _table(tree, tree.properties(node), set(tree.resolve(node).get("required", [])))
        for name, field in tree.properties(node).items():
            if tree.variants(field):
                yield ""
                yield f"### {section}.{name}"
                yield ""
                yield tree.resolve(field)["description"]
                yield ""
                yield from _choice(tree, field)


def _choice(tree: SchemaTree, node: Node) -> Iterator[str]:
    """The registered names of a choice, each with its settings."""
    chosen = tree.resolve(node)["default"]["name"]
    for name, variant in tree.variants(node).items():
        settings = {key: value for key, value in variant["properties"].items() if key != "name"}
        mark = " (the default)" if name == chosen else ""
        yield f"- `{{name: {name}}}`{mark}: {variant['description']}"
        for key, setting in settings.items():
            yield f"  - `{key}` ({tree.expected(setting)}; default {_written(setting)}): {setting['description']}"


def _table(tree: SchemaTree, fields: dict[str, Node], required: set[str]) -> Iterator[str]:
    yield "| field | accepts | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, field in fields.items():
        choice = tree.variants(field)
        accepts = (
            "one of " + ", ".join(f"`{variant}`" for variant in choice) if choice else tree.expected(field)
        )
        default = "required" if name in required else _written(tree.resolve(field))
        yield f"| `{name}` | {accepts} | {default} | {tree.resolve(field)['description']} |"


def _written(node: Node) -> str:
    """A field's default as a recipe writes it."""
    default: Any = node["default"]
    if isinstance(default, dict) and "name" in default:
        return f"`{default['name']}`"
    if isinstance(default, float):
        return f"`{default:g}`"
    return f"`{default}`" if isinstance(default, str) and default else f"`{json.dumps(default)}`"


if __name__ == "__main__":
    sys.stdout.write(reference_page())
