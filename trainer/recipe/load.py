"""Reads and validates a recipe file."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from halfbyte.trainer.recipe.document import Document, read
from halfbyte.trainer.recipe.overrides import apply_overrides
from halfbyte.trainer.recipe.paths import resolve_folders
from halfbyte.trainer.recipe.problems import report
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.recipe.schema import SchemaTree, json_schema


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, pictures_needed: bool = True) -> Recipe:
    """Reads a recipe file and applies `section.field=value` overrides.

    Raises RecipeError with one line for every problem, each with its file and line: what cannot be read, what
    the schema refuses, settings that contradict each other, and folders named there that do not exist (data.path
    only where `pictures_needed`).
    """
    return load_document(path, overrides, pictures_needed=pictures_needed)[0]


def load_document(
    path: str | Path, overrides: Sequence[str] = (), *, pictures_needed: bool = True
) -> tuple[Recipe, Document]:
    """As `load_recipe`, with what was written, to tell the line of what proves wrong later."""
    document = read(path)
    tree = SchemaTree(json_schema())
    apply_overrides(document, overrides, tree)
    for section, node in tree.properties(tree.schema).items():
        # A section with every line commented out reads as null; like an absent one, it has its defaults.
        if document.at((section,)) is None:
            document.data.pop(section, None)
            if not tree.variants(node):
                document.data[section] = {}
    resolve_folders(document, pictures_needed=pictures_needed)
    return _validated(document, tree), document


def load_written(path: Path) -> Recipe:
    """A recipe as a run wrote it, whose folders may be gone or on another machine. Raises RecipeError."""
    return _validated(read(path), SchemaTree(json_schema()))


def _validated(document: Document, tree: SchemaTree) -> Recipe:
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        report(error, document, tree)
    document.raise_problems()
    return recipe
