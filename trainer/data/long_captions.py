"""Lists captions that are longer than the text encoders read, before they are encoded."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.token_limits import TokenLimit, token_limits
from halfbyte.trainer.recipe.sections import MOST_TEXT_TOKENS
from halfbyte.trainer.wording import printable, shown

log = logging.getLogger(__name__)

_SHOWN = 3  # captions for each encoder

Place = Path | str  # an image, or the setting that names a prompt


def warn_of_long_captions(captions: Iterable[tuple[Place, str]], family: Family) -> None:
    """Logs one warning with the captions that are cut, by encoder, each with the text that is cut.

    Args:
        captions: texts to encode, each with where it comes from; equal texts count once.

    Raises:
        RecipeError: A tokenizer is damaged.
    """
    places: dict[str, Place] = {}
    for place, text in captions:
        places.setdefault(text, place)
    lines = [line for limit in token_limits(family) for line in _lines(limit, places, _advice(limit, family))]
    if lines:
        log.warning(
            "captions are longer than a text encoder reads, and their end is cut:\n  %s", "\n  ".join(lines)
        )


def _lines(limit: TokenLimit, places: dict[str, Place], advice: str) -> list[str]:
    texts = list(places)
    cut = [(places[text], end) for text, end in zip(texts, limit.cut(texts), strict=True) if end]
    if not cut:
        return []
    head = f"{limit.encoder} reads {limit.tokens} tokens; {len(cut)} of {len(texts)} captions have more. {advice}"
    more = [f"  and {len(cut) - _SHOWN} more"] if len(cut) > _SHOWN else []
    return [head, *(f"  {printable(place)}: cut: {shown(end)}" for place, end in cut[:_SHOWN]), *more]


def _advice(limit: TokenLimit, family: Family) -> str:
    if limit.encoder != "T5":
        return family.clip_advice
    if limit.tokens < MOST_TEXT_TOKENS:
        return f"Shorten them, or raise model.max_sequence_length, up to {MOST_TEXT_TOKENS}"
    return "Shorten them"


def prompt_places(prompts: Sequence[str]) -> list[tuple[Place, str]]:
    """Returns the sample prompts with the settings that name them."""
    return [(f"sample.prompts[{number}]", text) for number, text in enumerate(prompts)]
