"""The files that an adapter is written as, for diffusers and PEFT, ComfyUI, and kohya's scripts.

ComfyUI and kohya name layers as the model's authors do, who have queries, keys and values (in FLUX's single blocks
the MLP as well) in one layer. The update of such a layer from separately trained ones is exact at the sum of their
ranks: the A's above each other, the B's on the diagonal of blocks.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from halfbyte.trainer.adapters.saved import ADAPTER_FILE, LoraLayer, SavedAdapter
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.pretrained.layer_names import OriginalName, swap_halves

LoraFormat = Literal["diffusers", "comfyui", "kohya"]
FORMATS: tuple[LoraFormat, ...] = ("diffusers", "comfyui", "kohya")

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
COMFYUI_PREFIX = "diffusion_model."
KOHYA_PREFIX = "lora_unet_"


def formats_for(adapter: SavedAdapter, asked: Iterable[LoraFormat] | None) -> tuple[LoraFormat, ...]:
    """The formats to write; None asks for all that can hold the adapter. Raises RecipeError."""
    if asked is None:
        return FORMATS[:1] if adapter.is_dora else FORMATS
    wanted = tuple(dict.fromkeys(asked))
    if adapter.is_dora and wanted != ("diffusers",):
        raise RecipeError(
            "format: a DoRA adapter has lengths of rows for each of the layers that ComfyUI and kohya hold as one, and"
            " cannot be written for them; accepted: diffusers"
        )
    return wanted


def named_formats(text: str) -> tuple[LoraFormat, ...]:
    """The formats that `text` names, with commas between. Raises RecipeError."""
    named = [name.strip() for name in text.split(",")]
    found = tuple(known for name in named for known in FORMATS if known == name)
    if len(found) != len(named):
        odd = ", ".join(repr(name) for name in named if name not in FORMATS)
        raise RecipeError(f"--format: got {odd}; accepted: {', '.join(FORMATS)}, with commas between")
    return found


def file_name(name: str, kind: LoraFormat) -> str:
    """Where in the adapter's folder the file of a format is; `name` is the run's, as users see it in ComfyUI."""
    return ADAPTER_FILE if kind == "diffusers" else f"{kind}/{name}.safetensors"


def write_formats(
    adapter: SavedAdapter,
    formats: Iterable[LoraFormat],
    folder: Path,
    names: Sequence[OriginalName],
    *,
    name: str,
    base: tuple[str, str] | None,
) -> None:
    """Adds to `folder`, which holds diffusers' file, what else the formats are made of.

    base: the Hub repository and revision that was trained on; None for a folder, whose path is nobody's business.
    """
    for kind in formats:
        if kind == "diffusers":
            _write_peft(adapter, folder, base)
            continue
        prefix, dots = (COMFYUI_PREFIX, ".") if kind == "comfyui" else (KOHYA_PREFIX, "_")
        tensors: dict[str, Tensor] = {}
        for original, layer in fused_layers(adapter.layers(), names).items():
            key = prefix + original.replace(".", dots)
            tensors[f"{key}.lora_down.weight"] = layer.down
            tensors[f"{key}.lora_up.weight"] = layer.up
            # These formats scale by alpha / rank alone, so the alpha says what the scale was.
            tensors[f"{key}.alpha"] = torch.tensor(layer.scale * layer.rank)
        file = folder / file_name(name, kind)
        file.parent.mkdir()
        save_file(tensors, file, metadata=_kohya_metadata(adapter) if kind == "kohya" else {"format": "pt"})


def fused_layers(layers: Mapping[str, LoraLayer], names: Iterable[OriginalName]) -> dict[str, LoraLayer]:
    """The same update by the authors' names. Raises RecipeError for a layer that they have no name for."""
    left = dict(layers)
    found = {}
    for original in names:
        parts = [left.pop(part, None) for part in original.parts]
        if any(part is not None for part in parts):
            layer = _stacked(parts, original.rows)
            found[original.name] = (
                LoraLayer(layer.down, swap_halves(layer.up), layer.scale) if original.swapped else layer
            )
    if left:
        raise RecipeError(
            f"format: {next(iter(left))} has no counterpart in the files of ComfyUI and kohya; export it with"
            " --format diffusers (output.formats: [diffusers])"
        )
    return found


def _stacked(parts: list[LoraLayer | None], rows: tuple[int, ...]) -> LoraLayer:
    if len(parts) == 1 and parts[0] is not None:
        return LoraLayer(parts[0].down.contiguous(), parts[0].up.contiguous(), parts[0].scale)
    trained = [part for part in parts if part is not None]
    same = all(part.scale == trained[0].scale for part in trained)
    up = torch.zeros(sum(rows), sum(part.rank for part in trained))
    row = column = 0
    for part, height in zip(parts, rows, strict=True):
        if part is not None:
            # One alpha is all that the layer has: other scales go into B.
            block = part.up if same else part.up * part.scale
            up[row : row + height, column : column + part.rank] = block
            column += part.rank
        row += height
    return LoraLayer(torch.cat([part.down for part in trained]), up, trained[0].scale if same else 1.0)


def _write_peft(adapter: SavedAdapter, folder: Path, base: tuple[str, str] | None) -> None:
    tensors = {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in adapter.tensors.items()}
    save_file(tensors, folder / PEFT_FILE, metadata={"format": "pt"})
    config: dict[str, Any] = dict(adapter.config) | {"inference_mode": True}
    if base is not None:
        config |= {"base_model_name_or_path": base[0], "revision": base[1]}
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _kohya_metadata(adapter: SavedAdapter) -> dict[str, str]:
    # Read by its merging scripts and by pages that list models; each layer's own rank and alpha are what counts.
    return {
        "ss_network_dim": str(adapter.config["r"]),
        "ss_network_alpha": str(adapter.config["lora_alpha"]),
        "format": "pt",
    }
