"""Chooses the text that a sample is trained with: one of its captions, its tags shuffled and some left out.

An image has a fixed number of variants, so that all of them can be encoded before training. Variant v is a function of
(seed, the image's bytes, its captions, v); a sample's variant is a function of (seed, position).
"""

from collections.abc import Iterable, Iterator

import torch

from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.sources.caption_style import CaptionStyle, contains_word
from halfbyte.trainer.randomness import generator, uniform
from halfbyte.trainer.recipe.data_section import PLACEHOLDER, DataSet

TAG_VARIANTS = 8
"""The least number of variants with shuffled or dropped tags, if the recipe names none."""


def variant_count(sample: Sample, given: DataSet) -> int:
    """Returns the number of a sample's variants; some may be equal."""
    captions = max(1, len(sample.captions))
    if given.varies_tags:
        # A multiple of the captions, so that they have equal shares.
        return given.caption_variants or captions * -(-TAG_VARIANTS // captions)
    return min(given.caption_variants or captions, captions)


def variant(sample: Sample, given: DataSet, seed: int, number: int) -> str:
    """Returns the text of one variant."""
    if not sample.captions:
        return sample.caption  # made of the settings only
    own = sample.captions[number % len(sample.captions)]
    if given.varies_tags:
        own = _varied(own, given, seed, f"tags/{sample.sha256}", number)
    return CaptionStyle.of(given).finished(own)


def variants(sample: Sample, given: DataSet, seed: int) -> list[str]:
    """Returns the different texts of a sample."""
    every = (variant(sample, given, seed, number) for number in range(variant_count(sample, given)))
    return list(dict.fromkeys(every))


def all_variants(samples: Iterable[Sample], given: DataSet, seed: int) -> Iterator[tuple[Sample, str]]:
    """Yields the samples of a data set with each of their texts."""
    return ((sample, text) for sample in samples for text in variants(sample, given, seed))


def text_at(sample: Sample, given: DataSet, seed: int, position: int) -> str:
    """Returns the text that the sample at a position of the run is trained with; empty if its caption is dropped."""
    if uniform(seed, "caption_dropout", position) < given.caption_dropout:
        return ""
    count = variant_count(sample, given)
    number = int(uniform(seed, "caption_variant", position) * count) if count > 1 else 0
    return variant(sample, given, seed, number)


def _varied(caption: str, given: DataSet, seed: int, purpose: str, number: int) -> str:
    """Returns a caption with its tags shuffled and some left out, as the settings say."""
    separator = given.tag_separator.strip() or given.tag_separator
    tags = [tag for tag in (part.strip() for part in caption.split(separator)) if tag]
    kept, others = tags[: given.keep_tags], tags[given.keep_tags :]
    if given.shuffle_tags:
        order = torch.randperm(len(others), generator=generator(seed, f"{purpose}/order", number))
        others = [others[place] for place in order.tolist()]
    word = given.trigger_word.strip()
    left = [
        tag
        for place, tag in enumerate(others)
        if _stays(tag, word) or uniform(seed, f"{purpose}/dropped", number, place) >= given.tag_dropout
    ]
    return given.tag_separator.join([*kept, *left])


def _stays(tag: str, word: str) -> bool:
    """Returns True if a tag stands for the trigger word, so that it is never dropped."""
    return bool(word) and (PLACEHOLDER in tag or contains_word(tag, word))
