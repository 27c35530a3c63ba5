"""Writes quantized parts of a pipeline in the way stock diffusers, transformers and bitsandbytes publish them."""

from pathlib import Path

import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
from safetensors.torch import load, save
from transformers import BitsAndBytesConfig as TransformersBitsAndBytesConfig
from transformers import T5EncoderModel

from judge import stock_bitsandbytes_on_cpu

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
T5_WEIGHTS = "text_encoder_2/model.safetensors"

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


def write_package(pipeline: Path, folder: Path, *, transformer: str, t5: str) -> None:
    """Quantizes `transformer/` and `text_encoder_2/` of a FLUX pipeline, each with a kind of KINDS."""
    with stock_bitsandbytes_on_cpu():
        FluxTransformer2DModel.from_pretrained(
            pipeline,
            subfolder="transformer",
            quantization_config=BitsAndBytesConfig(**KINDS[transformer]),
            dtype=torch.bfloat16,
        ).save_pretrained(folder / "transformer")
    write_t5(pipeline / "text_encoder_2", folder / "text_encoder_2", t5)


def write_t5(source: Path, folder: Path, kind: str) -> None:
    """Quantizes a T5 with a kind of KINDS."""
    with stock_bitsandbytes_on_cpu():
        T5EncoderModel.from_pretrained(
            source,
            quantization_config=TransformersBitsAndBytesConfig(**KINDS[kind]),
            dtype=torch.bfloat16,
            device_map={"": "cpu"},
        ).save_pretrained(folder)


def with_halved_norms(content: bytes) -> bytes:
    """Changes the weights of a T5's file, which stays loadable."""
    tensors = load(content)
    return save({n: t / 2 if n.endswith("norm.weight") else t for n, t in tensors.items()}, {"format": "pt"})
