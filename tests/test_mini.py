"""The small pipelines: complete, loadable by stock diffusers, alive in every part."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from halfbyte.trainer.buckets import Cropping, views_of
from halfbyte.trainer.data import load_pixels, read_samples
from halfbyte.trainer.families.base import TextEmbedding
from halfbyte.trainer.families.sd3 import SD3
from halfbyte.trainer.mini import build_flux_pipeline, build_sd3_pipeline
from halfbyte.trainer.mini_tokenizers import clip_tokenizer, t5_tokenizer
from halfbyte.trainer.randomness import generator

BUILDERS = {"flux": build_flux_pipeline, "sd3": build_sd3_pipeline}
CLASSES = {"flux": FluxPipeline, "sd3": StableDiffusion3Pipeline}
MINI = Path(__file__).parents[1] / "recipes" / "mini"
CAPTIONS = ("A photo of a cat; its eyes are green.", "A photo of a rocket at night.")


def weights(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module)
        for key, tensor in component.state_dict().items()
    }


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_seed_gives_the_same_weights_and_another_seed_others(kind: str) -> None:
    first, again, other = (weights(BUILDERS[kind](seed)) for seed in (0, 0, 1))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = [key for key in first if not key.endswith(("position_ids", "pos_embed.pos_embed"))]
    assert not any(torch.equal(first[key], other[key]) for key in drawn)


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_saved_pipeline_loads_with_stock_diffusers(kind: str, tmp_path: Path) -> None:
    pipeline = BUILDERS[kind](0)
    pipeline.save_pretrained(tmp_path)
    loaded = CLASSES[kind].from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    want, got = weights(pipeline), weights(loaded)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    for name in (name for name in pipeline.components if name.startswith("tokenizer")):
        padded = {"padding": "max_length", "max_length": 77}
        assert getattr(pipeline, name)(CAPTIONS[0], **padded) == getattr(loaded, name)(CAPTIONS[0], **padded)


@pytest.mark.parametrize("kind", BUILDERS)
def test_linear_layers_are_whole_blocks_of_64(kind: str) -> None:
    layers = [m for m in BUILDERS[kind](0).transformer.modules() if isinstance(m, nn.Linear)]
    assert layers
    assert all(layer.in_features % 64 == 0 and layer.out_features % 64 == 0 for layer in layers)


@pytest.mark.parametrize("kind", BUILDERS)
def test_captions_change_the_embeddings(kind: str) -> None:
    pipeline = BUILDERS[kind](0)
    with torch.no_grad():
        embeds = [pipeline.encode_prompt(*[caption] * (2 if kind == "flux" else 3)) for caption in CAPTIONS]
    tensors = [[part for part in embed if isinstance(part, Tensor) and part.ndim > 1] for embed in embeds]
    differing = [not torch.equal(a, b) for a, b in zip(*tensors, strict=True)]
    assert sum(differing) >= 2, "prompt and pooled embeddings both follow the caption"
    assert all(part.isfinite().all() for part in tensors[0])


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_few_sampling_steps_stay_finite_and_of_order_one(kind: str) -> None:
    pipeline = BUILDERS[kind](0)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        CAPTIONS[0],
        height=64,
        width=64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    assert latents.isfinite().all()
    assert 0.3 < latents.float().std() < 10


class TestShippedSD3:
    """What scripts/make_mini.py writes; tests/test_shipped_mini.py has the pretrained FLUX."""

    def test_it_is_what_the_script_makes_and_small(self) -> None:
        folder = MINI / "sd3"
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 3e6
        shipped = weights(StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.bfloat16))
        built = weights(build_sd3_pipeline(0))
        assert {key: tensor.shape for key, tensor in shipped.items()} == {
            key: tensor.shape for key, tensor in built.items()
        }
        texts = [key for key in built if key.startswith("text_encoder")]
        assert all(torch.equal(shipped[key], built[key]) for key in texts)
        for tokenizer in folder.glob("tokenizer*/tokenizer.json"):
            built_tokenizer = getattr(build_sd3_pipeline(0), tokenizer.parent.name)
            saved = json.loads(tokenizer.read_text(encoding="utf-8"))
            assert saved["model"] == json.loads(built_tokenizer.backend_tokenizer.to_str())["model"]

    def test_no_path_of_the_machine_it_was_made_on(self) -> None:
        configs = [json.loads(file.read_text("utf-8")) for file in (MINI / "sd3").rglob("config.json")]
        assert [config.get("_name_or_path", "") for config in configs] == [""] * len(configs)

    def test_every_tensor_is_bf16(self) -> None:
        for file in (MINI / "sd3").rglob("*.safetensors"):
            assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}

    def test_the_vae_keeps_the_photographs(self) -> None:
        vae = AutoencoderKL.from_pretrained(MINI / "sd3" / "vae", torch_dtype=torch.float32)
        views = views_of(read_samples(MINI.parent / "photos"), Cropping(64, 16), seed=0)
        latents: list[Tensor] = []
        for (view,) in views[:8]:
            pixels = load_pixels(view.sample, view.box, (view.width, view.height), view.flip)[None]
            with torch.no_grad():
                posterior = vae.encode(pixels).latent_dist
                decoded = vae.decode(posterior.mean).sample
            colors = nn.functional.avg_pool2d(pixels, 16)
            assert nn.functional.avg_pool2d(decoded - pixels, 16).abs().mean() < 0.25 * colors.std()
            assert (decoded - pixels).std() < 0.6 * pixels.std(), "a flat picture would have 1"
            assert 0.01 < posterior.std.mean() < 0.3
            latents.append((posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor)
        assert 0.7 < torch.cat([latent.flatten() for latent in latents]).std() < 1.4

    def test_its_transformer_has_learned_from_photographs(self, tmp_path: Path) -> None:
        family = SD3.open(str(MINI / "sd3"), None, 64)
        encoders = family.load_encoders(device=torch.device("cpu"), dtype=torch.bfloat16, memo=tmp_path)
        text = encoders.encode_texts(["A photo."])
        text = TextEmbedding(text.prompt_embeds.float(), text.pooled_prompt_embeds.float())
        denoiser = SD3.denoiser_class.from_pretrained(MINI / "sd3" / "transformer")
        losses: list[float] = []
        for (view,) in views_of(read_samples(MINI.parent / "photos"), Cropping(64, 16), seed=0):
            pixels = load_pixels(view.sample, view.box, (view.width, view.height), view.flip)
            latents = family.scale_latents(encoders.encode_images(pixels[None]).mean)
            noise = torch.randn(latents.shape, generator=generator(0, "noise", view.sample.index))
            sigma = torch.tensor([0.5])
            with torch.no_grad():
                velocity = family.predict(denoiser, (latents + noise) / 2, sigma, text, 1.0)
            losses.append(nn.functional.mse_loss(velocity, noise - latents).item())
        assert sum(losses) / len(losses) < 1.0, "no prediction at all has a loss of 2"


def test_clip_reads_any_text_without_loss_up_to_case_and_spaces() -> None:
    tokenizer = clip_tokenizer()
    text = "a photo of a white cup, 3 coins & a café named Ωmega 🚀"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id == len(tokenizer) - 1
    back = tokenizer.decode(ids, skip_special_tokens=True)
    assert back.replace(" ", "") == text.lower().replace(" ", "")
    assert len(tokenizer("a photo of the photo").input_ids) == 7, "common words are one token each"


def test_tokens_are_the_same_in_every_process() -> None:
    text = "A photo of a white cup, 3 coins & a café."
    clip = [766, 320, 548, 519, 320, 630, 66, 640, 267, 274, 544, 681, 261, 320, 569, 69, 127, 358, 269, 767]
    assert clip_tokenizer()(text).input_ids == clip
    t5 = [426, 208, 203, 201, 222, 308, 15, 3, 22, 363, 3, 9, 201, 3, 70, 68, 73, 169, 17, 1]
    assert t5_tokenizer()(text).input_ids == t5


def test_t5_reads_latin_text_without_loss() -> None:
    tokenizer = t5_tokenizer()
    text = 'A photo of a White cup; café no. 5, "quoted" (ÀÖÿ) [x] {y} ~'
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.pad_token_id == 0
