"""What `halfbyte sample` is asked for, read from its options: every mistake is told before anything is loaded."""

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
_LARGEST_STRENGTH = 1000.0  # far beyond any adapter's use, far within half precision


@dataclass(frozen=True)
class SampleRequest:
    """The options; None where one was not given, and the run or the model decides."""

    source: str
    """A run, an adapter, or a pipeline: a folder, a file or a Hub repository."""
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
        """Raises RecipeError for values and combinations that mean nothing."""
        for option, value, accepted in (
            ("--quant", self.quant, QUANTS),
            ("--text-encoder-quant", self.text_encoder_quant, TEXT_ENCODER_QUANTS),
            ("--dtype", self.dtype, DTYPE_NAMES),
            ("--offload", self.offload, OFFLOADS),
            ("--device-map", self.device_map, DEVICE_MAPS),
        ):
            if value is not None and value not in accepted:
                raise RecipeError(f"{option}: got {value!r}, accepted: {in_prose(accepted)}")
        for option, side in (("--width", self.width), ("--height", self.height)):
            if side is not None and (side % 16 or not _SIDES[0] <= side <= _SIDES[1]):
                raise RecipeError(
                    f"{option}: got {side}, expected a multiple of 16 from {_SIDES[0]} to {_SIDES[1]} pixels"
                )
        self._check_placement()
        if self.output is not None and self.output.exists():
            if not self.output.is_dir():
                raise RecipeError(f"--output: {self.output} is a file; name a folder")
            if any(self.output.iterdir()):
                raise RecipeError(f"--output: {self.output} is not empty; name a new folder")

    def _check_placement(self) -> None:
        if self.device_map is not None and self.offload != "none":
            raise RecipeError("--device-map: it places the models itself; leave out --offload")
        if self.compiled and (self.device_map is not None or self.offload == "sequential"):
            raise RecipeError(
                "--compile: blocks whose layers are moved one by one cannot be compiled; accepted with it: --offload"
                " none or model, and no --device-map"
            )


def parse_strengths(text: str) -> tuple[float, ...]:
    """Numbers with commas between, each once. Raises RecipeError."""
    found = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not abs(number) <= _LARGEST_STRENGTH:  # nor where it is not a number
            raise RecipeError(
                f"--strength: got {part.strip()!r}, expected numbers from -{_LARGEST_STRENGTH:g} to"
                f" {_LARGEST_STRENGTH:g} with commas between, as 0,0.5,1"
            )
        found.append(number)
    return tuple(dict.fromkeys(found))


def parse_seeds(text: str | None, count: int | None) -> tuple[int, ...] | None:
    """The seeds listed in `text`, or `count` of them from the one that it names, else from 0. Raises RecipeError."""
    if text is None and count is None:
        return None
    listed = []
    for part in (text or "0").split(","):
        if not part.strip().isdecimal() or int(part) > _LARGEST_SEED:
            raise RecipeError(
                f"--seed: got {part.strip()!r}, expected whole numbers from 0 to {_LARGEST_SEED} with commas between"
            )
        listed.append(int(part))
    if count is None:
        return tuple(dict.fromkeys(listed))
    if len(listed) > 1:
        raise RecipeError(
            "--seeds: it counts on from one seed, and --seed lists several; give one of the two"
        )
    if listed[0] + count - 1 > _LARGEST_SEED:
        raise RecipeError(f"--seeds: {count} seeds from {listed[0]} go beyond {_LARGEST_SEED}")
    return tuple(range(listed[0], listed[0] + count))


def read_prompts(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The prompts given, and those of a file, one a line. Raises RecipeError."""
    prompts = list(given)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"--prompts-file: {file} cannot be read: {error}") from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise RecipeError(f"--prompts-file: {file} holds no prompt; expected one a line")
        prompts += found
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RecipeError(f"--prompt: got {prompt!r}, which is no UTF-8 text") from error
    return tuple(prompts)
