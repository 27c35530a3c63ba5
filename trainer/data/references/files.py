"""Finds reference images in files: next to their images, or in folders under the images' names."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from halfbyte.trainer.data.archives.reference_columns import ReferencePlace
from halfbyte.trainer.data.pictures.decode import PICTURE_SUFFIXES
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.sources.folder import FOREIGN_SUFFIXES, is_inside

_MARK = re.compile(r"(.+)\.ref(\d+)", re.IGNORECASE)  # dog.ref0.png is the first reference of dog.jpg

_Named = dict[Path, dict[int, list[Path]]]  # name of an image without suffix -> number -> files


class ReferenceFiles:
    """The reference files of a data set's images."""

    def __init__(self, root: Path, folders: Sequence[Path]) -> None:
        """`root` is the folder of the images. Without `folders`, their references are next to them."""
        self._root = root
        self._folders = folders
        self._named: _Named = defaultdict(lambda: defaultdict(list))
        if not folders:
            for file in _pictures(root):
                if found := _MARK.fullmatch(file.stem):
                    name = file.with_name(found[1]).relative_to(root)
                    self._named[name][int(found[2])].append(file)
        for number, folder in enumerate(folders):
            for file in _pictures(folder):
                self._named[file.relative_to(folder).with_suffix("")][number].append(file)

    def of(self, sample: Sample, problems: Problems) -> list[ReferencePlace]:
        """Returns the reference files of an image, in their order; none if it has none, or after adding a problem."""
        if sample.row is not None:
            problems.add(
                sample.path,
                "holds its images inside; references in files need images in files, or use source: columns",
            )
            return []
        numbered = self._named.get(sample.path.relative_to(self._root).with_suffix(""), {})
        for number in range(max(numbered, default=-1) + 1):
            if number not in numbered:
                problems.add(sample.path, f"has later reference images, but no {self._name(sample, number)}")
                return []
        files = []
        for number, several in sorted(numbered.items()):
            file = several[0]
            base = self._folders[number] if self._folders else self._root
            if len(several) > 1:
                names = " and ".join(other.name for other in several)
                problems.add(file, f"{names} are both reference {number} of one image; keep one of them")
            elif file.suffix.lower() in FOREIGN_SUFFIXES:
                accepted = ", ".join(PICTURE_SUFFIXES)
                problems.add(file, f"is of a format that cannot be read; convert it to one of {accepted}")
            elif not is_inside(base, file):
                problems.add(file, f"is a symbolic link to a file outside {base}; copy the file instead")
            else:
                files.append(ReferencePlace(file))
        return files if len(files) == len(numbered) else []

    def wanted(self, sample: Sample) -> str:
        """Describes what is expected of an image without references."""
        return f"expected {self._name(sample, 0)}{'' if self._folders else ' next to it'}"

    def _name(self, sample: Sample, number: int) -> str:
        if not self._folders:
            return sample.path.with_suffix(f".ref{number}.png").name
        return str(self._folders[number] / sample.path.relative_to(self._root).with_suffix(".png"))


def _pictures(folder: Path) -> Iterator[Path]:
    """Yields all images below a folder except hidden ones, also of formats that cannot be read, in order."""
    for file in visible_files(folder):
        if file.suffix.lower() in (*PICTURE_SUFFIXES, *FOREIGN_SUFFIXES):
            yield file


def visible_files(folder: Path) -> Iterator[Path]:
    """Yields all files below a folder except hidden ones, in order."""
    for inner, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(inner) / name for name in sorted(names) if not name.startswith("."))
