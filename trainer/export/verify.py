"""Whether the files of an exported model are what was in memory: key by key, bit by bit, tensor after tensor."""

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
    """Raises ExportError where the files in `folder` are not the quantized `denoiser`, without its adapters."""
    model: Any = denoiser
    config = json.loads(model.to_json_string())
    recipe = read_quantization_config(config["quantization_config"], type(model).__name__)
    config["quantization_config"] = quantization_config(recipe)
    config.pop("_name_or_path", None)
    check_written(folder, base_tensors(denoiser), config)


def check_written(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], weights_file: str = WEIGHTS_FILE
) -> None:
    """Raises ExportError, naming the keys, where a folder's files have others than these tensors and settings."""
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
            # One tensor at a time: the model may fill the device, and the files the host.
            wrong += [
                name
                for name in weights.names
                if name in tensors and not _same(weights.read(name), tensors[name])
            ]
    except ValueError as error:
        raise ExportError(f"export: what was just written cannot be read: {error}") from error
    if wrong:
        more = ", ..." if len(wrong) > _SHOWN else ""
        raise ExportError(
            f"export: {folder.name.removeprefix('.').removesuffix('.tmp')}/ is not what was in memory: {len(wrong)}"
            f" entries differ: {', '.join(wrong[:_SHOWN])}{more}; nothing was put in place"
        )


def _same(written: Tensor, held: Tensor) -> bool:
    return written.dtype == held.dtype and written.to(held.device).equal(held)
