"""Loads the transformer of a run: the quantized base, its adapters and its blocks, ready to train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.quant.layers.exact import exact_weights, hold_exact
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.lora.dora import reset_magnitudes
from halfbyte.trainer.adapters.lora import (
    ADAPTER,
    LoraVariant,
    TrainedLayers,
    add_lora,
    check_start,
    start_from,
)
from halfbyte.trainer.adapters.patterns import refuse_slow
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
    """A run's transformer, and the facts about it that the run reports."""

    denoiser: nn.Module
    quant: QuantRecipe | None  # the base's quantization; None: it is in the compute dtype
    trained: TrainedLayers
    quantized_layers: int
    footprint: int  # bytes of the base, without adapters
    stream: BlockStream | None  # set if the blocks' weights are streamed from host memory


def load_run_base(recipe: Recipe, family: Family, device: torch.device, console: Console) -> nn.Module:
    """Loads the run's frozen base without adapters, with progress on `console`; see `load_base`."""
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
    """Adds the recipe's adapters to the layers; see `add_lora`."""
    targets = recipe.lora.targets
    _refuse_slow_patterns(recipe, family, denoiser)
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


def _refuse_slow_patterns(recipe: Recipe, family: Family, denoiser: nn.Module) -> None:
    lora = recipe.lora
    names = [name for name, _ in denoiser.named_modules()]
    if isinstance(lora.targets, str) and lora.targets not in family.target_presets:
        refuse_slow("lora.targets: got", [lora.targets], names, "fullmatch")
    refuse_slow("lora.rank_pattern: got", list(lora.rank_pattern), names, "match")
    refuse_slow("lora.alpha_pattern: got", list(lora.alpha_pattern), names, "match")


def keep_exact(family: Family, denoiser: nn.Module, paths: Sequence[str]) -> None:
    """Gives the layers at `paths` their full-precision weights back; see `hold_exact`.

    Does nothing if the base is not quantized.

    Raises:
        RecipeError: the base is a single file, or a weight is not stored in full precision.
    """
    folder = _exact_folder(family, denoiser, paths)
    if folder is None:
        return
    try:
        with exact_weights(folder) as weights:

            def read(name: str) -> Tensor:
                _require_exact(weights, name)
                return weights.read(name)

            hold_exact(denoiser, paths, read)
    except ValueError as error:
        raise RecipeError(f"quant.exact: {error}") from error


def check_exact(family: Family, denoiser: nn.Module, paths: Sequence[str]) -> None:
    """Checks from the files' headers that `keep_exact` can work; the denoiser may be on meta.

    Raises:
        RecipeError: see `keep_exact`.
    """
    folder = _exact_folder(family, denoiser, paths)
    if folder is None:
        return
    try:
        with exact_weights(folder) as weights:
            for path in paths:
                _require_exact(weights, f"{path}.weight")
    except ValueError as error:
        raise RecipeError(f"quant.exact: {error}") from error


def _exact_folder(family: Family, denoiser: nn.Module, paths: Sequence[str]) -> Path | None:
    """Returns the folder of the full-precision weights; None if none are needed."""
    if not paths or not any(isinstance(module, QuantizedLayer) for module in denoiser.modules()):
        return None
    if family.denoiser_folder is None:
        raise RecipeError(
            f"quant.exact: got {list(paths)}, but {family.transformer.path} is a single file; expected []"
        )
    return family.denoiser_folder


def _require_exact(weights: ShardedWeights, name: str) -> None:
    if name not in weights.names or not weights.stored(name).dtype.is_floating_point:
        raise ValueError(
            f"{weights.folder} does not hold {name} in full precision; quantize the model again, with"
            " `halfbyte quantize` and this setting, or set []"
        )


def _stream(family: Family, denoiser: nn.Module, world: World) -> BlockStream:
    return BlockStream(streamed_blocks(family, denoiser), copies_to(world.device))


def streamed_blocks(family: Family, denoiser: nn.Module) -> list[nn.Module]:
    """Returns the blocks that hold packed weights. Raises RecipeError if there are none."""
    blocks = packed_blocks(denoiser, block_names(family))
    if not blocks:
        raise RecipeError(
            "train.stream_blocks: got true, but quant.skip excludes all layers of the blocks from"
            " quantization, and only quantized layers are streamed; expected false, or a shorter quant.skip"
        )
    return blocks


def start_layers(
    init_from: Path | None, family: Family, denoiser: nn.Module | None = None
) -> dict[str, LoraLayer] | None:
    """Reads the adapter that lora.init_from names; returns None if the setting is None.

    denoiser: the run's denoiser with its adapters on meta; the adapter that is read must fit it.

    Raises:
        RecipeError: the file is not an adapter of this model, see `read_layers`, or it does not fit the
            recipe, see `check_start`.
        HubError: its repository cannot be read.
    """
    if init_from is None:
        return None
    try:
        with adapter_at(init_from) as path:
            layers = read_layers(path, family.original_names())
        if denoiser is not None:
            check_start(denoiser, layers, ADAPTER, init_from)
        return layers
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
    """Loads the transformer with its adapters.

    attention: the backend; None: the one that needs no probe. start: the result of `start_layers`; None: it
    is read here.
    """
    start = start or start_layers(recipe.lora.init_from, family)
    denoiser = load_run_base(recipe, family, world.device, console)
    model: Any = denoiser
    footprint = int(model.get_memory_footprint())
    trained = add_adapters(recipe, family, denoiser)
    keep_exact(family, denoiser, recipe.quant.exact)
    # PEFT creates adapters on the device of the weights, which is the host for streamed ones.
    denoiser.to(world.device)
    has_magnitude = False
    if start is not None and recipe.lora.init_from is not None:
        try:
            has_magnitude = start_from(denoiser, start, ADAPTER, recipe.lora.init_from)
        except RecipeError as error:
            raise RecipeError(f"lora.init_from: {error}") from error
    if recipe.lora.dora and not has_magnitude:
        reset_magnitudes(denoiser, ADAPTER)
    family.fuse_blocks(denoiser, block_settings(recipe, attention))
    stream = _stream(family, denoiser, world) if recipe.train.stream_blocks else None
    quantized = sum(isinstance(module, QuantizedLayer) for module in denoiser.modules())
    return Loaded(denoiser.eval(), base_recipe(recipe, family), trained, quantized, footprint, stream)
