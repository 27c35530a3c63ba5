"""The transformer of a run: streamed and quantized, with its adapters, ready to train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.layers.exact import exact_weights, hold_exact
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.lora.dora import keep_lengths
from halfbyte.trainer.adapters.lora import ADAPTER, LoraVariant, TrainedLayers, add_lora, start_from
from halfbyte.trainer.adapters.read import read_layers
from halfbyte.trainer.adapters.saved import LoraLayer
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.denoiser.settings import (
    DTYPES,
    base_recipe,
    block_names,
    block_settings,
    quant_recipe,
)
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.offload.block_stream import BlockStream, packed_blocks
from halfbyte.trainer.families.offload.copies import copies_to
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.run_folder.adapter_source import adapter_at
from halfbyte.trainer.runtime.world import World


@dataclass(frozen=True)
class Loaded:
    denoiser: nn.Module
    quant: QuantRecipe | None  # how the base is held; None: in the compute dtype
    trained: TrainedLayers
    quantized_layers: int
    footprint: int
    stream: BlockStream | None  # where the blocks visit the device


def load_run_base(recipe: Recipe, family: Family, device: torch.device, console: Console) -> nn.Module:
    """The run's frozen base without adapters, with progress on `console`; see `load_base`."""
    return load_base(
        family,
        quant_recipe(recipe),
        device=device,
        dtype=DTYPES[recipe.quant.compute_dtype],
        console=console,
        cache_folder=recipe.data.cache_folder if recipe.model.cache_base else None,
        stream=recipe.train.stream_blocks,
    )


def add_adapters(recipe: Recipe, family: Family, denoiser: nn.Module) -> TrainedLayers:
    """Puts the recipe's adapters on the layers; see `add_lora`."""
    targets = recipe.lora.targets
    return add_lora(
        denoiser,
        rank=recipe.lora.rank,
        alpha=recipe.lora.alpha,
        dropout=recipe.lora.dropout,
        targets=family.lora_targets(targets) if isinstance(targets, str) else list(targets),
        init=recipe.lora.init,
        seed=recipe.train.seed,
        fused=recipe.train.fused_adapters,
        variant=LoraVariant(
            rslora=recipe.lora.rslora,
            dora=recipe.lora.dora,
            rank_pattern=recipe.lora.rank_pattern,
            alpha_pattern=recipe.lora.alpha_pattern,
        ),
    )


def keep_exact(family: Family, denoiser: nn.Module, paths: Sequence[str]) -> None:
    """Has the layers at `paths` multiply by their weights in full precision; see `hold_exact`. Raises RecipeError."""
    if not paths or not any(isinstance(module, QuantizedLayer) for module in denoiser.modules()):
        return
    folder = family.denoiser_folder
    if folder is None:
        raise RecipeError(
            f"quant.exact: got {list(paths)}, but {family.transformer.path} is one file; expected []"
        )
    try:
        with exact_weights(folder) as weights:

            def read(name: str) -> Tensor:
                if name not in weights.names or not weights.stored(name).dtype.is_floating_point:
                    raise ValueError(
                        f"{folder} does not hold {name} in full precision; quantize the model anew with halfbyte"
                        " quantize and this setting, or give []"
                    )
                return weights.read(name)

            hold_exact(denoiser, paths, read)
    except ValueError as error:
        raise RecipeError(f"quant.exact: {error}") from error


def _stream(family: Family, denoiser: nn.Module, world: World) -> BlockStream:
    return BlockStream(streamed_blocks(family, denoiser), copies_to(world.device))


def streamed_blocks(family: Family, denoiser: nn.Module) -> list[nn.Module]:
    """The blocks that hold packed weights. Raises RecipeError where there are none."""
    blocks = packed_blocks(denoiser, block_names(family))
    if not blocks:
        raise RecipeError(
            "train.stream_blocks: got true, but quant.skip leaves nothing packed in the blocks; expected false"
        )
    return blocks


def start_layers(init_from: Path | None, family: Family) -> dict[str, LoraLayer] | None:
    """The adapter that lora.init_from names; None where it names none. Raises RecipeError as `read_layers` does,
    HubError."""
    if init_from is None:
        return None
    try:
        with adapter_at(init_from) as path:
            return read_layers(path, family.original_names())
    except RecipeError as error:
        raise RecipeError(f"lora.init_from: {error}") from error


def load_denoiser(
    recipe: Recipe,
    family: Family,
    world: World,
    console: Console,
    *,
    attention: str | None = None,
    start: Mapping[str, LoraLayer] | None = None,
) -> Loaded:
    """The transformer with its adapters.

    attention: names the backend; None takes what needs no probe. start: what `start_layers` gave; None: it is asked.
    """
    start = start or start_layers(recipe.lora.init_from, family)
    denoiser = load_run_base(recipe, family, world.device, console)
    model: Any = denoiser
    footprint = int(model.get_memory_footprint())
    trained = add_adapters(recipe, family, denoiser)
    keep_exact(family, denoiser, recipe.quant.exact)
    # PEFT puts adapters where it finds the weights, and streamed ones lie on the host.
    denoiser.to(world.device)
    has_lengths = False
    if start is not None and recipe.lora.init_from is not None:
        try:
            has_lengths = start_from(denoiser, start, ADAPTER, recipe.lora.init_from)
        except RecipeError as error:
            raise RecipeError(f"lora.init_from: {error}") from error
    if recipe.lora.dora and not has_lengths:
        keep_lengths(denoiser, ADAPTER)
    family.fuse_blocks(denoiser, block_settings(recipe, attention))
    stream = _stream(family, denoiser, world) if recipe.train.stream_blocks else None
    quantized = sum(isinstance(module, QuantizedLayer) for module in denoiser.modules())
    return Loaded(denoiser.eval(), base_recipe(recipe, family), trained, quantized, footprint, stream)
