"""Sample prompts with their embeddings and reference images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.errors import DataError, RecipeError
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.recipe.data_section import PLACEHOLDER
from halfbyte.trainer.wording import printable, shown


def refuse_placeholders(prompts: Sequence[str]) -> None:
    """Raises RecipeError if a prompt contains [trigger], which is filled in for captions only."""
    for number, prompt in enumerate(prompts):
        if PLACEHOLDER in prompt:
            raise RecipeError(
                f"sample.prompts[{number}]: {shown(prompt)} contains {PLACEHOLDER}, which is filled in for captions"
                " only; write the trigger word"
            )


def references_for(prompts: Sequence[str], samples: Sequence[Sample], folder: Path) -> dict[str, Sample]:
    """Finds a reference image for each prompt: the sample in `folder` whose caption equals the prompt.

    Prompts without one are left out of the result.

    Raises:
        DataError: if no prompt has a reference image, or one has two different images.
    """
    found: dict[str, Sample] = {}
    for sample in samples:
        if sample.caption not in prompts:
            continue
        other = found.setdefault(sample.caption, sample)
        if other.sha256 != sample.sha256:
            raise DataError(
                f"sample.references: the prompt {shown(sample.caption)} is the caption of both"
                f" {printable(other.path)} and {printable(sample.path)}; keep one of them"
            )
    if not found:
        raise DataError(
            f"sample.references: no caption in {printable(folder)} equals one of sample.prompts; one of its captions is"
            f" {shown(samples[0].caption)}"
        )
    return found


@dataclass(frozen=True)
class Prompt:
    """A prompt for sample images, with the embedding made before the text encoders were freed."""

    text: str
    embedding: TextEmbedding  # a batch of one
    reference: Sample | None = None  # the image that the prompt should give
