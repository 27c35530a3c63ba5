"""What a run learned: the change in numbers, and one picture that shows it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from halfbyte.trainer.data.decode import decode
from halfbyte.trainer.data.folder import Sample, sample_bytes
from halfbyte.trainer.data.prepare import Prepared
from halfbyte.trainer.run_folder.folder import RunFolder
from halfbyte.trainer.sample.contact_sheet import Row, contact_sheet
from halfbyte.trainer.sample.image_distance import PictureChange, picture_change
from halfbyte.trainer.sample.sampler import Drawn, PictureSampler
from halfbyte.trainer.training.metrics import VALIDATION, read_validation
from halfbyte.trainer.training.opening import (
    ValidationChange,
    picture_result,
    validation_change,
    validation_result,
)

_TRAINING_PICTURES = 48  # decoded for the sheet at most: more than fit beside the longest list of prompts
_LONGER_SIDE = 512  # pixels, to which they are reduced before they wait in memory


@dataclass(frozen=True)
class Learned:
    """The end of a run beside its beginning; each part is None where there was nothing to compare."""

    validation: ValidationChange | None
    pictures: PictureChange | None
    sheet: Path | None


def what_was_learned(
    name: str, step: int, prepared: Prepared, sampler: PictureSampler, folder: RunFolder
) -> Learned:
    """Compares step 0 with `step`, both measured and drawn already, and writes the sheet, headed by `name`.

    Raises DataError where a picture changed since the run began.
    """
    measured = read_validation(folder.root / VALIDATION)
    validation = validation_change(measured, len(prepared.held_out))
    drawn = sampler.drawn(0, step)
    if not drawn:
        return Learned(validation, None, None)
    pictures = picture_change(drawn)
    heading = [name]
    if validation is not None:
        heading.append(f"validation {validation_result(validation)}")
    if pictures is not None:
        heading.append(picture_result(pictures))
    sheet = contact_sheet(
        heading, _columns(step, drawn), _rows(drawn), _shown(prepared.samples), of=len(prepared.samples)
    )
    sheet.save(folder.comparison)
    return Learned(validation, pictures, folder.comparison)


def _columns(step: int, drawn: Sequence[Drawn]) -> list[str]:
    columns = ["base", f"base + LoRA, step {step}"]
    return [*columns, "reference"] if _has_references(drawn) else columns


def _rows(drawn: Sequence[Drawn]) -> list[Row]:
    if _has_references(drawn):
        return [Row(one.prompt, [one.base, one.trained, one.reference]) for one in drawn]
    return [Row(one.prompt, [one.base, one.trained]) for one in drawn]


def _has_references(drawn: Sequence[Drawn]) -> bool:
    return any(one.reference is not None for one in drawn)


def _shown(samples: Sequence[Sample]) -> list[Image.Image]:
    """Training pictures from all over the list, reduced."""
    step = -(-len(samples) // _TRAINING_PICTURES)
    pictures = [decode(sample_bytes(sample)) for sample in samples[::step]]
    for picture in pictures:
        picture.thumbnail((_LONGER_SIDE, _LONGER_SIDE))
    return pictures
