"""The small pipelines: complete, loadable by stock diffusers, alive in every part."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from torch import Tensor, nn

from scripts.mini.tiny_pipelines import build_flux_pipeline, build_sd3_pipeline
from scripts.mini.tokenizer_files import clip_tokenizer, t5_tokenizer

BUILDERS = {"flux": build_flux_pipeline, "sd3": build_sd3_pipeline}
CLASSES = {"flux": FluxPipeline, "sd3": StableDiffusion3Pipeline}
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
def test_linear_layers_are_multiples_of_64(kind: str) -> None:
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
