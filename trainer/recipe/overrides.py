"""Applies command-line overrides such as `train.steps=10` to a recipe document."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.recipe.document import Document, KeyPath, SourceLocation, compose, dotted, plain_value
from halfbyte.trainer.recipe.schema import SchemaTree
from halfbyte.trainer.recipe.yaml12 import scalar

log = logging.getLogger(__name__)


def apply_overrides(document: Document, texts: Sequence[str], tree: SchemaTree) -> None:
    """Applies `section.field=value` texts in order; the last one for a field wins. Notes problems in the document."""
    for index, text in enumerate(texts):
        name, equals, value = text.partition("=")
        path = tuple(name.strip().split("."))
        place = SourceLocation(text, index, Path.cwd(), path)
        if not equals or not all(path):
            document.refuse(place, path, "expected section.field=value, such as train.steps=10")
        elif _is_section(path, document, tree):
            document.refuse(
                place,
                path,
                f"this is a section; set its fields one by one, such as {name}.{_first_field(path, tree)}=...",
            )
        else:
            _write_default_choice(document, path, place, tree)
            before = document.at(path)
            try:
                document.put(path, _parse_value(value.strip(), path, place, document), place)
            except RecipeError as error:
                document.problems.append((place, str(error)))
                continue
            if path[-1] == "name" and isinstance(before, str):
                _drop_old_settings(document, path[:-1], before, tree)


def _is_section(path: KeyPath, document: Document, tree: SchemaTree) -> bool:
    """Returns True for a section of the recipe. One inside a section, such as objective.preserve, can be set whole."""
    node = tree.at(path, document.data)
    return len(path) == 1 and node is not None and bool(tree.properties(node)) and not tree.variants(node)


def _first_field(path: KeyPath, tree: SchemaTree) -> str:
    node = tree.at(path, None)
    assert node is not None
    return next(iter(tree.properties(node)))


def _write_default_choice(document: Document, path: KeyPath, place: SourceLocation, tree: SchemaTree) -> None:
    """Writes out the default name of a choice that the file leaves out, before one of its settings is overridden."""
    node = tree.at(path[:-1], document.data)
    if node is not None and tree.variants(node) and document.at(path[:-1]) is None:
        document.put(path[:-1], {"name": node["default"]["name"]}, place)


def _drop_old_settings(document: Document, path: KeyPath, before: str, tree: SchemaTree) -> None:
    """Drops settings from the file that belong to the old choice (named `before`) and that the new one does not have.

    Settings that both have stay: another optimizer keeps `lr`, but `delta` is dropped when huber is replaced.
    """
    node = tree.at(path, document.data)
    choice = document.at(path)
    variants = tree.variants(node) if node is not None else {}
    if not {before, str(choice["name"])} <= set(variants):
        return
    dropped = [
        key
        for key in choice
        if key in variants[before]["properties"]
        and key not in variants[choice["name"]]["properties"]
        and document.place((*path, key)).override is None
    ]
    for key in dropped:
        del choice[key]
        document.forget((*path, key))
    if dropped:
        log.warning(
            "%s: ignoring the recipe's %s, which only %s has", dotted(path), " and ".join(dropped), before
        )


def _parse_value(text: str, path: KeyPath, place: SourceLocation, document: Document) -> Any:
    # Only brackets and quotes start YAML. Everything else is one plain value, so that '#' in a caption prefix does
    # not start a comment, nor '*' in a regular expression an alias.
    if not text.startswith(("[", "{", '"', "'")):
        return scalar(text)
    return plain_value(compose(text, place), path, place, document)
