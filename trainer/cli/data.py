"""The command `halfbyte data`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.quant.files.atomic import write_file
from halfbyte.trainer.cli.console import DebugOption, library_imports, reported_errors, slow_imports
from halfbyte.trainer.errors import DataError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console


def data_command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, e.g. recipes/flux_lora.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to override, e.g. data.path=./pictures.")
    ] = None,
    page: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("data.html"),
    most: Annotated[int, typer.Option(min=0, help="The number of images on the page.")] = 500,
    debug: DebugOption = False,
) -> None:
    """Check a recipe's images and captions, and show them on a page.

    Needs no GPU and no weights. The page is one HTML file with each image as the model will see it: its crop, its mask,
    its texts with the end that T5 cuts, and equal and similar images. If the data cannot be used, the page lists all
    problems.

    Exit codes: 0 done, 2 recipe or model error, or the page cannot be written, 3 data error, 4 Hub error,
    128 + N stopped by signal N (130: Ctrl-C), 1 an unexpected error.
    """
    with reported_errors(debug=debug) as command:
        with slow_imports():
            from halfbyte.trainer.recipe.load import load_document

        settings, command.document = load_document(recipe, overrides or [])
        if page.suffix.lower() not in (".html", ".htm"):
            raise RecipeError(f"--page: got {page}, expected a file that ends in .html")
        if not page.absolute().parent.is_dir():
            raise RecipeError(f"--page: got {page}, but there is no folder {page.absolute().parent}")
        with library_imports():
            from rich.console import Console

            from halfbyte.trainer.data_report.check import check_data
            from halfbyte.trainer.data_report.page import data_page, problems_page, report_lines
            from halfbyte.trainer.runtime.progress import write_lines
        console = Console()
        try:
            report = check_data(settings, console, most=most)
        except DataError as error:
            _write(page, problems_page(str(error).splitlines(), recipe.name), console)
            raise
        write_lines(console, report_lines(report))
        _write(page, data_page(report, recipe.name), console)


def _write(page: Path, content: str, console: "Console") -> None:
    try:
        write_file(page, content)
    except OSError as error:
        raise RecipeError(f"{page}: cannot write the page: {error.strerror}") from error
    console.print(f"page  {page}", highlight=False, soft_wrap=True)
