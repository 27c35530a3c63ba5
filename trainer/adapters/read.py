"""Reads an adapter in any common format, for `lora.init_from` and for sampling."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.trainer.adapters.formats import (
    COMFYUI_PREFIX,
    KOHYA_PREFIX,
    PEFT_CONFIG,
    PEFT_FILE,
    PEFT_PREFIX,
)
from halfbyte.trainer.adapters.listed_digests import require_intact
from halfbyte.trainer.adapters.saved import (
    ADAPTER_FILE,
    METADATA,
    LoraLayer,
    diffusers_adapter,
    layer_parts,
    read_tensors,
    whole_adapter,
)
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.pretrained.layer_names import OriginalName, swap_halves

log = logging.getLogger(__name__)

_DIFFUSERS_PREFIX = "transformer."
_TEXT_PREFIXES = ("text_encoder", "lora_te", "text_encoders.")


def read_layers(path: Path, names: Sequence[OriginalName]) -> dict[str, LoraLayer]:
    """Reads the adapter at `path`, a file or a folder; returns its layers under diffusers' names.

    names: the model's layers under their authors' names.

    Raises:
        RecipeError: there is no adapter, it is not a LoRA or not complete, or it has values that are not
            finite.
    """
    file = find_file(path)
    tensors, metadata = read_tensors(file)
    text = [key for key in tensors if key.startswith(_TEXT_PREFIXES)]
    if text:
        log.warning(
            "%s: ignoring %d tensors for text encoders, which halfbyte does not train", file, len(text)
        )
    own = {key: tensor for key, tensor in tensors.items() if key not in text}
    if not own:
        raise RecipeError(f"{file} has no adapter for a transformer")
    if METADATA in metadata and all(key.startswith(_DIFFUSERS_PREFIX) for key in own):
        return diffusers_adapter(file, own, metadata[METADATA]).layers()
    if all(key.startswith(PEFT_PREFIX) for key in own):
        config_file = file.with_name(PEFT_CONFIG)
        return whole_adapter(file, own, PEFT_PREFIX, _peft_config(config_file), str(config_file)).layers()
    parts = layer_parts(file, own)
    for prefix, dots in ((COMFYUI_PREFIX, "."), (KOHYA_PREFIX, "_")):
        if all(layer.startswith(prefix) for layer in parts):
            known = {
                prefix + part.replace(".", dots): OriginalName(part, (part,))
                for original in names
                for part in original.parts
            } | {prefix + original.name.replace(".", dots): original for original in names}
            return _split(file, parts, known)
    if all(layer.startswith(_DIFFUSERS_PREFIX) for layer in parts):
        return {layer.removeprefix(_DIFFUSERS_PREFIX): _layer(part) for layer, part in parts.items()}
    known_prefixes = (COMFYUI_PREFIX, KOHYA_PREFIX, _DIFFUSERS_PREFIX)
    first = next((prefix for prefix in known_prefixes if next(iter(own)).startswith(prefix)), "")
    unknown = next(key for key in own if not first or not key.startswith(first))
    raise RecipeError(
        f"{file} holds {unknown}; accepted: only keys of one format, diffusers ({_DIFFUSERS_PREFIX}…), PEFT"
        f" ({PEFT_PREFIX}…), ComfyUI ({COMFYUI_PREFIX}…) or kohya ({KOHYA_PREFIX}…)"
    )


def find_file(path: Path) -> Path:
    """Returns the adapter's file: `path`, or a file in the folder `path` or its subfolder `adapter`.

    Raises:
        RecipeError: there is no such file.
    """
    if path.is_file():
        return path
    for folder in (path, path / "adapter"):
        for name in (ADAPTER_FILE, PEFT_FILE):
            if (folder / name).is_file():
                return folder / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = ", ".join(file.name for file in files) or "no safetensors file"
    raise RecipeError(
        f"{path} has {found}; expected a run's folder, a folder with {ADAPTER_FILE} or {PEFT_FILE}, or an adapter"
        " file"
    )


def _peft_config(file: Path) -> dict[str, Any]:
    try:
        content = file.read_bytes()
        require_intact(file, content)
        config = json.loads(content)
    except RecipeError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{file} cannot be read, but the scale of the adapter is in it: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise RecipeError(f"{file} does not describe a LoRA; accepted: peft_type LORA")
    return config


def _layer(part: Mapping[str, Tensor]) -> LoraLayer:
    # A file without alpha means alpha = rank: the update is B A, unscaled.
    scale = part["alpha"].item() / len(part["down"]) if "alpha" in part else 1.0
    return LoraLayer(part["down"], part["up"], scale, part.get("magnitude"))


def _split(
    file: Path, parts: Mapping[str, Mapping[str, Tensor]], known: Mapping[str, OriginalName]
) -> dict[str, LoraLayer]:
    """Splits the authors' fused layers into diffusers' layers, and renames the others.

    known: key of a layer in the file -> its names in both models. Some trainers write diffusers' names in the form
    of ComfyUI or kohya, so these are keys too.
    """
    found: dict[str, LoraLayer] = {}
    for name, part in parts.items():
        original = known.get(name)
        if original is None:
            raise RecipeError(f"{file} is for another base: the model has no layer {name}")
        layer = _layer(part)
        rows = original.rows or (len(layer.up),)
        if sum(rows) != len(layer.up):
            raise RecipeError(
                f"{file} is for another base: {name} has {len(layer.up)} outputs, but the model's has {sum(rows)}"
            )
        if original.swapped:
            magnitude = None if layer.magnitude is None else swap_halves(layer.magnitude)
            layer = LoraLayer(layer.down, swap_halves(layer.up), layer.scale, magnitude)
        found |= _unfused(layer, original.parts, rows) if len(rows) > 1 else {original.parts[0]: layer}
    return found


def _unfused(layer: LoraLayer, paths: Sequence[str], rows: Sequence[int]) -> dict[str, LoraLayer]:
    """Splits B of a fused layer by rows.

    Each part keeps only the ranks (columns of B) that are not zero in its rows.
    """
    magnitudes = [None] * len(rows) if layer.magnitude is None else layer.magnitude.split(list(rows))
    found: dict[str, LoraLayer] = {}
    for path, block, magnitude in zip(paths, layer.up.split(rows), magnitudes, strict=True):
        used = block.any(dim=0)
        if not layer.up.any():
            # B is all zeros, as at the start of training. It does not show which rank belongs to which part;
            # a single rank of zeros gives the same update.
            used[0] = True
        if used.any() or magnitude is not None:
            columns = used if used.any() else torch.ones_like(used)
            down, up = layer.down[columns], block[:, columns].contiguous()
            found[path] = LoraLayer(down, up, layer.scale, magnitude)
    return found
