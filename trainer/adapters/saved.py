"""An adapter apart from its model: a LoRA's tensors, and the settings that give them their scale."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from halfbyte.trainer.errors import RecipeError

METADATA = "lora_adapter_metadata"
_PREFIX = "transformer."
DOWN = ".lora_A.weight"
MAGNITUDE = ".lora_magnitude_vector"
# What ends a layer's name in a key of PEFT and diffusers, and what it is.
_ENDINGS = {DOWN: "down", ".lora_B.weight": "up", MAGNITUDE: "lengths"}
# In files without a configuration, which may carry the scale themselves, as ComfyUI's and kohya's do.
PLAIN_ENDINGS = _ENDINGS | {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"}


@dataclass(frozen=True)
class LoraLayer:
    """One layer's update, scale * up @ down."""

    down: Tensor  # A, (rank, inputs) fp32
    up: Tensor  # B, (outputs, rank) fp32
    scale: float
    lengths: Tensor | None = None  # DoRA's: of the rows of the adapted weight, (outputs,) fp32

    @property
    def rank(self) -> int:
        """The inner size."""
        return len(self.down)


@dataclass(frozen=True)
class SavedAdapter:
    """What a file of diffusers or PEFT holds of a transformer's LoRA."""

    tensors: Mapping[str, Tensor]  # as `….lora_A.weight`, without prefix
    config: Mapping[str, Any]  # the fields of PEFT's LoraConfig

    def layers(self) -> dict[str, LoraLayer]:
        """The update of each adapted layer by its name in the model."""
        return {
            path: LoraLayer(
                part["down"], part["up"], self.scale(path, len(part["down"])), part.get("lengths")
            )
            for path, part in _by_layer(self.tensors, _ENDINGS).items()
        }

    def scale(self, path: str, rank: int) -> float:
        """PEFT's: alpha / rank, or alpha / sqrt(rank) for rsLoRA, with the alpha of the first pattern that fits."""
        alphas = self.config.get("alpha_pattern") or {}
        pattern = first_matching(alphas, path)
        alpha = self.config["lora_alpha"] if pattern is None else alphas[pattern]
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    @property
    def is_dora(self) -> bool:
        """Whether lengths of rows learned as well."""
        return any(name.endswith(MAGNITUDE) for name in self.tensors)


def read_saved(file: Path) -> SavedAdapter:
    """The adapter in a file as diffusers writes it. Raises RecipeError for any other file."""
    tensors, metadata = read_tensors(file)
    strange = [name for name in tensors if not name.startswith(_PREFIX)]
    if strange or not tensors or METADATA not in metadata:
        found = f"it holds {strange[0]}" if strange else f"it has {len(tensors)} tensors and no {METADATA}"
        raise RecipeError(f"{file}: expected a transformer's LoRA as diffusers writes it; {found}")
    return diffusers_adapter(file, tensors, metadata[METADATA])


def diffusers_adapter(file: Path, tensors: Mapping[str, Tensor], settings: str) -> SavedAdapter:
    """A transformer's adapter of a file by diffusers, with the JSON of its metadata; see `whole_adapter`."""
    where = f"{file}: its metadata ({METADATA})"
    try:
        entries = json.loads(settings)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where} is not JSON, and says how the update is scaled: {error}") from error
    if not isinstance(entries, dict):
        raise RecipeError(f"{where} is {settings[:40]}, expected the settings of PEFT's LoraConfig")
    # Those of text encoders, whose alpha may be another, are beside them.
    config = {
        name.removeprefix(_PREFIX): entry for name, entry in entries.items() if name.startswith(_PREFIX)
    }
    return whole_adapter(file, tensors, _PREFIX, config, where)


def whole_adapter(
    file: Path, tensors: Mapping[str, Tensor], prefix: str, config: Mapping[str, Any], where: str
) -> SavedAdapter:
    """The adapter of tensors under PEFT's names, each behind `prefix`, and of PEFT's settings.

    where: what a message calls the settings. Raises RecipeError as `layer_parts` does, and where the settings do not
    give every layer a scale.
    """
    parts = layer_parts(file, tensors, _ENDINGS)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise RecipeError(f"{where} has alpha_pattern {patterns!r}, expected an alpha for each pattern")
    alphas: dict[str, Any] = {"lora_alpha": config.get("lora_alpha")}
    alphas |= {f"alpha_pattern {pattern!r}": alpha for pattern, alpha in patterns.items()}
    for name, alpha in alphas.items():
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise RecipeError(
                f"{where} has {name} {alpha!r}, expected a number; without it the update's scale is not known"
            )
    for pattern in patterns:
        try:
            re.compile(_peft_regex(pattern))
        except re.error as error:
            raise RecipeError(
                f"{where} has alpha_pattern {pattern!r}, which is no regular expression: {error}"
            ) from error
    if config.get("use_dora") and not all("lengths" in part for part in parts.values()):
        raise RecipeError(f"{file}: is a DoRA adapter (use_dora) without the lengths of rows (…{MAGNITUDE})")
    return SavedAdapter({name.removeprefix(prefix): t for name, t in tensors.items()}, config)


def layer_parts(
    file: Path, tensors: Mapping[str, Tensor], endings: Mapping[str, str] = PLAIN_ENDINGS
) -> dict[str, dict[str, Tensor]]:
    """Layer, with its prefix -> its tensors in fp32 by what they are: down, up, lengths, alpha.

    Raises RecipeError, naming file and tensor, for a key that no LoRA has, a layer without both halves of one rank,
    values that are not finite, and for no layer at all.
    """
    known: dict[str, str] = {}
    for key, tensor in tensors.items():
        ending = next((ending for ending in endings if key.endswith(ending)), None)
        if ending is None:
            raise RecipeError(f"{file} holds {key}; accepted: LoRA alone ({', '.join(endings)})")
        twin = known.setdefault(key.removesuffix(ending) + endings[ending], key)
        if twin != key:
            raise RecipeError(f"{file} holds both {twin} and {key}, which are the same half of a LoRA")
        if not tensor.float().isfinite().all():
            raise RecipeError(f"{file}: {key} holds values that are not finite; the adapter is broken")
    found = _by_layer(tensors, endings)
    if not found:
        raise RecipeError(f"{file} holds no adapter of a transformer")
    for layer, part in found.items():
        _check_layer(file, layer, part)
    with_lengths = [layer for layer, part in found.items() if "lengths" in part]
    if with_lengths and len(with_lengths) < len(found):
        other = next(layer for layer in found if layer not in with_lengths)
        raise RecipeError(f"{file}: {with_lengths[0]} has DoRA's lengths of rows and {other} has none")
    return found


def _check_layer(file: Path, layer: str, part: Mapping[str, Tensor]) -> None:
    down, up = part.get("down"), part.get("up")
    if (
        down is None
        or up is None
        or down.ndim != 2
        or up.ndim != 2
        or not 0 < len(down) == up.shape[1]
        or not down.shape[1] * len(up)
    ):
        got = ", ".join(
            f"{name} {'none' if half is None else tuple(half.shape)}"
            for name, half in (("lora_A (down)", down), ("lora_B (up)", up))
        )
        raise RecipeError(
            f"{file}: {layer} has not both halves of a LoRA, of one rank: got {got}, expected (rank, inputs) and"
            " (outputs, rank)"
        )
    alpha, lengths = part.get("alpha"), part.get("lengths")
    if alpha is not None and alpha.numel() != 1:
        raise RecipeError(f"{file}: the alpha of {layer} has {alpha.numel()} values, expected one")
    if lengths is not None and lengths.shape != (len(up),):
        raise RecipeError(
            f"{file}: DoRA's lengths of {layer} have shape {tuple(lengths.shape)}, expected ({len(up)},)"
        )


def _by_layer(tensors: Mapping[str, Tensor], endings: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        ending = next(ending for ending in endings if key.endswith(ending))
        found.setdefault(key.removesuffix(ending), {})[endings[ending]] = tensor.float()
    return found


def first_matching(patterns: Iterable[str], layer: str) -> str | None:
    """The pattern that PEFT takes for a layer; None where none fits."""
    return next((pattern for pattern in patterns if re.match(_peft_regex(pattern), layer)), None)


def _peft_regex(pattern: str) -> str:
    """A pattern as PEFT matches it: against the end of a layer's name."""
    return rf"(.*\.)?({pattern})$"


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All of a safetensors file with its metadata. Raises RecipeError where it is none."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{file}: not a whole safetensors file: {error}") from error


ADAPTER_FILE = "pytorch_lora_weights.safetensors"
