"""The shipped mini pipelines: small, loadable by stock diffusers, and a short run teaches each a new style."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.training.metrics import read_validation
from scripts.mini.denoiser import KINDS
from scripts.mini.images.corpus import Emoji
from scripts.mini.shared_parts import build_vae

from repository import RECIPES
from runs import run_here

BLUEPRINTS = RECIPES / "blueprints"
TOKENS = 32  # as the recipes and the pretraining pad captions


@dataclass(frozen=True)
class Mini:
    """A mini pipeline, and the results that a short run on it has to reach."""

    family: str
    steps: int
    loss_left: float  # share of the held-out loss over all sigmas
    level_left: float  # share of the held-out loss at each sigma
    distance_left: float  # share of the distance to the true images of held-out prompts
    kept: float  # largest change of an image without the style

    @property
    def folder(self) -> Path:
        return RECIPES / "mini" / self.family

    def tokenizer(self, pipeline: DiffusionPipeline) -> PreTrainedTokenizerBase:
        """T5's."""
        return getattr(pipeline, KINDS[self.family].t5_tokenizer)


MINIS = (
    Mini("flux", steps=100, loss_left=0.4, level_left=0.8, distance_left=0.4, kept=0.06),
    Mini("sd3", steps=120, loss_left=0.1, level_left=0.25, distance_left=0.4, kept=0.07),
)

# Prompts that the runs below sample: true images of the first four exist and are held out; the last has no style.
STYLED = (
    "a blueprint of an airplane",
    "a blueprint of an owl",
    "a blueprint of a turtle",
    "a blueprint of a teapot",
)
UNSTYLED = "a picture of a mushroom"


def pixels(file: Path) -> Tensor:
    """(64, 64, 3) fp32 in [0, 1]."""
    return torch.from_numpy(numpy.asarray(Image.open(file).convert("RGB"), dtype=numpy.float32)) / 255


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().mean().item()


@pytest.fixture(scope="module", params=MINIS, ids=lambda mini: mini.family)
def mini(request: pytest.FixtureRequest) -> Mini:
    return request.param


@pytest.fixture(scope="module")
def pipeline(mini: Mini) -> DiffusionPipeline:
    # fp32: bf16 convolutions take twenty times as long on a CPU.
    loaded = KINDS[mini.family].pipeline.from_pretrained(mini.folder, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def held_out() -> dict[str, Sample]:
    return {sample.caption: sample for sample in read_samples(BLUEPRINTS / "heldout")}


class TestFiles:
    def test_the_whole_pipeline_is_small(self, mini: Mini) -> None:
        assert sum(file.stat().st_size for file in mini.folder.rglob("*") if file.is_file()) < 16e6

    def test_no_path_of_the_machine_it_was_made_on(self, mini: Mini) -> None:
        configs = [json.loads(file.read_text("utf-8")) for file in mini.folder.rglob("config.json")]
        assert [config.get("_name_or_path", "") for config in configs] == [""] * len(configs)

    def test_every_tensor_is_bf16_and_finite(self, mini: Mini) -> None:
        for file in mini.folder.rglob("*.safetensors"):
            for name, tensor in load_file(file).items():
                assert tensor.dtype == torch.bfloat16, name
                assert tensor.isfinite().all(), name

    def test_linear_layers_are_multiples_of_64(self, pipeline: DiffusionPipeline) -> None:
        layers = [m for m in pipeline.transformer.modules() if isinstance(m, torch.nn.Linear)]
        assert layers
        assert all(layer.in_features % 64 == 0 and layer.out_features % 64 == 0 for layer in layers)

    def test_it_has_the_sizes_that_the_script_builds(self, mini: Mini, pipeline: DiffusionPipeline) -> None:
        captions = [sample.caption for sample in read_samples(BLUEPRINTS / "train")]
        emoji = tuple(Emoji("", caption, "other", ()) for caption in captions)
        built = KINDS[mini.family].build(emoji, build_vae())
        for name, part in built.components.items():
            if isinstance(part, torch.nn.Module):
                # Without the first dimension: the embedding has one row per word of the corpus.
                want, got = (
                    {key: tensor.shape[1:] for key, tensor in one.state_dict().items()}
                    for one in (part, getattr(pipeline, name))
                )
                assert want == got, name

    def test_the_card_names_licenses_and_commands(self, mini: Mini) -> None:
        card = (mini.folder / "README.md").read_text(encoding="utf-8")
        for words in (
            "Noto Color Emoji",
            "SIL Open Font License",
            "scripts.mini.pretrain",
            "musical-instrument",
        ):
            assert words in card
        assert "SIL OPEN FONT LICENSE" in (BLUEPRINTS / "OFL.txt").read_text(encoding="utf-8")


class TestPictures:
    def test_train_and_held_out_images_share_no_caption(self, held_out: dict[str, Sample]) -> None:
        trained = {sample.caption for sample in read_samples(BLUEPRINTS / "train")}
        blueprints = {caption for caption in trained if "blueprint" in caption}
        assert (len(blueprints), len(trained), len(held_out)) == (24, 32, 16)
        assert not trained & set(held_out)
        assert set(STYLED) <= set(held_out)

    def test_captions_fit_and_the_style_has_no_word(
        self, mini: Mini, pipeline: DiffusionPipeline, held_out: dict[str, Sample]
    ) -> None:
        tokenizer = mini.tokenizer(pipeline)
        for caption in held_out:
            assert len(tokenizer(caption).input_ids) <= TOKENS
        assert "▁blueprint" not in tokenizer.get_vocab()


class TestBase:
    def test_the_vae_reconstructs_a_style_it_was_not_trained_on(
        self, pipeline: DiffusionPipeline, held_out: dict[str, Sample]
    ) -> None:
        pictures = torch.stack([pixels(sample.path).permute(2, 0, 1) for sample in held_out.values()])
        with torch.no_grad():
            posterior = pipeline.vae.encode(pictures * 2 - 1).latent_dist
            decoded = pipeline.vae.decode(posterior.mean).sample / 2 + 0.5
        config = pipeline.vae.config
        scaled = (posterior.mean - config.shift_factor) * config.scaling_factor
        assert (decoded - pictures).square().mean() < 10 ** (-22 / 10), "22 dB"
        assert 0.4 < scaled.std() < 1.5

    def test_it_follows_the_prompt(self, pipeline: DiffusionPipeline) -> None:
        texts = ["a red heart on a yellow background", "a silhouette of a cat"]
        pictures = pipeline(
            texts,
            height=64,
            width=64,
            num_inference_steps=8,
            guidance_scale=2.0,
            max_sequence_length=TOKENS,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        heart, cat = pictures.float()
        assert (heart[:, 32, 32] - torch.tensor([0.9, 0.2, 0.2])).abs().max() < 0.25, "red in the middle"
        assert (heart[:, 2, 2] - torch.tensor([1.0, 0.9, 0.4])).abs().max() < 0.1, "yellow in the corner"
        assert cat[:, 2, 2].min() > 0.9
        dark = (cat.amax(dim=0) < 0.2).float().mean()
        light = (cat.amin(dim=0) > 0.8).float().mean()
        assert 0.1 < dark < 0.6
        assert dark + light > 0.85, "black on white and little between"


@pytest.fixture(scope="module")
def run(mini: Mini, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped recipe, shorter and with smaller batches."""
    folder = tmp_path_factory.mktemp("learned")
    return run_here(
        RECIPES / f"{mini.family}_mini.yaml",
        f"train.steps={mini.steps}",
        "train.batch_size=2",
        "validation.every=0",
        "sample.steps=8",
        f"sample.prompts={json.dumps([*STYLED, UNSTYLED])}",
        "output.export_base=false",
        "output.self_check=false",
        "checkpoint.every=1000",
        f"data.cache_dir={folder / 'cache'}",
        f"output.dir={folder / 'run'}",
    )


def drawn(run: Path, mini: Mini, place: int) -> tuple[Tensor, Tensor]:
    """Returns a prompt's images before and after training."""
    before, after = (pixels(run / "samples" / f"step-{step:06d}-{place:02d}.png") for step in (0, mini.steps))
    return before, after


class TestLearning:
    def test_the_held_out_loss_falls_at_every_sigma(self, run: Path, mini: Mini) -> None:
        before, after = read_validation(run / "validation.csv")
        assert (before.step, after.step) == (0, mini.steps)
        assert after.loss < mini.loss_left * before.loss
        assert all(after.by_sigma[sigma] < mini.level_left * loss for sigma, loss in before.by_sigma.items())

    def test_a_held_out_concept_is_generated_in_the_new_style(
        self, run: Path, mini: Mini, held_out: dict[str, Sample]
    ) -> None:
        distances: list[tuple[float, float]] = []
        for place, caption in enumerate(STYLED):
            truth = pixels(held_out[caption].path)
            base, learned = drawn(run, mini, place)
            distances.append((distance(base, truth), distance(learned, truth)))
            assert (learned.mean(dim=(0, 1)) - truth.mean(dim=(0, 1))).abs().max() < 0.15, "the paper's blue"
        before, after = (sum(one) / len(one) for one in zip(*distances, strict=True))
        assert after < mini.distance_left * before

    def test_a_prompt_without_the_style_is_generated_as_before(self, run: Path, mini: Mini) -> None:
        base, learned = drawn(run, mini, len(STYLED))
        assert distance(learned, base) < mini.kept
        assert learned[[0, 0, -1, -1], [0, -1, 0, -1]].min() > 0.85, "on white"
