"""Downloads the files of a Hub data set that are needed, and opens them like local ones."""

import glob
import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import metadata_load

from halfbyte.trainer.data.archives import parquet, saved, tar
from halfbyte.trainer.data.archives.hub_files import Choice, chosen_files
from halfbyte.trainer.data.pictures.decode import PICTURE_SUFFIXES
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.hub.download import download
from halfbyte.trainer.hub.listing import CARD, card_folder, files_at
from halfbyte.trainer.hub.reference import HubData
from halfbyte.trainer.wording import printable

log = logging.getLogger(__name__)

_ARCHIVES = (parquet.SUFFIX, tar.SUFFIX, saved.SUFFIX)
_FOLDER = (*PICTURE_SUFFIXES, ".txt", ".caption", ".json", ".jsonl", ".csv")  # images and their captions
_MOST_PATTERNS = 1000  # above, whole folders are downloaded


def fetched(data: HubData, config: str | None, split: str | None) -> tuple[Path, list[Path]]:
    """Downloads the files of one split; returns the folder of the data set and the files, sorted.

    Files of other splits and other kinds are not downloaded.

    Raises:
        DataError: the data set has no such split, no such configuration, or no images.
        HubError: the Hub cannot be reached, or refuses.
    """
    folder = card_folder(data)
    data = data.at(folder.name)
    card = metadata_load(folder / CARD) if (folder / CARD).is_file() else None
    try:
        names = _of_one_kind(chosen_files(files_at(data), card or {}, Choice(data.inner, config, split)))
    except ValueError as error:
        raise DataError(f"{printable(data)}: {error}") from error
    download(data.name, data.revision, _patterns(names), kind="dataset")
    return folder, [folder / name for name in names]


def _of_one_kind(names: Sequence[str]) -> list[str]:
    """Returns the parquet files, or else the tar files, the Arrow files, or the images with their captions."""
    for suffix in _ARCHIVES:
        found = [name for name in names if name.lower().endswith(suffix)]
        if found:
            return found
    found = [name for name in names if PurePosixPath(name).suffix.lower() in _FOLDER]
    if not any(name.lower().endswith(PICTURE_SUFFIXES) for name in found):
        packed = [name for name in names if name.lower().endswith((*tar.COMPRESSED, ".zip"))]
        hint = f"; {packed[0]} is compressed, download and unpack it" if packed else ""
        raise ValueError(f"has no parquet or tar files and no images{hint}")
    return found


def _patterns(names: Sequence[str]) -> list[str]:
    """Returns patterns for the client that match the files; for very many files, those of their folders."""
    if len(names) <= _MOST_PATTERNS:
        return [glob.escape(name) for name in names]
    folders = dict.fromkeys(str(PurePosixPath(name).parent) for name in names)
    kinds = dict.fromkeys(PurePosixPath(name).suffix for name in names)
    inside = [f"{glob.escape(folder)}/" if folder != "." else "" for folder in folders]
    return [f"{prefix}*{kind}" for prefix in inside for kind in kinds]
