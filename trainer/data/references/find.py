"""Gives images their reference images, and reports those that are missing or cannot be used."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from halfbyte.quant.files.digest import sha256_of
from halfbyte.trainer.data.archives import parquet
from halfbyte.trainer.data.archives.reference_columns import ReferencePlace, reference_bytes
from halfbyte.trainer.data.archives.saved import is_saved
from halfbyte.trainer.data.pictures.decode import (
    DECODE_ERRORS,
    decoded_size,
    has_misnamed_profile,
    upright_size,
)
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.data.records.sample import Place, Sample
from halfbyte.trainer.data.references.files import ReferenceFiles
from halfbyte.trainer.data.references.tables import ReferenceTables
from halfbyte.trainer.data.sources.contents import read_bytes
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.recipe.data_section import DataSet
from halfbyte.trainer.wording import printable

log = logging.getLogger(__name__)


class _Source(Protocol):
    """Finds the references of an image."""

    def of(self, sample: Sample, problems: Problems) -> list[ReferencePlace]:
        """Returns their places in order; none if there are none, or after adding a problem."""

    def wanted(self, sample: Sample) -> str:
        """Describes what is expected of an image without references."""


def with_references(
    samples: Sequence[Sample],
    data_set: DataSet,
    *,
    is_decoded: Callable[[str], bool] = lambda sha256: False,
) -> Sequence[Sample]:
    """Returns the samples of a data set with their reference images.

    Every reference is decoded once. Logs a warning for images that are references of themselves.

    Args:
        is_decoded: returns True for the SHA-256 of an image that has been decoded before and need not be again.

    Raises:
        DataError: with one line for each reference that is missing or cannot be used.
    """
    if data_set.references.source == "none":
        return samples
    problems = Problems()
    _refuse_other_forms(data_set)
    source = _source(data_set, problems)
    if problems.lines:
        raise DataError(str(problems))
    found = []
    for sample in samples:
        known = len(problems.lines) + problems.more
        places = source.of(sample, problems)
        is_sound = len(problems.lines) + problems.more == known
        if not places and is_sound and data_set.references.missing == "error":
            problems.add(
                _where(sample),
                f"has no reference image; {source.wanted(sample)}, or set references.missing: none",
            )
        opened = [_open(place, sample, is_decoded, problems) for place in places]
        found.append(replace(sample, references=tuple(one for one in opened if one is not None)))
    if problems.lines:
        raise DataError(str(problems))
    _warn_of_unchanged(found)
    return found


def _refuse_other_forms(data_set: DataSet) -> None:
    """Raises DataError for data sets whose references cannot be found: tar files, saved and Hub data sets."""
    path = data_set.path
    if path.suffix != parquet.SUFFIX and (not path.is_dir() or is_saved(path)):
        raise DataError(
            f"{data_set.setting}.references: got source {data_set.references.source} for {printable(path)}, expected a"
            " folder of images or parquet files, or a single parquet file"
        )


def reference_paths(data_set: DataSet) -> frozenset[Path]:
    """Returns the folders and files of references that may be among the images of a data set, and are not trained."""
    settings = data_set.references
    if settings.source == "columns" and data_set.path.exists():
        return ReferenceTables(data_set.path, settings.columns, Problems(), data_set.image_column).files
    return frozenset(settings.folders)


def refuse_more(samples: Sequence[Sample], most: int) -> None:
    """Raises DataError, with one line for each, if images have more references than the model takes."""
    problems = Problems()
    for sample in samples:
        if len(sample.references) > most:
            problems.add(
                _where(sample),
                f"has {len(sample.references)} reference images, expected at most {most} for this model; remove some",
            )
    if problems.lines:
        raise DataError(str(problems))


def _source(data_set: DataSet, problems: Problems) -> _Source:
    settings = data_set.references
    if settings.source == "columns":
        return ReferenceTables(data_set.path, settings.columns, problems, data_set.image_column)
    root = data_set.path if data_set.path.is_dir() else data_set.path.parent
    return ReferenceFiles(root, settings.folders)


def _open(
    place: ReferencePlace, sample: Sample, is_decoded: Callable[[str], bool], problems: Problems
) -> Sample | None:
    try:
        if place.cell is None:
            data = read_bytes(Place(place.path))
        else:
            data = reference_bytes(place.path, place.row or 0, place.cell)
    except OSError as error:
        problems.add(place.where, f"cannot be read: {error.strerror}")
        return None
    sha256 = sha256_of(data)
    try:
        width, height = upright_size(data) if is_decoded(sha256) else decoded_size(data)
        misnamed = has_misnamed_profile(data)
    except DECODE_ERRORS as error:
        problems.add(
            place.where, f"cannot be decoded: {error}; replace or remove it" if data else "is empty (0 bytes)"
        )
        return None
    return Sample(
        sample.index,
        place.path,
        "",
        width,
        height,
        sha256,
        place.row,
        misnamed,
        sample.data_set,
        cell=place.cell,
    )


def _where(sample: Sample) -> str:
    return str(sample.path) if sample.row is None else f"{sample.path} row {sample.row}"


def _warn_of_unchanged(samples: Sequence[Sample]) -> None:
    same = [
        sample for sample in samples if sample.sha256 in {reference.sha256 for reference in sample.references}
    ]
    if same:
        log.warning(
            "%d of %d images are equal to one of their reference images, so nothing is changed in them; the first is"
            " %s",
            len(same),
            len(samples),
            printable(_where(same[0])),
        )
