"""Tests offloading by diffusers and device maps by accelerate with our layers: predictions stay the same."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from diffusers import FluxPipeline
from transformers import T5EncoderModel

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.text_encoder import load_text_encoder
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.runtime.placement import Placement

from probe import prediction

CPU = torch.device("cpu")


def denoiser_of(model, kind="flux", quant="nf4"):
    family = FAMILIES[kind].open(str(model), None, None)
    recipe = QuantRecipe(quant, compute_dtype=torch.float32)
    denoiser = load_base(family, recipe, device=CPU, dtype=torch.float32)
    family.fuse_blocks(denoiser, BlockSettings("inputs"))
    return denoiser


def on_meta(model):
    return [layer.weight.is_meta for layer in model.modules() if isinstance(layer, QuantizedLayer)]


@pytest.fixture(scope="module", params=["nf4", "int8"])
def quantized(request, mini_flux):
    """The quantization, and the prediction of the complete model."""
    return request.param, prediction(denoiser_of(mini_flux, quant=request.param), torch.float32)


def close(actual, expected):
    return (actual - expected).norm() / expected.norm() < 1e-5


def test_layers_offloaded_one_by_one_predict_the_same_repeatedly(quantized, mini_flux):
    quant, expected = quantized
    model = cpu_offload(denoiser_of(mini_flux, quant=quant), execution_device=CPU)
    assert all(on_meta(model))
    for _ in range(2):
        assert close(prediction(model, torch.float32), expected)
        assert all(on_meta(model)), "the weights left again"


def test_a_model_in_parts_on_disk_predicts_the_same(quantized, mini_flux, tmp_path):
    quant, expected = quantized
    model = denoiser_of(mini_flux, quant=quant)
    # If the main device is not the string "cpu", accelerate offloads the host's part too, as it does with a
    # GPU.
    where = {name: "disk" if "blocks" in name else "cpu" for name, _ in model.named_children()}
    model = dispatch_model(model, where, main_device=CPU, offload_dir=tmp_path)
    assert all(on_meta(model))
    for _ in range(2):
        assert close(prediction(model, torch.float32), expected)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_a_pipeline_is_offloaded_by_diffusers(offload, mini_flux):
    pipelines = []
    for placement in (Placement(CPU), Placement(CPU, offload)):
        pipeline = FluxPipeline.from_pretrained(
            mini_flux, transformer=denoiser_of(mini_flux), torch_dtype=torch.float32
        )
        pipeline.set_progress_bar_config(disable=True)
        placement.place(pipeline)
        pipelines.append(pipeline)
    assert all(on_meta(pipelines[1].transformer)) == (offload == "sequential")
    assert hasattr(pipelines[1].transformer, "_hf_hook")
    pictures = [
        pipeline(
            "a gradient",
            width=64,
            height=64,
            num_inference_steps=2,
            max_sequence_length=24,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for pipeline in pipelines
    ]
    assert (pictures[0] - pictures[1]).abs().max() < 1e-4


def test_a_device_map_with_room_keeps_the_model_in_one_piece(mini_flux):
    model = denoiser_of(mini_flux)
    expected = prediction(model, torch.float32)
    for name in ("auto", "balanced"):
        Placement(CPU, device_map=name, max_memory={"cpu": 10**9}).spread(model, "transformer")
        assert prediction(model, torch.float32).equal(expected)


def test_a_device_map_without_room_states_the_free_memory(mini_flux):
    with pytest.raises(RecipeError, match=r"^--device-map: transformer .*\(cpu 100\.0 kB\)"):
        Placement(CPU, device_map="auto", max_memory={"cpu": 100_000}).spread(
            denoiser_of(mini_flux), "transformer"
        )


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_t5_is_offloaded_layer_by_layer(quant, mini_flux):
    def encoded(offloaded):
        recipe = QuantRecipe(quant, compute_dtype=torch.float32)
        t5 = load_text_encoder(
            T5EncoderModel, mini_flux / "text_encoder_2", recipe, dtype=torch.float32, device=CPU
        )
        if offloaded:
            cpu_offload(t5, execution_device=CPU)
            assert all(on_meta(t5))
        with torch.no_grad():
            return t5(torch.arange(2, 26)[None]).last_hidden_state

    assert close(encoded(True), encoded(False))
