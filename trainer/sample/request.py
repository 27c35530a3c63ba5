"""Parses and checks the options of `halfbyte sample`, before anything is loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.wording import in_prose

QUANTS = ("nf4", "int8", "none")
TEXT_ENCODER_QUANTS = ("auto", "none", "int8", "nf4")
DTYPE_NAMES = ("bfloat16", "float16", "float32")
OFFLOADS = ("none", "model", "sequential")
DEVICE_MAPS = ("auto", "balanced")

_SIDES = (16, 8192)  # pixels
_LARGEST_SEED = 2**32 - 1
_LARGEST_STRENGTH = 1000.0  # far above useful strengths, far below the largest float16


@dataclass(frozen=True)
class SampleRequest:
    """The options. None means that an option was not given, and the run or the model decides."""

    source: str
    """A run, an adapter or a pipeline, given as a folder, a file or a Hub repository."""
    model: str | None = None
    revision: str | None = None
    checkpoint: int | None = None
    prompts: tuple[str, ...] = ()
    strengths: tuple[float, ...] | None = None
    seeds: tuple[int, ...] | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    quant: str | None = None
    text_encoder_quant: str | None = None
    max_sequence_length: int | None = None
    dtype: str | None = None
    offload: str = "none"
    device_map: str | None = None
    compiled: bool = False
    cache: Path | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        """Raises RecipeError for invalid values and combinations."""
        for option, value, accepted in (
            ("--quant", self.quant, QUANTS),
            ("--text-encoder-quant", self.text_encoder_quant, TEXT_ENCODER_QUANTS),
            ("--dtype", self.dtype, DTYPE_NAMES),
            ("--offload", self.offload, OFFLOADS),
            ("--device-map", self.device_map, DEVICE_MAPS),
        ):
            if value is not None and value not in accepted:
                raise RecipeError(f"{option}: got {value!r}, expected {in_prose(accepted)}")
        for option, side in (("--width", self.width), ("--height", self.height)):
            if side is not None and (side % 16 or not _SIDES[0] <= side <= _SIDES[1]):
                raise RecipeError(
                    f"{option}: got {side}, expected a multiple of 16 from {_SIDES[0]} to {_SIDES[1]} pixels"
                )
        self._check_placement()
        if self.output is not None and self.output.exists():
            if not self.output.is_dir():
                raise RecipeError(f"--output: {self.output} is a file; give a folder")
            if any(self.output.iterdir()):
                raise RecipeError(f"--output: {self.output} is not empty; give a new or empty folder")

    def _check_placement(self) -> None:
        if self.device_map is not None and self.offload != "none":
            raise RecipeError(
                "--device-map: cannot be combined with --offload, because it places the models itself; leave out one of"
                " the two options"
            )
        if self.compiled and (self.device_map is not None or self.offload == "sequential"):
            raise RecipeError(
                "--compile: cannot be combined with --offload sequential or --device-map, which move a block's layers"
                " one by one; use --offload none or model"
            )


def parse_strengths(text: str) -> tuple[float, ...]:
    """Parses comma-separated strengths and removes duplicates. Raises RecipeError for anything else."""
    found = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not abs(number) <= _LARGEST_STRENGTH:  # also true for NaN
            raise RecipeError(
                f"--strength: got {part.strip()!r}, expected numbers from -{_LARGEST_STRENGTH:g} to"
                f" {_LARGEST_STRENGTH:g}, separated by commas, such as 0,0.5,1"
            )
        found.append(number)
    return tuple(dict.fromkeys(found))


def parse_seeds(text: str | None, count: int | None) -> tuple[int, ...] | None:
    """Parses the seeds listed in `text`, or counts `count` seeds up from its single seed (by default 0).

    Returns None if neither is given. Raises RecipeError for anything else.
    """
    if text is None and count is None:
        return None
    listed = []
    for part in (text or "0").split(","):
        if not part.strip().isdecimal() or int(part) > _LARGEST_SEED:
            raise RecipeError(
                f"--seed: got {part.strip()!r}, expected whole numbers from 0 to {_LARGEST_SEED}, separated by commas"
            )
        listed.append(int(part))
    if count is None:
        return tuple(dict.fromkeys(listed))
    if len(listed) > 1:
        raise RecipeError(
            "--seeds: counts up from a single seed, but --seed lists several; give only one of the two options"
        )
    if listed[0] + count - 1 > _LARGEST_SEED:
        raise RecipeError(
            f"--seeds: {count} seeds from {listed[0]} on exceed the largest seed, {_LARGEST_SEED}"
        )
    return tuple(range(listed[0], listed[0] + count))


def read_prompts(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """Returns the given prompts and those of a file, one per line. Raises RecipeError if they cannot be read."""
    prompts = list(given)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"--prompts-file: {file} cannot be read: {error}") from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise RecipeError(f"--prompts-file: {file} contains no prompt, expected one per line")
        prompts += found
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RecipeError(f"--prompt: got {prompt!r}, expected UTF-8 text") from error
    return tuple(prompts)
