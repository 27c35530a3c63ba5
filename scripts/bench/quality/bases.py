"""The bases that the quality benchmark compares: settings of a recipe, or bitsandbytes' own layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from halfbyte.quant.convert.skip_list import is_skipped, kept_in_fp32, linear_layers
from halfbyte.trainer.adapters.lora import ADAPTER, TrainedLayers
from halfbyte.trainer.denoiser import base as base_module
from halfbyte.trainer.denoiser import load as denoiser_module
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.randomness import generator
from halfbyte.trainer.recipe.recipe import Recipe
from scripts.bench.quality.loftq import start_from_error


@dataclass(frozen=True)
class Base:
    """A way to store the frozen transformer, and the start of its adapters."""

    name: str
    settings: Sequence[str]  # over the recipe's
    bitsandbytes: bool = False  # bitsandbytes' layers under stock PEFT instead of ours
    loftq: bool = False  # the adapters start at the quantization's error
    kept: float = 0.0  # share of the linear weights that stay in bf16, by a skip list
    calibrated: bool = False  # rounded for the recipe's images, as by `halfbyte quantize`


def _ours(name: str, quant_type: str, *settings: str, init: str = "gaussian") -> Base:
    return Base(name, (f"quant.type={quant_type}", *settings, f"lora.init={init}"))


_MSE = "quant.scale_search=mse"
BF16 = _ours("bf16", "none")
NF4 = _ours("nf4", "nf4")
PEER = Base(
    "nf4, bitsandbytes + PEFT",
    ("quant.type=none", "lora.init=gaussian", "train.fused_adapters=false", "train.fused_blocks=false"),
    bitsandbytes=True,
)
STORED = (
    BF16,
    NF4,
    PEER,
    _ours("nf4, scales by mse", "nf4", _MSE),
    _ours("fp4", "fp4"),
    _ours("int8", "int8"),
)
CALIBRATED = (
    replace(_ours("nf4, calibrated", "nf4", _MSE), calibrated=True),
    # By the name of a layer that only FLUX has.
    replace(
        _ours("nf4, calibrated, x_embedder in bf16", "nf4", _MSE, "quant.skip=[x_embedder]"), calibrated=True
    ),
)
EXACT = (
    _ours(
        "nf4, x_embedder in bf16, proj_out exact", "nf4", "quant.skip=[x_embedder]", "quant.exact=[proj_out]"
    ),
    replace(
        _ours(
            "nf4, calibrated, x_embedder in bf16, proj_out exact",
            "nf4",
            _MSE,
            "quant.skip=[x_embedder]",
            "quant.exact=[proj_out]",
        ),
        calibrated=True,
    ),
)
STARTED = (
    _ours("bf16, kaiming", "none", init="kaiming"),
    _ours("nf4, kaiming", "nf4", init="kaiming"),
    replace(_ours("nf4, loftq", "nf4"), loftq=True),
    replace(_ours("nf4, scales by mse, loftq", "nf4", _MSE), loftq=True),
)


def keeping(name: str, skip: Sequence[str], share: float) -> Base:
    """Returns NF4 with some layers kept in bf16; they hold `share` of the linear weights."""
    base = _ours(f"nf4, {name} in bf16", "nf4", f"quant.skip=[{', '.join(skip)}]")
    return replace(base, kept=share)


@contextmanager
def loading(base: Base, family: type[Family], skip: Sequence[str]) -> Iterator[None]:
    """Makes the trainer load the transformer as `base` says; bitsandbytes leaves `skip` unquantized."""
    load: Callable[..., Any] = base_module._read
    add: Callable[..., TrainedLayers] = denoiser_module.add_adapters

    def load_with_bitsandbytes(*arguments: Any, **settings: Any) -> nn.Module:
        denoiser: nn.Module = load(*arguments, **settings)
        for path, linear in list(linear_layers(denoiser)):
            if not is_skipped(path, (*skip, *kept_in_fp32(denoiser))):
                denoiser.set_submodule(path, _bitsandbytes_layer(linear))
        return denoiser

    def add_at_the_error(recipe: Recipe, family: Family, denoiser: nn.Module) -> TrainedLayers:
        trained = add(recipe, family, denoiser)
        folder = family.source.folder / "transformer"
        start_from_error(
            denoiser, folder, ADAPTER, lambda path: generator(recipe.train.seed, f"loftq/{path}")
        )
        return trained

    if base.bitsandbytes:
        base_module._read = load_with_bitsandbytes
    if base.loftq:
        denoiser_module.add_adapters = add_at_the_error
    try:
        yield
    finally:
        base_module._read = load
        denoiser_module.add_adapters = add


def _bitsandbytes_layer(linear: nn.Linear) -> nn.Module:
    # Imported here because it is a dependency of the tests only.
    import bitsandbytes

    class Linear4bit(bitsandbytes.nn.Linear4bit):
        """A layer that is always in training mode: on a CPU with AVX-512, eval mode repacks its weight in place."""

        def train(self, mode: bool = True) -> nn.Module:
            return super().train(True)

    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach().cpu(),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=layer,
    )
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return layer.to(linear.weight.device).requires_grad_(False).train()
