"""Verifies that the files of an exported model are bitwise identical to the model in memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from halfbyte.quant.files.shards import WEIGHTS_FILE, ShardedWeights
from halfbyte.quant.load.serialize import base_tensors, quantization_config, read_quantization_config
from halfbyte.quant.load.transformer import read_config
from halfbyte.trainer.errors import ExportError

_SHOWN = 5


def check_written_denoiser(folder: Path, denoiser: nn.Module) -> None:
    """Checks that the files in `folder` hold exactly the quantized base of `denoiser`, without its adapters.

    Raises:
        ExportError: See `check_written`.
    """
    model: Any = denoiser
    config = json.loads(model.to_json_string())
    recipe = read_quantization_config(config["quantization_config"], type(model).__name__)
    config["quantization_config"] = quantization_config(recipe)
    config.pop("_name_or_path", None)
    check_written(folder, base_tensors(denoiser), config)


def check_written(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], weights_file: str = WEIGHTS_FILE
) -> None:
    """Checks that a folder's files hold exactly these tensors and settings.

    Raises:
        ExportError: The files cannot be read, or tensors or settings differ. The message names the keys.
    """
    try:
        written = read_config(folder)
        wrong = [
            f"config.json: {key}"
            for key in sorted(written.keys() | config.keys())
            if key not in written or key not in config or written[key] != config[key]
        ]
        with ShardedWeights(folder, weights_file) as weights:
            present = set(weights.names)
            wrong += sorted(present ^ tensors.keys())
            # Compare one tensor at a time: the model may fill the device, and its files the host memory.
            wrong += [
                name
                for name in weights.names
                if name in tensors and not _same(weights.read(name), tensors[name])
            ]
    except ValueError as error:
        raise ExportError(f"export: cannot read the exported files: {error}") from error
    if wrong:
        more = ", ..." if len(wrong) > _SHOWN else ""
        name = folder.name.removeprefix(".").removesuffix(".halfbyte.tmp")
        raise ExportError(
            f"export: {name}/ differs from the model in memory in {len(wrong)} entries:"
            f" {', '.join(wrong[:_SHOWN])}{more}; nothing was exported"
        )


def _same(written: Tensor, original: Tensor) -> bool:
    return written.dtype == original.dtype and written.to(original.device).equal(original)
