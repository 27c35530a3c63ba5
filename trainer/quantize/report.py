"""What quantizing a model costs each layer: relative error and size by scheme, to choose a skip list by numbers."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.quant.convert.skip_list import SkipList, linear_layers, skip_list_for, skip_matches
from halfbyte.quant.files.shards import TEXT_WEIGHTS_FILE, WEIGHTS_FILE, ShardedWeights
from halfbyte.quant.formats.weight_error import SCHEMES, WeightError, weight_error
from halfbyte.quant.load.text_encoder import text_encoder_on_meta
from halfbyte.quant.load.transformer import empty_model, read_config
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.pretrained.pipeline import component_folder
from halfbyte.trainer.runtime.progress import OnProgress

SCHEME_NAMES = tuple(scheme.name for scheme in SCHEMES)
_BLOCK_NUMBER = re.compile(r"\.\d+(?=\.|$)")

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
    progress: OnProgress | None = None,
) -> QuantReport:
    """Measure the linear layers of a component of a pipeline folder, or of a model's own folder.

    That is a transformer of diffusers or a text encoder of transformers; of a T5 every layer is measured by every
    scheme, though in 4 bits its `wo` stay unquantized. Weights are read one by one, and cast to bf16 as training
    would. `sample` limits how many are measured of a layer, in whole rows spread evenly. `beyond` (scheme, relative
    error) asks for a skip list of the layers that are worse, and of those that the scheme cannot hold. Raises
    RecipeError for a folder that holds no such model, or one that is quantized or damaged, and where a text encoder
    is to get a skip list.
    """
    folder = component_folder(model, component)
    try:
        config = read_config(folder)
        model_class = _model_class(config, folder)
        empty: nn.Module
        if issubclass(model_class, PreTrainedModel):
            if beyond is not None:
                raise ValueError(
                    f"--threshold: {folder} holds a {model_class.__name__}, and text encoders are quantized without a"
                    " skip list; leave it out"
                )
            empty, file = text_encoder_on_meta(model_class, folder, None, torch.bfloat16), TEXT_WEIGHTS_FILE
        else:
            empty, file = empty_model(model_class, config, folder), WEIGHTS_FILE
        with ShardedWeights(folder, file) as weights:
            layers = _measure(empty, weights, device, sample, progress)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    ranked = tuple(sorted(layers, key=lambda layer: (-_badness(layer, 0), layer.name)))
    suggestion = None if beyond is None else _suggest(empty, ranked, *beyond)
    return QuantReport(folder, model_class.__name__, sample, ranked, suggestion)


def _model_class(config: dict[str, Any], folder: Path) -> type[ModelMixin] | type[PreTrainedModel]:
    name = config.get("_class_name")
    architectures = config.get("architectures")
    if name is None and isinstance(architectures, list) and len(architectures) == 1:
        name, library = architectures[0], transformers
    else:
        library = diffusers
    model_class = getattr(library, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, ModelMixin | PreTrainedModel)):
        raise ValueError(
            f"{folder / 'config.json'}: describes a {name!r}, expected _class_name to be a model of diffusers, such as"
            " FluxTransformer2DModel, or architectures one of transformers, such as T5EncoderModel; to measure another"
            " component of a pipeline name it with --component"
        )
    if config.get("quantization_config") is not None:
        raise ValueError(f"{folder}: is quantized already; the report needs the model in full precision")
    return model_class


def _measure(
    model: nn.Module, weights: ShardedWeights, device: torch.device, sample: int, progress: OnProgress | None
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


def _badness(layer: LayerReport, scheme: int) -> float:
    """The error of a layer under a scheme, to order layers by: beyond any number where it cannot be held."""
    error = layer.error.relative()[scheme]
    return math.inf if error is None else error


def _sampled(weight: Tensor, sample: int) -> Tensor:
    """Every so many rows of a weight (N, K), so that about `sample` elements are left."""
    step = -(-weight.numel() // sample) if sample else 1
    return weight[:: min(step, weight.shape[0])]


def _suggest(model: nn.Module, layers: Sequence[LayerReport], scheme: str, threshold: float) -> Suggestion:
    number = SCHEME_NAMES.index(scheme)
    skip = skip_list_for(model, {layer.name for layer in layers if _badness(layer, number) > threshold})
    # Asked again of the code that converts: the list must mean what this report says.
    meant = {path for match in skip_matches(model, skip.entries) for path in match.layers}
    assert meant == set(skip.layers)
    parameters = sum(layer.parameters for layer in layers if layer.name in meant)
    nbytes = sum(2 * layer.parameters if layer.name in meant else layer.nbytes[number] for layer in layers)
    return Suggestion(scheme, threshold, skip, parameters, nbytes)
