"""Tests of captions that are longer than the text encoders read."""

import logging
from pathlib import Path

import pytest
import torch
from rich.console import Console

from halfbyte.trainer.data.long_captions import prompt_places, warn_of_long_captions
from halfbyte.trainer.families.encoders import load_encoders
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.sd3.family import SD3
from halfbyte.trainer.families.token_limits import token_limits
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run import run
from halfbyte.trainer.runtime.world import read_world

from runs import write_recipe
from steps import family_at

LONG = "a teal card on a wooden table, " * 40 + "and at the very end a RED APPLE"
WORDS = [
    "a photo of a dog",
    "Zwölf Boxkämpfer",
    "naïve café\r\nand\ta  tea",
    "一只猫 sits",
    "x" * 30,
    "ﷺ ﷺ",
    "🐕 🐈",
]


@pytest.mark.parametrize("cls", [Flux, SD3])
def test_what_is_kept_has_the_tokens_that_the_pipeline_reads(
    mini_flux: Path, mini_sd3: Path, cls: type[Flux | SD3]
) -> None:
    family = family_at(mini_flux if cls is Flux else mini_sd3, cls)
    t5, clip = token_limits(family)
    assert (t5.encoder, t5.tokens) == ("T5", family.max_sequence_length)
    assert (clip.encoder, clip.tokens) == ("CLIP", 77)
    for limit in (t5, clip):
        for words in (*WORDS, LONG):
            for times in range(1, 60, 3):
                text = " ".join([words] * times)
                (end,) = limit.cut([text])
                whole = limit.tokenizer(text, verbose=False).input_ids
                assert bool(end) == (len(whole) > limit.tokens), text
                read = limit.tokenizer(text, max_length=limit.tokens, truncation=True).input_ids
                kept = limit.tokenizer(text[: len(text) - len(end)], verbose=False).input_ids
                # A word that is cut in the middle may be split in another way.
                assert kept[: limit.tokens - 5] == read[: limit.tokens - 5]
                assert abs(len(kept) - len(read)) <= 3


def test_the_embedding_does_not_depend_on_what_is_cut(mini_flux: Path, tmp_path: Path) -> None:
    family = family_at(mini_flux, Flux)
    encoders = load_encoders(family, device=torch.device("cpu"), dtype=torch.float32, memo=tmp_path)
    t5, clip = token_limits(family)
    ends = [limit.cut([LONG])[0] for limit in (t5, clip)]
    assert all(end.endswith("RED APPLE") for end in ends)
    assert len(ends[0]) != len(ends[1])
    whole, other = encoders.encode_texts([LONG]), encoders.encode_texts([LONG.replace("APPLE", "PEAR")])
    assert torch.equal(whole.prompt_embeds, other.prompt_embeds)
    assert torch.equal(whole.pooled_prompt_embeds, other.pooled_prompt_embeds)


def test_one_warning_names_files_and_what_is_cut(mini_flux: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = family_at(mini_flux, Flux)
    captions: list[tuple[Path | str, str]] = [(Path(f"{n}.png"), f"{n} {LONG}") for n in range(5)]
    captions += [(Path("short.png"), "a card"), (Path("copy.png"), captions[0][1])]
    warn_of_long_captions([*captions, *prompt_places(["a card", LONG])], family)
    (message,) = caplog.messages
    assert caplog.records[0].levelno == logging.WARNING
    t5, clip = message.split("  CLIP reads ")
    for part, limit in ((t5, family.max_sequence_length), (clip, 77)):
        assert f"{limit} tokens; 6 of 7 captions have more" in part
        assert "0.png: cut: '" in part
        assert "3.png" not in part
        assert "and 3 more" in part
    assert "model.max_sequence_length" in t5
    caplog.clear()
    warn_of_long_captions(captions[-2:-1], family)
    assert not caplog.messages


def test_a_prompt_is_named_by_its_setting(mini_flux: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_long_captions(prompt_places(["a card", LONG]), family_at(mini_flux, Flux))
    assert "sample.prompts[1]: cut: '" in caplog.messages[0]


def test_a_run_warns_before_it_encodes(
    mini_flux: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    (tmp_path / "pictures" / "picture1.txt").write_text(LONG)
    console = Console(record=True, width=200)
    quick = ("train.steps=1", "sample.prompts=[]", "output.export_base=false", "train.grad_accumulation=1")
    settings = load_recipe(recipe, quick)
    assert run(settings, read_world({"ACCELERATE_USE_CPU": "true"}), console=console, resume=False)
    (message,) = [text for text in caplog.messages if "longer than a text encoder reads" in text]
    # The captions of the other images fit: 24 tokens of T5.
    assert "T5 reads 24 tokens; 1 of 6 captions have more" in message
    assert str(tmp_path / "pictures" / "picture1.png") in message
    (line,) = [line for line in console.export_text().splitlines() if line.startswith("captions ")]
    assert "7 different texts" in line  # with the empty caption
