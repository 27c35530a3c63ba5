"""Model families: in training, the denoiser gets the same inputs as in the stock pipeline at inference."""

import json
import os
import re
import shutil

import pytest
import torch
from diffusers import FluxPipeline

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.encoders import load_encoders
from halfbyte.trainer.families.flux.family import Flux, image_ids, pack, unpack
from halfbyte.trainer.families.sd3.family import SD3


class Calls:
    """Records the stock pipeline's calls of its denoiser: keyword arguments and outputs."""

    def __init__(self, denoiser):
        self.denoiser = denoiser
        self.inputs = []
        self.answers = []
        denoiser.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module, arguments, inputs, answer):
        self.inputs.append(inputs)
        self.answers.append(answer[0])


def opened(family, folder):
    return family.open(str(folder), None, None)


def encoded(family, captions):
    memo = family.source.folder.parent / "memo"
    encoders = load_encoders(family, device=torch.device("cpu"), dtype=torch.bfloat16, memo=memo)
    return encoders.encode_texts(captions)


def stock_calls(family, **settings):
    pipeline = family.pipeline_class.from_pretrained(family.source.folder, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    calls = Calls(pipeline.transformer)
    generator = torch.Generator().manual_seed(0)
    pipeline("a photo of a cat", num_inference_steps=2, output_type="latent", generator=generator, **settings)
    return pipeline, calls


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_flux_predicts_like_the_stock_pipeline(mini_flux, size):
    height, width = size
    family = opened(Flux, mini_flux)
    pipeline, calls = stock_calls(family, height=height, width=width, guidance_scale=3.5)
    call, answer = calls.inputs[0], calls.answers[0]
    noisy = pipeline._unpack_latents(call["hidden_states"], height, width, pipeline.vae_scale_factor)
    text = encoded(family, ["a photo of a cat"])
    velocity = family.predict(calls.denoiser, noisy, call["timestep"].float(), text, 3.5)
    expected = pipeline._unpack_latents(answer, height, width, pipeline.vae_scale_factor)
    assert torch.equal(velocity, expected)


def test_flux_packing_and_ids_equal_those_of_diffusers():
    latents = torch.randn(2, 16, 12, 8)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 16, 12, 8))
    assert torch.equal(unpack(pack(latents), 12, 8), latents)
    stock = FluxPipeline._prepare_latent_image_ids(1, 6, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(12, 8, torch.device("cpu")), stock)


def test_sd3_predicts_like_the_stock_pipeline(mini_sd3):
    family = opened(SD3, mini_sd3)
    _, calls = stock_calls(family, height=64, width=64, guidance_scale=1.0)
    call, answer = calls.inputs[1], calls.answers[1]
    text = encoded(family, ["a photo of a cat"])
    sigma = call["timestep"].float() / 1000
    velocity = family.predict(calls.denoiser, call["hidden_states"], sigma, text, 1.0)
    # timestep -> sigma -> timestep may change the last bit of fp32.
    assert torch.allclose(velocity, answer, atol=2e-2)


def test_sd3_text_equals_that_of_the_stock_pipeline(mini_sd3):
    family = opened(SD3, mini_sd3)
    _, calls = stock_calls(family, height=64, width=64, guidance_scale=1.0)
    text = encoded(family, ["a photo of a cat"])
    assert torch.equal(text.prompt_embeds, calls.inputs[0]["encoder_hidden_states"])
    assert torch.equal(text.pooled_prompt_embeds, calls.inputs[0]["pooled_projections"])
    assert text.prompt_embeds.shape[1] == family.text_tokens


def test_flux_sigma_survives_the_transformers_cast(mini_flux):
    family = opened(Flux, mini_flux)
    sigma = family.representable(torch.rand(1000), torch.bfloat16)
    assert torch.equal(sigma.to(torch.bfloat16).float(), sigma)


def test_latents_are_scaled_by_the_vaes_config(mini_flux):
    family = opened(Flux, mini_flux)
    pipeline = family.pipeline_class.from_pretrained(family.source.folder, transformer=None)
    latents = torch.randn(1, 16, 8, 8)
    decoded = (
        family.scale_latents(latents) / pipeline.vae.config.scaling_factor
    ) + pipeline.vae.config.shift_factor
    assert torch.allclose(decoded, latents, atol=1e-6)


def test_schnell_pads_to_256_and_dev_to_512(mini_flux):
    family = opened(Flux, mini_flux)
    assert family.max_sequence_length == 512
    family.denoiser_config = family.denoiser_config | {"guidance_embeds": False}
    assert family.default_sequence_length() == 256


def test_a_model_of_another_family_is_refused(mini_sd3):
    with pytest.raises(ValueError, match=r"model\.family.*SD3Transformer2DModel"):
        Flux.open(str(mini_sd3), None, None)


def test_text_embedding_shapes(mini_flux):
    text = encoded(opened(Flux, mini_flux), ["one", "two"])
    assert isinstance(text, TextEmbedding)
    assert text.prompt_embeds.shape[:2] == (2, 512)
    assert not torch.equal(text.prompt_embeds[0], text.prompt_embeds[1])


def test_targets_are_presets_or_regular_expressions(mini_flux):
    family = Flux.open(str(mini_flux), None, None)
    every = [f"transformer_blocks.0.{name}" for name in ("attn.to_q", "ff.net.2")]
    every += [f"single_transformer_blocks.3.{name}" for name in ("attn.to_q", "proj_mlp", "proj_out")]
    matched = {
        preset: [n for n in every if re.fullmatch(family.lora_targets(preset), n)]
        for preset in family.target_presets
    }
    assert matched["all-linear"] == every
    assert matched["attention"] == [name for name in every if "attn" in name]
    assert not re.fullmatch(family.lora_targets("all-linear"), "proj_out"), (
        "the model's last layer is not in a block"
    )
    assert family.lora_targets(r".*\.to_q") == r".*\.to_q"


def test_sd3_presets_match_every_linear_layer_of_the_blocks_except_modulation(mini_sd3):
    family = opened(SD3, mini_sd3)
    attention = [
        f"transformer_blocks.11.{name}" for name in ("attn.to_q", "attn2.to_out.0", "attn.add_k_proj")
    ]
    feed_forward = [f"transformer_blocks.0.{name}" for name in ("ff.net.0.proj", "ff_context.net.2")]
    others = ["transformer_blocks.0.norm1.linear", "proj_out", "attn.to_q"]
    for preset, wanted in (("attention", attention), ("all-linear", attention + feed_forward)):
        pattern = family.lora_targets(preset)
        assert [n for n in attention + feed_forward + others if re.fullmatch(pattern, n)] == wanted


@pytest.mark.parametrize(
    ("dual", "kinds"),
    [([0, 1], [(0, 1), (2, 3), (4,)]), ([], [(0, 1, 2, 3), (4,)]), (None, [(0, 1, 2, 3), (4,)])],
)
def test_sd3_has_three_kinds_of_blocks(mini_sd3, dual, kinds):
    family = opened(SD3, mini_sd3)
    family.denoiser_config |= {"num_layers": 5, "dual_attention_layers": dual}
    names = [tuple(f"transformer_blocks.{number}" for number in kind) for kind in kinds]
    assert list(family.block_kinds()) == names
    some = family.config_of_blocks([kind[-1] for kind in names])
    assert some["num_layers"] == len(kinds)
    assert some["dual_attention_layers"] == ([0] if dual else [])


@pytest.mark.parametrize(
    ("component", "file"),
    [("transformer", "diffusion_pytorch_model.safetensors"), ("text_encoder_2", "model.safetensors")],
)
@pytest.mark.parametrize("damage", ["missing", "cut short", "a pickle"])
def test_a_missing_truncated_or_pickled_weight_file_is_an_error_when_opening(
    mini_flux, tmp_path, component, file, damage
):
    folder = shutil.copytree(mini_flux, tmp_path / "model")
    weights = folder / component / file
    if damage == "missing":
        index = {"weight_map": {"a": "part-1.safetensors"}}
        (folder / component / f"{file}.index.json").write_text(json.dumps(index))
    elif damage == "cut short":
        os.truncate(weights, weights.stat().st_size - 1)
    else:
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(RecipeError, match=rf"model\.path: .*{component}.*(missing|not a complete|pickled)"):
        Flux.open(str(folder), None, None)
