"""Pipelines that stock diffusers and bitsandbytes quantized, transformer and T5: they train as they are."""

import logging
import shutil

import pytest
import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig as TransformersBitsAndBytesConfig
from transformers import T5EncoderModel

from halfbyte.trainer.metrics import read_metrics

from judge import stock_bitsandbytes_on_cpu
from runs import run_here, write_recipe

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(params=KINDS)
def package(request, mini_flux, tmp_path):
    folder = tmp_path / "package"
    shutil.copytree(mini_flux, folder)
    settings = KINDS[request.param]
    with stock_bitsandbytes_on_cpu():
        transformer = FluxTransformer2DModel.from_pretrained(
            mini_flux,
            subfolder="transformer",
            quantization_config=BitsAndBytesConfig(**settings),
            dtype=torch.bfloat16,
        )
        t5 = T5EncoderModel.from_pretrained(
            mini_flux / "text_encoder_2",
            quantization_config=TransformersBitsAndBytesConfig(**settings),
            dtype=torch.bfloat16,
            device_map={"": "cpu"},
        )
        for name, model in (("transformer", transformer), ("text_encoder_2", t5)):
            shutil.rmtree(folder / name)
            model.save_pretrained(folder / name)
    return request.param, folder


def test_it_trains_without_a_quantization_in_the_recipe(package, tmp_path, caplog):
    kind, folder = package
    recipe = write_recipe(tmp_path, folder)
    recipe.write_text("".join(line for line in recipe.open() if not line.startswith("quant:")))
    with caplog.at_level(logging.WARNING):
        run = run_here(recipe, "train.steps=1", "train.grad_accumulation=1", "sample.prompts=[]")
    assert read_metrics(run / "metrics.csv")[0].loss > 0
    stored, exported = load_file(folder / WEIGHTS), load_file(run / WEIGHTS)
    assert stored.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in stored.items())
    # The recipe's default is NF4 with double quantization, which neither of them is: said once.
    told = [record.message for record in caplog.records if "is quantized already" in record.message]
    assert len(told) == 1
    assert kind in told[0]
