"""Loads recipes: reads the file, applies overrides, resolves paths and validates."""

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
    """Loads a recipe file with `section.field=value` overrides applied.

    Raises:
        RecipeError: with one line per problem, each with its file and line: text that cannot be read, values that the
            schema does not accept, contradictory settings, and folders that do not exist. A missing data.path is
            accepted unless `pictures_needed`.
    """
    return load_document(path, overrides, pictures_needed=pictures_needed)[0]


def load_document(
    path: str | Path, overrides: Sequence[str] = (), *, pictures_needed: bool = True
) -> tuple[Recipe, Document]:
    """Loads a recipe like `load_recipe`, and also returns its document, so that later errors can name file and line."""
    document = read(path)
    tree = SchemaTree(json_schema())
    apply_overrides(document, overrides, tree)
    for section, node in tree.properties(tree.schema).items():
        # YAML reads a section with every line commented out as null. Treat it as absent, so its defaults apply.
        if document.at((section,)) is None:
            document.data.pop(section, None)
            if not tree.variants(node):
                document.data[section] = {}
    resolve_folders(document, pictures_needed=pictures_needed)
    return _validated(document, tree), document


def load_written(path: Path) -> Recipe:
    """Loads a recipe that a run wrote, without checking its folders: they may be gone or on another machine.

    Raises:
        RecipeError: if the file cannot be read or its values are not valid.
    """
    return _validated(read(path), SchemaTree(json_schema()))


def _validated(document: Document, tree: SchemaTree) -> Recipe:
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        report(error, document, tree)
    document.raise_problems()
    return recipe
