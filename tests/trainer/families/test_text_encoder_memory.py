"""Memory while captions and images are encoded: first T5 as the recipe says, then the VAE, then neither."""

import gc
import weakref

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import T5Config, T5EncoderModel

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.layers.linear8bit import Linear8bit
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.serialize import save_quantized
from halfbyte.quant.load.transformer import load_quantized
from halfbyte.trainer.data.prepare import prepare
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families import t5
from halfbyte.trainer.families.encoders import load_encoders
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.sd3.family import SD3
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.runtime.device_memory import free_unused
from halfbyte.trainer.runtime.world import read_world

from runs import write_recipe

CPU = torch.device("cpu")
CAPTIONS = ["a photo of a cat", "two dogs"]
PIXELS = torch.zeros(1, 3, 64, 64)


def encoders_of(family, folder, tmp_path, setting="auto"):
    opened = family.open(str(folder), None, 24)
    return load_encoders(opened, device=CPU, dtype=torch.bfloat16, memo=tmp_path / "memo", t5_quant=setting)


def quantized_in(encoders):
    components = encoders._pipeline.components.items()
    return {
        name: {type(layer) for layer in model.modules() if isinstance(layer, QuantizedLayer)}
        for name, model in components
        if isinstance(model, nn.Module)
    }


@pytest.mark.parametrize(("family", "name"), [(Flux, "mini_flux"), (SD3, "mini_sd3")])
def test_only_t5_is_quantized_as_the_recipe_says(family, name, request, tmp_path):
    folder = request.getfixturevalue(name)
    plain = encoders_of(family, folder, tmp_path).encode_texts(CAPTIONS)
    encoders = encoders_of(family, folder, tmp_path, "int8")
    packed = encoders.encode_texts(CAPTIONS)
    kinds = quantized_in(encoders)
    assert kinds.pop(family.t5_component) == {Linear8bit}
    assert set().union(*kinds.values()) == set()
    assert torch.equal(plain.pooled_prompt_embeds, packed.pooled_prompt_embeds)
    difference = (
        packed.prompt_embeds - plain.prompt_embeds
    ).float().norm() / plain.prompt_embeds.float().norm()
    assert 0 < difference < 0.06


def test_each_quantization_of_t5_has_its_own_embeddings_in_the_cache(mini_flux, tmp_path):
    prints = {
        setting: encoders_of(Flux, mini_flux, tmp_path, setting).text_fingerprint
        for setting in ("auto", "none", "int8", "nf4")
    }
    assert prints["auto"] == prints["none"]
    assert len(set(prints.values())) == 3
    latents = {encoders_of(Flux, mini_flux, tmp_path, setting).latent_fingerprint for setting in prints}
    assert len(latents) == 1


def test_auto_quantizes_a_large_t5(mini_flux, monkeypatch):
    folder = mini_flux / "text_encoder_2"
    assert t5.resolve_quant("auto", folder) == "none"
    monkeypatch.setattr(t5, "_LARGE", 10**5)
    assert t5.resolve_quant("auto", folder) == "int8"
    assert t5.resolve_quant("none", folder) == "none"


def test_a_damaged_config_is_a_recipe_error(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"^model\.path: .*config\.json"):
        t5.resolve_quant("auto", tmp_path)


def test_the_vae_and_the_text_encoders_are_never_in_memory_together(mini_flux, tmp_path):
    encoders = encoders_of(Flux, mini_flux, tmp_path)
    first = encoders.encode_texts(CAPTIONS)
    text_encoder = weakref.ref(encoders._pipeline.text_encoder_2)
    latents = encoders.encode_images(PIXELS)
    gc.collect()
    assert text_encoder() is None
    vae = weakref.ref(encoders._vae)
    again = encoders.encode_texts(CAPTIONS)
    gc.collect()
    assert vae() is None
    assert torch.equal(first.prompt_embeds, again.prompt_embeds)
    assert torch.equal(latents.mean, encoders.encode_images(PIXELS).mean)


def test_a_streamed_t5_gives_the_same_embeddings(tmp_path):
    torch.manual_seed(0)
    config = T5Config(num_layers=5, d_model=64, d_ff=128, num_heads=4, d_kv=16, vocab_size=50)
    T5EncoderModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "t5")
    how = {"quant": "int8", "dtype": torch.bfloat16, "device": CPU}
    plain, streamed = (t5.load_t5(tmp_path / "t5", **how, stream=stream) for stream in (False, True))
    packed = [layer for layer in streamed.modules() if isinstance(layer, QuantizedLayer)]
    assert len(packed) == 5 * 6
    assert all(layer.on_host for layer in packed)
    tokens = torch.arange(20)[None] % 50
    with torch.no_grad():
        expected = plain(tokens).last_hidden_state
        assert all(torch.equal(streamed(tokens).last_hidden_state, expected) for _ in range(2))
        for layer in packed:  # proves that the device's bytes are copied from here
            layer.weight.data.zero_()
        assert not torch.equal(streamed(tokens).last_hidden_state, expected)


@pytest.mark.parametrize(("family", "name"), [(Flux, "mini_flux"), (SD3, "mini_sd3")])
def test_encoders_with_a_streamed_t5_encode_the_same(family, name, request, tmp_path):
    folder = request.getfixturevalue(name)
    opened = family.open(str(folder), None, 24)
    how = {"device": CPU, "dtype": torch.bfloat16, "memo": tmp_path / "memo", "t5_quant": "int8"}
    plain, streamed = (load_encoders(opened, **how, stream_t5=stream) for stream in (False, True))
    expected, found = plain.encode_texts(CAPTIONS), streamed.encode_texts(CAPTIONS)
    assert torch.equal(found.prompt_embeds, expected.prompt_embeds)
    assert torch.equal(found.pooled_prompt_embeds, expected.pooled_prompt_embeds)
    # Both use the same entries of the cache.
    assert streamed.text_fingerprint == plain.text_fingerprint


def test_streaming_a_t5_that_is_not_quantized_is_an_error(mini_flux, tmp_path):
    opened = Flux.open(str(mini_flux), None, 24)
    encoders = load_encoders(opened, device=CPU, dtype=torch.bfloat16, memo=tmp_path, stream_t5=True)
    with pytest.raises(RecipeError, match=r"^model\.stream_text_encoder: got true"):
        encoders.encode_texts(CAPTIONS)
    with pytest.raises(RecipeError, match=r"expected false.* model\.text_encoder_quant is none"):
        load_recipe(
            write_recipe(tmp_path, mini_flux),
            ["model.stream_text_encoder=true", "model.text_encoder_quant=none"],
        )


_PAGE = 2 << 20  # bytes


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["none", "int8", "nf4"])
def test_the_encoders_leave_nothing_on_the_gpu(mini_flux, tmp_path, setting):
    file = write_recipe(tmp_path, mini_flux)
    family = Flux.open(str(mini_flux), None, 24)
    world = read_world({})
    # The libraries' workspaces and the formats' tables stay allocated; the first round creates them.
    for folder in ("first", "second"):
        overrides = [f"model.text_encoder_quant={setting}", f"data.cache_dir={tmp_path / folder}"]
        free_unused(world.device)
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        prepare(load_recipe(file, overrides), family, world, Console(quiet=True))
        assert torch.cuda.max_memory_allocated() > before[0] + 10**5, "nothing was encoded"
    assert torch.cuda.memory_allocated() == before[0]
    # What stays may be on other pages than before, which expandable segments give back one by one.
    assert torch.cuda.memory_reserved() <= before[1] + 10 * _PAGE


@pytest.mark.gpu
def test_after_loading_only_the_packed_model_is_on_the_gpu(mini_flux, tmp_path):
    device = torch.device("cuda")
    opened = Flux.open(str(mini_flux), None, 24)
    recipe = QuantRecipe()
    cold = load_base(opened, recipe, device=device, dtype=torch.bfloat16)
    footprint = cold.get_memory_footprint()
    save_quantized(cold, tmp_path / "packed")
    codes = {name: tensor.cpu() for name, tensor in cold.state_dict().items()}
    del cold
    gc.collect()
    before = torch.cuda.memory_allocated()
    warm = load_quantized(
        opened.denoiser_class, tmp_path / "packed", None, dtype=torch.bfloat16, device=device
    )
    gc.collect()
    # The allocator gives each small tensor a block of 512 bytes.
    tensors = sum(1 for _ in warm.state_dict())
    assert torch.cuda.memory_allocated() - before < footprint + 512 * 2 * tensors
    for name, tensor in warm.state_dict().items():
        assert torch.equal(tensor.cpu(), codes[name]), name
