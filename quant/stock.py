"""Our layers behind the `from_pretrained` of diffusers and of transformers, in place of bitsandbytes."""

from halfbyte.quant import stock_diffusers, stock_transformers
from halfbyte.quant.stock_diffusers import HalfbyteConfig

__all__ = ["HalfbyteConfig", "register"]


def register() -> None:
    """From here on both libraries build our layers for bitsandbytes checkpoints and configs."""
    stock_diffusers.register()
    stock_transformers.register()
