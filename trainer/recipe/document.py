"""Reads a recipe file as a document: its YAML values, with the line of every key for error messages.

Values follow YAML 1.2, like in editors: 1e-4 is a number and `on` is a word. PyYAML's default is YAML 1.1, where
1e-4 is a word and `on` is true.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from halfbyte.quant.files.regular import read_regular
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.recipe.yaml12 import (
    SCALARS,
    TAG,
    RecipeDumper,
    RecipeLoader,
    converted,
)
from halfbyte.trainer.wording import nearest, printable

KeyPath = tuple[str | int, ...]

MAX_PROBLEMS = 50
_RECIPE_BYTES = 10**6
_LONGEST = 2000  # characters of one message

_SETTING = re.compile(r"(\w+)\.(\w+): ")


RecipeDumper.add_representer(str, RecipeDumper.represent_text)

for _name, _pattern in SCALARS.items():
    RecipeLoader.add_implicit_resolver(TAG + _name, _pattern, None)
    RecipeDumper.add_implicit_resolver(TAG + _name, _pattern, None)


@dataclass(frozen=True)
class SourceLocation:
    """The place where a value was written: a line of the file, or an override on the command line."""

    source: str  # the file as the user named it, or the override's text
    line: int  # line number from 1; for an override, its position on the command line from 0
    base: Path  # the folder that ./ and ../ are relative to
    override: KeyPath | None = None  # the field that the override sets; None: the value is in the file

    def report(self, path: KeyPath, message: str) -> str:
        """Formats a message as `flux_lora.yaml:14: optimizer.lr: ...` or `command line: optimizer.lr=x: ...`."""
        if self.override is None:
            return _line(f"{self.source}:{self.line}: {dotted(path)}{': ' if path else ''}{message}")
        deeper = dotted(path[len(self.override) :])
        source = self.source if len(self.source) <= _LONGEST // 4 else f"{self.source[: _LONGEST // 4]}..."
        return _line(f"command line: {source}: {deeper}{': ' if deeper else ''}{message}")


def _line(message: str) -> str:
    """Escapes control characters, and cuts the middle out of a message about a very long value."""
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    return printable(message)


@dataclass
class Document:
    """The values of a recipe file with overrides applied, and where each was written."""

    data: dict[str, Any]
    places: dict[KeyPath, SourceLocation]
    problems: list[tuple[SourceLocation, str]] = field(default_factory=list)
    # Fields whose value could not be read. They are null in `data`, and validation errors about them are dropped.
    unread: set[KeyPath] = field(default_factory=set)
    more: int = 0  # problems that were counted but not recorded

    def place(self, path: KeyPath) -> SourceLocation:
        """Returns where the value at `path` was written; for an absent value, where its section was."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def problem(self, path: KeyPath, message: str) -> None:
        """Records a problem with the field at `path`, at the place where the field was written."""
        self.refuse(self.place(path), path, message)

    def at(self, path: KeyPath) -> Any:
        """Returns the value of a field; None if it is absent."""
        value: Any = self.data
        for key in path:
            if isinstance(value, list) and isinstance(key, int):
                value = value[key]
            else:
                value = value.get(key) if isinstance(value, dict) else None
        return value

    def located(self, message: str) -> str:
        """Adds file and line to a message that starts with `section.setting: `, if the setting was written."""
        found = _SETTING.match(message)
        path: KeyPath = () if found is None else (found[1], found[2])
        if found is None or self.at(path) is None:
            return message
        return self.place(path).report(path, message[found.end() :])

    def refuse(self, place: SourceLocation, path: KeyPath, message: str) -> None:
        """Records a problem with the field at `path`, at the given place."""
        self.problems.append((place, place.report(path, message)))

    def replace(self, path: KeyPath, value: Any) -> None:
        """Changes the value of a field that exists and keeps the record of where it was written."""
        self.at(path[:-1])[path[-1]] = value

    def put(self, path: KeyPath, value: Any, place: SourceLocation) -> None:
        """Sets a field, and creates the sections around it if they are absent or empty."""
        section = self.data
        for depth, key in enumerate(path[:-1], start=1):
            inner = section.get(str(key))
            if inner is None:
                inner = section[str(key)] = {}
                self.places[path[:depth]] = place
            if not isinstance(inner, dict):
                self.refuse(place, path, f"{dotted(path[:depth])} is a single value and has no fields")
                return
            section = inner
        section[str(path[-1])] = value
        self.forget(path)
        self.places[path] = place

    def forget(self, path: KeyPath) -> None:
        """Removes the recorded places of a value and of everything inside it."""
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]

    def raise_problems(self) -> None:
        """Raises RecipeError if there are problems: one line each, in the file's order, then the command line's."""
        if self.problems:
            ordered = sorted(self.problems, key=lambda item: (item[0].override is not None, item[0].line))
            lines = list(dict.fromkeys(text for _, text in ordered))
            hidden = self.more + max(0, len(lines) - MAX_PROBLEMS)
            if hidden:
                lines[MAX_PROBLEMS:] = [f"... and {hidden} more like these"]
            raise RecipeError("\n".join(lines))


def dotted(path: KeyPath) -> str:
    """Returns a field's name as messages and overrides write it, such as `sample.prompts[1]`."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def read(file: str | Path) -> Document:
    """Reads a recipe file into a document. Raises RecipeError if the file is absent, unreadable or not YAML."""
    path, file = Path(file), printable(file)
    try:
        text = read_regular(path, _RECIPE_BYTES).decode("utf-8-sig")
    except FileNotFoundError as error:
        near = nearest(path.stem, [other.stem for other in path.parent.glob("*.yaml")])
        hint = f"; did you mean {path.parent / near}.yaml?" if near else ""
        raise RecipeError(f"{file}: no such recipe{printable(hint)}") from error
    except IsADirectoryError as error:
        raise RecipeError(f"{file}: this is a folder, expected a recipe in YAML") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 text, expected a recipe in YAML") from error
    except OSError as error:
        raise RecipeError(f"{file}: cannot read the recipe: {error.strerror}") from error
    root = SourceLocation(str(file), 1, path.absolute().parent)
    node = compose(text, root)
    if not isinstance(node, yaml.MappingNode):
        kinds = {yaml.SequenceNode: "is a list", yaml.ScalarNode: "is a single value"}
        kind = kinds.get(type(node), "is empty")
        raise RecipeError(f"{file}: the recipe {kind}, expected sections: model, quant, lora, data, ...")
    document = Document({}, {(): root})
    document.data = plain_value(node, (), root, document)
    return document


def compose(text: str, place: SourceLocation) -> yaml.Node | None:
    """Parses YAML text into nodes; None for empty text. Raises RecipeError, with the line, for invalid YAML."""
    try:
        return yaml.compose(text, Loader=RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        if "'\\t'" in problem:
            problem = "a tab before a key or value; indent with spaces"
        raise RecipeError(_not_yaml(place, mark.line + 1 if mark else 1, problem)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character U+{error.character:04X} is not allowed"
        raise RecipeError(_not_yaml(place, line, problem)) from error
    except RecursionError as error:
        raise RecipeError(_not_yaml(place, 1, "nested too deeply")) from error


def _not_yaml(place: SourceLocation, line: int, problem: str) -> str:
    where = SourceLocation(place.source, line, place.base, place.override)
    return where.report(place.override or (), f"not valid YAML: {problem}")


def plain_value(node: yaml.Node | None, path: KeyPath, place: SourceLocation, document: Document) -> Any:
    """Converts a node to plain values. For a file, records the line of each key and list item in the document."""
    if node is None:
        return None
    if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
        return _mapping(node, path, place, document)
    if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
        items = []
        for index, item in enumerate(node.value):
            inner = _note(item, (*path, index), place, document)
            items.append(plain_value(item, (*path, index), inner, document))
        return items
    kind = node.tag.removeprefix(TAG)
    if isinstance(node, yaml.ScalarNode) and kind == "str":
        return node.value
    if isinstance(node, yaml.ScalarNode) and kind in SCALARS and SCALARS[kind].match(node.value):
        return converted(kind, node.value)
    document.refuse(place, path, f"YAML tags are not supported in recipes; remove '{node.tag}'")
    document.unread.add(path)
    return None


def _mapping(
    node: yaml.MappingNode, path: KeyPath, place: SourceLocation, document: Document
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            here = SourceLocation(place.source, key.start_mark.line + 1, place.base, place.override)
            document.refuse(here, path, "got a list or mapping as a key, expected a single word")
            continue
        inner = (*path, key.value)
        if key.value in values:
            first = document.place(inner)
            here = SourceLocation(place.source, key.start_mark.line + 1, place.base, place.override)
            where = f"; first on line {first.line}" if first.override is None else ""
            document.problems.append((here, here.report(inner, f"given twice{where}; keep one of them")))
            continue
        values[key.value] = plain_value(value, inner, _note(key, inner, place, document), document)
    return values


def _note(node: yaml.Node, path: KeyPath, place: SourceLocation, document: Document) -> SourceLocation:
    if place.override is not None:
        return place
    place = SourceLocation(place.source, node.start_mark.line + 1, place.base)
    document.places[path] = place
    return place
