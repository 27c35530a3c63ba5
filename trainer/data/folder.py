"""A folder of pictures with captions, checked whole before anything is trained on it.

Three forms are read: pictures with metadata.jsonl or metadata.csv (columns file_name and text or caption, one
file a folder, folders nested at will), pictures with a .txt file of the same name beside each, and parquet
files with the columns image and text or caption, as `datasets` writes them.
"""

import difflib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, Value
from datasets import Image as PictureFeature
from torch import Tensor

from halfbyte.quant.files.digest import sha256_of
from halfbyte.trainer.data.captions import METADATA_NAMES, Problems, caption_of, read_metadata, read_text
from halfbyte.trainer.data.decode import DECODE_ERRORS, decode, pixels, upright_size
from halfbyte.trainer.data.parquet import IMAGE_COLUMN, embedded_bytes, picture_bytes, read_rows
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.runtime.progress import OnProgress

log = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
# Pictures all the same, but not to Pillow: naming them beats leaving them out in silence.
_FOREIGN_SUFFIXES = (".heic", ".heif", ".jxl", ".raw", ".dng", ".cr2", ".nef", ".arw", ".psd", ".svg")

_HINTS = 10


@dataclass(frozen=True)
class Sample:
    """One picture and its caption: what joins a latent and an embedding, and nothing else does."""

    index: int  # in the sorted order of the paths
    path: Path
    caption: str
    width: int  # pixels, upright
    height: int
    sha256: str  # of the picture file's bytes
    row: int | None = None  # of the parquet file at `path`; None: `path` is the picture


@dataclass(frozen=True)
class _Found:
    """A picture and caption that belong together, not yet opened."""

    path: Path
    row: int | None
    caption: str

    @property
    def where(self) -> str:
        return str(self.path) if self.row is None else f"{self.path} row {self.row}"


def read_samples(
    path: Path | str,
    caption_prefix: str = "",
    *,
    is_decoded: Callable[[str], bool] = lambda sha256: False,
    progress: OnProgress | None = None,
) -> list[Sample]:
    """The samples at `path` in a fixed order.

    The prefix goes before every caption, with a space between; with a prefix a picture needs no caption of
    its own. Every picture is decoded once, to find the damaged ones now and not at night; `is_decoded` tells
    by SHA-256 which ones have been before. Symbolic links that leave the folder are refused.

    Raises DataError with one line for each thing wrong.
    """
    root = Path(path)
    if ".." in root.parts:
        root = root.resolve()  # rows are looked up by normalized path
    problems = Problems()
    found = _find(root, caption_prefix.strip(), problems)
    samples: list[Sample] = []
    for number, item in enumerate(found):
        sample = _open(item, len(samples), is_decoded, problems)
        if sample is not None:
            samples.append(sample)
        if progress is not None:
            progress(number + 1, len(found))
    if problems.lines:
        raise DataError(str(problems))
    return samples


def load_pixels(sample: Sample, box: tuple[int, int, int, int], size: tuple[int, int], flip: bool) -> Tensor:
    """(3, H, W) fp32 in [-1, 1]: the box (left, top, right, bottom) of the upright picture at size (W, H)."""
    return pixels(decode(sample_bytes(sample)), box=box, size=size, flip=flip)


def sample_bytes(sample: Sample) -> bytes:
    """The picture file as it was when the sample was read. Raises DataError if it changed since."""
    try:
        data = sample.path.read_bytes() if sample.row is None else picture_bytes(sample.path, sample.row)
    except OSError as error:
        raise DataError(f"{sample.path}: cannot be read: {error.strerror}") from error
    if sha256_of(data) != sample.sha256:
        raise DataError(f"{sample.path}: changed while the run was starting; start again")
    return data


def _find(root: Path, prefix: str, problems: Problems) -> list[_Found]:
    if root.is_file() and root.suffix == ".parquet":
        return _parquet_items(root.parent, [root], prefix, problems)
    if not root.is_dir():
        problems.add(root, "no such folder" if not root.exists() else "not a folder or a .parquet file")
        return []
    files = _files(root, problems)
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    tables = [file for file in files if file.suffix == ".parquet"]
    if tables and pictures:
        problems.add(root, f"holds pictures and parquet files ({tables[0].name}); keep one kind")
        return []
    if tables:
        return _parquet_items(root, tables, prefix, problems)
    if not pictures:
        arrow = any(file.suffix == ".arrow" for file in files)
        hint = "; what datasets has saved to disk: write it with to_parquet instead" if arrow else ""
        problems.add(root, f"no pictures; accepted: {', '.join(PICTURE_SUFFIXES)}, or .parquet files{hint}")
    return _picture_items(root, files, pictures, prefix, problems)


def _files(root: Path, problems: Problems) -> list[Path]:
    """Every file below root in sorted order, hidden ones left out."""
    found: list[Path] = []

    def unreadable(error: OSError) -> None:
        problems.add(error.filename, f"cannot be read: {error.strerror}")

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__MACOSX")))
        for name in subfolders:
            if (Path(folder) / name).is_symlink():
                problems.add(Path(folder) / name, "a symbolic link to a folder is not followed; copy it")
        for file in (Path(folder) / name for name in names if not name.startswith(".")):
            if file.is_symlink() and not _is_inside(root, file):
                problems.add(file, f"a symbolic link to outside {root}; copy the file")
            elif file.suffix.lower() in _FOREIGN_SUFFIXES:
                problems.add(file, f"cannot be read; convert it to one of {', '.join(PICTURE_SUFFIXES)}")
            else:
                found.append(file)
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _is_inside(root: Path, file: Path) -> bool:
    return file.resolve().is_relative_to(root.resolve())


def _picture_items(
    root: Path, files: list[Path], pictures: list[Path], prefix: str, problems: Problems
) -> list[_Found]:
    captions = _metadata_captions(root, files, pictures, problems)
    captions = _text_captions(files, pictures, captions, problems)
    rows: dict[str, list[str]] = {"image": [], "caption": []}
    for picture in pictures:
        caption = captions.get(picture)
        if caption is None and not prefix:
            problems.add(
                picture,
                f"has no caption; add {picture.with_suffix('.txt').name} beside it, a row in"
                f" {' or '.join(METADATA_NAMES)}, or set data.caption_prefix",
            )
        elif not caption and not prefix:
            problems.add(picture, "its caption is empty; write one, or set data.caption_prefix")
        rows["image"].append(str(picture))
        rows["caption"].append(_joined(prefix, caption))
    # decode=False: a damaged picture would end the iteration, and its pixels would be decoded twice.
    features = Features({"image": PictureFeature(decode=False), "caption": Value("string")})
    return [
        _Found(Path(row["image"]["path"]), None, row["caption"])
        for row in Dataset.from_dict(rows, features=features)
    ]


def _joined(prefix: str, caption: str | None) -> str:
    return " ".join(part for part in (prefix, caption) if part)


def _metadata_captions(
    root: Path, files: list[Path], pictures: list[Path], problems: Problems
) -> dict[Path, str]:
    known = set(pictures)
    captions: dict[Path, str] = {}
    first_row: dict[Path, str] = {}
    for file in (file for file in files if file.name in METADATA_NAMES):
        other = file.with_name(METADATA_NAMES[0])
        if file.name != other.name and other in files:
            problems.add(file, f"{other.name} is in the same folder; keep one of them")
            continue
        for row in read_metadata(file, problems):
            picture = Path(os.path.normpath(file.parent / row.file_name))
            if picture not in known:
                # Looking for what may have been meant takes long where very many are missing.
                candidates = pictures if len(problems.lines) < _HINTS else []
                problems.add(row.where, _missing(root, file.parent, row.file_name, picture, candidates))
            elif picture in first_row:
                problems.add(row.where, f"{row.file_name!r} has a row already, at {first_row[picture]}")
            else:
                first_row[picture] = row.where
                captions[picture] = row.text
    return captions


def _missing(root: Path, folder: Path, name: str, picture: Path, candidates: list[Path]) -> str:
    if not picture.is_relative_to(root):
        return f"names {name!r}, which is outside {root}; pictures are read from inside it alone"
    if picture.exists() or picture.is_symlink():
        return f"names {name!r}, which cannot be read as a picture; accepted: {', '.join(PICTURE_SUFFIXES)}"
    names = [os.path.relpath(other, folder) for other in candidates]
    folded = {other.casefold(): other for other in names}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    hint = f"; did you mean {folded[close[0]]!r}?" if close else ""
    return f"names a missing picture, {name!r}{hint}"


def _text_captions(
    files: list[Path], pictures: list[Path], captions: dict[Path, str], problems: Problems
) -> dict[Path, str]:
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    used: set[Path] = set()
    merged = dict(captions)
    for picture in pictures:
        file = texts.get(picture.with_suffix(""))
        if file is None:
            continue
        used.add(file)
        text = read_text(file, problems)
        if text is None:
            merged[picture] = "?"  # one problem is enough; its lack of a caption is not another
        elif picture in captions and captions[picture] != text.strip():
            problems.add(picture, f"has one caption in {file.name} and another in a metadata file; keep one")
        else:
            merged[picture] = text.strip()
    unused = [file for file in texts.values() if file not in used]
    if unused and used:
        log.warning("%d .txt files have no picture beside them, the first is %s", len(unused), unused[0])
    return merged


def _parquet_items(root: Path, tables: list[Path], prefix: str, problems: Problems) -> list[_Found]:
    items = [item for table in tables for item in _table_items(root, table, prefix, problems)]
    if not items and not problems.lines:
        problems.add(root, "the parquet files have no rows")
    return items


def _table_items(root: Path, table: Path, prefix: str, problems: Problems) -> Iterator[_Found]:
    for number, row in read_rows(table, problems):
        where = f"{table} row {number}"
        caption = caption_of(where, row, problems)
        if caption == "" and not prefix:
            problems.add(where, "its caption is empty; write one, or set data.caption_prefix")
        image = row[IMAGE_COLUMN]
        if embedded_bytes(image) is not None:
            yield _Found(table, number, _joined(prefix, caption))
            continue
        name = image.get("path") if isinstance(image, dict) else None
        picture = table.parent / name if isinstance(name, str) and "\0" not in name else None
        if picture is None:
            problems.add(where, f"{IMAGE_COLUMN}: holds no bytes and no path")
        elif not _is_inside(root, picture):
            problems.add(where, f"names {name!r}, which is outside {root}; embed the bytes instead")
        elif not picture.is_file():
            problems.add(where, f"names a missing picture, {name!r}")
        else:
            yield _Found(picture, None, _joined(prefix, caption))


def _open(item: _Found, index: int, is_decoded: Callable[[str], bool], problems: Problems) -> Sample | None:
    try:
        data = item.path.read_bytes() if item.row is None else picture_bytes(item.path, item.row)
    except OSError as error:
        problems.add(item.where, f"cannot be read: {error.strerror}")
        return None
    sha256 = sha256_of(data)
    try:
        width, height = upright_size(data) if is_decoded(sha256) else decode(data).size
    except DECODE_ERRORS as error:
        problems.add(item.where, _undecodable(data, error))
        return None
    return Sample(index, item.path, item.caption, width, height, sha256, item.row)


def _undecodable(data: bytes, error: Exception) -> str:
    if not data:
        return "is empty (0 bytes)"
    reason = "not a picture, or of an unknown kind" if "cannot identify" in str(error) else str(error)
    return f"does not decode: {reason}; replace or remove it"
