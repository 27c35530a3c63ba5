"""A training step without values: the run's own code over meta tensors, which counts what would be alive.

Nothing is loaded and no device is needed. What the step computes, keeps and frees is what the code does, so that a
change of the blocks or the layers needs no change here; what kernels do inside is in `kernel_memory`, what the
optimizer keeps in the optimizers themselves.
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
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.offload.activations import Held, HostStore
from halfbyte.trainer.families.offload.block_stream import Visitors, packed_blocks
from halfbyte.trainer.plan.memory_tracker import LiveBytes, Peak
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.training.module import DiffusionModule, training_module

ADAPTERS = "adapters"
GRADIENTS = "gradients"
BLOCK_KEEPS = "kept for the backward"
BATCH = "batch"
VISITING = "packed: blocks on their visit"


@dataclass(frozen=True)
class RehearsedStep:
    """What one step takes on the device, optimizer and averages apart."""

    peak: Peak
    flops: int
    calls: int  # of operations, by the processor
    kept: int  # bytes that the forward keeps for the backward
    host: int  # bytes of them in the host's memory


class _WithoutValues(DiffusionModule):
    """The training step, but for the numbers that it draws in the host's memory, hundreds of GB of a huge batch."""

    def normal(self, purpose: str, batch: Batch) -> Tensor:
        """See `DiffusionModule`."""
        return torch.empty_like(batch.latent_mean)


class _MetaStore(HostStore):
    """The host's memory in a rehearsal."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self._live = live

    def put(self, tensor: Tensor) -> Held:
        """See `HostStore`."""
        with torch.device("meta"), self._live.on_host():
            return super().put(tensor)


class Rehearsal:
    """A recipe's denoiser with its adapters on meta, to be stepped at any size."""

    def __init__(self, recipe: Recipe, family: Family) -> None:
        """Raises RecipeError for adapters, skip lists and exact layers that fit no layer, where nothing is packed that
        could be streamed, and for configurations of no model."""
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
        """Bytes of the base by kind of layer, and of the adapters."""
        live = LiveBytes()
        return {**self._hold_base(live), ADAPTERS: live.hold(self.adapters.values(), ADAPTERS)}

    @property
    def streams(self) -> bool:
        """Whether there are packed weights in the blocks."""
        return bool(packed_blocks(self.denoiser, block_names(self.family)))

    @cached_property
    def largest_weight(self) -> int:
        """Numbers in the largest matrix of the base."""
        layers = (module for module in self.denoiser.modules() if isinstance(module, nn.Linear))
        return max(layer.in_features * layer.out_features for layer in layers)

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the trained parameters."""
        return [tuple(parameter.shape) for parameter in self.adapters.values()]

    def step(self, recipe: Recipe, width: int, height: int) -> RehearsedStep:
        """One step as `recipe` says, which may differ from the own one in all but base and adapters.

        width, height: pixels. Raises ValueError where the model cannot take the size.
        """
        live = LiveBytes()
        self._hold_base(live)
        live.hold(self.adapters.values(), ADAPTERS)
        self._fuse(recipe, live)
        module = training_module(recipe, self.family, self.denoiser, self.dtype, _WithoutValues)
        with live, _autocast(self.dtype):
            batch = self._batch(recipe.train.batch_size, width, height)
            live.hold([batch.latent_mean, batch.latent_std, *_text(batch)], BATCH)
            # Lightning lets go of the last step's gradients between forward and backward.
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
        return RehearsedStep(peak, flops, calls, kept, live.host)

    def prediction(self, batch_size: int, width: int, height: int) -> RehearsedStep:
        """A forward without gradients, as pictures are drawn and validation is measured."""
        live = LiveBytes()
        self._hold_base(live)
        live.hold(self.adapters.values(), ADAPTERS)
        self._fuse(self.recipe, live)
        module = training_module(self.recipe, self.family, self.denoiser, self.dtype, _WithoutValues)
        with live, _autocast(self.dtype), torch.no_grad():
            batch = self._batch(batch_size, width, height)
            live.restart()
            module.loss(batch)
        return RehearsedStep(live.peak, live.flops, live.calls, 0, 0)

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

    def _batch(self, size: int, width: int, height: int) -> Batch:
        config, scale = self.family.denoiser_config, self.family.vae_scale
        channels = self.family.vae_config["latent_channels"]
        moments = [
            torch.empty(size, channels, height // scale, width // scale, device="meta") for _ in range(2)
        ]
        text = [
            torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for shape in (
                (size, self.family.text_tokens, config["joint_attention_dim"]),
                (size, config["pooled_projection_dim"]),
            )
        ]
        return Batch(tuple(range(size)), *moments, *text)


# Its buffers in the backward are known, and cuDNN's are no larger.
_BACKEND = "flash"

_IN_BLOCKS = (
    ("attention", r"\.attn2?\."),
    ("feed-forward", r"\.(ff|ff_context)\.|\.proj_(mlp|out)$"),
    ("modulation", r"\.norm"),
)


def layer_kind(path: str, *, quantized: bool) -> str:
    """What the base's layer at `path` counts as: packed by its place in a block, or not quantized."""
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
    # The engine itself: torch's functions around it are seen by modes and run without them, and blocks that are
    # computed again there would be computed without autocast.
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)


def _autocast(dtype: torch.dtype) -> AbstractContextManager[None]:
    """As Lightning's precision has it."""
    return nullcontext() if dtype == torch.float32 else autocast_on_meta(dtype)
