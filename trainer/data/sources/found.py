"""The interface of the sources of images: folders, tables and tar files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from halfbyte.trainer.data.records.problems import MOST_LINES, Problems
from halfbyte.trainer.data.records.sample import Place
from halfbyte.trainer.data.sources.left_out import LeftOut
from halfbyte.trainer.recipe.data_section import DataSet, MaskedLoss

_NO_MASKS = MaskedLoss()


@dataclass(frozen=True)
class SourceSettings:
    """The settings of a data set that decide which images, captions and masks are read."""

    data_set: int = 0  # the number that the samples get, see `Sample`
    setting: str = "data"  # the section of the recipe, for messages
    masks: MaskedLoss = _NO_MASKS
    without: frozenset[Path] = frozenset()  # folders and files that are left out: masks or reference images
    image_column: str | None = None  # of tables; None: image
    caption_column: str | None = None  # of tables; None: text or caption
    split: str | None = None  # of a saved or Hub data set with several
    config: str | None = None  # of a Hub data set with several
    skip_bad: bool = False  # leave out images that cannot be read or decoded, with a warning that lists them
    tables: Path | None = None  # the folder that keeps what was read for the next start; None: it is not kept
    renew: bool = True  # False: use what is kept, and keep nothing
    most_problems: int | None = MOST_LINES  # lines of the message; None: all

    @classmethod
    def of(cls, given: DataSet, number: int) -> "SourceSettings":
        """Returns the settings of a data set of the recipe."""
        return cls(
            number,
            given.setting,
            given.masked_loss,
            image_column=given.image_column,
            caption_column=given.caption_column,
            split=given.split,
            config=given.config,
        )


@dataclass(frozen=True)
class Found:
    """An image and its captions, before the image is opened."""

    place: Place
    captions: tuple[str, ...]
    mask: Place | None = None
    data: bytes | None = None  # the image's bytes, if the source has read them
    mask_data: bytes | None = None


class Source(Protocol):
    """Images with captions at one path."""

    @property
    def root(self) -> Path:
        """The folder that names are relative to."""

    @property
    def shards(self) -> Sequence[Path]:
        """The files that hold many images each, in order. Empty for files of one image each."""

    @property
    def total(self) -> int:
        """The number of images, maybe an estimate, for the display of progress."""

    def items(self, shard: Path, problems: Problems, left_out: LeftOut) -> Iterator[Found]:
        """Yields the images of one shard, or of the folder `root`, in order.

        Adds what cannot be used to `problems`, and images that are not for training to `left_out`.
        """
