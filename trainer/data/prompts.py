"""What sample prompts should show: pictures of a folder, found by their captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.trainer.data.folder import Sample
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.families.embedding import TextEmbedding


def references_for(prompts: Sequence[str], samples: Sequence[Sample], folder: Path) -> dict[str, Sample]:
    """The picture of each prompt that is the caption of one of `samples`, which are those of `folder`.

    Raises DataError where no prompt is a caption, or one is the caption of two different pictures.
    """
    found: dict[str, Sample] = {}
    for sample in samples:
        if sample.caption not in prompts:
            continue
        other = found.setdefault(sample.caption, sample)
        if other.sha256 != sample.sha256:
            raise DataError(
                f"sample.references: the prompt {sample.caption!r} is the caption of {other.path} and of"
                f" {sample.path}; keep one"
            )
    if not found:
        raise DataError(
            f"sample.references: no caption in {folder} is one of sample.prompts; a caption there is"
            f" {samples[0].caption!r}"
        )
    return found


@dataclass(frozen=True)
class Prompt:
    """A caption to draw, embedded before the text encoders left."""

    text: str
    embedding: TextEmbedding  # batch of one
    reference: Sample | None = None  # what it should show
