"""LoRA through PEFT: adds adapters to layers, initializes them, and reads and writes their weights."""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer as PeftLayer
from torch import Tensor, nn

from halfbyte.quant.lora.dora import RowMagnitudes
from halfbyte.quant.lora.layers import fused_config
from halfbyte.trainer.adapters.saved import DOWN, MAGNITUDE, LoraLayer, first_matching
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.randomness import generator

log = logging.getLogger(__name__)

ADAPTER = "default"  # PEFT's name of the adapter


@dataclass(frozen=True)
class LoraVariant:
    """Departures from plain LoRA; patterns are regular expressions that match the end of a module name."""

    rslora: bool = False  # scales the update by alpha / sqrt(rank)
    dora: bool = False  # also trains the magnitude (norm) of each weight row, see `halfbyte.quant.lora.dora`
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)


_PLAIN = LoraVariant()


@dataclass(frozen=True)
class TrainedLayers:
    """Numbers of the layers and parameters that a run trains."""

    layers: int
    parameters: int
    total_layers: int  # linear layers in the whole transformer


def add_lora(
    denoiser: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | list[str],
    init: str,
    seed: int,
    fused: bool = True,
    variant: LoraVariant = _PLAIN,
) -> TrainedLayers:
    """Adds fp32 adapters to the layers that match `targets`, a regular expression or endings of names.

    fused: computes a layer and its adapter as one function, see `halfbyte.quant.lora.layers`. The adapters
    are the same.

    Raises:
        RecipeError: a target or a pattern of `variant` matches nothing, a target matches a module that is not
            a linear layer, or a weight for DoRA has a row of zeros, which has no direction.
    """
    linears = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    _check_targets(denoiser, targets, linears)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        init_lora_weights="gaussian" if init == "gaussian" else True,
        use_rslora=variant.rslora,
        use_dora=variant.dora,
        rank_pattern=dict(variant.rank_pattern),
        alpha_pattern=dict(variant.alpha_pattern),
    )
    model: Any = denoiser
    model.add_adapter(fused_config(config) if fused else config, adapter_name=ADAPTER)
    adapters = trained_parameters(denoiser)
    for name, parameter in adapters.items():
        parameter.data = parameter.data.float()
        if ".lora_A." in name:
            _start(parameter, name, init, seed)
    adapted = [name.partition(".lora_A.")[0] for name in adapters if ".lora_A." in name]
    _check_patterns(variant, adapted)
    if variant.dora:
        _check_directions(denoiser)
    return TrainedLayers(len(adapted), sum(p.numel() for p in adapters.values()), len(linears))


def _check_targets(denoiser: nn.Module, targets: str | list[str], linears: list[str]) -> None:
    """Checks that each target matches a layer, and only linear layers: others cannot be exported.

    PEFT itself only checks that all targets together match something.
    """
    modules = {name: module for name, module in denoiser.named_modules() if name}
    examples = ", ".join(linears[:: max(1, len(linears) // 6)])
    for target in [targets] if isinstance(targets, str) else targets:
        if isinstance(targets, str):
            found = [name for name in modules if re.fullmatch(target, name)]
        else:
            found = [name for name in modules if f".{name}".endswith(f".{target}")]
        other = next((name for name in found if not isinstance(modules[name], nn.Linear)), None)
        if found and other is None:
            continue
        fault = f"{other}, a {type(modules[other]).__name__}" if other else "no layer"
        raise RecipeError(
            f"lora.targets: {target!r} matches {fault}; accepted: all-linear, attention, endings of linear layers'"
            f" names, or a regular expression that matches whole names, such as {examples}"
        )


def _check_patterns(variant: LoraVariant, adapted: list[str]) -> None:
    for setting, patterns in (
        ("rank_pattern", variant.rank_pattern),
        ("alpha_pattern", variant.alpha_pattern),
    ):
        for pattern in patterns:
            if not any(first_matching([pattern], name) for name in adapted):
                examples = ", ".join(adapted[:: max(1, len(adapted) // 6)])
                raise RecipeError(
                    f"lora.{setting}: {pattern!r} matches no layer with an adapter; accepted: regular expressions that"
                    f" match the end of a layer's name, such as {examples}"
                )


def _check_directions(denoiser: nn.Module) -> None:
    for name, module in denoiser.named_modules():
        if not isinstance(module, RowMagnitudes) or module.base_squares.is_meta:
            continue
        if not bool(module.base_squares.all()):
            layer = name.partition(MAGNITUDE)[0]
            raise RecipeError(
                f"lora.dora: {layer} has rows of zeros, for which DoRA has no direction; remove the layer from"
                " lora.targets, or set lora.dora: false"
            )


def _start(parameter: nn.Parameter, name: str, init: str, seed: int) -> None:
    # Drawn on the CPU with a generator keyed by the layer's name, so that every process and device starts
    # from the same adapter.
    value = torch.empty(parameter.shape, dtype=torch.float32)
    source = generator(seed, f"lora/{name}")
    if init == "gaussian":
        nn.init.normal_(value, std=1 / len(value), generator=source)  # 1 / the layer's rank
    else:
        # PEFT's default: uniform in +-1 / sqrt(inputs).
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=source)
    parameter.data.copy_(value)


def trained_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trained parameters by their name in the model, in the model's order."""
    return {name: p for name, p in denoiser.named_parameters() if p.requires_grad}


def adapter_tensors(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Returns the `trained_parameters` in fp32 on their device, under the names that PEFT uses in files.

    The names end with `.lora_A.weight`, `.lora_B.weight` and, for DoRA, `.lora_magnitude_vector`. fp32 weights
    share their memory with the model.
    """
    return {_saved_name(name): parameter.detach().float() for name, parameter in parameters.items()}


def adapter_state(denoiser: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the adapter's weights on the CPU, see `adapter_tensors`."""
    tensors = adapter_tensors(trained_parameters(denoiser))
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def load_adapter_state(denoiser: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies saved weights into the model.

    Raises:
        ValueError: names or shapes differ from the model's.
    """
    _check_fit(denoiser, state)
    for name, parameter in trained_parameters(denoiser).items():
        parameter.data.copy_(state[_saved_name(name)])


def _check_fit(denoiser: nn.Module, state: Mapping[str, Tensor]) -> None:
    parameters = {_saved_name(name): p for name, p in trained_parameters(denoiser).items()}
    differing = sorted(parameters.keys() ^ state.keys())
    differing += [n for n in parameters.keys() & state.keys() if parameters[n].shape != state[n].shape]
    if differing:
        raise ValueError(
            f"the saved adapter does not fit this model: {len(differing)} names or shapes differ, the first is"
            f" {differing[0]}"
        )


def by_parameter(denoiser: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a saved adapter under the names of its parameters in the model.

    Raises:
        ValueError: names or shapes differ from the model's.
    """
    names = {_saved_name(name): name for name in trained_parameters(denoiser)}
    _check_fit(denoiser, state)
    return {names[saved]: tensor for saved, tensor in state.items()}


def save_adapter(denoiser: nn.Module, pipeline_class: Any, folder: str) -> None:
    """Writes the adapter in diffusers' format and under diffusers' name, `pytorch_lora_weights.safetensors`."""
    write_adapter(pipeline_class, adapter_state(denoiser), adapter_settings(denoiser), folder)


def adapter_settings(denoiser: nn.Module) -> dict[str, Any]:
    """Returns the fields of PEFT's LoraConfig that belong into an adapter's file, rank and alpha among them."""
    model: Any = denoiser
    names = [_saved_name(name) for name in trained_parameters(denoiser)]
    layers = [name.removesuffix(DOWN) for name in names if name.endswith(DOWN)]
    config: dict[str, Any] = model.peft_config[ADAPTER].to_dict()
    return config | {name: _in_any_order(config[name], layers) for name in ("rank_pattern", "alpha_pattern")}


def write_adapter(
    pipeline_class: Any,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    folder: str,
    file: str | None = None,
) -> None:
    """Writes an adapter's tensors and settings in diffusers' format.

    file: its name; None for diffusers' own, `pytorch_lora_weights.safetensors`.
    """
    pipeline_class.save_lora_weights(
        folder,
        transformer_lora_layers=dict(tensors),
        # Copied, because diffusers replaces sets in it by lists.
        transformer_lora_adapter_metadata=dict(settings),
        weight_name=file,
    )


def _in_any_order(patterns: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """Returns patterns for a file that give each layer its value in any order.

    PEFT uses the first pattern that matches a layer, but diffusers writes the patterns sorted. If sorting
    would change the match of a layer, the patterns are replaced by the layers' names.
    """
    chosen = {layer: first_matching(patterns, layer) for layer in layers}
    if all(first_matching(sorted(patterns), layer) == pattern for layer, pattern in chosen.items()):
        return dict(patterns)
    # PEFT matches a pattern against the end of a name. "^" anchors it to the start, so it matches only this
    # layer.
    return {
        f"^{re.escape(name)}": patterns[pattern] for name, pattern in chosen.items() if pattern is not None
    }


def _saved_name(name: str) -> str:
    return name.replace(f"{MAGNITUDE}.{ADAPTER}.weight", MAGNITUDE).replace(f".{ADAPTER}.", ".")


def check_start(denoiser: nn.Module, layers: Mapping[str, LoraLayer], adapter: str, path: Path | str) -> None:
    """Checks that the adapters on `denoiser`, which may be on meta, can start with the updates of `layers`.

    path: names the adapter in messages.

    Raises:
        RecipeError: an update has no adapter to go to, another shape, a larger rank, or magnitudes while the
            run trains no DoRA.
    """
    own = _adapted(denoiser, adapter)
    unmatched = sorted(layers.keys() - own.keys())
    if unmatched:
        _refuse(denoiser, unmatched, own, path)
    for name, layer in layers.items():
        module = own[name]
        down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        expected, got = (len(up), down.shape[1]), (len(layer.up), layer.down.shape[1])
        if expected != got:
            raise RecipeError(
                f"{path} is for another base: its {name} has shape {got[0]} x {got[1]}, but the model's has"
                f" {expected[0]} x {expected[1]}"
            )
        if layer.rank > len(down):
            highest = max(other.rank for other in layers.values())
            raise RecipeError(
                f"{name} has rank {layer.rank} in {path}, but {len(down)} in this run; set"
                f" lora.rank: {highest}, or set a rank for these layers in lora.rank_pattern"
            )
        if layer.magnitude is not None and adapter not in module.lora_magnitude_vector:
            raise RecipeError(f"{path} is a DoRA adapter; set lora.dora: true")


def _adapted(denoiser: nn.Module, adapter: str) -> dict[str, Any]:
    """Returns the layers that have this adapter, by name."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, PeftLayer) and adapter in module.lora_A
    }


@torch.no_grad()
def start_from(denoiser: nn.Module, layers: Mapping[str, LoraLayer], adapter: str, path: Path | str) -> bool:
    """Starts the adapters on `denoiser` with exactly the updates of `layers`; True if DoRA's too.

    If the run's rank is larger, the rest of A keeps its random start and the rest of B is zero. Layers
    without an update start as usual.

    Raises:
        RecipeError: the updates do not fit, see `check_start`.
    """
    check_start(denoiser, layers, adapter, path)
    own = _adapted(denoiser, adapter)
    for name, layer in layers.items():
        module = own[name]
        down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        down[: layer.rank].copy_(layer.down)
        up.zero_()
        # B carries the ratio of the scales, so that scale * B A is the same update.
        up[:, : layer.rank].copy_(layer.up * (layer.scale / module.scaling[adapter]))
    magnitudes = {name: layer.magnitude for name, layer in layers.items() if layer.magnitude is not None}
    for name, values in magnitudes.items():
        own[name].lora_magnitude_vector[adapter].weight.copy_(values)
    log.info("%d of %d layers start with the adapter of %s", len(layers), len(own), path)
    return bool(magnitudes)


def _refuse(denoiser: nn.Module, unmatched: list[str], own: Iterable[str], path: Path | str) -> None:
    modules = {name for name, _ in denoiser.named_modules()}
    missing = [name for name in unmatched if name not in modules]
    if missing:
        raise RecipeError(
            f"{path} is for another base: the model has no layer {missing[0]} ({len(missing)} layers are missing)"
        )
    ends = sorted({name.split(".", 2)[-1] for name in (*unmatched, *own)})
    raise RecipeError(
        f"{path} adapts {len(unmatched)} layers that lora.targets does not include, the first is {unmatched[0]}; set"
        f" lora.targets: [{', '.join(ends)}]"
    )


@contextmanager
def without_adapters(denoiser: nn.Module) -> Iterator[None]:
    """Computes as the base: PEFT's layers leave their adapters out inside this context."""
    layers = [module for module in denoiser.modules() if isinstance(module, PeftLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
