"""Runs stock diffusers with bitsandbytes on the CPU as a reference for our files, or with our layers instead.

diffusers rejects bitsandbytes without a GPU, but only by a check. Without the check, everything else works on
the CPU. Models load in eval mode. On a CPU with AVX-512, bitsandbytes' eval forward repacks weights in place
and rounds differently, so compare outputs after `.train()`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.quantizers import auto as diffusers_auto
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from transformers.quantizers import auto as transformers_auto

from halfbyte.quant import stock
from halfbyte.quant.stock import diffusers_quantizer as stock_diffusers
from halfbyte.quant.stock import transformers_quantizer as stock_transformers


class _OnCpu:
    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        pass

    def update_device_map(self, device_map: Any) -> dict[str, str]:
        return {"": "cpu"}


class _FourBit(_OnCpu, BnB4BitDiffusersQuantizer):
    pass


class _EightBit(_OnCpu, BnB8BitDiffusersQuantizer):
    pass


@contextmanager
def stock_bitsandbytes_on_cpu() -> Iterator[None]:
    """Lets stock `from_pretrained` load quantized folders, and quantize with BitsAndBytesConfig, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", _FourBit)
        patch.setitem(AUTO_QUANTIZER_MAPPING, "bitsandbytes_8bit", _EightBit)
        yield


@contextmanager
def our_layers_on_cpu() -> Iterator[None]:
    """Lets stock `from_pretrained` of diffusers and transformers build our layers, on the CPU by default."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (diffusers_auto, transformers_auto):
            for name in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
                mapping = getattr(module, name)
                for kind in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
                    patch.setitem(mapping, kind, mapping[kind])
        for quantizer in (stock_diffusers, stock_transformers):
            patch.setattr(quantizer, "default_device", lambda: torch.device("cpu"))
        stock.register()
        yield
