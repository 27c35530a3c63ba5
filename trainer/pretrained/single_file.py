"""Loads a transformer from one file with its authors' layer names, like BFL's FLUX and ComfyUI's files.

The file holds bf16, or fp8 with a scale for each weight. It is streamed into diffusers' model and quantized
on the way. The model's configuration comes from the pipeline.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.convert.replace_linears import convert
from halfbyte.quant.convert.skip_list import kept_in_fp32
from halfbyte.quant.files.row_ranges import Rows, SingleFile
from halfbyte.quant.load.fill import Finish, OnLayerLoaded, OnProgress, check_headers, fill
from halfbyte.quant.load.on_meta import built_on_meta
from halfbyte.quant.load.serialize import quantization_config
from halfbyte.quant.load.transformer import blame_config, empty_model
from halfbyte.trainer.pretrained.layer_names import OriginalName, swap_halves

log = logging.getLogger(__name__)

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# fp8 weights are multiplied by these scales. The scales of inputs are only for matrix products in fp8.
_SCALES = (".scale_weight", ".weight_scale")
_UNUSED = (".scale_input", ".input_scale")
_MARKER = "scaled_fp8"
# Newer ComfyUI files describe the quantization of each layer in a tensor of JSON bytes. In the accepted
# formats, the layer's weight is the fp8 tensor times its scale.
_DESCRIBED = ".comfy_quant"
_FP8 = ("float8_e4m3fn", "float8_e5m2")
_SHOWN = 5


def load_single_file(
    model_cls: type[Any],
    file: Path,
    config: Mapping[str, Any],
    names: Sequence[OriginalName],
    recipe: QuantRecipe | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: OnProgress | None = None,
    place: OnLayerLoaded | None = None,
) -> nn.Module:
    """Builds the model that `config` describes and loads the weights of `file`, like `load_quantized`.

    `names` lists the layers with their names in the file.

    Raises:
        ValueError: Tensors are missing, unexpected, quantized or of the wrong shape. The message names the
            file. The check runs before any weight is loaded.
    """
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    model = empty_model(model_cls, plain, file.parent, dtype)
    if recipe is not None:
        convert(model, recipe)
        model.register_to_config(quantization_config=quantization_config(recipe))
    with original_weights(file, names) as (weights, finish):
        fill(
            model,
            weights,
            packed=False,
            dtype=dtype,
            device=device,
            in_fp32=kept_in_fp32(model),
            progress=progress,
            finish=finish,
            place=place,
        )
    loaded: nn.Module = model.to(device).eval()
    return loaded


def check_single_file(
    model_cls: type[Any], file: Path, config: Mapping[str, Any], names: Sequence[OriginalName]
) -> None:
    """Compares the file's header with the model that `config` describes; see `load_single_file`.

    Raises:
        ValueError: The file is damaged or does not fit.
    """
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with original_weights(file, names) as (weights, _), built_on_meta():
        with blame_config(file, model_cls):
            model: nn.Module = model_cls.from_config(plain)
        check_headers(model, weights, packed=False)


@contextmanager
def original_weights(file: Path, names: Sequence[OriginalName]) -> Iterator[tuple[SingleFile, Finish]]:
    """Opens a file and yields its tensors under diffusers' names, and a function that converts them.

    The function multiplies fp8 weights by their scales and swaps the halves of layers that diffusers stores
    the other way round.

    Raises:
        ValueError: See `load_single_file`.
    """
    weights = SingleFile(file)
    with weights:
        scales = _rename(weights, file, names)
        swapped = {part for original in names if original.swapped for part in original.parts}

        def finish(name: str, tensor: Tensor) -> Tensor:
            if name in scales:
                tensor = tensor.float() * scales[name].to(tensor.device)
            return swap_halves(tensor) if name.rpartition(".")[0] in swapped else tensor

        yield weights, finish


def _rename(weights: SingleFile, file: Path, names: Sequence[OriginalName]) -> dict[str, Tensor]:
    """Renames the weights to diffusers' names. Returns the fp8 scales by those names. Raises ValueError."""
    present = set(weights.names)
    packed = next(
        (name for name in sorted(present) if ".quant_state." in name or name.endswith(".SCB")), None
    )
    if packed is not None:
        raise ValueError(
            f"{file}: already quantized ({packed}); accepted: bf16, fp16, fp32 or fp8, or a quantized folder in"
            " diffusers' layout as the pipeline's own transformer"
        )
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in present)), "")
    own = {name.removeprefix(prefix): name for name in present if name.startswith(prefix)}
    if len(own) < len(present):
        log.info(
            "%s: ignored %d tensors that do not belong to the transformer", file, len(present) - len(own)
        )
    for name in sorted(own):
        if name.endswith(_DESCRIBED):
            weight = own.get(name.removesuffix(_DESCRIBED) + ".weight")
            _check_described(weights, file, own.pop(name), weight)
    rows: dict[str, Rows] = {}
    scales: dict[str, Tensor] = {}
    missing = []
    for original in names:
        for leaf in (original.leaf, "bias") if original.leaf == "weight" else (original.leaf,):
            source = own.pop(f"{original.name}.{leaf}", None)
            if source is None:
                missing.append(f"{original.name}.{leaf}")
                continue
            rows |= _parts(weights, file, original, "bias" if leaf == "bias" else "weight", source)
        for ending in _SCALES:
            source = own.pop(original.name + ending, None)
            if source is not None:
                scale = weights.read(source).float()
                scales |= _scales(file, original, scale)
    unexpected = sorted(name for name in own if not name.endswith(_UNUSED) and name != _MARKER)
    problems = [
        f"{len(found)} {what} ({', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''})"
        for what, found in (("missing", missing), ("unexpected", unexpected))
        if found
    ]
    if problems:
        raise ValueError(
            f"{file}: the tensors do not match the transformer that the pipeline's transformer/config.json describes"
            f" (by its authors' layer names): {'; '.join(problems)}"
        )
    weights.rename(rows)
    return scales


def _check_described(weights: SingleFile, file: Path, name: str, weight: str | None) -> None:
    """Raises ValueError if a layer's description is not fp8, or its weight is stored in another dtype."""
    try:
        described = json.loads(bytes(weights.read(name).tolist()))
        kind = described.get("format")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {name} does not describe the layer's quantization: {error}") from error
    stored = "no weight" if weight is None else str(weights.stored(weight).dtype).removeprefix("torch.")
    if kind not in _FP8 or stored != kind:
        raise ValueError(
            f"{file}: {name} says {kind!r}, and its weight is stored as {stored}; accepted: {' or '.join(_FP8)}, with a"
            " weight of that dtype"
        )


def _parts(
    weights: SingleFile, file: Path, original: OriginalName, leaf: str, source: str
) -> dict[str, Rows]:
    if not original.rows:
        return {f"{original.parts[0]}.{leaf}": Rows(source)}
    shape = weights.shape(source)
    if not shape or shape[0] != sum(original.rows):
        raise ValueError(f"{file}: {source}: expected {sum(original.rows)} rows, got shape {shape}")
    parts, start = {}, 0
    for part, height in zip(original.parts, original.rows, strict=True):
        parts[f"{part}.{leaf}"] = Rows(source, start, start + height)
        start += height
    return parts


def _scales(file: Path, original: OriginalName, scale: Tensor) -> dict[str, Tensor]:
    """Returns the scale of each part: a scalar for the whole weight, or one value per row, shape (rows, 1)."""
    rows = original.rows or (scale.numel(),)
    if scale.numel() == 1:
        return {f"{part}.weight": scale.reshape(()) for part in original.parts}
    if scale.numel() != sum(rows):
        raise ValueError(f"{file}: {original.name}: {scale.numel()} scales, expected 1 or {sum(rows)}")
    parts = zip(original.parts, scale.reshape(-1, 1).split(rows), strict=True)
    return {f"{part}.weight": rows_of_part for part, rows_of_part in parts}
