"""Writes an adapter in the formats of diffusers and PEFT, ComfyUI, and kohya's scripts.

ComfyUI and kohya use the layer names of the model's authors, who fuse queries, keys and values (and the MLP,
in FLUX's single blocks) into one layer. The update of a fused layer is exactly that of the separately trained
layers if its rank is the sum of their ranks: the A matrices are stacked, and the B matrices form a block
diagonal.
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
    """Returns the formats to write; `asked` None means all that can represent the adapter.

    Raises:
        RecipeError: a DoRA adapter is to be written in another format than diffusers.
    """
    if asked is None:
        return FORMATS[:1] if adapter.is_dora else FORMATS
    wanted = tuple(dict.fromkeys(asked))
    if adapter.is_dora and wanted != ("diffusers",):
        raise RecipeError(
            f"format: got {', '.join(wanted)} for a DoRA adapter, accepted: diffusers. DoRA has a magnitude vector for"
            " each of the layers that ComfyUI and kohya fuse into one"
        )
    return wanted


def named_formats(text: str) -> tuple[LoraFormat, ...]:
    """Parses a comma-separated list of formats.

    Raises:
        RecipeError: a name in `text` is not a format.
    """
    named = [name.strip() for name in text.split(",")]
    found = tuple(known for name in named for known in FORMATS if known == name)
    if len(found) != len(named):
        unknown = ", ".join(repr(name) for name in named if name not in FORMATS)
        raise RecipeError(f"--format: got {unknown}; accepted: {', '.join(FORMATS)}, separated by commas")
    return found


def file_name(name: str, kind: LoraFormat) -> str:
    """Returns a format's file, relative to the adapter's folder.

    name: the name of the run, which ComfyUI shows to users.
    """
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
    """Writes the files of `formats` into `folder`, which already has diffusers' own file.

    base: Hub repository and revision that the adapter was trained on; None for a local folder, whose path is
    private.
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
            # These formats always scale by alpha / rank, so alpha = scale * rank gives the right scale (also
            # for rsLoRA).
            tensors[f"{key}.alpha"] = torch.tensor(layer.scale * layer.rank)
        file = folder / file_name(name, kind)
        file.parent.mkdir()
        save_file(tensors, file, metadata=_kohya_metadata(adapter) if kind == "kohya" else {"format": "pt"})


def fused_layers(layers: Mapping[str, LoraLayer], names: Iterable[OriginalName]) -> dict[str, LoraLayer]:
    """Returns the same update under the authors' layer names.

    Raises:
        RecipeError: the authors' model has no such layer.
    """
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
            f"format: {next(iter(left))} has no counterpart in the formats of ComfyUI and kohya; export the adapter"
            " with --format diffusers (output.formats: [diffusers])"
        )
    return found


def _stacked(parts: list[LoraLayer | None], rows: tuple[int, ...]) -> LoraLayer:
    """Returns the fused layer of `parts`, with `rows` outputs each; None is a layer that was not trained."""
    if len(parts) == 1 and parts[0] is not None:
        return LoraLayer(parts[0].down.contiguous(), parts[0].up.contiguous(), parts[0].scale)
    trained = [part for part in parts if part is not None]
    same = all(part.scale == trained[0].scale for part in trained)
    up = torch.zeros(sum(rows), sum(part.rank for part in trained))
    row = column = 0
    for part, height in zip(parts, rows, strict=True):
        if part is not None:
            # The fused layer has only one alpha. If the parts' scales differ, they are multiplied into B.
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
    # Only for kohya's merge scripts and for model listings. Loading uses each layer's own rank and alpha.
    return {
        "ss_network_dim": str(adapter.config["r"]),
        "ss_network_alpha": str(adapter.config["lora_alpha"]),
        "format": "pt",
    }
