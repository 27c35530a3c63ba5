"""Tests of caption variants: functions of seed, image and number, all known before training."""

from collections import Counter
from pathlib import Path

import pytest

from halfbyte.trainer.data.caption_variants import text_at, variant, variant_count, variants
from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.recipe.data_section import DataSection, DataSet

TAGS = "one, two, three, four, five, six"


def sample(*captions: str, sha256: str = "0" * 64, caption: str | None = None) -> Sample:
    return Sample(
        0, Path("a.png"), captions[0] if caption is None else caption, 8, 8, sha256, captions=captions
    )


def settings(**given: object) -> DataSet:
    (resolved,) = DataSection.model_validate({"path": Path("x"), **given}).resolved_sets
    return resolved


def test_one_caption_without_tags_has_one_variant() -> None:
    assert variants(sample("a dog"), settings(), 0) == ["a dog"]
    assert variants(sample("a dog"), settings(caption_variants=5), 0) == ["a dog"]
    bare = sample(caption="a photo")
    assert variants(bare, settings(caption_prefix="a photo", shuffle_tags=True), 0) == ["a photo"]


def test_each_caption_is_a_variant() -> None:
    three = sample("x", "y", "z")
    assert variants(three, settings(caption_prefix="a"), 0) == ["a x", "a y", "a z"]
    assert variants(three, settings(caption_variants=2), 0) == ["x", "y"]
    drawn = Counter(text_at(three, settings(), 3, position) for position in range(3000))
    assert set(drawn) == {"x", "y", "z"}
    assert all(900 < count < 1100 for count in drawn.values())


@pytest.mark.parametrize(
    ("captions", "given", "count"),
    [(1, None, 8), (3, None, 9), (8, None, 8), (10, None, 10), (1, 5, 5), (3, 5, 5)],
)
def test_the_number_of_variants_with_tags(captions: int, given: int | None, count: int) -> None:
    several = sample(*["a, b, c, d, e, f, g"] * captions)
    assert variant_count(several, settings(shuffle_tags=True, caption_variants=given)) == count


def test_shuffling_keeps_all_tags_and_the_first() -> None:
    given = settings(shuffle_tags=True, keep_tags=2, trigger_word="sks", caption_suffix=", end")
    texts = variants(sample(TAGS), given, 0)
    assert len(texts) > 4
    for text in texts:
        tags = text.split(", ")
        assert tags[:3] == ["sks", "one", "two"]
        assert tags[-1] == "end"
        assert sorted(tags[1:-1]) == sorted(TAGS.split(", "))


def test_a_variant_is_a_function_of_seed_image_and_number() -> None:
    given = settings(shuffle_tags=True, tag_dropout=0.3)
    texts = [variant(sample(TAGS), given, 0, number) for number in range(8)]
    assert texts == [variant(sample(TAGS), given, 0, number) for number in range(8)]
    more = settings(shuffle_tags=True, tag_dropout=0.3, caption_variants=20)
    assert texts == [variant(sample(TAGS), more, 0, number) for number in range(8)]
    assert texts != [variant(sample(TAGS), given, 1, number) for number in range(8)]
    assert texts != [variant(sample(TAGS, sha256="1" * 64), given, 0, number) for number in range(8)]


def test_the_text_at_a_position_is_one_of_the_variants() -> None:
    given = settings(shuffle_tags=True, caption_dropout=0.25)
    one = sample(TAGS)
    texts = [text_at(one, given, 7, position) for position in range(400)]
    assert texts == [text_at(one, given, 7, position) for position in range(400)]
    assert set(texts) == {"", *variants(one, given, 7)}
    assert 60 < texts.count("") < 140
    # Dropout does not depend on the tags.
    plain = settings(caption_dropout=0.25)
    assert [not text for text in texts] == [not text_at(one, plain, 7, position) for position in range(400)]


def test_dropped_tags() -> None:
    given = settings(tag_dropout=0.5, keep_tags=1, caption_variants=200)
    counts: Counter[str] = Counter()
    for number in range(200):
        tags = variant(sample(TAGS), given, 0, number).split(", ")
        assert tags == [tag for tag in TAGS.split(", ") if tag in tags]  # in their order
        counts.update(tags)
    assert counts["one"] == 200
    assert all(70 < counts[tag] < 130 for tag in ("two", "three", "four", "five", "six"))


def test_a_tag_with_the_trigger_word_is_never_dropped() -> None:
    given = settings(tag_dropout=1.0, trigger_word="sks")
    assert variants(sample("dog, [trigger] dog, park"), given, 0) == ["sks dog"]
    assert variants(sample("dog, sks, park"), given, 0) == ["sks"]
    assert variants(sample("dog, park"), given, 0) == ["sks"]


@pytest.mark.parametrize(
    ("separator", "caption", "text"),
    [
        (", ", " a,b ,c,, ", "a, b, c"),
        ("|", "a | b,c|d", "a|b,c|d"),
        (" | ", "a|b", "a | b"),
        ("\n", "a\nb", "a\nb"),
        (" ", "a b", "a b"),
        (";", "a, b", "a, b"),
    ],
)
def test_separators(separator: str, caption: str, text: str) -> None:
    given = settings(shuffle_tags=True, keep_tags=9, tag_separator=separator)
    assert variants(sample(caption), given, 0) == [text]
