"""What quantizing a model costs each layer: relative error and size by scheme, to choose a skip list by numbers."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor

from halfbyte.quant.convert import linear_layers, skip_matches
from halfbyte.quant.load import empty_model, read_config
from halfbyte.quant.shards import ShardedWeights
from halfbyte.quant.skip_list import SkipList, skip_list_for
from halfbyte.quant.weight_error import SCHEMES, WeightError, weight_error
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.source import find_component

SCHEME_NAMES = tuple(scheme.name for scheme in SCHEMES)
_BLOCK_NUMBER = re.compile(r"\.\d+(?=\.|$)")

Progress = Callable[[int, int], None]
"""Called after each layer with (layers done, layers in all)."""


@dataclass(frozen=True)
class LayerReport:
    """One linear layer, or several together."""

    name: str
    layers: int
    parameters: int  # elements of the weights
    nbytes: tuple[int, ...]  # in the order of SCHEMES
    error: WeightError  # over the weights that were measured

    def __add__(self, other: "LayerReport") -> "LayerReport":
        return LayerReport(
            self.name,
            self.layers + other.layers,
            self.parameters + other.parameters,
            tuple(a + b for a, b in zip(self.nbytes, other.nbytes, strict=True)),
            self.error + other.error,
        )


@dataclass(frozen=True)
class Suggestion:
    """The layers beyond an error, as a skip list."""

    scheme: str
    threshold: float
    skip: SkipList
    parameters: int  # that stay unquantized
    nbytes: int  # of all linear weights, with those in bf16


@dataclass(frozen=True)
class QuantReport:
    """A model's linear layers, the worst under NF4 first."""

    folder: Path
    model_class: str
    sample: int  # weights measured a layer at most; 0: all
    layers: tuple[LayerReport, ...]
    suggestion: Suggestion | None

    @property
    def kinds(self) -> tuple[LayerReport, ...]:
        """The layers of each kind together, a kind being a path without its block numbers; the biggest first."""
        kinds: dict[str, LayerReport] = {}
        for layer in self.layers:
            kind = kind_of(layer.name)
            part = LayerReport(kind, layer.layers, layer.parameters, layer.nbytes, layer.error)
            kinds[kind] = kinds[kind] + part if kind in kinds else part
        return tuple(sorted(kinds.values(), key=lambda kind: (-kind.parameters, kind.name)))

    @property
    def total(self) -> LayerReport:
        """All linear layers together."""
        first, *rest = (
            LayerReport("all", one.layers, one.parameters, one.nbytes, one.error) for one in self.layers
        )
        for layer in rest:
            first += layer
        return first


def kind_of(path: str) -> str:
    """`transformer_blocks.3.attn.to_out.0` -> `transformer_blocks.*.attn.to_out.*`."""
    return _BLOCK_NUMBER.sub(".*", path)


def quant_report(
    model: Path,
    component: str,
    *,
    device: torch.device,
    sample: int = 0,
    beyond: tuple[str, float] | None = None,
    progress: Progress | None = None,
) -> QuantReport:
    """Measure the linear layers of a component of a pipeline folder, or of a diffusers model's own folder.

    Weights are read one by one, and cast to bf16 as training would. `sample` limits how many are measured of a
    layer, in whole rows spread evenly. `beyond` (scheme, relative error) asks for a skip list of the layers that
    are worse. Raises RecipeError for a folder that holds no such model, or one that is quantized or damaged.
    """
    folder = find_component(model, component)
    try:
        config = read_config(folder)
        model_class = _model_class(config, folder)
        empty = empty_model(model_class, config, folder)
        with ShardedWeights(folder) as weights:
            layers = _measure(empty, weights, device, sample, progress)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    ranked = tuple(sorted(layers, key=lambda layer: (-layer.error.relative()[0], layer.name)))
    suggestion = None if beyond is None else _suggest(empty, ranked, *beyond)
    return QuantReport(folder, model_class.__name__, sample, ranked, suggestion)


def _model_class(config: dict[str, Any], folder: Path) -> type[ModelMixin]:
    name = config.get("_class_name")
    model_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, ModelMixin)):
        raise ValueError(
            f"{folder / 'config.json'}: _class_name is {name!r}, expected a model class of diffusers, such as"
            " FluxTransformer2DModel; to measure another component of a pipeline name it with --component"
        )
    if config.get("quantization_config") is not None:
        raise ValueError(f"{folder}: is quantized already; the report needs the model in full precision")
    return model_class


def _measure(
    model: ModelMixin, weights: ShardedWeights, device: torch.device, sample: int, progress: Progress | None
) -> list[LayerReport]:
    linears = {f"{path}.weight": (path, linear) for path, linear in linear_layers(model)}
    if not linears:
        raise ValueError(f"{weights.folder}: {type(model).__name__} has no linear layers")
    missing = sorted(linears.keys() - set(weights.names))
    if missing:
        raise ValueError(f"{weights.folder}: {len(missing)} weights are missing, first {missing[0]}")
    reports: list[LayerReport] = []
    # In the file's order, so that reading goes through it once.
    for name in (name for name in weights.names if name in linears):
        path, linear = linears[name]
        rows, columns = shape = (linear.out_features, linear.in_features)
        if weights.shape(name) != shape:
            raise ValueError(
                f"{weights.path(name)}: {name}: expected shape {shape}, got {weights.shape(name)}"
            )
        nbytes = tuple(scheme.nbytes(rows, columns) for scheme in SCHEMES)
        weight = weights.read(name)
        if not weight.is_floating_point():
            raise ValueError(
                f"{weights.path(name)}: {name}: expected floating-point weights, got {weight.dtype}"
            )
        error = weight_error(_sampled(weight, sample).to(device, torch.bfloat16), name)
        reports.append(LayerReport(path, 1, rows * columns, nbytes, error))
        if progress is not None:
            progress(len(reports), len(linears))
    return reports


def _sampled(weight: Tensor, sample: int) -> Tensor:
    """Every so many rows of a weight (N, K), so that about `sample` elements are left."""
    step = -(-weight.numel() // sample) if sample else 1
    return weight[:: min(step, weight.shape[0])]


def _suggest(model: ModelMixin, layers: Sequence[LayerReport], scheme: str, threshold: float) -> Suggestion:
    number = SCHEME_NAMES.index(scheme)
    skip = skip_list_for(
        model, {layer.name for layer in layers if layer.error.relative()[number] > threshold}
    )
    # Asked again of the code that converts: the list must mean what this report says.
    meant = {path for match in skip_matches(model, skip.entries) for path in match.layers}
    assert meant == set(skip.layers)
    parameters = sum(layer.parameters for layer in layers if layer.name in meant)
    nbytes = sum(2 * layer.parameters if layer.name in meant else layer.nbytes[number] for layer in layers)
    return Suggestion(scheme, threshold, skip, parameters, nbytes)
