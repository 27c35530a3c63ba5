"""An adapter in any of the forms that adapters come in, and a run that starts from one: `lora.init_from`."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer as PeftLayer
from torch import Tensor, nn

from halfbyte.trainer.checkpoint import ADAPTER_FILE
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.original_names import OriginalName, swap_halves
from halfbyte.trainer.lora_formats import COMFYUI_PREFIX, KOHYA_PREFIX, PEFT_CONFIG, PEFT_FILE, PEFT_PREFIX
from halfbyte.trainer.saved_adapter import METADATA, LoraLayer, SavedAdapter, read_saved, read_tensors

log = logging.getLogger(__name__)

_DIFFUSERS_PREFIX = "transformer."
_TEXT_PREFIXES = ("text_encoder", "lora_te", "text_encoders.")
# What ends a layer's name in a key, and what it is.
_ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
    ".lora_magnitude_vector": "lengths",
}


def read_layers(path: Path, names: Sequence[OriginalName]) -> dict[str, LoraLayer]:
    """The adapter at `path`, a file or a folder of any form, by diffusers' names of the layers.

    names: the model's layers by their authors' names. Raises RecipeError for what is no adapter, or one that is not
    LoRA.
    """
    file = find_file(path)
    tensors, metadata = read_tensors(file)
    text = [key for key in tensors if key.startswith(_TEXT_PREFIXES)]
    if text:
        log.warning(
            "%s: %d tensors for text encoders are left out, which are not trained here", file, len(text)
        )
    own = {key: tensor for key, tensor in tensors.items() if key not in text}
    if not own:
        raise RecipeError(f"{file} holds no adapter of a transformer")
    if metadata.get(METADATA) and all(key.startswith(_DIFFUSERS_PREFIX) for key in tensors):
        return read_saved(file).layers()
    if all(key.startswith(PEFT_PREFIX) for key in own):
        config = _peft_config(file.with_name(PEFT_CONFIG))
        return SavedAdapter({k.removeprefix(PEFT_PREFIX): t for k, t in own.items()}, config).layers()
    parts = _parts(file, own)
    for prefix, dots in ((COMFYUI_PREFIX, "."), (KOHYA_PREFIX, "_")):
        if all(layer.startswith(prefix) for layer in parts):
            known = {prefix + original.name.replace(".", dots): original for original in names}
            return _split(file, parts, known)
    if all(layer.startswith(_DIFFUSERS_PREFIX) for layer in parts):
        return {
            layer.removeprefix(_DIFFUSERS_PREFIX): _layer(file, layer, part) for layer, part in parts.items()
        }
    odd = next(key for key in own if not key.startswith((COMFYUI_PREFIX, KOHYA_PREFIX, _DIFFUSERS_PREFIX)))
    raise RecipeError(
        f"{file} holds {odd}; accepted: the keys of diffusers ({_DIFFUSERS_PREFIX}…), PEFT"
        f" ({PEFT_PREFIX}…), ComfyUI ({COMFYUI_PREFIX}…) or kohya ({KOHYA_PREFIX}…), one of them in a file"
    )


@torch.no_grad()
def start_from(denoiser: nn.Module, layers: Mapping[str, LoraLayer], adapter: str, path: Path | str) -> bool:
    """Gives the adapters on `denoiser` the updates of `layers`, exactly; whether DoRA's lengths came along.

    Where the run's rank is larger the rest of A stays as it starts and that of B is zero; layers that have no update
    start as without. Raises RecipeError where an update has no layer, another shape, or a larger rank.
    """
    own = {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, PeftLayer) and adapter in module.lora_A
    }
    strange = sorted(layers.keys() - own.keys())
    if strange:
        _refuse(denoiser, strange, own, path)
    for name, layer in layers.items():
        module: Any = own[name]
        down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        expected, got = (len(up), down.shape[1]), (len(layer.up), layer.down.shape[1])
        if expected != got:
            raise RecipeError(
                f"{path} is for another base: its {name} is {got[0]} x {got[1]}, the model's"
                f" {expected[0]} x {expected[1]}"
            )
        if layer.rank > len(down):
            highest = max(other.rank for other in layers.values())
            raise RecipeError(
                f"{name} has rank {layer.rank} in {path}, and {len(down)} in this run; set"
                f" lora.rank: {highest}, or a rank for these layers in lora.rank_pattern"
            )
        if layer.lengths is not None and adapter not in module.lora_magnitude_vector:
            raise RecipeError(f"{path} is a DoRA adapter; set lora.dora: true")
    for name, layer in layers.items():
        module = own[name]
        down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        down[: layer.rank].copy_(layer.down)
        up.zero_()
        up[:, : layer.rank].copy_(layer.up * (layer.scale / module.scaling[adapter]))
    lengths = {name: layer.lengths for name, layer in layers.items() if layer.lengths is not None}
    for name, values in lengths.items():
        own[name].lora_magnitude_vector[adapter].weight.copy_(values)
    log.info("%d of %d layers have the adapter of %s", len(layers), len(own), path)
    return bool(lengths)


def _refuse(denoiser: nn.Module, strange: list[str], own: Iterable[str], path: Path | str) -> None:
    modules = {name for name, _ in denoiser.named_modules()}
    missing = [name for name in strange if name not in modules]
    if missing:
        raise RecipeError(
            f"{path} is for another base: the model has no {missing[0]} ({len(missing)} such layers)"
        )
    ends = sorted({name.split(".", 2)[-1] for name in (*strange, *own)})
    raise RecipeError(
        f"{path} adapts {len(strange)} layers that lora.targets does not, first {strange[0]}; set"
        f" lora.targets: [{', '.join(ends)}]"
    )


def find_file(path: Path) -> Path:
    """The file with the adapter at `path`, itself or in its folder. Raises RecipeError where there is none."""
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
        f"{path} holds {found}; expected a run, a folder with {ADAPTER_FILE} or {PEFT_FILE}, or a file"
    )


def _peft_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file} cannot be read, and says how the update is scaled: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or "lora_alpha" not in config:
        raise RecipeError(f"{file} describes no LoRA; accepted: peft_type LORA")
    return config


def _parts(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer, with its prefix -> its tensors by what they are."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS if key.endswith(ending)), None)
        if ending is None:
            raise RecipeError(f"{file} holds {key}; accepted: LoRA alone ({', '.join(_ENDINGS)})")
        found.setdefault(key.removesuffix(ending), {})[_ENDINGS[ending]] = tensor
    return found


def _layer(file: Path, name: str, part: Mapping[str, Tensor]) -> LoraLayer:
    if "down" not in part or "up" not in part or part["down"].shape[0] != part["up"].shape[1]:
        raise RecipeError(f"{file}: {name} has not both halves of a LoRA, of one rank")
    down = part["down"].float()
    # Without an alpha the update is B A as it is.
    scale = float(part["alpha"]) / len(down) if "alpha" in part else 1.0
    return LoraLayer(down, part["up"].float(), scale, part.get("lengths"))


def _split(
    file: Path, parts: Mapping[str, Mapping[str, Tensor]], known: Mapping[str, OriginalName]
) -> dict[str, LoraLayer]:
    """Layers that the authors hold as one, parted again; of each part the columns of B that it has."""
    found = {}
    for name, part in parts.items():
        original = known.get(name)
        if original is None:
            raise RecipeError(f"{file} is for another base: the model has no {name}")
        layer = _layer(file, name, part)
        rows = original.rows or (len(layer.up),)
        if sum(rows) != len(layer.up):
            raise RecipeError(
                f"{file} is for another base: {name} has {len(layer.up)} outputs, the model's {sum(rows)}"
            )
        up = swap_halves(layer.up) if original.swapped else layer.up
        for path, block in zip(original.parts, up.split(rows), strict=True):
            used = block.any(dim=0)
            if len(rows) > 1 and not used.any():
                continue
            columns = used if len(rows) > 1 else torch.ones_like(used)
            found[path] = LoraLayer(layer.down[columns], block[:, columns].contiguous(), layer.scale)
    return found
