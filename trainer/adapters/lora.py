"""LoRA through PEFT: which layers learn, how they start, and their weights under diffusers' names."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer as PeftLayer
from torch import Tensor, nn

from halfbyte.quant.lora.dora import RowMagnitudes
from halfbyte.quant.lora.layers import fused_config
from halfbyte.trainer.adapters.read import (
    log,
)
from halfbyte.trainer.adapters.saved import (
    DOWN,
    MAGNITUDE,
    LoraLayer,
    first_matching,
)
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.randomness import generator

ADAPTER = "default"


@dataclass(frozen=True)
class LoraVariant:
    """What departs from plain LoRA; patterns are regular expressions for the end of a module name."""

    rslora: bool = False  # the update is scaled by alpha / sqrt(rank)
    dora: bool = False  # the lengths of the weight's rows learn as well, see `halfbyte.quant.lora.dora`
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)


_PLAIN = LoraVariant()


@dataclass(frozen=True)
class TrainedLayers:
    """What learns in a run."""

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
    """Puts fp32 adapters on the layers that `targets` matches (a regular expression, or module-name endings).

    `fused` computes a layer and its adapter as one function, see `halfbyte.quant.lora.layers`; the adapters are
    the same.
    Raises RecipeError when one of the targets or of the variant's patterns matches nothing, or a target other than
    linear layers, or DoRA finds a weight without direction.
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
    """Each must fit a layer, which PEFT asks of all together, and linear layers alone, which have an export."""
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
            f" names, or a regular expression over whole names such as {examples}"
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
                    f"lora.{setting}: {pattern!r} matches no layer with an adapter; accepted: regular expressions"
                    f" for the end of names such as {examples}"
                )


def _check_directions(denoiser: nn.Module) -> None:
    for name, module in denoiser.named_modules():
        if not isinstance(module, RowMagnitudes) or module.base_squares.is_meta:
            continue
        if not bool(module.base_squares.all()):
            layer = name.partition(MAGNITUDE)[0]
            raise RecipeError(
                f"lora.dora: {layer} has rows of zeros, whose direction DoRA cannot keep; leave the layer out of"
                " lora.targets, or set lora.dora: false"
            )


def _start(parameter: nn.Parameter, name: str, init: str, seed: int) -> None:
    # Drawn on the CPU and keyed by layer, so that every process and every device starts from the same adapter.
    value = torch.empty(parameter.shape, dtype=torch.float32)
    source = generator(seed, f"lora/{name}")
    if init == "gaussian":
        nn.init.normal_(value, std=1 / len(value), generator=source)  # 1 / the layer's rank
    else:
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=source)
    parameter.data.copy_(value)


def trained_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by their name in the model, in its order."""
    return {name: p for name, p in denoiser.named_parameters() if p.requires_grad}


def adapter_state(denoiser: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights on the CPU in fp32, under PEFT's saved names (`….lora_A.weight`, and DoRA's
    `….lora_magnitude_vector`)."""
    return {
        _saved_name(name): p.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, p in trained_parameters(denoiser).items()
    }


def load_adapter_state(denoiser: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts saved weights back; raises ValueError unless names and shapes are exactly the model's."""
    _check_fit(denoiser, state)
    for name, parameter in trained_parameters(denoiser).items():
        parameter.data.copy_(state[_saved_name(name)])


def _check_fit(denoiser: nn.Module, state: Mapping[str, Tensor]) -> None:
    parameters = {_saved_name(name): p for name, p in trained_parameters(denoiser).items()}
    odd = sorted(parameters.keys() ^ state.keys())
    odd += [n for n in parameters.keys() & state.keys() if parameters[n].shape != state[n].shape]
    if odd:
        raise ValueError(
            f"the saved adapter does not fit this model: {len(odd)} names differ, first {odd[0]}"
        )


def by_parameter(denoiser: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A saved adapter under its parameters' names in the model; ValueError as for `load_adapter_state`."""
    names = {_saved_name(name): name for name in trained_parameters(denoiser)}
    _check_fit(denoiser, state)
    return {names[saved]: tensor for saved, tensor in state.items()}


def save_adapter(denoiser: nn.Module, pipeline_class: Any, folder: str, file: str | None = None) -> None:
    """Writes `pytorch_lora_weights.safetensors`, or `file`, as diffusers does: rank and alpha ride in its metadata."""
    model: Any = denoiser
    state = adapter_state(denoiser)
    layers = [name.removesuffix(DOWN) for name in state if name.endswith(DOWN)]
    config: dict[str, Any] = model.peft_config[ADAPTER].to_dict()
    config |= {name: _in_any_order(config[name], layers) for name in ("rank_pattern", "alpha_pattern")}
    pipeline_class.save_lora_weights(
        folder,
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata=config,
        weight_name=file,
    )


def _in_any_order(patterns: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """The patterns for a file: diffusers sorts them, and the first that fits a layer is taken. Where that would be
    another one, the layers' own names."""
    chosen = {layer: first_matching(patterns, layer) for layer in layers}
    if all(first_matching(sorted(patterns), layer) == pattern for layer, pattern in chosen.items()):
        return dict(patterns)
    # A pattern fits ends of names: from the start only itself.
    return {
        f"^{re.escape(name)}": patterns[pattern] for name, pattern in chosen.items() if pattern is not None
    }


def _saved_name(name: str) -> str:
    return name.replace(f"{MAGNITUDE}.{ADAPTER}.weight", MAGNITUDE).replace(f".{ADAPTER}.", ".")


@torch.no_grad()
def start_from(denoiser: nn.Module, layers: Mapping[str, LoraLayer], adapter: str, path: Path | str) -> bool:
    """Gives the adapters on `denoiser` the updates of `layers`, exactly; whether DoRA's lengths came along.

    Where the run's rank is larger the rest of A stays as it starts and that of B is zero; layers that have no update
    start as without. Raises RecipeError where an update has no layer, another shape, or a larger rank.
    """
    own = {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, PeftLayer) and adapter in module.lora_A
    }
    strange = sorted(layers.keys() - own.keys())
    if strange:
        _refuse(denoiser, strange, own, path)
    for name, layer in layers.items():
        module: Any = own[name]
        down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        expected, got = (len(up), down.shape[1]), (len(layer.up), layer.down.shape[1])
        if expected != got:
            raise RecipeError(
                f"{path} is for another base: its {name} is {got[0]} x {got[1]}, the model's"
                f" {expected[0]} x {expected[1]}"
            )
        if layer.rank > len(down):
            highest = max(other.rank for other in layers.values())
            raise RecipeError(
                f"{name} has rank {layer.rank} in {path}, and {len(down)} in this run; set"
                f" lora.rank: {highest}, or a rank for these layers in lora.rank_pattern"
            )
        if layer.lengths is not None and adapter not in module.lora_magnitude_vector:
            raise RecipeError(f"{path} is a DoRA adapter; set lora.dora: true")
    for name, layer in layers.items():
        module = own[name]
        down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        down[: layer.rank].copy_(layer.down)
        up.zero_()
        up[:, : layer.rank].copy_(layer.up * (layer.scale / module.scaling[adapter]))
    lengths = {name: layer.lengths for name, layer in layers.items() if layer.lengths is not None}
    for name, values in lengths.items():
        own[name].lora_magnitude_vector[adapter].weight.copy_(values)
    log.info("%d of %d layers have the adapter of %s", len(layers), len(own), path)
    return bool(lengths)


def _refuse(denoiser: nn.Module, strange: list[str], own: Iterable[str], path: Path | str) -> None:
    modules = {name for name, _ in denoiser.named_modules()}
    missing = [name for name in strange if name not in modules]
    if missing:
        raise RecipeError(
            f"{path} is for another base: the model has no {missing[0]} ({len(missing)} such layers)"
        )
    ends = sorted({name.split(".", 2)[-1] for name in (*strange, *own)})
    raise RecipeError(
        f"{path} adapts {len(strange)} layers that lora.targets does not, first {strange[0]}; set"
        f" lora.targets: [{', '.join(ends)}]"
    )
