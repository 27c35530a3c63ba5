"""Exports a run's adapter and models: writes them to work folders, checks them, then moves them into place."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.files.atomic import put_in_place, recover, work_folder, write_file
from halfbyte.quant.files.shards import TEXT_WEIGHTS_FILE, WEIGHTS_FILE
from halfbyte.quant.load.serialize import CONFIG_FILE, save_quantized
from halfbyte.trainer.adapters.formats import (
    FORMATS,
    PEFT_CONFIG,
    PEFT_FILE,
    LoraFormat,
    file_name,
    formats_for,
    write_formats,
)
from halfbyte.trainer.adapters.listed_digests import PROVENANCE_FILE
from halfbyte.trainer.adapters.lora import adapter_state, save_adapter
from halfbyte.trainer.adapters.saved import ADAPTER_FILE, SavedAdapter, read_saved
from halfbyte.trainer.errors import ExportError, RecipeError
from halfbyte.trainer.export.merge import FAINT, Survival, merge, total
from halfbyte.trainer.export.provenance import (
    BASE_ERROR_FILE,
    write_base_error,
    write_provenance,
)
from halfbyte.trainer.export.self_check import SelfCheck, StockCheck
from halfbyte.trainer.export.text_encoder import write_text_encoder
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.hub.reference import HubPart
from halfbyte.trainer.run_folder.folder import RunFolder
from halfbyte.trainer.run_folder.lock import lock_exports
from halfbyte.trainer.runtime.staging import keep_others

MERGED = "merged"
MERGE_REPORT = "merge_report.json"
_OURS = (PROVENANCE_FILE, PEFT_FILE, PEFT_CONFIG, CONFIG_FILE, BASE_ERROR_FILE, MERGE_REPORT)
_WEIGHTS = tuple(file.removesuffix(".safetensors") for file in (WEIGHTS_FILE, TEXT_WEIGHTS_FILE))


@dataclass(frozen=True)
class ExportSettings:
    """The parts to export, and the facts to record with them."""

    name: str  # base name of the files for ComfyUI and kohya, which list adapters by file name
    formats: tuple[LoraFormat, ...] | None  # None: all formats that can represent the adapter
    base: bool  # export the quantized base
    check: bool  # check the export in stock diffusers
    step: int  # training step of the adapter
    quant: QuantRecipe | None  # quantization of the base during training
    merged: bool = False  # export the base with the adapter merged in
    text_encoder: torch.device | None = None  # export T5 in NF4, quantized on this device
    started_from: HubPart | None = None  # the Hub adapter that training started from


@dataclass(frozen=True)
class Exported:
    """The exported files and the results of their self-check."""

    adapter: Path
    formats: tuple[LoraFormat, ...]
    base: Path | None
    check: SelfCheck | None
    merged: Path | None = None
    survivals: tuple[Survival, ...] = ()  # one for each merged layer
    text_encoder: Path | None = None


def export_trained(
    family: Family, denoiser: nn.Module, folder: RunFolder, settings: ExportSettings
) -> Exported:
    """Exports the adapters on `denoiser` and its base.

    Raises:
        ExportError: The export differs from the trained weights, or stock diffusers cannot load it. An
            earlier export then stays unchanged.
    """
    with _work(family, folder) as work:
        save_adapter(denoiser, family.pipeline_class, str(work))
        try:
            adapter = read_saved(work / ADAPTER_FILE)
        except RecipeError as error:
            raise ExportError(f"export: the trained adapter is incomplete: {error}") from error
        _check_written(work / ADAPTER_FILE, adapter.tensors, adapter_state(denoiser))
        return _export(family, denoiser, adapter, folder, work, settings)


def export_saved(
    family: Family,
    denoiser: nn.Module | None,
    adapter_file: Path,
    folder: RunFolder,
    settings: ExportSettings,
) -> Exported:
    """Exports the adapter of a checkpoint, a file in the format of diffusers, like `export_trained`.

    `denoiser` is the base without adapters. It is needed to export the base, to merge (which changes it), and
    for the self-check.
    """
    adapter = read_saved(adapter_file)
    with _work(family, folder) as work:
        shutil.copyfile(adapter_file, work / ADAPTER_FILE)
        return _export(family, denoiser, adapter, folder, work, settings)


def is_quantized(denoiser: nn.Module) -> bool:
    """Returns True if the denoiser has a quantized base, which can be exported."""
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
    """Writes everything to work folders, checks it, and only then moves it into place."""
    formats = formats_for(adapter, settings.formats)
    source = family.source
    base = None if source.revision is None else (source.name, source.revision)
    write_formats(adapter, formats, work, family.original_names(), name=settings.name, base=base)
    write_provenance(family, settings.step, settings.quant, settings.started_from, work)
    check = survivals = None
    with ExitStack() as works:
        built = {folder.adapter: work}  # final folder -> work folder

        def build(place: Path) -> Path:
            built[place] = works.enter_context(work_folder(place))
            return built[place]

        stock = None
        if settings.check:
            assert denoiser is not None
            work_check = works.enter_context(work_folder(folder.root / "check"))
            stock = StockCheck(family, denoiser, adapter, work_check)
            stock.add_adapter(denoiser, work, formats, name=settings.name)
        has_base = settings.base and denoiser is not None and is_quantized(denoiser)
        if has_base:
            assert denoiser is not None
            place = build(folder.base)
            save_quantized(denoiser, place)
            if stock is not None:
                stock.add_denoiser(folder.base.name, denoiser, place, adapted=True)
            write_base_error(family, denoiser, place)
        component = None
        if settings.text_encoder is not None:
            component = folder.root / family.t5_component
            written = write_text_encoder(family.t5, build(component), settings.text_encoder)
            if stock is not None:
                stock.add_text_encoder(written, built[component])
            del written
        merged = folder.root / MERGED if settings.merged else None
        if merged is not None:
            assert denoiser is not None
            survivals = _write_merged(denoiser, adapter, build(merged))
            if stock is not None:
                stock.add_denoiser(merged.name, denoiser, built[merged], adapted=False)
        if stock is not None:
            check = stock.result()
        for place, built_in in built.items():
            keep_others(place, built_in, partial(_is_ours, settings.name))
        # The adapter last: with it, an export counts as finished.
        for place, built_in in reversed(built.items()):
            put_in_place(built_in, place)
    return Exported(
        folder.adapter / ADAPTER_FILE,
        formats,
        folder.base if has_base else None,
        check,
        merged,
        tuple(survivals or ()),
        component,
    )


@contextmanager
def _work(family: Family, folder: RunFolder) -> Iterator[Path]:
    """Yields the work folder of the adapter, while no other process exports into the run's folder."""
    with lock_exports(folder.root):
        _recover(family, folder)
        with work_folder(folder.adapter) as work:
            yield work


def _recover(family: Family, folder: RunFolder) -> None:
    """Undoes what an export that was killed left, also of the parts that are not exported now."""
    for place in (folder.adapter, folder.base, folder.root / family.t5_component, folder.root / MERGED):
        recover(place)


def _write_merged(denoiser: nn.Module, adapter: SavedAdapter, folder: Path) -> list[Survival]:
    survivals = merge(denoiser, adapter.layers())
    save_quantized(denoiser, folder)
    report = {"kept": total(survivals), "layers": [asdict(survival) for survival in survivals]}
    write_file(folder / MERGE_REPORT, json.dumps(report, indent=1) + "\n")
    return survivals


def _is_ours(name: str, path: str) -> bool:
    """Returns True if an export writes a file of this relative path, so the file is replaced and not kept."""
    return (
        path in _OURS
        or path in [file_name(name, kind) for kind in FORMATS]
        or ("/" not in path and path.startswith(_WEIGHTS) and path.endswith((".safetensors", ".index.json")))
    )


def _check_written(file: Path, written: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    wrong = sorted(trained.keys() ^ written.keys())
    wrong += [name for name in trained.keys() & written.keys() if not written[name].equal(trained[name])]
    if wrong:
        raise ExportError(
            f"export: {file} differs from the trained adapter in {len(wrong)} entries, the first is {wrong[0]}; the"
            " last checkpoint is complete"
        )


_SHOWN = 5  # number of layers to list, those that kept the smallest part of their update


def merge_lines(survivals: Sequence[Survival], folder: Path) -> list[str]:
    """Returns the lines to print about a merge."""
    lines = [f"merged: {folder} ({total(survivals):.0%} of the update remains, see {MERGE_REPORT})"]
    faint = sorted((s for s in survivals if s.kept < FAINT), key=lambda survival: survival.kept)
    if faint:
        lines.append(
            f"warning: {len(faint)} of {len(survivals)} layers kept less than {FAINT:.0%} of their update. Use the base"
            " and the adapter as separate files, which loses nothing. The worst layers:"
        )
        lines += [
            f"  {survival.layer}: kept {survival.kept:.0%}, error {survival.error:.0%} (the update is"
            f" {survival.relative:.2%} of the weight)"
            for survival in faint[:_SHOWN]
        ]
    return lines


def exported_lines(exported: Exported) -> list[str]:
    """Returns the lines to print about an export."""
    lines = [f"adapter: {exported.adapter.parent} ({', '.join(exported.formats)})"]
    if exported.base is not None:
        lines.append(f"base: {exported.base}")
    if exported.text_encoder is not None:
        lines.append(f"text encoder: {exported.text_encoder}")
    if exported.merged is not None:
        lines += merge_lines(exported.survivals, exported.merged)
    check = exported.check
    if check is None:
        lines.append("not checked: the self-check is turned off")
        return lines
    lines.append("checked in stock diffusers:")
    lines += [f"  {part}" for part in check.checked]
    lines += [f"warning: {part}" for part in check.unread]
    lines += [f"not checked: {part}" for part in check.left_out]
    lines.append(f"the adapter changes the prediction by {check.moved:.2%}")
    if check.moved == 0:
        lines.append("warning: the adapter has no effect on the output")
    return lines
