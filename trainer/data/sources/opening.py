"""Opens the source of a data set: a folder of images, tables, tar files, or a saved data set."""

import logging
from collections.abc import Sequence
from pathlib import Path

from halfbyte.quant.files.patterns import base_folder, is_pattern, matching_files
from halfbyte.trainer.data.archives import parquet, saved, tar
from halfbyte.trainer.data.archives.columns import MASK_COLUMN, Columns
from halfbyte.trainer.data.archives.hub import fetched
from halfbyte.trainer.data.pictures.decode import PICTURE_SUFFIXES
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.folder import FolderSource, list_files
from halfbyte.trainer.data.sources.found import Source, SourceSettings
from halfbyte.trainer.data.sources.left_out import LeftOut
from halfbyte.trainer.data.sources.masks import mask_files
from halfbyte.trainer.data.sources.picture_captions import Listing, picture_captions
from halfbyte.trainer.data.sources.shards import TarSource
from halfbyte.trainer.data.sources.tables import TableSource
from halfbyte.trainer.hub.reference import HubData
from halfbyte.trainer.recipe.fields import SHARD_SUFFIXES
from halfbyte.trainer.wording import in_prose, printable, shown

log = logging.getLogger(__name__)


def open_source(
    path: Path, settings: SourceSettings, style: CaptionStyle, problems: Problems, left_out: LeftOut
) -> Source | None:
    """Opens the images at a path: a folder, a file with many images, or a pattern of such files.

    Returns None after adding a problem.
    """
    data = HubData.of(path)
    if data is not None:
        return _hub(data, settings, style, problems, left_out)
    if settings.config is not None:
        problems.add(f"{settings.setting}.config", f"{printable(path)} is not on the Hub; remove it")
    if saved.is_saved(path):
        return _tables(path, saved.saved_files(path, settings.split, problems), settings, style, problems)
    if settings.split is not None:
        problems.add(
            path,
            f"has no splits, but {settings.setting}.split is {shown(settings.split)}; remove that setting",
        )
        return None
    if path.is_dir():
        return _folder(path, settings, style, problems, left_out)
    if is_pattern(path):
        try:
            files = matching_files(path)
        except ValueError as error:
            problems.add(path, str(error))
            return None
        return _archives(base_folder(path), files, settings, style, problems)
    if path.is_file() and path.suffix in (*SHARD_SUFFIXES, saved.SUFFIX):
        return _archives(path.parent, [path], settings, style, problems)
    if path.name.lower().endswith(tar.COMPRESSED):
        problems.add(
            path, "is compressed, so its members cannot be read at their place; unpack it to a .tar file"
        )
    elif path.exists():
        problems.add(path, f"not a folder or a {in_prose(SHARD_SUFFIXES)} file")
    else:
        problems.add(path, "no such folder")
    return None


def _hub(
    data: HubData, settings: SourceSettings, style: CaptionStyle, problems: Problems, left_out: LeftOut
) -> Source | None:
    root, files = fetched(data, settings.config, settings.split)
    if files[0].suffix in (parquet.SUFFIX, tar.SUFFIX, saved.SUFFIX):
        return _archives(root, files, settings, style, problems)
    return _pictures(root, files, settings, style, problems, left_out)


def _archives(
    root: Path, files: Sequence[Path], settings: SourceSettings, style: CaptionStyle, problems: Problems
) -> Source | None:
    kinds = {file.suffix for file in files}
    if kinds == {tar.SUFFIX}:
        return _tars(root, files, settings, style, problems)
    if kinds in ({parquet.SUFFIX}, {saved.SUFFIX}):
        return _tables(root, files, settings, style, problems)
    problems.add(
        root, f"the pattern matches files that end with {in_prose(sorted(kinds))}; expected one kind"
    )
    return None


def _tars(
    root: Path, files: Sequence[Path], settings: SourceSettings, style: CaptionStyle, problems: Problems
) -> Source:
    _refuse_columns(root, settings, problems)
    _refuse_mask_folder(root, settings, problems)
    return TarSource(root, files, settings.masks.source == "files", style.lines)


def _tables(
    root: Path, files: Sequence[Path], settings: SourceSettings, style: CaptionStyle, problems: Problems
) -> Source:
    _refuse_mask_folder(root, settings, problems)
    columns = Columns(
        settings.image_column or "image",
        settings.caption_column,
        MASK_COLUMN if settings.masks.source == "files" else None,
        captions_needed=not style.gives_text or settings.caption_column is not None,
    )
    return TableSource(root, files, columns)


def _folder(
    root: Path, settings: SourceSettings, style: CaptionStyle, problems: Problems, left_out: LeftOut
) -> Source | None:
    without = (
        settings.without if settings.masks.folder is None else settings.without | {settings.masks.folder}
    )
    files = [
        file
        for file in list_files(root, problems, left_out)
        if not without or without.isdisjoint((file, *file.parents))
    ]
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    tables = [file for file in files if file.suffix == parquet.SUFFIX]
    tars = [file for file in files if file.suffix == tar.SUFFIX]
    packed = [file for file in files if file.name.lower().endswith(tar.COMPRESSED)]
    if tables and (pictures or tars):
        other = "images" if pictures else "tar files"
        problems.add(root, f"contains both {other} and parquet files ({tables[0].name}); keep one kind")
        return None
    if tables:
        return _tables(root, tables, settings, style, problems)
    if not pictures:
        for file in packed:
            problems.add(
                file, "is compressed, so its members cannot be read at their place; unpack it to a .tar file"
            )
        if tars:
            return _tars(root, tars, settings, style, problems)
        if not packed:
            problems.add(
                root, f"no images; accepted: {', '.join(PICTURE_SUFFIXES)}, or .parquet or .tar files"
            )
    elif tars:
        log.warning("%d tar files next to images are ignored, the first is %s", len(tars), printable(tars[0]))
    return _pictures(root, files, settings, style, problems, left_out)


def _pictures(
    root: Path,
    files: Sequence[Path],
    settings: SourceSettings,
    style: CaptionStyle,
    problems: Problems,
    left_out: LeftOut,
) -> Source:
    """Returns the images among the files of a folder."""
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    _refuse_columns(root, settings, problems)
    captions = picture_captions(Listing(root, files, pictures), style, problems, left_out)
    masks = {}
    if settings.masks.source == "files":
        masks = mask_files(root, pictures, settings.masks, problems)
    return FolderSource(root, captions, masks)


def _refuse_columns(root: Path, settings: SourceSettings, problems: Problems) -> None:
    for name in ("image_column", "caption_column"):
        if (value := getattr(settings, name)) is not None:
            problems.add(
                f"{settings.setting}.{name}",
                f"got {shown(value)}, but {printable(root)} has no tables; remove it",
            )


def _refuse_mask_folder(root: Path, settings: SourceSettings, problems: Problems) -> None:
    if settings.masks.folder is not None:
        problems.add(
            f"{settings.setting}.masked_loss.folder",
            f"got {printable(settings.masks.folder)}, expected null: {printable(root)} holds its images inside; masks"
            " belong into a column mask, or into the tar file as dog.mask.png",
        )
