"""Tests that text encoders and VAE are only used if every tensor is there, in its shape, and finite."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from opened_model import CLIP, LFS_POINTER, VAE, copy_of, edit_tensors, open_and_encode, replace
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.catalog import FAMILIES

T5 = "text_encoder_2/model.safetensors"
Q = "encoder.layers.0.self_attn.q_proj.weight"


def refusal(folder: Path, family: str = "flux") -> str:
    """Returns the message with which a model is refused."""
    with pytest.raises(RecipeError) as refused:
        open_and_encode(family, folder, folder.parent / "memo")
    assert refused.value.exit_code == 2
    assert str(refused.value).startswith("model.path: ")
    return str(refused.value)


def openai_names(tensors: dict[str, Tensor]) -> None:
    """Names CLIP's tensors as OpenAI and ComfyUI's older files do."""
    for name in list(tensors):
        changed = name.replace("encoder.layers.", "transformer.resblocks.").replace(".self_attn.", ".attn.")
        tensors[changed] = tensors.pop(name)


def flip_bit_in_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(b"layers.0.self_attn.q_proj.weight")] ^= 1
    replace(file, bytes(content))


def cut(file: Path) -> None:
    replace(file, file.read_bytes()[:-5000])


def pickled(file: Path) -> None:
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def fp16_variant(file: Path) -> None:
    save_file({k: v.half() for k, v in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
    file.unlink()


def first_value(tensors: dict[str, Tensor], value: float) -> None:
    tensors[min(name for name in tensors if name.endswith("weight"))].flatten()[0] = value


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "not a complete safetensors file"),
    "cut in the header": (lambda file: replace(file, file.read_bytes()[:100]), "not a complete"),
    "empty": (lambda file: replace(file, b""), "not a complete"),
    "pointer": (lambda file: replace(file, LFS_POINTER), "git lfs pull"),
    "pickled": (pickled, "save_pretrained"),
    "fp16 variant": (fp16_variant, ".fp16.safetensors"),
    "gone": (Path.unlink, "missing"),
    "NaN": (lambda file: edit_tensors(file, lambda t: first_value(t, float("nan"))), "NaN or infinite"),
    "infinite": (lambda file: edit_tensors(file, lambda t: first_value(t, float("inf"))), "NaN or infinite"),
    "tensor missing": (lambda file: edit_tensors(file, lambda t: t.pop(max(t))), "1 missing"),
    "tensor added": (lambda file: edit_tensors(file, lambda t: t.update(x=torch.zeros(1))), "1 unexpected"),
    "shape": (
        lambda file: edit_tensors(file, lambda t: t.update({max(t): t[max(t)][:-1].clone()})),
        "expected (",
    ),
    "integers": (lambda file: edit_tensors(file, lambda t: t.update({max(t): t[max(t)].int()})), "int32"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("part", [CLIP, T5, VAE])
def test_a_part_with_a_fault_is_refused_by_name(
    tmp_path: Path, mini_flux: Path, part: str, fault: str
) -> None:
    model = copy_of(mini_flux, tmp_path / "model")
    damage, expected = FAULTS[fault]
    damage(model / part)
    message = refusal(model)
    assert f"{Path(part).parent.name} missing" in message or str((model / part).parent) in message
    assert expected in message


@pytest.mark.parametrize("clip", ["text_encoder", "text_encoder_2"])
def test_both_clips_of_sd3_are_checked(tmp_path: Path, mini_sd3: Path, clip: str) -> None:
    model = copy_of(mini_sd3, tmp_path / "model")
    edit_tensors(model / clip / "model.safetensors", lambda t: t.pop("text_projection.weight"))
    message = refusal(model, "sd3")
    assert f"/{clip}: " in message
    assert "text_projection.weight" in message


def test_a_clip_under_other_names_is_refused(tmp_path: Path, mini_flux: Path) -> None:
    model = copy_of(mini_flux, tmp_path / "model")
    edit_tensors(model / CLIP, openai_names)
    assert "resblocks" in refusal(model)


def test_one_flipped_bit_in_a_clips_header_is_refused(tmp_path: Path, mini_flux: Path) -> None:
    model = copy_of(mini_flux, tmp_path / "model")
    flip_bit_in_header(model / CLIP)
    assert "1 missing" in refusal(model)


def test_a_tensor_under_both_of_its_names_is_refused(tmp_path: Path, mini_flux: Path) -> None:
    model = copy_of(mini_flux, tmp_path / "model")
    edit_tensors(model / CLIP, lambda t: t.update({f"text_model.{Q}": t[Q] + 1}))
    assert "the same tensor" in refusal(model)


def test_no_weights_are_read_before_the_headers_of_all_parts_are_checked(
    tmp_path: Path, mini_flux: Path
) -> None:
    model = copy_of(mini_flux, tmp_path / "model")
    edit_tensors(model / VAE, lambda t: t.pop("encoder.conv_in.bias"))
    with pytest.raises(RecipeError, match=r"encoder\.conv_in\.bias"):
        FAMILIES["flux"].open(str(model), None, 24)


def test_older_names_and_harmless_tensors_are_read_as_before(tmp_path: Path, mini_flux: Path) -> None:
    """Files as transformers 4 wrote them, a whole CLIP's other tensors, and an older VAE's attention."""
    model = copy_of(mini_flux, tmp_path / "model")

    def older_clip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[f"text_model.{name}"] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        tensors["logit_scale"] = torch.tensor(4.6)

    def older_vae(tensors: dict[str, Tensor]) -> None:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            for name in [name for name in tensors if f".{new}." in name]:
                tensors[name.replace(new, old)] = tensors.pop(name)

    edit_tensors(model / CLIP, older_clip)
    edit_tensors(model / VAE, older_vae)
    assert "decoder.mid_block.attentions.0.query.weight" in load_file(model / VAE)
    text, latents = open_and_encode("flux", model, tmp_path / "memo")
    expected_text, expected_latents = open_and_encode("flux", mini_flux, tmp_path / "memo")
    assert torch.equal(text.prompt_embeds, expected_text.prompt_embeds)
    assert torch.equal(text.pooled_prompt_embeds, expected_text.pooled_prompt_embeds)
    assert torch.equal(latents.mean, expected_latents.mean)


def test_the_encoders_hold_the_weights_of_from_pretrained(tmp_path: Path, mini_flux: Path) -> None:
    """The cache's entries must stay bitwise what they were when the stock pipeline loaded the encoders."""
    text, latents = open_and_encode("flux", mini_flux, tmp_path / "memo")
    stock = FluxPipeline.from_pretrained(mini_flux, transformer=None, vae=None, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        embeds, pooled, _ = stock.encode_prompt(
            "a photo of a dog", "a photo of a dog", max_sequence_length=24
        )
        vae = AutoencoderKL.from_pretrained(mini_flux / "vae", torch_dtype=torch.float32)
        moments = vae.encode(torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)).latent_dist
    assert torch.equal(text.prompt_embeds, embeds)
    assert torch.equal(text.pooled_prompt_embeds, pooled)
    assert torch.equal(latents.mean, moments.mean)
    assert torch.equal(latents.std, moments.std)
