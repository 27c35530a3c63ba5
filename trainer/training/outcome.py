"""The result of a finished run: the change in validation loss, a sheet of sample images, and summary.json."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from halfbyte.quant.files.atomic import write_file
from halfbyte.trainer.data.prepare import Prepared
from halfbyte.trainer.data.read_sets import ReadData
from halfbyte.trainer.data.sources.contents import unchanged_pictures
from halfbyte.trainer.run_folder.folder import RunFolder
from halfbyte.trainer.sample.contact_sheet import Row, contact_sheet
from halfbyte.trainer.sample.image_distance import PictureChange, picture_change
from halfbyte.trainer.sample.sampler import Drawn, PictureSampler
from halfbyte.trainer.training.metrics import VALIDATION, Measurement, read_validation
from halfbyte.trainer.wording import printable


@dataclass(frozen=True)
class LevelChange:
    """The validation loss at one noise level, before and after training."""

    sigma: float
    base: float
    trained: float


@dataclass(frozen=True)
class ValidationChange:
    """The validation loss before and after training; `base` is step 0, with the untrained adapter."""

    pictures: int
    base: float
    trained: float
    change_percent: float
    by_sigma: Sequence[LevelChange]


# Training images decoded for the sheet at most; even with the most prompts it has room for fewer.
_TRAINING_PICTURES = 48
_SKIPPED_SHOWN = 10
_LONGER_SIDE = 512  # pixels; decoded images are reduced to it, to save host memory


@dataclass(frozen=True)
class Learned:
    """The comparison of the last step with step 0; a part is None if there was nothing to compare."""

    validation: ValidationChange | None
    pictures: PictureChange | None
    sheet: Path | None


def what_was_learned(
    name: str, step: int, prepared: Prepared, sampler: PictureSampler, folder: RunFolder
) -> Learned:
    """Compares step 0 with `step` and writes the sheet of sample images, with `name` as its heading.

    Both steps must have been measured and sampled already. Training and reference images that are gone or have changed
    are left out with a warning.
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
        heading,
        _columns(step, drawn),
        _rows(drawn),
        _training_images(prepared.data),
        of=prepared.data.count,
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


def _training_images(data: ReadData) -> list[Image.Image]:
    """Returns reduced training images, evenly spaced over the list of samples."""
    step = -(-data.count // _TRAINING_PICTURES)
    found = unchanged_pictures(data.samples(step), _LONGER_SIDE, "the sheet of samples")
    return [picture for picture in found if picture is not None]


def validation_change(measured: Sequence[Measurement], pictures: int) -> ValidationChange | None:
    """Compares the rows of step 0 and the last step; None if one of them was not measured."""
    if len(measured) < 2 or measured[0].step != 0:
        return None
    base, trained = measured[0], measured[-1]
    return ValidationChange(
        pictures,
        base.loss,
        trained.loss,
        100 * (trained.loss / base.loss - 1),
        [LevelChange(sigma, loss, trained.by_sigma[sigma]) for sigma, loss in base.by_sigma.items()],
    )


@dataclass(frozen=True)
class Closing:
    """The results of a finished run, in the form of summary.json."""

    steps: int
    seconds: float  # of training only
    first_loss: float | None  # mean over the first tenth of the logged steps
    last_loss: float | None
    adapter: Path
    base: Path | None
    checkpoint: Path | None
    samples: Path | None
    metrics: Path
    validation: ValidationChange | None
    pictures: PictureChange | None  # change of the distance to sample.references
    skipped: Sequence[str]  # damaged images that were not trained on


def closing_lines(closing: Closing) -> list[tuple[str, str]]:
    """Returns a label and a text for each result that users look for after a run."""
    lines = [("trained", f"{closing.steps} steps in {closing.seconds:.0f} s")]
    if closing.first_loss is not None and closing.last_loss is not None:
        lines.append(
            (
                "loss",
                f"{closing.first_loss:.4f} -> {closing.last_loss:.4f} (means of the first and last tenth)",
            )
        )
    if closing.validation is not None:
        levels = ", ".join(
            f"{100 * (one.trained / one.base - 1):+.1f} % at {one.sigma:g}"
            for one in closing.validation.by_sigma
        )
        lines.append(("validation", f"{validation_result(closing.validation)}; by sigma {levels}"))
    if closing.skipped:
        first = ", ".join(printable(name) for name in closing.skipped[:_SKIPPED_SHOWN])
        more = len(closing.skipped) - _SKIPPED_SHOWN
        lines.append(
            (
                "skipped",
                f"{len(closing.skipped)} damaged images: {first}{f' and {more} more' if more > 0 else ''}",
            )
        )
    lines.append(("adapter", str(closing.adapter)))
    if closing.base is not None:
        lines.append(("base", str(closing.base)))
    if closing.samples is not None:
        lines.append(("samples", str(closing.samples)))
    if closing.pictures is not None:
        lines.append(("images", picture_result(closing.pictures)))
    lines.append(
        (
            "metrics",
            f"{closing.metrics} (also: tensorboard --logdir {shlex.quote(str(closing.metrics.parent))})",
        )
    )
    if closing.checkpoint is not None:
        lines.append(("checkpoint", str(closing.checkpoint)))
    return lines


def validation_result(change: ValidationChange) -> str:
    """Returns the change of the validation loss as one line, without the noise levels."""
    return (
        f"loss {change.base:.4f} -> {change.trained:.4f} ({change.change_percent:+.1f} %) on {change.pictures}"
        " held-out images"
    )


def picture_result(change: PictureChange) -> str:
    """Returns the change of the distance to the reference images as one line."""
    return (
        f"distance from {change.pictures} reference images {change.base.rmse:.3f} -> {change.trained.rmse:.3f}"
        f" (RMSE of colors in 0 to 1), structural similarity {change.base.ssim:.3f} -> {change.trained.ssim:.3f}"
    )


def write_summary(closing: Closing, path: Path) -> None:
    """Writes the results as summary.json."""
    write_file(path, json.dumps(asdict(closing), indent=1, default=str) + "\n")
