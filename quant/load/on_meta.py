"""Builds a model on meta whose weights have the dtypes and sizes of a loaded model, for planning memory."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.convert.replace_linears import convert
from halfbyte.quant.convert.skip_list import kept_in_fp32, refuse_unmatched
from halfbyte.quant.formats.nf4 import NESTED_BLOCKSIZE, NestedState, QuantSpec, QuantState
from halfbyte.quant.layers.linear4bit import Linear4bit, Params4bit
from halfbyte.quant.layers.linear8bit import Int8Params
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.not_filled import NotFilled
from halfbyte.quant.load.transformer import blame_config, default_dtype

Model = TypeVar("Model", bound=ModelMixin)


@contextmanager
def built_on_meta() -> Iterator[None]:
    """Creates modules on meta and skips their initialization; see `NotFilled`."""
    with torch.device("meta"), NotFilled():
        yield


def model_on_meta(
    model_cls: type[Model], config: dict[str, Any], recipe: QuantRecipe | None, dtype: torch.dtype
) -> Model:
    """Returns the model that `load_quantized` would load for `config`, without values.

    Raises ValueError where no model can be built from the config, and SkipListError where an entry of the
    skip list matches no layer, unless the config itself contains the list.
    """
    with blame_config("config.json", model_cls), default_dtype(dtype), built_on_meta():
        model: Model = model_cls.from_config(config)
    if recipe is not None:
        with built_on_meta():
            # Loading warns where an entry matches too much, so this only checks that every entry matches.
            if "quantization_config" not in config:
                refuse_unmatched(model, recipe.skip)
            convert(model, recipe, check_skip=False)
    place_weights_on_meta(model, dtype, in_fp32=kept_in_fp32(model))
    return model.eval().requires_grad_(False)


def place_weights_on_meta(model: nn.Module, dtype: torch.dtype, *, in_fp32: Collection[str] = ()) -> None:
    """Gives parameters and saved buffers of a model on meta the dtypes and sizes that loading gives them.

    `dtype` applies to tensors that are not quantized, except in modules with a name in `in_fp32`.
    """
    placed: dict[int, nn.Parameter] = {}  # keeps shared parameters shared
    for path, module in model.named_modules():
        own_dtype = torch.float32 if set(in_fp32) & set(path.split(".")) else dtype
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(module, QuantizedLayer) and name == "weight":
                module.weight = _packed(module)
            else:
                if id(parameter) not in placed:
                    value = torch.empty(parameter.shape, dtype=own_dtype, device="meta")
                    placed[id(parameter)] = nn.Parameter(value, requires_grad=False)
                module._parameters[name] = placed[id(parameter)]
        for name, buffer in list(module.named_buffers(recurse=False)):
            # Buffers that are not saved keep the dtype that the model gave them.
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty(buffer.shape, dtype=own_dtype, device="meta")


def weight_tensors(module: nn.Module) -> list[Tensor]:
    """Returns the module's own tensors and the statistics of a packed weight, without submodules."""
    tensors: list[Tensor] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return tensors + (statistics_of(module) if isinstance(module, QuantizedLayer) else [])


def statistics_of(module: QuantizedLayer) -> list[Tensor]:
    """Returns the tensors of a layer's statistics, without the tables that all layers share."""
    statistics = module.weight.statistics
    if isinstance(statistics, Tensor):
        return [statistics]
    nested = statistics.nested
    return [statistics.absmax] + ([] if nested is None else [nested.absmax, nested.offset])


def _packed(module: QuantizedLayer) -> Params4bit | Int8Params:
    """Returns the packed weight of a layer, with its statistics, on meta."""
    outputs, width = module.out_features, module.in_features
    if isinstance(module, Linear4bit):
        codes = _empty(((outputs * width + 1) // 2, 1), torch.uint8)
        return Params4bit(codes, quant_state=_state(module.spec, outputs, width, module.compute_dtype))
    return Int8Params(_empty((outputs, width), torch.int8), SCB=_empty((outputs,), torch.float32))


def _state(spec: QuantSpec, outputs: int, width: int, dtype: torch.dtype) -> QuantState:
    blocks = -(-outputs * width // spec.blocksize)
    nested = None
    if spec.double_quant:
        nested = NestedState(
            _empty((-(-blocks // NESTED_BLOCKSIZE),), torch.float32),
            _empty((256,), torch.float32),
            _empty((), torch.float32),
            NESTED_BLOCKSIZE,
        )
    return QuantState(
        spec.quant_type,
        torch.Size((outputs, width)),
        dtype,
        spec.blocksize,
        _empty((16,), torch.float32),
        _empty((blocks,), torch.float32 if nested is None else torch.uint8),
        nested,
    )


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
