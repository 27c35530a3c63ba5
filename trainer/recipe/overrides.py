"""Overrides from the command line, as `train.steps=10`: single fields, set after the recipe file is read."""

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
    """Applies `section.field=value` texts in turn; the last one for a field wins."""
    for index, text in enumerate(texts):
        name, equals, value = text.partition("=")
        path = tuple(name.strip().split("."))
        place = SourceLocation(text, index, Path.cwd(), path)
        if not equals or not all(path):
            document.refuse(place, path, "expected section.field=value, as train.steps=10")
        elif _is_section(path, document, tree):
            document.refuse(
                place, path, f"a section; set its fields one by one, as {name}.{_first(path, tree)}=..."
            )
        else:
            _name_absent_choice(document, path, place, tree)
            before = document.at(path)
            try:
                document.put(path, _written_value(value.strip(), path, place, document), place)
            except RecipeError as error:
                document.problems.append((place, str(error)))
                continue
            if path[-1] == "name" and isinstance(before, str):
                _leave_out_settings(document, path[:-1], before, tree)


def _is_section(path: KeyPath, document: Document, tree: SchemaTree) -> bool:
    node = tree.at(path, document.data)
    return node is not None and bool(tree.properties(node)) and not tree.variants(node)


def _first(path: KeyPath, tree: SchemaTree) -> str:
    node = tree.at(path, None)
    assert node is not None
    return next(iter(tree.properties(node)))


def _name_absent_choice(document: Document, path: KeyPath, place: SourceLocation, tree: SchemaTree) -> None:
    """A setting is overridden of a choice that the file leaves to its default: the default is that choice."""
    node = tree.at(path[:-1], document.data)
    if node is not None and tree.variants(node) and document.at(path[:-1]) is None:
        document.put(path[:-1], {"name": node["default"]["name"]}, place)


def _leave_out_settings(document: Document, path: KeyPath, before: str, tree: SchemaTree) -> None:
    """Another choice's name was given: drops what the file set for the old choice and the new one lacks.

    So `lr` stays with another optimizer, and `delta` goes with the loss it belonged to.
    """
    node = tree.at(path, document.data)
    choice = document.at(path)
    variants = tree.variants(node) if node is not None else {}
    if not {before, str(choice["name"])} <= set(variants):
        return
    unfit = [
        key
        for key in choice
        if key in variants[before]["properties"]
        and key not in variants[choice["name"]]["properties"]
        and document.place((*path, key)).override is None
    ]
    for key in unfit:
        del choice[key]
        document.forget((*path, key))
    if unfit:
        log.warning(
            "%s: leaving out the recipe's %s, which only %s has", dotted(path), " and ".join(unfit), before
        )


def _written_value(text: str, path: KeyPath, place: SourceLocation, document: Document) -> Any:
    # Only brackets and quotes make it YAML. All else is one plain value, so that the '#' of a caption prefix
    # begins no comment, and the '*' of a regular expression no alias.
    if not text.startswith(("[", "{", '"', "'")):
        return scalar(text)
    return plain_value(compose(text, place), path, place, document)
