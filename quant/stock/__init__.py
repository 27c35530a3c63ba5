"""Makes `from_pretrained` of diffusers and transformers build our quantized layers, not bitsandbytes'."""

from halfbyte.quant.stock import diffusers_quantizer as stock_diffusers
from halfbyte.quant.stock import transformers_quantizer as stock_transformers
from halfbyte.quant.stock.diffusers_quantizer import HalfbyteConfig

__all__ = ["HalfbyteConfig", "register"]


def register() -> None:
    """Makes both libraries build our layers for bitsandbytes checkpoints and configs, from now on."""
    stock_diffusers.register()
    stock_transformers.register()
