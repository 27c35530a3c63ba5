"""Draws a contact sheet: one row per prompt, one column per stage of a run, and training images at the side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 10
_LINE = 22
_TEXT = 14  # font size
# All sizes are in pixels. A cell's longer side is at least _SMALLEST for enlarged images, at most _LARGEST for others.
_SMALLEST, _LARGEST = 192, 288
_ENLARGED_UP_TO = 128  # images with a longer side up to this are enlarged
_COLUMNS = 4  # at most so many columns of training images


@dataclass(frozen=True)
class Row:
    """A prompt and its images, one per column; None leaves the cell empty."""

    caption: str
    pictures: Sequence[Image.Image | None]


@dataclass(frozen=True)
class _Grid:
    """The grid of training images."""

    cell: int  # side of a square cell, in pixels
    columns: int
    rows: int

    @property
    def width(self) -> int:
        return self.columns * (self.cell + _MARGIN) if self.columns else 0


def contact_sheet(
    heading: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[Row],
    trained_on: Sequence[Image.Image],
    *,
    of: int,
) -> Image.Image:
    """Draws lines of text above a labeled grid of images, with training images at its side.

    Images of up to 128 pixels are enlarged by integer factors, so that their pixels stay visible; large ones are
    reduced.

    Args:
        trained_on: training images, of which as many are shown as fit.
        of: the total number of training images, for the title.
    """
    width, height = _cell(rows)
    top = _MARGIN + (len(heading) + 1) * _LINE
    bottom = top + len(rows) * (_LINE + height + _MARGIN)
    # Two training images are as high as one generated image.
    grid = _grid(len(trained_on), bottom - _MARGIN - top - _LINE, (max(width, height) - _MARGIN) // 2)
    left = _MARGIN + len(columns) * (width + _MARGIN)
    sheet = Image.new("RGB", (left + (grid.width + _MARGIN if grid.columns else 0), bottom), "white")
    pen = ImageDraw.Draw(sheet)
    font: Any = ImageFont.load_default(_TEXT)

    def write(x: int, y: int, text: str, room: int) -> None:
        pen.text((x, y), fitted(text, font, room), fill="black", font=font)

    for number, line in enumerate(heading):
        write(_MARGIN, _MARGIN + number * _LINE, line, sheet.width - 2 * _MARGIN)
    for place, title in enumerate(columns):
        write(_MARGIN + place * (width + _MARGIN), top - _LINE, title, width)
    for number, row in enumerate(rows):
        y = top + number * (_LINE + height + _MARGIN)
        write(_MARGIN, y, row.caption, left - 2 * _MARGIN)
        for place, picture in enumerate(row.pictures):
            if picture is not None:
                _paste(sheet, picture, _MARGIN + place * (width + _MARGIN), y + _LINE, (width, height))
    shown = trained_on[: grid.columns * grid.rows]
    if shown:
        title = f"trained on {of}" if len(shown) == of else f"{len(shown)} of {of} trained on"
        write(left + _MARGIN, top, title, grid.width)
    for number, picture in enumerate(shown):
        across, down = number % grid.columns, number // grid.columns
        x = left + _MARGIN + across * (grid.cell + _MARGIN)
        _paste(sheet, picture, x, top + _LINE + down * (grid.cell + _MARGIN), (grid.cell, grid.cell))
    return sheet


def fitted(text: str, font: Any, room: int) -> str:
    """Cuts text to one line of at most `room` pixels; control characters and line breaks become spaces."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if font.getlength(text) <= room:
        return text
    text = text[:room]  # no letter is narrower than one pixel
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"


def _cell(rows: Sequence[Row]) -> tuple[int, int]:
    """Returns the size (width, height) of the grid's cells, into which the largest shown image fits."""
    sizes = [_shown_size(picture.size) for row in rows for picture in row.pictures if picture is not None]
    return max(width for width, _ in sizes), max(height for _, height in sizes)


def _shown_size(size: tuple[int, int]) -> tuple[int, int]:
    longer = max(size)
    if longer <= _ENLARGED_UP_TO:
        factor: float = -(-_SMALLEST // longer)
    else:
        factor = min(1.0, _LARGEST / longer)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _grid(pictures: int, height: int, cell: int) -> _Grid:
    """Returns a grid of square cells that fills the height, with enough columns for all images but at most four."""
    rows = max(1, (height + _MARGIN) // (cell + _MARGIN))
    return _Grid(cell, min(_COLUMNS, -(-pictures // rows)), rows)


def _paste(sheet: Image.Image, picture: Image.Image, x: int, y: int, room: tuple[int, int]) -> None:
    """Pastes the image, scaled to fit into `room` (width, height) with its aspect ratio kept."""
    factor = min(room[0] / picture.width, room[1] / picture.height)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    resampling = Image.Resampling.NEAREST if factor == int(factor) else Image.Resampling.LANCZOS
    sheet.paste(picture.convert("RGB").resize(size, resampling), (x, y))
