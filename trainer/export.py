"""What a run leaves behind: adapter and quantized base, written beside their places, checked, then put there."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from halfbyte.quant.convert import QuantRecipe
from halfbyte.quant.serialize import save_quantized
from halfbyte.quant.shards import flush
from halfbyte.trainer.adapters import adapter_state, save_adapter
from halfbyte.trainer.checkpoint import ADAPTER_FILE
from halfbyte.trainer.errors import ExportError
from halfbyte.trainer.families.base import Family
from halfbyte.trainer.lora_formats import LoraFormat, formats_for, write_formats
from halfbyte.trainer.provenance import write_base_error, write_provenance
from halfbyte.trainer.run_folder import RunFolder
from halfbyte.trainer.saved_adapter import SavedAdapter, read_saved
from halfbyte.trainer.self_check import SelfCheck, self_check


@dataclass(frozen=True)
class ExportSettings:
    """What is written."""

    name: str  # of the files that ComfyUI and kohya show by their names
    formats: tuple[LoraFormat, ...] | None  # None: all that can hold the adapter
    base: bool
    check: bool
    step: int  # whose adapter it is
    quant: QuantRecipe | None  # how the base is held that it was trained on


@dataclass(frozen=True)
class Exported:
    """What was written, and what was proven of it."""

    adapter: Path
    formats: tuple[LoraFormat, ...]
    base: Path | None
    check: SelfCheck | None


def export_trained(
    family: Family, denoiser: nn.Module, folder: RunFolder, settings: ExportSettings
) -> Exported:
    """Exports the adapters that are on `denoiser`, and its base.

    Raises ExportError when what would be exported is not what was trained or stock diffusers does not take it; what
    was exported before is then untouched.
    """
    with work_folder(folder.adapter) as work:
        save_adapter(denoiser, family.pipeline_class, str(work))
        adapter = read_saved(work / ADAPTER_FILE)
        _check_written(work / ADAPTER_FILE, adapter.tensors, adapter_state(denoiser))
        return _export(family, denoiser, adapter, folder, work, settings)


def export_saved(
    family: Family,
    denoiser: nn.Module | None,
    adapter_file: Path,
    folder: RunFolder,
    settings: ExportSettings,
) -> Exported:
    """Exports the adapter of a file as diffusers writes it, a checkpoint's; see `export_trained`.

    denoiser: the base with or without adapters, for what needs one: the base's own export and the check.
    """
    adapter = read_saved(adapter_file)
    with work_folder(folder.adapter) as work:
        shutil.copyfile(adapter_file, work / ADAPTER_FILE)
        return _export(family, denoiser, adapter, folder, work, settings)


def is_quantized(denoiser: nn.Module) -> bool:
    """Whether the denoiser holds a quantized base, which can be exported."""
    model: Any = denoiser
    return "quantization_config" in model.config


def _export(
    family: Family,
    denoiser: nn.Module | None,
    adapter: SavedAdapter,
    folder: RunFolder,
    work: Path,
    settings: ExportSettings,
) -> Exported:
    formats = formats_for(adapter, settings.formats)
    source = family.source
    base = None if source.revision is None else (source.name, source.revision)
    write_formats(adapter, formats, work, family.original_names(), name=settings.name, base=base)
    write_provenance(family, settings.step, settings.quant, work)
    check = None
    with work_folder(folder.base) as work_base:
        has_base = settings.base and denoiser is not None and is_quantized(denoiser)
        if has_base:
            assert denoiser is not None
            save_quantized(denoiser, work_base)
            write_base_error(family, denoiser, work_base)
        if settings.check:
            assert denoiser is not None
            with work_folder(folder.root / "check") as work_check:
                check = self_check(
                    family,
                    denoiser,
                    adapter,
                    work,
                    formats,
                    name=settings.name,
                    device=next(denoiser.parameters()).device,
                    work=work_check,
                )
        if has_base:
            put_in_place(work_base, folder.base)
        put_in_place(work, folder.adapter)
    return Exported(folder.adapter / ADAPTER_FILE, formats, folder.base if has_base else None, check)


def _check_written(file: Path, written: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    wrong = sorted(trained.keys() ^ written.keys())
    wrong += [name for name in trained.keys() & written.keys() if not written[name].equal(trained[name])]
    if wrong:
        raise ExportError(
            f"export: {file} is not what was trained: {len(wrong)} entries differ, first {wrong[0]}; the last"
            " checkpoint is whole"
        )


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, gone afterwards unless it has been put in its place."""
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def put_in_place(work: Path, folder: Path) -> None:
    """Renames `work` to `folder`; what was there goes only when the new one stands."""
    for file in work.rglob("*"):
        flush(file)
    replaced = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(work, folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
