"""Tests of prefix, suffix and trigger word."""

from pathlib import Path

import pytest

from halfbyte.trainer.data.sources.caption_style import CaptionStyle, contains_word
from halfbyte.trainer.recipe.data_section import DataSection


@pytest.mark.parametrize(
    ("settings", "own", "text"),
    [
        ({}, "a dog", "a dog"),
        ({"prefix": " a photo of "}, "a dog", "a photo of a dog"),
        ({"suffix": "on film"}, "a dog", "a dog on film"),
        ({"suffix": ", on film"}, "a dog", "a dog, on film"),
        ({"suffix": ", on film"}, "", "on film"),
        ({"prefix": "photo", "suffix": "on film"}, "", "photo on film"),
        ({"trigger_word": "sks"}, "a dog", "sks a dog"),
        ({"trigger_word": "sks"}, "a sks dog", "a sks dog"),
        ({"trigger_word": "sks"}, "a sksd dog", "sks a sksd dog"),
        ({"trigger_word": "sks"}, "a [trigger] dog", "a sks dog"),
        ({"trigger_word": "sks"}, "[trigger] and [trigger]", "sks and sks"),
        ({"trigger_word": "sks"}, "", "sks"),
        ({"trigger_word": "sks", "prefix": "a photo of"}, "dog", "a photo of sks dog"),
        ({"trigger_word": "sks", "prefix": "a photo of [trigger],"}, "a dog", "a photo of sks, a dog"),
        (
            {"trigger_word": "sks", "suffix": "in the style of [trigger]"},
            "a dog",
            "a dog in the style of sks",
        ),
        ({"trigger_word": "sks", "tag_separator": ", "}, "dog, park", "sks, dog, park"),
        ({"trigger_word": "sks", "tag_separator": ", "}, "", "sks"),
    ],
)
def test_the_text_of_a_caption(settings: dict[str, str], own: str, text: str) -> None:
    assert CaptionStyle(**settings).finished(own) == text


@pytest.mark.parametrize(
    ("text", "word", "found"),
    [
        ("a cat.", "cat", True),
        ("a category", "cat", False),
        ("bobcat", "cat", False),
        ("一只猫在睡觉", "猫", True),
        ("a c++ book", "c++", True),
    ],
)
def test_a_word_is_not_found_in_a_longer_one(text: str, word: str, found: bool) -> None:
    assert contains_word(text, word) == found


def test_a_style_that_gives_text_replaces_missing_captions() -> None:
    assert not CaptionStyle(" ").gives_text
    for name in ("prefix", "suffix", "trigger_word"):
        assert CaptionStyle(**{name: "x"}).gives_text


def test_the_style_of_a_set(tmp_path: Path) -> None:
    data = DataSection.model_validate(
        {
            "trigger_word": "sks",
            "caption_lines": True,
            "sets": [
                {"path": tmp_path, "shuffle_tags": True},
                {"path": tmp_path, "kind": "regularization"},
                {"path": tmp_path, "kind": "regularization", "trigger_word": "dog", "caption_lines": False},
            ],
        }
    )
    first, second, third = (CaptionStyle.of(given) for given in data.resolved_sets)
    assert (first.trigger_word, first.tag_separator, first.lines) == ("sks", ", ", True)
    # Other things of the class must not be trained with the word.
    assert (second.trigger_word, second.tag_separator, second.setting) == ("", None, "data.sets[1]")
    assert (third.trigger_word, third.lines) == ("dog", False)
