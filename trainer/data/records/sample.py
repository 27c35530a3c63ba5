"""One image with its captions and its mask, and the place of their bytes."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Cell:
    """The place of a reference image inside a row."""

    column: str
    number: int  # in the list of the cell; 0 for a cell that is no list


@dataclass(frozen=True)
class Place:
    """The place of an image's bytes: a file, a cell of a table or a member of a tar file."""

    file: Path
    row: int | None = None  # of the table `file`
    part: str = ""  # the column of the table, or the name of the tar file's member
    start: int | None = None  # of the member's bytes in the tar file
    size: int = 0  # of the member, in bytes

    @property
    def path(self) -> Path:
        """The file, or the member as if its tar file were a folder."""
        return self.file if self.start is None else self.file / self.part

    @property
    def where(self) -> str:
        """The place for messages."""
        return str(self.path) if self.row is None else f"{self.path} row {self.row}"


@dataclass(frozen=True)
class Mask:
    """The mask of an image: which parts of it are learned."""

    path: Path | None  # None: the image's own transparency
    sha256: str  # of the bytes that hold it
    row: int | None = None  # in the table at `path`, with the column's name in `part`
    part: str = ""
    start: int | None = None  # of the member `part` in its tar file, see `Sample`
    size: int = 0

    @property
    def place(self) -> Place | None:
        """The place of the mask's bytes; None for the image's own transparency."""
        return None if self.path is None else place_of(self.path, self.row, self.part, self.start, self.size)


@dataclass(frozen=True)
class Sample:
    """One image and its captions. Latents and text embeddings are matched only through this object.

    A reference image is a sample without captions.
    """

    index: int  # in the order of the source
    path: Path  # of the file with the image; a member of a tar file is named as if that were a folder
    caption: str  # the first with the settings of its data set, tags in place; what validation uses
    width: int  # pixels, of the upright image
    height: int
    sha256: str  # of the image file's bytes
    row: int | None = None  # in the table at `path`; None: `path` is the image itself
    misnamed_profile: bool = False  # its color profile says sRGB but is not, see `color`
    data_set: int = 0  # the place of its data set in the recipe
    captions: tuple[str, ...] = ()  # of the source, without the settings; empty: it has none
    mask: Mask | None = None
    references: tuple["Sample", ...] = ()  # its reference images, in the order in which the model sees them
    cell: Cell | None = None  # of a reference image inside the parquet file at `path`
    part: str = ""  # the column of the table, or the name of the tar file's member
    start: int | None = None  # of the member's bytes in the tar file; None: not in a tar file
    size: int = 0  # of the member, in bytes

    @property
    def place(self) -> Place:
        """The place of the image's bytes."""
        return place_of(self.path, self.row, self.part, self.start, self.size)

    @property
    def where(self) -> str:
        """The image's place for messages."""
        return self.place.where


def place_of(path: Path, row: int | None, part: str, start: int | None, size: int) -> Place:
    """Returns the place of bytes whose path is `Place.path`."""
    file = path if start is None else path.parents[len(PurePosixPath(part).parts) - 1]
    return Place(file, row, part, start, size)
