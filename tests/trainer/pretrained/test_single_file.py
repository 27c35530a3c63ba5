"""Tests FLUX from one file, with BFL's and ComfyUI's names in bf16 and fp8, against diffusers' own conversion."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.families.flux.names import flux_names
from halfbyte.trainer.pretrained.layer_names import swap_halves

from probe import prediction
from runs import run_here, write_recipe

WIDTH, FULL = 64, 3072  # the miniature's width, and the width that diffusers' conversion hard-codes


@pytest.fixture(scope="module")
def original(mini_flux):
    """The miniature's tensors under the authors' names."""
    model = FluxTransformer2DModel.from_pretrained(mini_flux, subfolder="transformer", dtype=torch.bfloat16)
    state, tensors = model.state_dict(), {}
    for name in flux_names(model.config):
        for leaf, own in ((name.leaf, "weight"), ("bias", "bias")):
            if f"{name.parts[0]}.{own}" in state:
                stacked = torch.cat([state.pop(f"{part}.{own}") for part in name.parts])
                tensors[f"{name.name}.{leaf}"] = swap_halves(stacked) if name.swapped else stacked
    assert not state
    return tensors


def opened(model, file):
    return FAMILIES["flux"].open(str(model), None, None, file)


def loaded(model, file, recipe=None, dtype=torch.bfloat16):
    return load_base(opened(model, file), recipe, device=torch.device("cpu"), dtype=dtype)


def full_width(tensors):
    """Pads the rows of linear1 to the size of the full model, which diffusers' conversion expects."""
    padded = {}
    for name, tensor in tensors.items():
        if ".linear1." in name:
            parts = tensor.split((WIDTH, WIDTH, WIDTH, 4 * WIDTH))
            rows = [FULL, FULL, FULL, 4 * FULL]
            filled = [
                torch.cat((part, part.new_zeros(size - len(part), *part.shape[1:])))
                for part, size in zip(parts, rows, strict=True)
            ]
            tensor = torch.cat(filled)
        padded[name] = tensor
    return padded


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_the_result_matches_diffusers_conversion(original, mini_flux, tmp_path, prefix):
    others = {"vae.decoder.weight": torch.zeros(2)} if prefix else {}
    save_file(
        {prefix + name: tensor for name, tensor in original.items()} | others, tmp_path / "flux.safetensors"
    )
    state = loaded(mini_flux, tmp_path / "flux.safetensors").state_dict()
    expected = convert_flux_transformer_checkpoint_to_diffusers(full_width(original))
    assert expected.keys() == state.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor[: len(state[name])], state[name]), name


def test_a_file_is_quantized_like_a_folder(original, mini_flux, tmp_path):
    save_file(original, tmp_path / "flux.safetensors")
    ours = loaded(mini_flux, tmp_path / "flux.safetensors", QuantRecipe("nf4"))
    folder = load_base(
        opened(mini_flux, None), QuantRecipe("nf4"), device=torch.device("cpu"), dtype=torch.bfloat16
    )
    assert all(torch.equal(tensor, folder.state_dict()[name]) for name, tensor in ours.state_dict().items())


def described(kind):
    """Encodes a layer's quantization as newer ComfyUI files do."""
    return torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale", None])
@pytest.mark.parametrize("each_row", [False, True])
def test_fp8_is_multiplied_by_its_scales(original, mini_flux, tmp_path, ending, each_row):
    tensors, expected = {}, {}
    for name, tensor in original.items():
        if not name.endswith(".weight") or tensor.dim() != 2:
            tensors[name] = expected[name] = tensor
            continue
        scale = torch.ones(())
        if ending is not None:
            scale = tensor.float().abs().amax(dim=1 if each_row else None) / 448
        rows = scale.reshape(-1, 1) if scale.dim() else scale
        tensors[name] = (tensor.float() / rows).to(torch.float8_e4m3fn)
        expected[name] = (tensors[name].float() * rows).bfloat16()
        if ending is not None:
            tensors[name.removesuffix("weight") + ending] = scale
            tensors[name.removesuffix("weight") + "scale_input"] = torch.ones(())
        if ending == "weight_scale":
            tensors[name.removesuffix("weight") + "comfy_quant"] = described("float8_e4m3fn")
    tensors["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "fp8.safetensors")
    save_file(expected, tmp_path / "plain.safetensors")
    ours, plain = (
        loaded(mini_flux, tmp_path / f"{name}.safetensors").state_dict() for name in ("fp8", "plain")
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())


def test_a_run_trains_on_a_file(original, mini_flux, tmp_path):
    save_file(original, tmp_path / "flux.safetensors")
    quick = ("sample.prompts=[]", "train.steps=1", "train.grad_accumulation=1")
    bare = tmp_path / "model"
    bare.symlink_to(mini_flux)
    run = run_here(write_recipe(tmp_path, bare), *quick, f"model.transformer={tmp_path / 'flux.safetensors'}")
    again = run_here(write_recipe(tmp_path, mini_flux, name="again"), *quick)
    first, second = (
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors") for folder in (run, again)
    )
    assert all(torch.equal(first[name], second[name]) for name in second)
    errors = [
        json.loads((folder / "transformer" / "quantization_error.json").read_text())
        for folder in (run, again)
    ]
    assert errors[0]["layers"] == errors[1]["layers"]
    assert errors[0]["relative"] == pytest.approx(errors[1]["relative"], rel=1e-6)
    assert prediction(loaded(mini_flux, tmp_path / "flux.safetensors")).isfinite().all()


def test_tensors_that_do_not_match_are_named(original, mini_flux, mini_sd3, tmp_path):
    file = tmp_path / "flux.safetensors"
    with pytest.raises(RecipeError, match=r"model\.transformer: .*no such file or folder"):
        opened(mini_flux, file)
    file.write_bytes(b"torn")
    with pytest.raises(RecipeError, match=r"model\.transformer: .*flux\.safetensors: "):
        opened(mini_flux, file)
    tensors = dict(original)
    del tensors["guidance_in.in_layer.weight"]
    tensors["double_blocks.2.img_mod.lin.weight"] = torch.zeros(2, 2)
    save_file(tensors, file)
    with pytest.raises(RecipeError, match=r"1 missing \(guidance_in.*1 unexpected \(double_blocks\.2"):
        loaded(mini_flux, file)
    save_file(original | {"img_in.weight.quant_state.bitsandbytes__nf4": torch.zeros(2)}, file)
    with pytest.raises(RecipeError, match=r"quantized \(img_in\.weight\.quant_state\.bitsandbytes__nf4\)"):
        loaded(mini_flux, file)
    marked = {"img_in.comfy_quant": described("int8_tensorwise")}
    save_file(original | marked, file)
    with pytest.raises(RecipeError, match=r"img_in\.comfy_quant .*'int8_tensorwise'.*bfloat16; accepted"):
        loaded(mini_flux, file)
    save_file(original | {"img_in.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, file)
    with pytest.raises(RecipeError, match=r"img_in\.comfy_quant does not describe"):
        loaded(mini_flux, file)
    narrow = {name: t[:-1].contiguous() if name.endswith("qkv.weight") else t for name, t in original.items()}
    save_file(narrow, file)
    with pytest.raises(RecipeError, match=r"expected 192 rows, got shape \(191, 64\)"):
        loaded(mini_flux, file)
    with pytest.raises(RecipeError, match=r"model\.transformer: .*flux\b"):
        FAMILIES["sd3"].open(str(mini_sd3), None, None, file)
