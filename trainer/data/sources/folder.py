"""Images in a folder, each in a file of its own.

Captions are in metadata.jsonl or metadata.csv (one per folder; folders may be nested), in meta.json, or in a .txt,
.caption or .json file of the same name next to each image.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.trainer.data.pictures.decode import PICTURE_SUFFIXES
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.data.records.sample import Place
from halfbyte.trainer.data.sources.captions import METADATA_NAMES
from halfbyte.trainer.data.sources.found import Found
from halfbyte.trainer.data.sources.left_out import LeftOut, foreign_folder, pictures_in

# Image formats that Pillow cannot read. They are reported as errors rather than skipped silently.
FOREIGN_SUFFIXES = (".heic", ".heif", ".jxl", ".raw", ".dng", ".cr2", ".nef", ".arw", ".psd", ".svg")


@dataclass(frozen=True)
class FolderSource:
    """The images of a folder, with captions and masks that are found already."""

    root: Path
    captions: Mapping[Path, tuple[str, ...]]  # by image, in order
    masks: Mapping[
        Path, Path
    ]  # mask files by the names of their images, relative to `root` and without suffix
    shards: Sequence[Path] = ()

    @property
    def total(self) -> int:
        """The number of images."""
        return len(self.captions)

    def items(self, shard: Path, problems: Problems, left_out: LeftOut) -> Iterator[Found]:
        """Yields all images, see `Source`."""
        for picture, texts in self.captions.items():
            mask = self.masks.get(picture.relative_to(self.root).with_suffix("")) if self.masks else None
            if mask is not None:
                left_out.reasons.pop(mask, None)  # it is used
            yield Found(Place(picture), texts, None if mask is None else Place(mask))


def list_files(root: Path, problems: Problems, left_out: LeftOut) -> list[Path]:
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
