"""An adapter on disk, without its model: a LoRA's tensors and the settings that determine its scale."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from halfbyte.trainer.adapters.listed_digests import require_intact
from halfbyte.trainer.adapters.patterns import peft_regex, refuse_slow
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.wording import printable, shown

METADATA = "lora_adapter_metadata"
_PREFIX = "transformer."
DOWN = ".lora_A.weight"
MAGNITUDE = ".lora_magnitude_vector"
# Ending of a key in files of PEFT and diffusers, after the layer's name -> the tensor's role.
_ENDINGS = {DOWN: "down", ".lora_B.weight": "up", MAGNITUDE: "magnitude"}
# The same for files without a configuration, such as ComfyUI's and kohya's, which may have the scale as a
# tensor.
PLAIN_ENDINGS = _ENDINGS | {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"}


@dataclass(frozen=True)
class LoraLayer:
    """The update of one layer: scale * up @ down."""

    down: Tensor  # A, (rank, inputs) fp32
    up: Tensor  # B, (outputs, rank) fp32
    scale: float
    magnitude: Tensor | None = None  # DoRA's magnitude: norms of the adapted weight's rows, (outputs,) fp32

    @property
    def rank(self) -> int:
        """The rank: the number of rows of A and columns of B."""
        return len(self.down)


@dataclass(frozen=True)
class SavedAdapter:
    """A transformer's LoRA from a file of diffusers or PEFT."""

    tensors: Mapping[str, Tensor]  # keys such as `….lora_A.weight`, without the file's prefix
    config: Mapping[str, Any]  # the fields of PEFT's LoraConfig

    def layers(self) -> dict[str, LoraLayer]:
        """Returns the update of each adapted layer by the layer's name in the model."""
        return {
            path: LoraLayer(
                part["down"], part["up"], self.scale(path, len(part["down"])), part.get("magnitude")
            )
            for path, part in _by_layer(self.tensors, _ENDINGS).items()
        }

    def scale(self, path: str, rank: int) -> float:
        """Returns PEFT's scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.

        alpha is that of the first pattern that matches `path`.
        """
        alphas = self.config.get("alpha_pattern") or {}
        pattern = first_matching(alphas, path)
        alpha = self.config["lora_alpha"] if pattern is None else alphas[pattern]
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    @property
    def is_dora(self) -> bool:
        """True if the adapter has DoRA's magnitudes."""
        return any(name.endswith(MAGNITUDE) for name in self.tensors)


def read_saved(file: Path) -> SavedAdapter:
    """Reads an adapter in diffusers' format.

    Raises:
        RecipeError: the file is not such an adapter.
    """
    tensors, metadata = read_tensors(file)
    others = [name for name in tensors if not name.startswith(_PREFIX)]
    if others or not tensors or METADATA not in metadata:
        found = f"the key {others[0]}" if others else f"{len(tensors)} tensors and no {METADATA}"
        raise RecipeError(f"{file}: got {found}, expected a transformer's LoRA in diffusers' format")
    return diffusers_adapter(file, tensors, metadata[METADATA])


def diffusers_adapter(file: Path, tensors: Mapping[str, Tensor], settings: str) -> SavedAdapter:
    """Returns the transformer's adapter of a diffusers file, see `whole_adapter`.

    settings: the JSON in the file's metadata.
    """
    where = f"{file}: its metadata ({METADATA})"
    try:
        entries = json.loads(settings)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where} is not JSON, but the scale of the adapter is in it: {error}") from error
    if not isinstance(entries, dict):
        raise RecipeError(
            f"{where} is {printable(settings[:40])}, expected the settings of PEFT's LoraConfig"
        )
    # The same dictionary may have settings of text encoders, with another alpha; the prefix tells them apart.
    config = {
        name.removeprefix(_PREFIX): entry for name, entry in entries.items() if name.startswith(_PREFIX)
    }
    return whole_adapter(file, tensors, _PREFIX, config, where)


def whole_adapter(
    file: Path, tensors: Mapping[str, Tensor], prefix: str, config: Mapping[str, Any], where: str
) -> SavedAdapter:
    """Checks and returns an adapter with PEFT's names, after `prefix`, and PEFT's settings `config`.

    where: names the settings in error messages.

    Raises:
        RecipeError: for the reasons in `layer_parts`, or the settings do not give every layer a scale.
    """
    parts = layer_parts(file, tensors, _ENDINGS)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise RecipeError(f"{where} has alpha_pattern {shown(patterns)}, expected an alpha for each pattern")
    alphas: dict[str, Any] = {"lora_alpha": config.get("lora_alpha")}
    alphas |= {f"alpha_pattern {pattern!r}": alpha for pattern, alpha in patterns.items()}
    for name, alpha in alphas.items():
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise RecipeError(
                f"{where} has {name} {alpha!r}, expected a number: the scale of the adapter depends on it"
            )
    refuse_slow(f"{where} has alpha_pattern", list(patterns), list(parts), "match")
    if config.get("use_dora") and not all("magnitude" in part for part in parts.values()):
        raise RecipeError(
            f"{file}: is a DoRA adapter (use_dora), but layers have no magnitude (…{MAGNITUDE})"
        )
    return SavedAdapter({name.removeprefix(prefix): t for name, t in tensors.items()}, config)


def layer_parts(
    file: Path, tensors: Mapping[str, Tensor], endings: Mapping[str, str] = PLAIN_ENDINGS
) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of each layer (with its prefix) in fp32, by role: down, up, magnitude, alpha.

    Raises:
        RecipeError: a key does not belong to a LoRA, a layer does not have A and B of the same rank, a value
            is not finite, or there are no layers. The message names file and tensor.
    """
    known: dict[str, str] = {}
    for key, tensor in tensors.items():
        ending = next((ending for ending in endings if key.endswith(ending)), None)
        if ending is None:
            raise RecipeError(f"{file} holds {key}; accepted: only keys of a LoRA ({', '.join(endings)})")
        twin = known.setdefault(key.removesuffix(ending) + endings[ending], key)
        if twin != key:
            raise RecipeError(f"{file} has both {twin} and {key}, which are the same matrix of a LoRA")
        if not tensor.float().isfinite().all():
            raise RecipeError(f"{file}: {key} has values that are not finite; the adapter is damaged")
    found = _by_layer(tensors, endings)
    if not found:
        raise RecipeError(f"{file} has no adapter for a transformer")
    for layer, part in found.items():
        _check_layer(file, layer, part)
    with_magnitude = [layer for layer, part in found.items() if "magnitude" in part]
    if with_magnitude and len(with_magnitude) < len(found):
        other = next(layer for layer in found if layer not in with_magnitude)
        raise RecipeError(
            f"{file}: {with_magnitude[0]} has a DoRA magnitude, but {other} has none; expected one for every layer"
        )
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
            f"{file}: {layer} needs both matrices of a LoRA, of the same rank: got {got}, expected (rank, inputs) and"
            " (outputs, rank)"
        )
    alpha, magnitude = part.get("alpha"), part.get("magnitude")
    if alpha is not None and alpha.numel() != 1:
        raise RecipeError(f"{file}: the alpha of {layer} has {alpha.numel()} values, expected one")
    if magnitude is not None and magnitude.shape != (len(up),):
        raise RecipeError(
            f"{file}: the DoRA magnitude of {layer} has shape {tuple(magnitude.shape)}, expected ({len(up)},)"
        )


def _by_layer(tensors: Mapping[str, Tensor], endings: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        ending = next(ending for ending in endings if key.endswith(ending))
        found.setdefault(key.removesuffix(ending), {})[endings[ending]] = tensor.float()
    return found


def first_matching(patterns: Iterable[str], layer: str) -> str | None:
    """Returns the first pattern that matches a layer, which is the one that PEFT uses; None if none matches."""
    return next((pattern for pattern in patterns if re.match(peft_regex(pattern), layer)), None)


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads all tensors of a safetensors file, and its metadata.

    The file is read once, so that the bytes that were checked are the bytes that are used. A file of a
    checkpoint or an export is compared with its listed digest, see `require_intact`.

    Raises:
        RecipeError: the file is missing, incomplete or not a safetensors file, or differs from its checksum.
    """
    try:
        content = file.read_bytes()
        require_intact(file, content)
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{file}: not a complete safetensors file: {error}") from error
    except KeyError as error:
        raise RecipeError(f"{file}: has a tensor of type {error}, which torch does not have") from error
    # safetensors returns them in a random order, which messages that name the first key would show.
    return dict(sorted(tensors.items())), header.get("__metadata__") or {}


ADAPTER_FILE = "pytorch_lora_weights.safetensors"
