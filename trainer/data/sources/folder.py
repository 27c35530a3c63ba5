"""Reads folders of captioned images and checks all of them before training starts.

Three forms are supported:
- images with metadata.jsonl or metadata.csv (columns file_name and text or caption), one such file per folder; folders
  may be nested
- images with a .txt, .caption or .json file of the same name next to each, see `sidecars`
- parquet files with the columns image and text or caption, as `datasets` writes them
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from halfbyte.quant.files.digest import sha256_of
from halfbyte.quant.files.regular import read_regular
from halfbyte.trainer.data.pictures.decode import (
    DECODE_ERRORS,
    PICTURE_BYTES,
    PICTURE_SUFFIXES,
    decode,
    decoded_size,
    has_misnamed_profile,
    pixels,
    upright_size,
)
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.captions import METADATA_NAMES, Problems, captions_of
from halfbyte.trainer.data.sources.left_out import DAMAGED, LeftOut, foreign_folder, pictures_in
from halfbyte.trainer.data.sources.parquet import IMAGE_COLUMN, embedded_bytes, picture_bytes, read_rows
from halfbyte.trainer.data.sources.picture_captions import picture_captions
from halfbyte.trainer.data.sources.reference_columns import Cell, reference_bytes
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.runtime.progress import OnProgress
from halfbyte.trainer.wording import printable, shown

log = logging.getLogger(__name__)

FOREIGN_SUFFIXES = (".heic", ".heif", ".jxl", ".raw", ".dng", ".cr2", ".nef", ".arw", ".psd", ".svg")
"""Image formats that Pillow cannot read. They are reported as errors rather than skipped silently."""

_PLAIN = CaptionStyle()


@dataclass(frozen=True)
class Mask:
    """The mask of an image: which parts of it are learned."""

    path: Path | None  # None: the image's own transparency
    sha256: str  # of the file that holds it


@dataclass(frozen=True)
class Sample:
    """One image and its captions. Latents and text embeddings are matched only through this object.

    A reference image is a sample without captions.
    """

    index: int  # in the sorted order of the paths
    path: Path
    caption: str  # the first with the settings of its data set, tags in place; what validation uses
    width: int  # pixels, of the upright image
    height: int
    sha256: str  # of the image file's bytes
    row: int | None = None  # in the parquet file at `path`; None: `path` is the image itself
    misnamed_profile: bool = False  # its color profile says sRGB but is not, see `color`
    data_set: int = 0  # the place of its data set in the recipe
    captions: tuple[str, ...] = ()  # of the source, without the settings; empty: it has none
    mask: Mask | None = None
    references: tuple["Sample", ...] = ()  # its reference images, in the order in which the model sees them
    cell: Cell | None = None  # of a reference image inside the parquet file at `path`


@dataclass(frozen=True)
class _Found:
    """An image and its captions, before the image is opened."""

    path: Path
    row: int | None
    captions: tuple[str, ...]

    @property
    def where(self) -> str:
        return str(self.path) if self.row is None else f"{self.path} row {self.row}"


def read_samples(
    path: Path | str,
    style: CaptionStyle = _PLAIN,
    *,
    data_set: int = 0,
    without: frozenset[Path] = frozenset(),
    is_decoded: Callable[[str], bool] = lambda sha256: False,
    progress: OnProgress | None = None,
    left_out: LeftOut | None = None,
    skip_bad: bool = False,
) -> list[Sample]:
    """Reads the samples at `path`, sorted by path.

    Every image is decoded once, so that a corrupt one fails at start-up, not mid-run. Symbolic links out of the folder
    are refused.

    Args:
        style: applied to every caption. If it adds text, images need no caption.
        data_set: the number that the samples get, see `Sample`.
        without: folders and files inside `path` that are left out, because they are masks or reference images.
        is_decoded: returns True for the SHA-256 of an image that has been decoded before and need not be again.
        left_out: gets the images that are not for training, such as masks.
        skip_bad: leave images out that cannot be read or decoded, with a warning that lists them.

    Raises:
        DataError: with one line per problem, or if no image is left.
    """
    root = Path(path)
    if ".." in root.parts:
        root = root.resolve()  # captions are looked up by normalized path
    problems = Problems()
    style.check(problems)
    left_out = LeftOut() if left_out is None else left_out
    found = _find(root, style, without, problems, left_out)
    samples: list[Sample] = []
    bad = Problems() if skip_bad else problems
    for number, item in enumerate(found):
        sample = _open(item, style, len(samples), data_set, is_decoded, bad)
        if sample is not None:
            samples.append(sample)
        elif skip_bad:
            left_out.add(item.where, DAMAGED)
        if progress is not None:
            progress(number + 1, len(found))
    if problems.lines:
        raise DataError(str(problems))
    if found and not samples:
        raise DataError(f"{printable(root)}: none of its {len(found)} images can be used:\n{bad}")
    if bad.lines:
        log.warning(
            "%d of %d images are skipped (data.on_bad_image: skip):\n  %s",
            len(found) - len(samples),
            len(found),
            str(bad).replace("\n", "\n  "),
        )
    return samples


def load_pixels(sample: Sample, box: tuple[int, int, int, int], size: tuple[int, int], flip: bool) -> Tensor:
    """Loads the box (left, top, right, bottom) of the upright image, scaled to (W, H): (3, H, W) fp32 in [-1, 1]."""
    return pixels(decode(sample_bytes(sample), box), size, flip=flip)


def sample_bytes(sample: Sample) -> bytes:
    """Returns the bytes of the image file. Raises DataError if they changed since the sample was read."""
    try:
        data = stored_bytes(sample.path, sample.row, sample.cell)
    except OSError as error:
        raise DataError(f"{printable(sample.path)}: cannot be read: {error.strerror}") from error
    if sha256_of(data) != sample.sha256:
        raise DataError(f"{printable(sample.path)}: changed since the run was started; start again")
    return data


def unchanged_pictures(
    samples: Sequence[Sample], longer_side: int | None, used_for: str
) -> list[Image.Image | None]:
    """Decodes images, reduced to `longer_side` pixels. Gives None for those that are gone or have changed.

    Logs a warning for these, with what the images are used for: a finished run must not fail because of them.
    """
    pictures: list[Image.Image | None] = []
    lost: list[str] = []
    for sample in samples:
        try:
            picture = decode(sample_bytes(sample))
        except DataError as error:
            lost.append(str(error).removesuffix("; start again"))
            pictures.append(None)
            continue
        if longer_side is not None:
            picture.thumbnail((longer_side, longer_side))
        pictures.append(picture)
    if lost:
        log.warning("left out of %s: %d of %d images; %s", used_for, len(lost), len(samples), lost[0])
    return pictures


def stored_bytes(path: Path, row: int | None, cell: Cell | None = None) -> bytes:
    """Returns the bytes of an image in a file of its own or in a row of a parquet file. Raises OSError."""
    if row is None:
        return read_regular(path, PICTURE_BYTES)
    return picture_bytes(path, row) if cell is None else reference_bytes(path, row, cell)


def _find(
    root: Path, style: CaptionStyle, without: frozenset[Path], problems: Problems, left_out: LeftOut
) -> list[_Found]:
    if root.is_file() and root.suffix == ".parquet":
        return _parquet_items(root.parent, [root], style, problems)
    if not root.is_dir():
        problems.add(root, "no such folder" if not root.exists() else "not a folder or a .parquet file")
        return []
    files = [file for file in _files(root, problems, left_out) if without.isdisjoint((file, *file.parents))]
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    tables = [file for file in files if file.suffix == ".parquet"]
    if tables and pictures:
        problems.add(root, f"contains both images and parquet files ({tables[0].name}); keep one kind")
        return []
    if tables:
        return _parquet_items(root, tables, style, problems)
    if not pictures:
        arrow = any(file.suffix == ".arrow" for file in files)
        hint = (
            "; for the .arrow files of a saved dataset, use to_parquet instead of save_to_disk"
            if arrow
            else ""
        )
        problems.add(root, f"no images; accepted: {', '.join(PICTURE_SUFFIXES)}, or .parquet files{hint}")
    captions = picture_captions(root, files, pictures, style, problems, left_out)
    return [_Found(picture, None, texts) for picture, texts in captions.items()]


def _files(root: Path, problems: Problems, left_out: LeftOut) -> list[Path]:
    """Returns all files below root except hidden ones and those of other programs, sorted."""
    found: list[Path] = []

    def unreadable(error: OSError) -> None:
        problems.add(error.filename, f"cannot be read: {error.strerror}")

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        for name in sorted(subfolders):
            if (reason := foreign_folder(name)) is not None:
                for picture in pictures_in(Path(folder) / name, PICTURE_SUFFIXES):
                    left_out.add(picture, reason)
        subfolders[:] = sorted(
            name for name in subfolders if not name.startswith(".") and foreign_folder(name) is None
        )
        for name in subfolders:
            if name.lower().endswith((*PICTURE_SUFFIXES, ".txt", ".caption")) or name in METADATA_NAMES:
                problems.add(Path(folder) / name, "is a folder, but its name is that of a file; rename it")
            if (Path(folder) / name).is_symlink():
                problems.add(
                    Path(folder) / name,
                    "is a symbolic link to a folder, which is not followed; copy the folder instead",
                )
        for file in (Path(folder) / name for name in names if not name.startswith(".")):
            if file.is_symlink() and not is_inside(root, file):
                problems.add(file, f"is a symbolic link to a file outside {root}; copy the file instead")
            elif file.suffix.lower() in FOREIGN_SUFFIXES:
                problems.add(
                    file,
                    f"is of a format that cannot be read; convert it to one of {', '.join(PICTURE_SUFFIXES)}",
                )
            else:
                found.append(file)
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def is_inside(root: Path, file: Path) -> bool:
    """Returns True if a file is below a folder once all symbolic links are followed."""
    # realpath, because Path.resolve raises RuntimeError for a loop of links.
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root))


def _parquet_items(root: Path, tables: list[Path], style: CaptionStyle, problems: Problems) -> list[_Found]:
    items = [item for table in tables for item in _table_items(root, table, style, problems)]
    if not items and not problems.lines:
        problems.add(root, "the parquet files contain no rows")
    return items


def _table_items(root: Path, table: Path, style: CaptionStyle, problems: Problems) -> Iterator[_Found]:
    for number, row in read_rows(table, problems):
        where = f"{table} row {number}"
        texts = captions_of(where, row, problems)
        if texts == () and not style.gives_text:
            problems.add(where, f"has an empty caption; write one, or set {style.setting}.caption_prefix")
        texts = texts or ()
        for text in texts:
            style.check_own(where, text, problems)
        image = row[IMAGE_COLUMN]
        if embedded_bytes(image) is not None:
            yield _Found(table, number, texts)
            continue
        name = image.get("path") if isinstance(image, dict) else None
        picture = table.parent / name if isinstance(name, str) and "\0" not in name else None
        if picture is None:
            problems.add(where, f"{IMAGE_COLUMN}: contains neither bytes nor a path")
        elif not is_inside(root, picture):
            problems.add(
                where, f"names {shown(name)}, which is outside {root}; embed the image's bytes instead"
            )
        elif not os.path.isfile(picture):
            problems.add(where, f"names a missing image, {shown(name)}")
        else:
            yield _Found(picture, None, texts)


def _open(
    item: _Found,
    style: CaptionStyle,
    index: int,
    data_set: int,
    is_decoded: Callable[[str], bool],
    problems: Problems,
) -> Sample | None:
    try:
        data = stored_bytes(item.path, item.row)
    except OSError as error:
        problems.add(item.where, f"cannot be read: {error.strerror}")
        return None
    sha256 = sha256_of(data)
    try:
        width, height = upright_size(data) if is_decoded(sha256) else decoded_size(data)
        misnamed = has_misnamed_profile(data)
    except DECODE_ERRORS as error:
        problems.add(item.where, _undecodable(data, error))
        return None
    caption = style.finished(item.captions[0] if item.captions else "")
    return Sample(
        index, item.path, caption, width, height, sha256, item.row, misnamed, data_set, item.captions
    )


def _undecodable(data: bytes, error: Exception) -> str:
    if not data:
        return "is empty (0 bytes)"
    return f"cannot be decoded: {error}; replace or remove it"
