"""Dry run of a training step: runs the real training code on meta tensors and counts the memory it would use.

Loads no weights and needs no device. The training code itself decides what a step computes, keeps and frees,
so a change to the blocks or layers needs no change here. Memory inside kernels is in `op_costs`; memory of
the optimizers is in `optim.optimizers`.
"""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.quant.convert.skip_list import SkipListError
from halfbyte.quant.layers.exact import hold_exact
from halfbyte.quant.layers.meta_autocast import autocast_on_meta
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.on_meta import built_on_meta, model_on_meta, weight_tensors
from halfbyte.trainer.adapters.lora import trained_parameters
from halfbyte.trainer.data.batches import Batch
from halfbyte.trainer.denoiser.load import add_adapters, streamed_blocks
from halfbyte.trainer.denoiser.settings import DTYPES, base_recipe, block_names, block_settings
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.offload.activations import Held, HostStore
from halfbyte.trainer.families.offload.block_stream import Visitors, packed_blocks
from halfbyte.trainer.plan.memory_tracker import LiveBytes, Peak
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.training.module import DiffusionModule, training_module
from halfbyte.trainer.training.preservation import Preservation

ADAPTERS = "adapters"
GRADIENTS = "gradients"
BLOCK_KEEPS = "kept for the backward"
BATCH = "batch"
VISITING = "packed: blocks on their visit"


@dataclass(frozen=True)
class DryRunStep:
    """The memory and work of one step on the device, without the optimizer and the average of the weights."""

    peak: Peak
    flops: int
    calls: int  # operations that the CPU launches
    kept: int  # bytes that the forward keeps for the backward
    host: int  # bytes of activations in host memory


class _WithoutValues(DiffusionModule):
    """The training step without its random numbers.

    The real step draws them in host memory, which would take hundreds of GB for a huge batch.
    """

    def normal(self, purpose: str, batch: Batch) -> Tensor:
        """Returns a meta tensor in place of the normal samples of `DiffusionModule`."""
        return torch.empty_like(batch.latent_mean)


class _MetaStore(HostStore):
    """Counts offloaded activations as host memory in a dry run."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self._live = live

    def put(self, tensor: Tensor) -> Held:
        """Stores a meta tensor, and counts its bytes as host memory."""
        with torch.device("meta"), self._live.on_host():
            return super().put(tensor)


class DryRun:
    """A recipe's denoiser with its adapters on meta; it can take a step at any image size."""

    def __init__(self, recipe: Recipe, family: Family) -> None:
        """Builds the denoiser on meta.

        Raises:
            RecipeError: adapter targets, skip list or exact layers match no layer; the recipe streams blocks
                but none has packed weights; or the configuration does not describe a model.
        """
        self.recipe = recipe
        self.family = family
        self.dtype = DTYPES[recipe.quant.compute_dtype]
        base = base_recipe(recipe, family)
        try:
            denoiser = model_on_meta(family.denoiser_class, family.denoiser_config, base, self.dtype)
        except SkipListError as error:
            raise RecipeError(f"quant.{error}") from error
        except ValueError as error:
            raise RecipeError(f"{family.transformer.setting}: {error}") from error
        with built_on_meta():
            add_adapters(recipe, family, denoiser)
        self.denoiser: Any = denoiser
        self._hold_exact()
        self.adapters = trained_parameters(denoiser)
        if recipe.train.stream_blocks:
            streamed_blocks(family, denoiser)
        self.visitors = Visitors(denoiser, block_names(family) if recipe.train.stream_blocks else ())

    @cached_property
    def held(self) -> Mapping[str, int]:
        """Device bytes of the base by kind of layer, and of the adapters."""
        live = LiveBytes()
        return {**self._hold_base(live), ADAPTERS: live.hold(self.adapters.values(), ADAPTERS)}

    @property
    def streams(self) -> bool:
        """True if the blocks have packed weights, which can be streamed."""
        return bool(packed_blocks(self.denoiser, block_names(self.family)))

    @cached_property
    def largest_weight(self) -> int:
        """Number of elements in the largest matrix of the base."""
        layers = (module for module in self.denoiser.modules() if isinstance(module, nn.Linear))
        return max(layer.in_features * layer.out_features for layer in layers)

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the trained parameters."""
        return [tuple(parameter.shape) for parameter in self.adapters.values()]

    def step(self, recipe: Recipe, width: int, height: int) -> DryRunStep:
        """Takes one dry step of `recipe`, which must have the base and the adapters of `self.recipe`.

        width, height: pixels.

        Raises:
            ValueError: the model cannot take this image size.
        """
        live = LiveBytes()
        self._hold_base(live)
        live.hold(self.adapters.values(), ADAPTERS)
        self._fuse(recipe, live)
        module = training_module(
            recipe, self.family, self.denoiser, self.dtype, _WithoutValues, self._preservation(recipe)
        )
        with live, _autocast(self.dtype):
            batch_size = recipe.train.batch_size
            assert isinstance(batch_size, int), "a dry step is of one size"
            batch = self._batch(batch_size, width, height)
            live.hold([batch.latent_mean, batch.latent_std, *_text(batch)], BATCH)
            # Lightning frees the last step's gradients between forward and backward, so the forward still
            # sees them.
            for parameter in self.adapters.values():
                parameter.grad = torch.empty_like(parameter)
            live.hold([parameter.grad for parameter in self._learning()], GRADIENTS)
            live.restart()
            loss = module.loss(batch)
            kept = live.name_rest(BLOCK_KEEPS)
            if recipe.train.grad_accumulation == 1:
                self._drop_gradients()
            _backward(loss)
            live.hold([parameter.grad for parameter in self._learning()], GRADIENTS)
            peak, flops, calls = live.peak, live.flops, live.calls
            self._drop_gradients()
        return DryRunStep(peak, flops, calls, kept, live.host)

    def prediction(self, batch_size: int, width: int, height: int) -> DryRunStep:
        """Takes one dry forward without gradients, as in sampling and validation. width, height: pixels."""
        live = LiveBytes()
        self._hold_base(live)
        live.hold(self.adapters.values(), ADAPTERS)
        self._fuse(self.recipe, live)
        module = training_module(self.recipe, self.family, self.denoiser, self.dtype, _WithoutValues)
        with live, _autocast(self.dtype), torch.no_grad():
            batch = self._batch(batch_size, width, height)
            live.restart()
            module.loss(batch)
        return DryRunStep(live.peak, live.flops, live.calls, 0, 0)

    def _hold_exact(self) -> None:
        def on_meta(name: str) -> Tensor:
            layer = self.denoiser.get_submodule(name.removesuffix(".weight"))
            return torch.empty(layer.out_features, layer.in_features, device="meta")

        try:
            hold_exact(self.denoiser, self.recipe.quant.exact, on_meta)
        except ValueError as error:
            raise RecipeError(f"quant.exact: {error}") from error

    def _fuse(self, recipe: Recipe, live: LiveBytes) -> None:
        settings = block_settings(recipe, _BACKEND)
        if settings.store is not None:
            settings = replace(settings, store=_MetaStore(live))
        self.family.fuse_blocks(self.denoiser, settings)

    def _learning(self) -> list[Any]:
        return [parameter for parameter in self.adapters.values() if parameter.grad is not None]

    def _drop_gradients(self) -> None:
        for parameter in self.adapters.values():
            parameter.grad = None

    def _hold_base(self, live: LiveBytes) -> dict[str, int]:
        kinds: dict[str, list[Tensor]] = {VISITING: [*self.visitors.rooms]}
        for path, module in self.denoiser.named_modules():
            if "lora_" in path:
                continue
            quantized = isinstance(module, QuantizedLayer)
            kinds.setdefault(layer_kind(path, quantized=quantized), []).extend(
                tensor for tensor in weight_tensors(module) if id(tensor) not in self.visitors.tensors
            )
        return {kind: held for kind, tensors in kinds.items() if (held := live.hold(tensors, kind))}

    def _preservation(self, recipe: Recipe) -> Preservation | None:
        settings = recipe.objective.preserve
        if settings is None:
            return None
        batch = self._batch(1, self.family.size_multiple, self.family.size_multiple)
        return Preservation(TextEmbedding(*_text(batch)), settings.weight)

    def _batch(self, size: int, width: int, height: int) -> Batch:
        config, scale = self.family.denoiser_config, self.family.vae_scale
        channels = self.family.vae_config["latent_channels"]
        mean, std = (
            torch.empty(size, channels, height // scale, width // scale, device="meta") for _ in range(2)
        )
        embeds, pooled = (
            torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for shape in (
                (size, self.family.text_tokens, config["joint_attention_dim"]),
                (size, config["pooled_projection_dim"]),
            )
        )
        return Batch(tuple(range(size)), mean, std, embeds, pooled)


# The buffers of flash attention's backward are known, and those of cuDNN's are no larger.
_BACKEND = "flash"

_IN_BLOCKS = (
    ("attention", r"\.attn2?\."),
    ("feed-forward", r"\.(ff|ff_context)\.|\.proj_(mlp|out)$"),
    ("modulation", r"\.norm"),
)


def layer_kind(path: str, *, quantized: bool) -> str:
    """Returns the kind of the base's layer at `path`: packed, with its role in the block, or not quantized."""
    path = path.replace(".base_layer", "")
    if not quantized:
        return "not quantized"
    if "blocks." not in path:
        return "packed: embeddings and head"
    found = (kind for kind, pattern in _IN_BLOCKS if re.search(pattern, path))
    return f"packed: {next(found, 'other layers of the blocks')}"


def _text(batch: Batch) -> list[Tensor]:
    return [batch.prompt_embeds, batch.pooled_prompt_embeds]


def _backward(loss: Tensor) -> None:
    # Calls the autograd engine directly. `torch.autograd.backward` is itself visible to dispatch modes and
    # would run with them disabled, so blocks that checkpointing recomputes in the backward would run without
    # autocast.
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)


def _autocast(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Returns the autocast context that Lightning's precision plugin uses for `dtype`."""
    return nullcontext() if dtype == torch.float32 else autocast_on_meta(dtype)
