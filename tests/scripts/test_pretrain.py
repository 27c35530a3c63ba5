"""Pretraining of the mini pipelines: corpus, styles, captions, and each stage for a step or two."""

import random
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.objective.shift import NoShift
from scripts.mini.denoiser import KINDS, Scaling, Stage, corrupt, distill_guidance, train_denoiser
from scripts.mini.images.blueprints import HELD_OUT, KEPT, TRAINED
from scripts.mini.images.captions import CAPTION_TOKENS, LOOKS, caption, styled, vocabulary
from scripts.mini.images.corpus import HELD_OUT_GROUP, Corpus, Emoji, _read_names
from scripts.mini.images.looks import Batch, PictureTable, as_input, draw_all, read_captions
from scripts.mini.images.styles import BACKGROUNDS, HELD_OUT_STYLE, STYLES
from scripts.mini.pace import Pace
from scripts.mini.shared_parts import bf16_copy, build_vae
from scripts.mini.vae import train_vae

CPU = torch.device("cpu")
NAMES = """# group: Animals
# subgroup: animal-mammal
1F408                     ; fully-qualified     # 🐈 E0.7 cat
1F408 200D 2B1B           ; fully-qualified     # 🐈‍⬛ E13.0 black cat
# subgroup: hands
1F44F                     ; fully-qualified     # 👏 E0.6 clapping hands
1F44F 1F3FB               ; fully-qualified     # 👏🏻 E1.0 clapping hands: light skin tone
263A                      ; unqualified         # ☺ E0.6 smiling face
"""
WORDS = """
alpaca balloon candle dolphin envelope falcon guitar hammer igloo jungle kangaroo lantern mandolin notebook oyster
penguin quartz raccoon sandwich telescope unicorn volcano walrus xylophone yogurt zeppelin harmonica accordion
butterfly strawberry microscope submarine
"""


def emoji() -> tuple[Emoji, ...]:
    """Returns enough words for CLIP's merges, some keywords, and one held-out group."""
    words = WORDS.split()
    groups = {word: HELD_OUT_GROUP if word == "guitar" else "other" for word in words}
    return tuple(Emoji(word[0], word, groups[word], (f"{word} thing", "object")) for word in words)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Discs of different colors and sizes."""
    row = torch.arange(64) - 31.5
    distance = (row[:, None].square() + row.square()).sqrt()
    sprites: list[Tensor] = []
    for index in range(len(emoji())):
        opacity = (distance < 8 + index / 2).float().mul(255)[None]
        color = torch.tensor([7 * index, 255 - 7 * index, 128.0])[:, None, None].expand(3, 64, 64)
        sprites.append(torch.cat((color * (opacity > 0), opacity)).byte())
    return Corpus(emoji(), torch.stack(sprites))


@pytest.fixture(scope="module")
def pipeline(corpus: Corpus) -> FluxPipeline:
    torch.manual_seed(0)
    return KINDS["flux"].build(corpus.emoji, build_vae().requires_grad_(False))


@pytest.fixture(scope="module")
def table(corpus: Corpus, pipeline: FluxPipeline) -> PictureTable:
    few = Corpus(corpus.emoji[:2], corpus.sprites[:2])
    captions = read_captions(few, pipeline.tokenizer, pipeline.tokenizer_2, each=2, seed=0, device=CPU)
    return PictureTable(few, pipeline.vae, captions, CPU)


class TestCorpus:
    def test_names_have_groups_and_no_skin_tones(self, tmp_path: Path) -> None:
        (tmp_path / "names.txt").write_text(NAMES, encoding="utf-8")
        names = [(name, group) for _, name, group in _read_names(tmp_path / "names.txt")]
        assert names == [
            ("cat", "animal-mammal"),
            ("black cat", "animal-mammal"),
            ("clapping hands", "hands"),
        ]

    def test_a_saved_corpus_loads_unchanged(self, corpus: Corpus, tmp_path: Path) -> None:
        corpus.save(tmp_path)
        again = Corpus.load(tmp_path)
        assert again.emoji == corpus.emoji
        assert torch.equal(again.sprites, corpus.sprites)

    def test_a_group_can_be_left_out(self, corpus: Corpus) -> None:
        rest = corpus.without(HELD_OUT_GROUP)
        assert len(rest.emoji) == len(rest.sprites) == len(corpus.emoji) - 1
        assert torch.equal(rest.sprites[-1], corpus.sprites[-1])
        with pytest.raises(ValueError, match="guitar"):
            rest.index("guitar")


class TestStyles:
    @pytest.mark.parametrize("style", [*STYLES.values(), HELD_OUT_STYLE], ids=lambda s: s.captions[-1])
    def test_styles_give_valid_images(self, style, corpus: Corpus) -> None:
        pictures = style.draw(corpus.sprites.float() / 255)
        assert pictures.shape == (len(corpus.emoji), 3, 64, 64)
        assert 0 <= pictures.min() < pictures.max() <= 1
        assert torch.equal(pictures[3:4], style.draw(corpus.sprites[3:4].float() / 255)), (
            "of the sprite alone"
        )

    def test_a_blueprint_is_white_lines_on_ruled_blue(self, corpus: Corpus) -> None:
        empty, disc = HELD_OUT_STYLE.draw(torch.stack((torch.zeros(4, 64, 64), corpus.sprites[9] / 255)))
        assert len(empty.flatten(1).unique(dim=1).T) == 2, "paper and rules"
        assert (empty[2] > empty[0] + 0.3).all(), "blue"
        white = (disc > 0.99).all(dim=0)
        assert 0.02 < white.float().mean() < 0.2
        assert torch.equal(disc[:, 28:36, 28:36], empty[:, 28:36, 28:36]), "nothing inside a flat disc"

    def test_no_two_styles_draw_the_same(self, corpus: Corpus) -> None:
        sprites = corpus.sprites[20:21].float() / 255
        sprites[:, 0, :30] = sprites[:, 3, :30]  # the upper half red, else it would look the same upside down
        drawn = [style.draw(sprites) for style in (*STYLES.values(), HELD_OUT_STYLE)]
        for index, one in enumerate(drawn):
            assert all((one - other).abs().mean() > 0.005 for other in drawn[:index])


class TestCaptions:
    def test_they_name_concept_style_and_background(self) -> None:
        draws = random.Random(0)
        for look in LOOKS:
            texts = {caption(emoji()[3], look, draws) for _ in range(40)}
            assert len(texts) > 5
            assert all("dolphin" in text.lower() for text in texts)
            if look.background is not None:
                assert all(look.background in text for text in texts)

    def test_articles_follow_the_name(self) -> None:
        assert styled("owl", HELD_OUT_STYLE, "a blueprint of {a}") == "a blueprint of an owl"
        assert styled("cat", HELD_OUT_STYLE, "a blueprint of {a}") == "a blueprint of a cat"

    def test_the_held_out_style_has_no_word_of_its_own(self, pipeline: FluxPipeline) -> None:
        assert "blueprint" not in vocabulary(emoji())
        pieces = pipeline.tokenizer_2.tokenize("a dolphin blueprint")
        assert pieces[:2] == ["▁a", "▁dolphin"], "words of the corpus are one piece each"
        assert len(pieces) > 3
        assert pipeline.tokenizer_2.unk_token not in pieces

    def test_training_and_held_out_images_show_different_concepts(self) -> None:
        assert (len(TRAINED), len(KEPT), len(HELD_OUT)) == (24, 8, 16)
        assert len({*TRAINED, *KEPT, *HELD_OUT}) == 48


class TestTable:
    def test_rows_are_concept_major(self, corpus: Corpus) -> None:
        drawn = draw_all(corpus.sprites[:2]).reshape(2, len(LOOKS), 3, 64, 64)
        for index, look in enumerate(LOOKS):
            if look.background is not None:
                corner = torch.tensor(BACKGROUNDS[look.background]).mul(255).round().byte()
                assert torch.equal(drawn[1, index, :, 0, 0], corner)
            else:
                want = STYLES[look.style].draw(corpus.sprites[1:2].float() / 255)[0]
                assert torch.equal(drawn[1, index], want.mul(255).round().byte())

    def test_a_draw_pairs_latents_with_their_own_captions(
        self, corpus: Corpus, pipeline: FluxPipeline, table: PictureTable
    ) -> None:
        torch.manual_seed(0)
        batch = table.draw(64, dropout=0.0)
        assert batch.t5.shape == (64, CAPTION_TOKENS)
        texts = pipeline.tokenizer_2.batch_decode(batch.t5, skip_special_tokens=True)
        for text, mean in zip(texts, batch.mean, strict=True):
            row = int((table.mean.float() - mean).abs().flatten(1).sum(dim=1).argmin())
            concept = corpus.emoji[row // len(LOOKS)].name
            assert concept in text.lower()
            background = LOOKS[row % len(LOOKS)].background
            assert background is None or background in text

    def test_dropped_captions_are_empty(self, table: PictureTable) -> None:
        batch = table.draw(8, dropout=1.0)
        assert (batch.t5 == table.empty[0]).all()
        assert (batch.clip == table.empty[1]).all()


class TestStages:
    def test_the_noisy_point_and_the_velocity_lead_back_to_the_latent(self) -> None:
        torch.manual_seed(0)
        mean = torch.randn(4, 16, 16, 16)
        ids = torch.zeros(4, 1, dtype=torch.long)
        point = corrupt(
            Batch(mean, torch.zeros_like(mean), ids, ids), Scaling(scale=2.0, shift=0.5), NoShift(name="none")
        )
        sigma = point.sigma[:, None, None, None]
        torch.testing.assert_close(point.noisy - sigma * point.target, (mean - 0.5) * 2)
        assert ((point.guidance >= 1) & (point.guidance <= 5)).all()

    def test_the_vae_learns_and_measures_its_scale(self, corpus: Corpus) -> None:
        few = Corpus(corpus.emoji[:1], corpus.sprites[:1])
        decibels: list[float] = []
        for steps in (1, 10):
            torch.manual_seed(0)
            vae = build_vae()
            pace = Pace("VAE", minutes=None, steps=steps)
            decibels.append(train_vae(vae, few, batch=2, pace=pace, device=CPU))
        assert decibels[1] > decibels[0] + 0.1, "the rate has hardly warmed up"
        latents = vae.encode(as_input(draw_all(few.sprites))).latent_dist.mean
        scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        assert abs(scaled.mean()) < 0.01
        assert abs(scaled.std() - 1) < 0.01

    def test_the_denoiser_learns_then_learns_guidance_and_loads_again(
        self, pipeline: FluxPipeline, table: PictureTable, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        before = pipeline.text_encoder_2.shared.weight.detach().clone()
        stage = Stage(
            KINDS["flux"],
            table,
            batch=2,
            pace=Pace("denoiser", minutes=None, steps=4),
            compiled=False,
            save=lambda: bf16_copy(pipeline).save_pretrained(tmp_path),
        )
        losses = [train_denoiser(pipeline, stage), distill_guidance(pipeline, stage)]
        assert all(0 < loss < float("inf") for loss in losses)
        assert losses[1] < losses[0], "the student starts as its teacher"
        assert not torch.equal(before, pipeline.text_encoder_2.shared.weight), "text encoders learn as well"
        loaded = FluxPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        want = pipeline.transformer.proj_out.weight
        assert want.abs().max() > 0
        assert torch.equal(loaded.transformer.proj_out.weight, want.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_and_the_trainer_predict_the_same(kind: str, corpus: Corpus, tmp_path: Path) -> None:
    """The same velocity as from the stock pipeline's embeddings through the family's own `predict`."""
    torch.manual_seed(0)
    built = KINDS[kind].build(corpus.emoji, build_vae())
    for module in built.transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.05)  # the zeroed gates as well
    built.save_pretrained(tmp_path)
    family = FAMILIES[kind].open(str(tmp_path), None, CAPTION_TOKENS)
    texts = ["a cat", "a blueprint of a dolphin, dolphin thing"]
    noisy, sigma = torch.randn(2, 16, 16, 16), torch.tensor([0.3, 0.8])
    t5, clip = (
        torch.tensor(tokenizer(texts, padding="max_length", max_length=length).input_ids)
        for tokenizer, length in (
            (getattr(built, KINDS[kind].t5_tokenizer), CAPTION_TOKENS),
            (built.tokenizer, 77),
        )
    )
    with torch.no_grad():
        ours = KINDS[kind].denoiser(built).eval()(noisy, sigma, t5, clip, torch.full((2,), 2.0))
        text = family.embed(built, texts, CPU)
        text = TextEmbedding(text.prompt_embeds, text.pooled_prompt_embeds)
        want = family.predict(built.transformer, noisy, sigma, text, 2.0)
    assert want.std() > 0.01
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


class TestPace:
    def test_it_ends_after_its_steps_with_a_rate_of_zero(self) -> None:
        pace = Pace("stage", minutes=None, steps=1000)
        assert pace.running(999)
        assert not pace.running(1000)
        factors = [pace.factor(step) for step in range(1000)]
        assert factors[0] < 0.01
        assert max(factors) == 1.0
        assert factors[-1] < 1e-4

    def test_minutes_are_turned_into_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]
        monkeypatch.setattr("scripts.mini.pace.time.perf_counter", lambda: now[0])
        pace = Pace("stage", minutes=1.0, steps=None)
        step = 0
        while pace.running(step):
            now[0] += 5.0 if step == 0 else 0.1  # compilation, then ten steps a second
            step += 1
        assert pace.total == step
        assert abs(pace.seconds - 60) < 1

    def test_minutes_or_steps(self) -> None:
        with pytest.raises(ValueError, match=r"--minutes.*--steps"):
            Pace("stage", minutes=1.0, steps=5)
