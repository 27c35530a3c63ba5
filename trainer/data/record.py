"""The record of the data that a run was started on, by content, so that a resume notices what changed.

It is one file in the run's folder: gzip over JSON lines, a head and one line for each sample. A million images take
about 70 MB. gzip's own checksum finds damage.
"""

import gzip
import json
import logging
import os
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from halfbyte.quant.files.atomic import replaced
from halfbyte.quant.files.digest import sha256_of
from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.wording import printable

log = logging.getLogger(__name__)

_FORMAT = 1
_Key = tuple[bool, int, str, int]  # held out, data set, file, number among those of one name
_NAMED = 5  # samples named in a message for each kind of change


@dataclass(frozen=True)
class RecordedSample:
    """One sample of the record."""

    file: str  # relative to the folder of the data; for parquet with the row's number
    image: str  # SHA-256 of the image file
    caption: str  # start of the SHA-256 of the caption, or of all of them if there are several
    held_out: bool
    data_set: int = 0  # the place of its data set in the recipe
    mask: str = ""  # SHA-256 of the file with its mask, empty without one
    references: str = ""  # SHA-256 of its reference images, separated by spaces

    @property
    def content(self) -> tuple[str, str, bool, int, str, str]:
        """Everything that the run's results depend on."""
        return self.image, self.caption, self.held_out, self.data_set, self.mask, self.references

    @property
    def line(self) -> dict[str, object]:
        """The sample's line of the record; without references it is that of older versions."""
        return {name: value for name, value in vars(self).items() if name != "references" or value}


class Recorded(Collection[RecordedSample]):
    """Samples for the record, made one after the other when they are needed."""

    def __init__(self, parts: Sequence[tuple[Sequence[Sample], Path, bool]]) -> None:
        """`parts` are samples, the folder that their names are relative to, and True for held-out images."""
        self._parts = parts

    def __len__(self) -> int:
        return sum(len(samples) for samples, _, _ in self._parts)

    def __iter__(self) -> Iterator[RecordedSample]:
        for samples, root, held_out in self._parts:
            for sample in samples:
                yield RecordedSample(
                    name_in(root, sample),
                    sample.sha256,
                    _caption_digest(sample),
                    held_out,
                    sample.data_set,
                    "" if sample.mask is None else sample.mask.sha256,
                    " ".join(reference.sha256 for reference in sample.references),
                )

    def __contains__(self, one: object) -> bool:
        return any(one == other for other in self)


def recorded(samples: Sequence[Sample], root: Path, *, held_out: bool) -> Recorded:
    """Returns the samples of the data at `root` for the record, in their order."""
    return Recorded([(samples, root, held_out)])


def _caption_digest(sample: Sample) -> str:
    # A single caption has the digest of older versions. The data set's settings are compared with the recipe.
    several = len(sample.captions) > 1
    return sha256_of(json.dumps(sample.captions) if several else sample.caption)[:32]


def name_in(root: Path, sample: Sample) -> str:
    """Returns a sample's file relative to the folder of the data; for parquet with the row's number."""
    name = os.path.relpath(sample.path, root) if sample.path != root else root.name
    return name if sample.row is None else f"{name} row {sample.row}"


def write_record(file: Path, samples: Collection[RecordedSample]) -> None:
    """Writes the record atomically."""
    with (
        replaced(file) as stream,
        gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1, mtime=0, filename="") as packed,
    ):
        packed.write(json.dumps({"format": _FORMAT, "samples": len(samples)}).encode() + b"\n")
        for sample in samples:
            packed.write(json.dumps(sample.line).encode() + b"\n")


def read_record(file: Path) -> list[RecordedSample]:
    """Reads the record. Raises DataError if it is damaged."""
    return list(_samples_in(file))


def _samples_in(file: Path) -> Iterator[RecordedSample]:
    try:
        with gzip.open(file, "rb") as lines:
            head = json.loads(lines.readline())
            if head["format"] != _FORMAT:
                raise ValueError(f"format {head['format']}, expected {_FORMAT}")
            count = 0
            for line in lines:
                count += 1
                yield RecordedSample(**json.loads(line))
        if count != head["samples"]:
            raise ValueError(f"{count} samples, expected {head['samples']}")
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{file}: cannot be read: {printable(error)}. Without this file the run would continue on the data in its"
            " current state; delete it to allow that"
        ) from error


def require_same(file: Path, now: Collection[RecordedSample]) -> None:
    """Checks that a resumed run has the data of its start; the names and the place of the files may differ.

    Runs of older versions have no record: they continue with a warning.

    Raises:
        DataError: captions, images or their order differ. The message names the first of each kind.
    """
    if not file.is_file():
        log.warning(
            "--resume: %s is missing, as in runs of older versions; using the data in its current state", file
        )
        return
    pairs = zip_longest(_samples_in(file), now)
    # The whole record is read, even after a difference: a damaged file is reported as such.
    same = [
        before is not None and after is not None and before.content == after.content
        for before, after in pairs
    ]
    if all(same):
        return
    before, now = read_record(file), list(now)
    run = printable(file.parent)
    raise DataError(
        f"--resume: the data differ from those that {run} was started on ({file.name}), which would change its"
        " results:\n  "
        + "\n  ".join(_differences(before, now))
        + "\nPut the old files back, or start a new run on the"
        f" new data from this run's adapter: lora.init_from={run} output.dir=runs/other"
    )


def _differences(before: Sequence[RecordedSample], now: Sequence[RecordedSample]) -> list[str]:
    """Returns one line for each kind of difference."""
    then, present = _by_name(before), _by_name(now)
    both = [name for name in then if name in present]
    images = [name for name in both if then[name].image != present[name].image]
    captions = [name for name in both if then[name].caption != present[name].caption]
    masks = [name for name in both if then[name].mask != present[name].mask]
    references = [name for name in both if then[name].references != present[name].references]
    missing = [name for name in then if name not in present]
    added = [name for name in present if name not in then]
    # A file with another name and the same content was renamed.
    names: defaultdict[object, list[_Key]] = defaultdict(list)
    for name in reversed(added):
        names[present[name].content].append(name)
    renamed = {name: names[then[name].content].pop() for name in missing if names[then[name].content]}
    taken = set(renamed.values())
    lines = [
        _line(captions, "caption", "changed"),
        _line(images, "image", "changed"),
        _line(masks, "mask", "changed"),
        _line(references, "image", "with other references"),
        _line([name for name in missing if name not in renamed], "image", "missing"),
        _line([name for name in added if name not in taken], "image", "new"),
    ]
    found = [line for line in lines if line]
    if not found:
        found = [_line(list(renamed), "image", "renamed, which changes the order")]
    return [line for line in found if line] or ["the order of the images changed"]


def _by_name(samples: Sequence[RecordedSample]) -> dict[_Key, RecordedSample]:
    """Returns the samples by set, name, and number among those of one name: rows of a table may share a file."""
    count: defaultdict[tuple[bool, int, str], int] = defaultdict(int)
    named = {}
    for sample in samples:
        key = (sample.held_out, sample.data_set, sample.file)
        named[(*key, count[key])] = sample
        count[key] += 1
    return named


def _line(names: Sequence[_Key], noun: str, change: str) -> str:
    if not names:
        return ""
    listed = [
        f"{printable(name)}{f' of data.sets[{number}]' if number else ''}{' (held out)' if held_out else ''}"
        for held_out, number, name, _ in names[:_NAMED]
    ]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} {change}: {', '.join(listed)}{more}"
