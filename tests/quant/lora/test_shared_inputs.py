"""Tests whole denoisers with fused adapters: outputs, gradients and files equal those of diffusers and PEFT."""

import copy

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.load.transformer import load_quantized
from halfbyte.quant.lora import layers as lora
from halfbyte.quant.lora.layers import LoraLinear, fused_config
from halfbyte.quant.lora.low_rank import low_rank_linears
from halfbyte.trainer.adapters.lora import add_lora, save_adapter, trained_parameters
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.sd3.family import SD3

from probe import inputs, prediction

CLASSES = {
    "flux": (Flux, FluxTransformer2DModel, FluxPipeline),
    "sd3": (SD3, SD3Transformer2DModel, StableDiffusion3Pipeline),
}


@pytest.fixture(params=["flux", "sd3"])
def family_and_folder(request):
    """Returns the family and the pipeline's folder."""
    folder = request.getfixturevalue(f"mini_{request.param}")
    return CLASSES[request.param][0].open(str(folder), None, 24), folder


def loaded(family, dtype=torch.float32):
    recipe = QuantRecipe(compute_dtype=dtype)
    return load_base(family, recipe, device=torch.device("cpu"), dtype=dtype)


def adapted(family, *, fused, shared, dtype=torch.float32, dropout=0.0):
    denoiser = loaded(family, dtype)
    targets = family.lora_targets("all-linear")
    add_lora(
        denoiser, rank=4, alpha=6, dropout=dropout, targets=targets, init="gaussian", seed=1, fused=fused
    )
    generator = torch.Generator().manual_seed(7)
    for name, parameter in trained_parameters(denoiser).items():
        if ".lora_B." in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    if shared:
        family.fuse_blocks(denoiser, BlockSettings(whole=False))
    return denoiser


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_output_without_adapters_is_bitwise_diffusers_output(family_and_folder, dtype, autocast):
    family, _ = family_and_folder
    denoiser = loaded(family, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = prediction(denoiser, dtype)
        family.fuse_blocks(denoiser, BlockSettings(whole=False))
        assert torch.equal(prediction(denoiser, dtype), expected)


def step(denoiser, dtype=torch.float32):
    output = denoiser.train()(**inputs(denoiser, dtype))[0]
    parameters = trained_parameters(denoiser)
    grads = torch.autograd.grad(output.float().square().sum(), list(parameters.values()), allow_unused=True)
    return output, dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("shared", [True, False])
def test_outputs_and_gradients_match_peft(family_and_folder, shared):
    family, _ = family_and_folder
    output, grads = step(adapted(family, fused=True, shared=shared))
    expected, expected_grads = step(adapted(family, fused=False, shared=False))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, wanted in expected_grads.items():
        assert (grads[name] - wanted).norm() <= 1e-4 * wanted.norm(), name


def test_layers_with_a_shared_input_are_computed_together(family_and_folder, monkeypatch):
    family, _ = family_and_folder
    groups = []

    def counted(x, layers, dropped=None):
        groups.append(len(layers))
        return low_rank_linears(x, layers, dropped)

    monkeypatch.setattr(lora, "low_rank_linears", counted)
    denoiser = adapted(family, fused=True, shared=True)
    prediction(denoiser, torch.float32)
    layers = sum(isinstance(module, LoraLinear) for module in denoiser.modules())
    assert sum(groups) == layers
    if isinstance(family, Flux):
        assert groups.count(4) == len(denoiser.single_transformer_blocks)
        assert groups.count(3) == 2 * len(denoiser.transformer_blocks)
    else:
        assert groups.count(3) >= 2 * len(denoiser.transformer_blocks)


def test_blocks_compile_with_checkpointing_without_graph_breaks(family_and_folder):
    torch._dynamo.reset()
    family, _ = family_and_folder
    denoiser = adapted(family, fused=True, shared=True)
    expected, expected_grads = step(denoiser)
    denoiser.enable_gradient_checkpointing()
    kinds = ("FluxTransformerBlock", "FluxSingleTransformerBlock", "JointTransformerBlock")
    # Selected by class name, as compile_repeated_blocks does. One block of each class, because tracing takes seconds.
    blocks = {type(module).__name__: module for module in denoiser.modules()}
    compiled = [blocks[kind] for kind in kinds if kind in blocks]
    for block in compiled:
        block.compile(fullgraph=True, backend="aot_eager")
    output, grads = step(denoiser)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for name, wanted in expected_grads.items():
        assert (grads[name] - wanted).norm() <= 1e-4 * wanted.norm(), name
    assert len(compiled) == (2 if isinstance(family, Flux) else 1)


def test_each_layer_has_its_own_dropout_mask(family_and_folder):
    family, _ = family_and_folder
    denoiser = adapted(family, fused=True, shared=True, dropout=0.5)
    torch.manual_seed(0)
    output, _ = step(denoiser)
    plain = adapted(family, fused=True, shared=False, dropout=0.5)
    assert not torch.equal(output, step(denoiser)[0])
    denoiser.eval()
    with torch.no_grad():
        together, expected = (model.eval()(**inputs(model, torch.float32))[0] for model in (denoiser, plain))
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


def test_saved_adapter_equals_pefts_and_loads_in_diffusers(family_and_folder, tmp_path):
    family, folder = family_and_folder
    ours = adapted(family, fused=True, shared=True)
    theirs = adapted(family, fused=False, shared=False)
    assert list(get_peft_model_state_dict(ours)) == list(get_peft_model_state_dict(theirs))
    assert ours.peft_config["default"].to_dict() == theirs.peft_config["default"].to_dict()
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        save_adapter(model, family.pipeline_class, str(tmp_path / name))
    mine, peft = (
        load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("ours", "theirs")
    )
    assert mine.keys() == peft.keys()
    assert all(torch.equal(mine[name], peft[name]) for name in peft)
    assert len(mine) == len(trained_parameters(ours))

    pipeline = family.pipeline_class.from_pretrained(folder, transformer=loaded(family), dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path / "ours")
    expected = prediction(pipeline.transformer, torch.float32)
    torch.testing.assert_close(prediction(ours, torch.float32), expected, rtol=1e-4, atol=1e-5)


def test_pipeline_can_switch_delete_and_unload_adapters(family_and_folder, tmp_path):
    family, folder = family_and_folder
    denoiser = adapted(family, fused=True, shared=True)
    save_adapter(denoiser, family.pipeline_class, str(tmp_path))
    bare = prediction(loaded(family), torch.float32)
    tuned = prediction(denoiser, torch.float32)
    pipeline = family.pipeline_class.from_pretrained(folder, transformer=denoiser, dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path, adapter_name="again")
    pipeline.set_adapters("again")
    assert torch.equal(prediction(denoiser, torch.float32), tuned)
    pipeline.set_adapters("again", 0.0)
    torch.testing.assert_close(prediction(denoiser, torch.float32), bare)
    pipeline.set_adapters(["default", "again"], [0.5, 0.5])
    torch.testing.assert_close(prediction(denoiser, torch.float32), tuned, rtol=1e-4, atol=1e-5)
    pipeline.disable_lora()
    assert torch.equal(prediction(denoiser, torch.float32), bare)
    pipeline.enable_lora()
    pipeline.delete_adapters("default")
    pipeline.set_adapters("again")
    assert torch.equal(prediction(denoiser, torch.float32), tuned)
    with pytest.raises(ValueError, match=r"merge.*4-bit"):
        pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert not [module for module in denoiser.modules() if isinstance(module, LoraLinear)]
    assert torch.equal(prediction(denoiser, torch.float32), bare)


def test_deepcopy_gives_the_same_output(family_and_folder):
    family, _ = family_and_folder
    denoiser = adapted(family, fused=True, shared=True)
    assert torch.equal(
        prediction(copy.deepcopy(denoiser), torch.float32), prediction(denoiser, torch.float32)
    )


def test_unquantized_base_gets_fused_layers(family_and_folder):
    family, _ = family_and_folder
    denoiser = load_base(family, None, device=torch.device("cpu"), dtype=torch.float32)
    targets = family.lora_targets("all-linear")
    add_lora(denoiser, rank=4, alpha=4, dropout=0.0, targets=targets, init="kaiming", seed=1)
    tuned = {type(module) for module in denoiser.modules() if isinstance(module, peft_layer.Linear)}
    assert tuned == {LoraLinear}


def test_blocks_fuse_with_a_users_own_adapter_config(family_and_folder):
    """The model comes from load_quantized, without a family, and the adapter from a LoraConfig of the user."""
    family, folder = family_and_folder
    model_class = type(loaded(family))
    model = load_quantized(
        model_class, folder / "transformer", QuantRecipe(), dtype=torch.bfloat16, device="cpu"
    )
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    model.add_adapter(fused_config(config))
    expected = prediction(model)
    family.fuse_blocks(model, BlockSettings(whole=False))
    torch.testing.assert_close(prediction(model), expected, rtol=5e-2, atol=5e-2)
