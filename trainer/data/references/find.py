"""Gives images their reference images, and reports those that are missing or cannot be used."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from halfbyte.quant.files.digest import sha256_of
from halfbyte.trainer.data.pictures.decode import (
    DECODE_ERRORS,
    decoded_size,
    has_misnamed_profile,
    upright_size,
)
from halfbyte.trainer.data.references.files import ReferenceFiles
from halfbyte.trainer.data.references.tables import ReferenceTables
from halfbyte.trainer.data.sources.captions import Problems
from halfbyte.trainer.data.sources.folder import Sample, stored_bytes
from halfbyte.trainer.data.sources.reference_columns import Place
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.recipe.data_section import DataSet
from halfbyte.trainer.wording import printable

log = logging.getLogger(__name__)


class _Source(Protocol):
    """Finds the references of an image."""

    def of(self, sample: Sample, problems: Problems) -> list[Place]:
        """Returns their places in order; none if there are none, or after adding a problem."""

    def wanted(self, sample: Sample) -> str:
        """Describes what is expected of an image without references."""


def with_references(
    samples: Sequence[Sample],
    data_set: DataSet,
    *,
    is_decoded: Callable[[str], bool] = lambda sha256: False,
) -> list[Sample]:
    """Returns the samples of a data set with their reference images.

    Every reference is decoded once. Logs a warning for images that are references of themselves.

    Args:
        is_decoded: returns True for the SHA-256 of an image that has been decoded before and need not be again.

    Raises:
        DataError: with one line for each reference that is missing or cannot be used.
    """
    if data_set.references.source == "none":
        return list(samples)
    problems = Problems()
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


def reference_paths(data_set: DataSet) -> frozenset[Path]:
    """Returns the folders and files of references that may be among the images of a data set, and are not trained."""
    settings = data_set.references
    if settings.source == "columns" and data_set.path.exists():
        return ReferenceTables(data_set.path, settings.columns, Problems()).files
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
        return ReferenceTables(data_set.path, settings.columns, problems)
    root = data_set.path if data_set.path.is_dir() else data_set.path.parent
    return ReferenceFiles(root, settings.folders)


def _open(
    place: Place, sample: Sample, is_decoded: Callable[[str], bool], problems: Problems
) -> Sample | None:
    try:
        data = stored_bytes(place.path, place.row, place.cell)
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
