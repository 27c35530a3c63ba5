"""MkDocs hooks: generate the reference pages, and put current source code and command help into the others.

Three kinds of code block are replaced when the site is built, so that none of them can go stale:

    ```source                            the definition of a class, function or constant
    trainer/objective/losses.py Huber
    ```

    ```options                           the arguments and options of a command
    halfbyte plan
    ```

    ```recipes                           a table of the recipes and the models they train
    ```

The recipe reference, the changelog and the contributing guide are pages made from files outside `docs/`.
"""

import ast
import inspect
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.models import ArgumentInfo, OptionInfo

ROOT = Path(__file__).resolve().parents[1]
IMAGES = {
    "images/flux-learned.png": "recipes/mini/flux/learned.png",
    "images/sd3-learned.png": "recipes/mini/sd3/learned.png",
}
_FENCE = re.compile(r"^```(source|options|recipes)\n(.*?)```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and images that are made from files outside `docs/`."""
    from halfbyte.trainer.recipe.reference_page import reference_page

    pages = {
        "recipe-reference.md": reference_page(),
        "contributing.md": relinked((ROOT / "CONTRIBUTING.md").read_text()),
        "changelog.md": relinked((ROOT / "CHANGELOG.md").read_text()),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for name, source in IMAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces the generated blocks of a page."""

    def replaced(match: re.Match[str]) -> str:
        kind, body = match[1], match[2].strip()
        try:
            return GENERATORS[kind](body)
        except (KeyError, OSError, ValueError) as error:
            raise PluginError(f"{page.file.src_uri}: ```{kind}\n{body}: {error}") from error

    return _FENCE.sub(replaced, markdown)


def relinked(markdown: str) -> str:
    """Returns a page from the repository's root with links that work in the site.

    Links into `docs/` become relative to it. Files outside of it are not in the site: their links become plain text.
    """

    def replaced(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if target.startswith(("http://", "https://", "mailto:")) or not target:
            return match[0]
        if target.startswith("docs/"):
            return f"[{text}]({target.removeprefix('docs/')}{anchor})"
        named = {
            "CONTRIBUTING.md": "contributing.md",
            "CHANGELOG.md": "changelog.md",
            "README.md": "index.md",
        }
        if target == "recipes/REFERENCE.md":
            return f"[{text}](recipe-reference.md{anchor})"
        return f"[{text}]({named[target]}{anchor})" if target in named else text

    return _LINK.sub(replaced, markdown)


def source_block(reference: str) -> str:
    """Returns the code block for `path name`, where name is a class, a function, `Class.method` or a constant."""
    path, _, name = reference.partition(" ")
    code = definition(ROOT / path, name)
    return f'```python title="{posixpath.normpath(path)}"\n{code}\n```'


def definition(file: Path, name: str) -> str:
    """Returns the source of a definition in a file, with its decorators.

    Raises:
        KeyError: if the file does not define the name.
    """
    text = file.read_text()
    body: list[ast.stmt] = ast.parse(text).body
    node: ast.stmt | None = None
    for part in name.split("."):
        node = next((item for item in body if part in _names(item)), None)
        if node is None:
            raise KeyError(f"{file.name} does not define {name}")
        body = node.body if isinstance(node, ast.ClassDef) else []
    assert node is not None
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines)


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return {target.id for target in targets if isinstance(target, ast.Name)}


def options_block(command: str) -> str:
    """Returns the usage line and the tables of arguments and options of `halfbyte NAME`."""
    name = command.removeprefix("halfbyte ").strip()
    parameters = parameters_of(commands()[name])
    usage = ["halfbyte", name, *(item.usage for item in parameters if item.is_argument), "[OPTIONS]"]
    lines = [f"```\n{' '.join(usage)}\n```"]
    for title in ("argument", "option"):
        rows = [item for item in parameters if item.is_argument == (title == "argument")]
        if rows:
            lines += ["", f"| {title} | meaning |", "| --- | --- |"]
            lines += [f"| {item.written} | {item.meaning} |" for item in rows]
    return "\n".join(lines)


def commands() -> dict[str, Callable[..., Any]]:
    """Returns the functions behind the commands of `halfbyte`, by the command's name."""
    from halfbyte.trainer.cli.app import app

    return {command.name: command.callback for command in app.registered_commands}


def _is_option(name: Any) -> bool:
    return isinstance(name, str) and name.startswith("--")


@dataclass(frozen=True)
class Parameter:
    """An argument or an option of a command."""

    name: str
    info: ArgumentInfo | OptionInfo
    kind: Any
    default: Any

    @property
    def is_argument(self) -> bool:
        return isinstance(self.info, ArgumentInfo)

    @property
    def usage(self) -> str:
        """The argument in the usage line, in brackets if it may be left out."""
        shown = self.name.upper() + ("..." if "list" in str(self.kind) else "")
        return shown if self.default is inspect.Parameter.empty else f"[{shown}]"

    @property
    def options(self) -> list[str]:
        """Every way to write the option, such as --public and --private."""
        dashed = self.name.replace("_", "-")
        # In an Annotated type, Typer takes the first name for the default.
        declared = [name for name in (self.info.default, *(self.info.param_decls or ())) if _is_option(name)]
        if not declared:
            declared = [f"--{dashed}/--no-{dashed}" if self.is_switch else f"--{dashed}"]
        return [part.strip() for option in declared for part in option.split("/")]

    @property
    def is_switch(self) -> bool:
        return self.kind is bool or set(get_args(self.kind)) == {bool, type(None)}

    @property
    def written(self) -> str:
        """The first column of the table."""
        if self.is_argument:
            return f"`{self.name.upper()}`"
        if self.is_switch:
            return " / ".join(f"`{option}`" for option in self.options)
        words = {"str": "TEXT", "int": "N", "float": "X", "Path": "PATH"}
        value = next(word for kind, word in words.items() if re.search(rf"\b{kind}\b", str(self.kind)))
        return f"`{self.options[0]} {value}`"

    @property
    def meaning(self) -> str:
        """The second column: the option's help, and its default unless the help states it."""
        text = (self.info.help or "").replace("|", "\\|")
        if self.is_argument or self.default in (None, False, inspect.Parameter.empty):
            return text
        return f"{text} Default: `{self.options[0] if self.default is True else self.default}`."


def parameters_of(command: Callable[..., Any]) -> list[Parameter]:
    """Returns the arguments and options of a command's function."""
    hints = get_type_hints(command, include_extras=True)
    found = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind, info = get_args(hints[name])
        found.append(Parameter(name, info, kind, parameter.default))
    return found


def recipes_block(_: str) -> str:
    """Returns the table of the recipes in `recipes/`, with what their second line says of them."""
    rows = ["| recipe | model and purpose |", "| --- | --- |"]
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        rows.append(f"| `recipes/{file.name}` | {purpose(file)} |")
    return "\n".join(rows)


def purpose(recipe: Path) -> str:
    """Returns the comment at the head of a recipe, up to the command in it, as one line."""
    found = []
    for line in recipe.read_text().splitlines()[1:]:
        if not line.startswith("# ") or line.startswith("#  "):
            break
        found.append(line.removeprefix("# ").strip())
    return " ".join(found).rstrip(":")


GENERATORS: dict[str, Callable[[str], str]] = {
    "source": source_block,
    "options": options_block,
    "recipes": recipes_block,
}
