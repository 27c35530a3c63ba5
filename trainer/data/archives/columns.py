"""The columns of a table that hold images, captions and masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.quant.files.regular import require_regular
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.wording import shown

TABLE_BYTES = 2**50
"""More than any file has: only what the file is matters, because tables are read in parts."""

CAPTION_COLUMNS = ("text", "caption")
IMAGE_COLUMN = "image"
MASK_COLUMN = "mask"


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns."""

    image: str = "image"
    caption: str | None = None  # None: text or caption
    mask: str | None = None  # None: masks are not read
    captions_needed: bool = True  # False: a table without a column of captions is accepted

    @property
    def captions(self) -> tuple[str, ...]:
        """The names that a column of captions may have."""
        return CAPTION_COLUMNS if self.caption is None else (self.caption,)

    def used(self, path: Path, names: Sequence[str], problems: Problems) -> list[str]:
        """Returns those of a table's columns that are read; none after adding a problem."""
        known = set(names)
        if self.image not in known or (self.captions_needed and not known & set(self.captions)):
            found = ", ".join(map(shown, names[:20])) or "none"
            texts = "text (or caption)" if self.caption is None else self.caption
            problems.add(
                path,
                f"found the columns {found}, expected {self.image} and {texts}; set data.image_column and"
                " data.caption_column for other names",
            )
            return []
        wanted = {self.image, *self.captions, *([] if self.mask is None else [self.mask])}
        return [name for name in names if name in wanted]


def is_table_file(path: Path, problems: Problems) -> bool:
    """Returns True for a regular file; otherwise adds a problem."""
    try:
        require_regular(path, TABLE_BYTES)
    except OSError as error:
        problems.add(path, f"cannot be read: {error.strerror}")
        return False
    return True


def embedded_bytes(image: object) -> bytes | None:
    """Returns the bytes of an image cell, plain or in a struct of bytes and path; None if it has only a path."""
    if isinstance(image, dict):
        image = image.get("bytes")
    return image if isinstance(image, bytes) else None
