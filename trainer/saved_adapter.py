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
_MAGNITUDE = ".lora_magnitude_vector"


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
        found = {}
        for name, down in self.tensors.items():
            path, _, rest = name.partition(".lora_A.")
            if rest:
                up = self.tensors[f"{path}.lora_B.weight"]
                found[path] = LoraLayer(
                    down, up, self.scale(path, len(down)), self.tensors.get(path + _MAGNITUDE)
                )
        return found

    def scale(self, path: str, rank: int) -> float:
        """PEFT's: alpha / rank, or alpha / sqrt(rank) for rsLoRA, with the alpha of the first pattern that fits."""
        alpha = self.config["lora_alpha"]
        for pattern, other in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = other
                break
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    @property
    def is_dora(self) -> bool:
        """Whether lengths of rows learned as well."""
        return any(name.endswith(_MAGNITUDE) for name in self.tensors)


def read_saved(file: Path) -> SavedAdapter:
    """The adapter in a file as diffusers writes it. Raises RecipeError for any other file."""
    tensors, metadata = read_tensors(file)
    strange = [name for name in tensors if not name.startswith(_PREFIX)]
    if strange or not tensors or METADATA not in metadata:
        found = f"it holds {strange[0]}" if strange else f"it has {len(tensors)} tensors and no {METADATA}"
        raise RecipeError(f"{file}: expected a transformer's LoRA as diffusers writes it; {found}")
    adapter = SavedAdapter(_without_prefix(tensors), _without_prefix(json.loads(metadata[METADATA])))
    _check_pairs(file, adapter.tensors)
    return adapter


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All of a safetensors file with its metadata. Raises RecipeError where it is none."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{file}: not a whole safetensors file: {error}") from error


def _without_prefix(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(_PREFIX): entry for name, entry in entries.items()}


def _check_pairs(file: Path, names: Iterable[str]) -> None:
    present = set(names)
    for name in sorted(present):
        for one, other in ((".lora_A.", ".lora_B."), (".lora_B.", ".lora_A.")):
            if one in name and name.replace(one, other) not in present:
                raise RecipeError(
                    f"{file}: holds {name} without {name.replace(one, other)}; the file is not whole"
                )
