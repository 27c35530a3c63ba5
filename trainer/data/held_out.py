"""Pictures that a run is measured on and never trained on: from a folder of their own, or set aside."""

from collections.abc import Sequence

from halfbyte.trainer.data.folder import Sample
from halfbyte.trainer.errors import DataError


def set_aside(samples: Sequence[Sample], count: int) -> tuple[list[Sample], list[Sample]]:
    """Splits samples into those to train on and `count` to measure on; both keep their order.

    The choice is by the pictures' SHA-256 alone: the same for every seed, and renaming a file does not change it.
    Copies of a picture stay together, for one that is trained on tells nothing; they count once. Raises DataError
    where nothing would be left to train on.
    """
    contents = sorted({sample.sha256 for sample in samples})
    if count >= len(contents):
        raise DataError(
            f"validation.held_out: got {count}, but data.path has {len(contents)} different pictures; expected at"
            f" most {len(contents) - 1}"
        )
    chosen = set(contents[:count])
    return (
        [sample for sample in samples if sample.sha256 not in chosen],
        [sample for sample in samples if sample.sha256 in chosen],
    )


def refuse_trained(held_out: Sequence[Sample], trained: Sequence[Sample]) -> None:
    """Raises DataError, a line for each, where held-out pictures are trained on as well."""
    known = {sample.sha256: sample for sample in trained}
    both = [sample for sample in held_out if sample.sha256 in known]
    if both:
        raise DataError(
            "\n".join(
                f"{sample.path}: is in validation.path and, as {known[sample.sha256].path}, in data.path; take it"
                " out of one of them"
                for sample in both
            )
        )
