"""What a run learned: the change in numbers, and one picture that shows it."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from halfbyte.quant.files.atomic import write_file
from halfbyte.trainer.data.decode import decode
from halfbyte.trainer.data.folder import Sample, sample_bytes
from halfbyte.trainer.data.prepare import Prepared
from halfbyte.trainer.run_folder.folder import RunFolder
from halfbyte.trainer.sample.contact_sheet import Row, contact_sheet
from halfbyte.trainer.sample.image_distance import PictureChange, picture_change
from halfbyte.trainer.sample.sampler import Drawn, PictureSampler
from halfbyte.trainer.training.metrics import VALIDATION, Measurement, read_validation


@dataclass(frozen=True)
class LevelChange:
    """What training did to the validation loss at one noise level."""

    sigma: float
    base: float
    trained: float


@dataclass(frozen=True)
class ValidationChange:
    """What training did to the validation loss: `base` is step 0, the model with its adapter as it starts."""

    pictures: int
    base: float
    trained: float
    change_percent: float
    by_sigma: Sequence[LevelChange]


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


def validation_change(measured: Sequence[Measurement], pictures: int) -> ValidationChange | None:
    """From the rows of validation.csv; None where nothing was measured at step 0 or after it."""
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
    """What a finished run left, as summary.json holds it."""

    steps: int
    seconds: float  # of training alone
    first_loss: float | None  # mean over the first tenth of the logged steps
    last_loss: float | None
    adapter: Path
    base: Path | None
    checkpoint: Path | None
    samples: Path | None
    metrics: Path
    validation: ValidationChange | None
    pictures: PictureChange | None  # towards sample.references


def closing_lines(closing: Closing) -> list[tuple[str, str]]:
    """Label and text for each thing a user looks for after a run."""
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
    lines.append(("adapter", str(closing.adapter)))
    if closing.base is not None:
        lines.append(("base", str(closing.base)))
    if closing.samples is not None:
        lines.append(("samples", str(closing.samples)))
    if closing.pictures is not None:
        lines.append(("pictures", picture_result(closing.pictures)))
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
    """One line, without the levels."""
    return (
        f"loss {change.base:.4f} -> {change.trained:.4f} ({change.change_percent:+.1f} %) on {change.pictures}"
        " pictures that were not trained on"
    )


def picture_result(change: PictureChange) -> str:
    """One line."""
    return (
        f"distance from {change.pictures} reference pictures {change.base.rmse:.3f} -> {change.trained.rmse:.3f}"
        f" (RMSE of colours in 0 to 1), structural similarity {change.base.ssim:.3f} -> {change.trained.ssim:.3f}"
    )


def write_summary(closing: Closing, path: Path) -> None:
    """The same as JSON."""
    write_file(path, json.dumps(asdict(closing), indent=1, default=str) + "\n")
