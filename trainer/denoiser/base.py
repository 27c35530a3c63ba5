"""Loads a family's frozen transformer: quantizes it while reading it, or takes it packed from the cache."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.convert.skip_list import SkipListError
from halfbyte.quant.load.fill import OnLayerLoaded, OnProgress
from halfbyte.quant.load.transformer import load_quantized
from halfbyte.trainer.denoiser.settings import block_names
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.offload.block_stream import keep_on_host
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.pretrained.packed_cache import BaseCache
from halfbyte.trainer.pretrained.single_file import load_single_file
from halfbyte.trainer.runtime.device_memory import free_unused
from halfbyte.trainer.runtime.progress import BYTES, LazyProgress


def load_base(
    family: Family,
    recipe: QuantRecipe | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    console: Console | None = None,
    cache_folder: Path | None = None,
    stream: bool = False,
) -> nn.Module:
    """Loads the frozen transformer without adapters. With `recipe` None it is not quantized but in `dtype`.

    console: shows the progress. cache_folder: stores packed bases and digests of files. stream: leaves the
    blocks' packed weights in host memory, see `BlockStream`.

    Raises:
        RecipeError: the files are damaged, or the skip list does not fit the model.
    """
    progress = None if console is None else LazyProgress(console, "loading the transformer", BYTES)
    try:
        denoiser = _read(
            family,
            recipe,
            cache=None if cache_folder is None else base_cache(cache_folder),
            dtype=dtype,
            device=device,
            progress=progress,
            place=keep_on_host(block_names(family)) if stream else None,
        )
    except SkipListError as error:
        raise RecipeError(f"quant.{error}") from error
    except ValueError as error:
        raise RecipeError(f"{family.transformer.setting}: {error}") from error
    if progress is not None:
        progress.close()
    free_unused(device)
    return denoiser.requires_grad_(False)


def base_cache(cache_folder: Path) -> BaseCache:
    """Returns the cache of packed bases in a cache folder."""
    return BaseCache(cache_folder / "bases", FileDigests(cache_folder / "digests"))


def _read(
    family: Family,
    recipe: QuantRecipe | None,
    *,
    cache: BaseCache | None,
    dtype: torch.dtype,
    device: torch.device,
    progress: OnProgress | None,
    place: OnLayerLoaded | None,
) -> nn.Module:
    how: dict[str, Any] = {"dtype": dtype, "device": device, "progress": progress, "place": place}
    denoiser: nn.Module
    file = family.transformer.file
    if file is not None:
        denoiser = load_single_file(
            family.denoiser_class, file, family.denoiser_config, family.original_names(), recipe, **how
        )
    elif cache is None or recipe is None:
        denoiser = load_quantized(family.denoiser_class, family.transformer.path, recipe, **how)
    else:
        denoiser = cache.load(family.denoiser_class, family.transformer, recipe, **how)
    return denoiser
