"""What a model card tells: the facts of a run, from the files that it left."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.quant.load.base_error import BaseError
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.export.provenance import Provenance
from halfbyte.trainer.publish.files import SamplePicture
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.run_folder.folder import RunFolder


@dataclass(frozen=True)
class Validation:
    """The loss on pictures that were not trained on, before and after."""

    pictures: int
    base: float
    trained: float


@dataclass(frozen=True)
class CardFacts:
    """Of one push."""

    repository: str
    recipe: Recipe
    provenance: Provenance
    names: tuple[str, ...]  # of the files beside the card
    pictures: tuple[SamplePicture, ...]
    base_error: BaseError | None
    validation: Validation | None  # of a finished run


def read_validation(run: RunFolder, step: int) -> Validation | None:
    """From the summary of a run that finished at the step; None where nothing was held out. Raises RecipeError."""
    file = run.root / "summary.json"
    try:
        summary: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = summary["validation"]
        if found is None or summary["steps"] != step:
            return None
        return Validation(int(found["pictures"]), float(found["base"]), float(found["trained"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecipeError(f"{file}: not the summary of a run: {error}") from error
