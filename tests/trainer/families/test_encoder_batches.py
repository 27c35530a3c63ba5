"""Batches of the encoders: an entry depends on the size of its batch, and not on what else is in it."""

import pytest
import torch

from halfbyte.trainer.families import encoders as encoders_module
from halfbyte.trainer.families.encoders import load_encoders
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.sd3.family import SD3

CAPTIONS = ["a photo of a cat", "two dogs", "", "a red house in the snow, in the morning"]


def encoders_of(family, folder, tmp_path, **options):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = family.open(str(folder), None, 24)
    return load_encoders(opened, device=device, dtype=torch.bfloat16, memo=tmp_path / "memo", **options)


@pytest.mark.parametrize(("family", "name"), [(Flux, "mini_flux"), (SD3, "mini_sd3")])
def test_rows_do_not_depend_on_the_rest_of_their_batch(family, name, request, tmp_path):
    encoders = encoders_of(family, request.getfixturevalue(name), tmp_path)
    whole = encoders.encode_texts(CAPTIONS)
    for place, caption in enumerate(CAPTIONS):
        repeated = encoders.encode_texts([caption] * len(CAPTIONS))
        for row in range(len(CAPTIONS)):
            assert torch.equal(repeated.prompt_embeds[row], whole.prompt_embeds[place])
            assert torch.equal(repeated.pooled_prompt_embeds[row], whole.pooled_prompt_embeds[place])
    pixels = torch.rand(3, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encoders.encode_images(pixels)
    for place in range(3):
        repeated = encoders.encode_images(pixels[place].expand(3, -1, -1, -1).contiguous())
        for row in range(3):
            assert torch.equal(repeated.mean[row], latents.mean[place])
            assert torch.equal(repeated.std[row], latents.std[place])


def test_a_large_cuda_device_takes_batches_except_of_int8(mini_flux, tmp_path, monkeypatch):
    plain = encoders_of(Flux, mini_flux, tmp_path)
    packed = encoders_of(Flux, mini_flux, tmp_path, t5_quant="int8")
    streamed = encoders_of(Flux, mini_flux, tmp_path, t5_quant="nf4", stream_t5=True)
    for encoders in (plain, packed, streamed):
        encoders.device = torch.device("cpu")
        assert (encoders.text_batch, encoders.image_batch(1024, 1024)) == (1, 1)
    monkeypatch.setattr(encoders_module, "total_bytes", lambda device: 24 * 2**30)
    for encoders in (plain, packed, streamed):
        encoders.device = torch.device("cuda")
        del encoders.__dict__["_takes_batches"]
    assert (plain.text_batch, plain.image_batch(1024, 1024), plain.image_batch(512, 512)) == (170, 4, 16)
    assert plain.image_batch(4096, 4096) == 1
    assert (packed.text_batch, packed.image_batch(1024, 1024)) == (1, 4)
    assert (streamed.text_batch, streamed.image_batch(1024, 1024)) == (1, 1)


def test_the_vae_in_bfloat16_has_its_own_entries(mini_flux, tmp_path):
    exact, rounded = (
        encoders_of(Flux, mini_flux, tmp_path, vae_dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact.latent_fingerprint.endswith(":float32"), "as in older versions"
    assert rounded.latent_fingerprint != exact.latent_fingerprint
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one, other = exact.encode_images(pixels), rounded.encode_images(pixels)
    assert one.mean.dtype == other.mean.dtype == torch.float32
    assert 0 < (one.mean - other.mean).norm() / one.mean.norm() < 0.1
