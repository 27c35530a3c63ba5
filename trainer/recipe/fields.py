"""Base class and field types shared by the recipe's sections."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, PlainSerializer

from halfbyte.trainer.hub.reference import written_path
from halfbyte.trainer.registry import SETTINGS

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
MOST_STEPS = 10**8
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
"""A number of optimizer steps, at least one."""
Interval = Annotated[int, Field(ge=0, le=MOST_STEPS)]
"""A number of optimizer steps; 0 turns something off."""
SIDE_STEP = 16  # pixels: sides of images are multiples of this
PictureSide = Annotated[int, Field(ge=SIDE_STEP, le=8192, multiple_of=SIDE_STEP)]
PictureSides = Annotated[tuple[PictureSide, ...], Field(strict=False, min_length=1)]
FilePath = Annotated[Path, Field(strict=False)]
SHARD_SUFFIXES = (".tar", ".parquet")
"""The endings of files with many images, which a pattern may name."""
DataPath = Annotated[FilePath, PlainSerializer(written_path, return_type=str, when_used="json")]
"""A folder or file, or a data set on the Hub."""
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], Field(strict=False)]


class Section(BaseModel):
    """One section of the recipe."""

    model_config = SETTINGS


DEFAULT_FOLDER = Path("~/.cache/halfbyte")
