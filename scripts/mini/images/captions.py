"""Captions of the corpus: a name, keywords in any order and number, words for the style and the background."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from scripts.mini.images.corpus import Emoji
from scripts.mini.images.styles import BACKGROUNDS, STYLES, Style

CAPTION_TOKENS = 32  # T5 tokens that every caption is padded to, here and in the recipes

_KEYWORDS_SHARE = 0.4  # share of captions that end with keywords
_CAPITALS_SHARE = 0.06  # share with a capitalized name, so that words spelled by letters are learned as well


@dataclass(frozen=True)
class Look:
    """A way to show every concept of the corpus; only the plain style has a background."""

    style: str
    background: str | None


LOOKS = (
    *(Look(style, None) for style in STYLES),
    *(Look("plain", background) for background in BACKGROUNDS),
)


def caption(emoji: Emoji, look: Look, draws: random.Random) -> str:
    """Returns one of the many captions of an image."""
    name = emoji.name.title() if draws.random() < _CAPITALS_SHARE else emoji.name
    text = styled(name, STYLES[look.style], draws.choice(STYLES[look.style].captions))
    if look.background is not None:
        text += draws.choice((" on {a} background", " on {name}", ", {name} background")).format(
            name=look.background, a=with_article(look.background)
        )
    elif look.style == "plain" and draws.random() < 0.1:
        text += draws.choice((" on a white background", " on white"))
    if emoji.keywords and draws.random() < _KEYWORDS_SHARE:
        count = draws.randint(1, min(3, len(emoji.keywords)))
        text = ", ".join((text, *draws.sample(emoji.keywords, count)))
    return text


def styled(name: str, style: Style, template: str) -> str:
    """Returns the template of a style filled with a name."""
    assert template in style.captions
    return template.format(name=name, a=with_article(name))


def with_article(name: str) -> str:
    """Adds the article by the first letter, which is nearly always right."""
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def vocabulary(emoji: Iterable[Emoji]) -> list[str]:
    """Returns every word of the captions, most frequent first, without the held-out style's own word."""
    counts: Counter[str] = Counter()
    for one in emoji:
        for text in (one.name, *one.keywords):
            counts.update(text.split())
    frequent = ["a", "an", "the", "of", "in", "on", "as", "background", "white", "emoji", "picture", "black"]
    for style in STYLES.values():
        for template in style.captions:
            frequent += template.format(name="", a="").split()
    for background in BACKGROUNDS:
        frequent += background.split()
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return list(dict.fromkeys([*frequent, *ranked]))
