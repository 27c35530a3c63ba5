"""Measures each layer's quantization error and size for every scheme, as a basis for the skip list."""

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


@dataclass(frozen=True)
class LayerReport:
    """The measurements of one linear layer, or the sum over several layers."""

    name: str
    layers: int
    parameters: int  # number of weights
    nbytes: tuple[int, ...]  # quantized size for each scheme, in the order of SCHEMES
    error: WeightError  # over the measured weights

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
    """A skip list of the layers whose error exceeds the threshold."""

    scheme: str
    threshold: float
    skip: SkipList
    parameters: int  # number of weights that stay unquantized
    nbytes: int  # size of all linear weights, with the skipped layers in bf16


@dataclass(frozen=True)
class QuantReport:
    """The measurements of a model's linear layers, sorted by NF4 error with the largest first."""

    folder: Path
    model_class: str
    sample: int  # maximum number of measured weights per layer; 0: all
    layers: tuple[LayerReport, ...]
    suggestion: Suggestion | None

    @property
    def kinds(self) -> tuple[LayerReport, ...]:
        """Sums over layers of the same kind (the same path apart from block numbers), the largest first."""
        kinds: dict[str, LayerReport] = {}
        for layer in self.layers:
            kind = kind_of(layer.name)
            part = LayerReport(kind, layer.layers, layer.parameters, layer.nbytes, layer.error)
            kinds[kind] = kinds[kind] + part if kind in kinds else part
        return tuple(sorted(kinds.values(), key=lambda kind: (-kind.parameters, kind.name)))

    @property
    def total(self) -> LayerReport:
        """The sum over all linear layers."""
        first, *rest = (
            LayerReport("all", layer.layers, layer.parameters, layer.nbytes, layer.error)
            for layer in self.layers
        )
        for layer in rest:
            first += layer
        return first


def kind_of(path: str) -> str:
    """Replaces numbers in a path: `transformer_blocks.3.attn.to_out.0` becomes `transformer_blocks.*.attn.to_out.*`."""
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
    """Measures the linear layers of a transformer of diffusers or a text encoder of transformers.

    Weights are read one by one and cast to bf16, as in training. For T5, every layer is measured with every
    scheme, although its `wo` layers stay unquantized in 4 bits.

    Args:
        model: The folder of a pipeline or of the model itself.
        component: The component to measure, if `model` is a pipeline.
        device: The device to quantize on.
        sample: The maximum number of weights to measure per layer, as whole rows spread evenly. 0 measures
            all.
        beyond: A scheme and a relative error. Asks for a skip list of the layers whose error is larger, or
            that the scheme cannot represent.
        progress: A callback for the number of finished layers.

    Raises:
        RecipeError: The folder has no such model, the model is quantized or damaged, or a skip list is
            requested for a text encoder.
    """
    folder = component_folder(model, component)
    try:
        config = read_config(folder)
        model_class = _model_class(config, folder)
        empty: nn.Module
        if issubclass(model_class, PreTrainedModel):
            if beyond is not None:
                raise ValueError(
                    f"--threshold: {folder} holds a {model_class.__name__}, and text encoders have no skip list; leave"
                    " the option out"
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
            f"{folder / 'config.json'}: describes a {name!r}; expected _class_name to be a model of diffusers, such as"
            " FluxTransformer2DModel, or architectures to be a model of transformers, such as T5EncoderModel. To"
            " measure another component of a pipeline, set --component"
        )
    if config.get("quantization_config") is not None:
        raise ValueError(f"{folder}: already quantized; the report needs the model in full precision")
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
    # Read in the order of the file, so the file is read once from start to end.
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
    """Returns a layer's error with a scheme, for sorting.

    Infinite if the scheme cannot represent the layer.
    """
    error = layer.error.relative()[scheme]
    return math.inf if error is None else error


def _sampled(weight: Tensor, sample: int) -> Tensor:
    """Selects evenly spaced rows of a weight (N, K), so that about `sample` elements remain."""
    step = -(-weight.numel() // sample) if sample else 1
    return weight[:: min(step, weight.shape[0])]


def _suggest(model: nn.Module, layers: Sequence[LayerReport], scheme: str, threshold: float) -> Suggestion:
    number = SCHEME_NAMES.index(scheme)
    skip = skip_list_for(model, {layer.name for layer in layers if _badness(layer, number) > threshold})
    # Check that the code that converts models expands the entries to the same layers.
    skipped = {path for match in skip_matches(model, skip.entries) for path in match.layers}
    assert skipped == set(skip.layers)
    parameters = sum(layer.parameters for layer in layers if layer.name in skipped)
    nbytes = sum(2 * layer.parameters if layer.name in skipped else layer.nbytes[number] for layer in layers)
    return Suggestion(scheme, threshold, skip, parameters, nbytes)
