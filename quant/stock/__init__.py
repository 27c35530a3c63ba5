"""Our layers behind the `from_pretrained` of diffusers and of transformers, in place of bitsandbytes."""

from halfbyte.quant.stock import diffusers_quantizer as stock_diffusers
from halfbyte.quant.stock import transformers_quantizer as stock_transformers
from halfbyte.quant.stock.diffusers_quantizer import HalfbyteConfig

__all__ = ["HalfbyteConfig", "register"]


def register() -> None:
    """From here on both libraries build our layers for bitsandbytes checkpoints and configs."""
    stock_diffusers.register()
    stock_transformers.register()
