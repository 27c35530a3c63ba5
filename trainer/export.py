"""What a run leaves behind: the adapter and the quantized base, as stock diffusers loads them."""

import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from halfbyte.quant.serialize import save_quantized
from halfbyte.trainer.adapters import adapter_state, save_adapter
from halfbyte.trainer.checkpoint import ADAPTER_FILE
from halfbyte.trainer.errors import HalfbyteError
from halfbyte.trainer.families.base import Family


def export_adapter(family: Family, denoiser: nn.Module, folder: Path) -> Path:
    """Writes the LoRA file, reads it back and compares; the folder appears whole or not at all.

    Raises HalfbyteError when what is on disk is not what was trained.
    """
    work = _work_folder(folder)
    save_adapter(denoiser, family.pipeline_class, str(work))
    trained = {f"transformer.{name}": tensor for name, tensor in adapter_state(denoiser).items()}
    with safe_open(work / ADAPTER_FILE, framework="pt") as file:
        written = set(file.keys())
        wrong = sorted(trained.keys() ^ written)
        wrong += [n for n in trained.keys() & written if not file.get_tensor(n).equal(trained[n])]
        if "lora_adapter_metadata" not in (file.metadata() or {}):
            wrong.append("the metadata with alpha and rank")
    if wrong:
        raise HalfbyteError(
            f"export: {work / ADAPTER_FILE} is not what was trained: {len(wrong)} entries differ, first {wrong[0]};"
            " the last checkpoint is whole"
        )
    _replace(work, folder)
    return folder / ADAPTER_FILE


def is_quantized(denoiser: nn.Module) -> bool:
    """Whether the denoiser holds a quantized base, which can be exported."""
    model: Any = denoiser
    return "quantization_config" in model.config


def export_base(denoiser: nn.Module, folder: Path) -> Path:
    """Writes the quantized transformer without its adapters, whole or not at all."""
    work = _work_folder(folder)
    save_quantized(denoiser, work)
    _replace(work, folder)
    return folder


def _work_folder(folder: Path) -> Path:
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def _replace(work: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)
