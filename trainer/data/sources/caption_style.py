"""Turns the captions of a source into the texts of a data set: prefix, trigger word and suffix."""

import re
from dataclasses import dataclass

from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.recipe.data_section import PLACEHOLDER, DataSet

_MARKS = ",.;:!?)"  # a suffix that starts with one of these follows without a space


@dataclass(frozen=True)
class CaptionStyle:
    """The settings of one data set that apply to each of its captions."""

    prefix: str = ""
    suffix: str = ""
    trigger_word: str = ""
    lines: bool = False  # each line of a caption file is a caption
    tag_separator: str | None = None  # None: captions are not split into tags
    setting: str = "data"  # the section of the recipe, for messages

    @classmethod
    def of(cls, given: DataSet) -> "CaptionStyle":
        """Returns the style of a data set."""
        return cls(
            given.caption_prefix.strip(),
            given.caption_suffix.strip(),
            given.trigger_word.strip(),
            given.caption_lines,
            given.tag_separator if given.varies_tags else None,
            given.setting,
        )

    @property
    def gives_text(self) -> bool:
        """True if images without a caption of their own get one from the settings."""
        return bool(self.prefix.strip() or self.suffix.strip() or self.trigger_word.strip())

    def finished(self, own: str) -> str:
        """Returns the text to train with; own: a caption of the source, empty if it has none."""
        word = self.trigger_word.strip()
        parts = [self.prefix.strip(), own, self.suffix.strip()]
        if word:
            parts = [part.replace(PLACEHOLDER, word) for part in parts]
            if not any(contains_word(part, word) for part in parts):
                # Of a list of tags, the trigger word becomes the first.
                between = self.tag_separator if self.tag_separator is not None and parts[1] else " "
                parts[1] = f"{word}{between}{parts[1]}" if parts[1] else word
        prefix, own, suffix = parts
        text = " ".join(part for part in (prefix, own) if part)
        between = " " if text and suffix and suffix[0] not in _MARKS else ""
        return f"{text}{between}{suffix if text else suffix.lstrip(_MARKS + ' ')}"

    def check(self, problems: Problems) -> None:
        """Adds a problem if the prefix or the suffix needs a trigger word and there is none."""
        for name, text in (("caption_prefix", self.prefix), ("caption_suffix", self.suffix)):
            if PLACEHOLDER in text and not self.trigger_word.strip():
                problems.add(f"{self.setting}.{name}", _no_trigger_word(self.setting))

    def check_own(self, where: object, own: str, problems: Problems) -> None:
        """Adds a problem if a caption of the source needs a trigger word and there is none."""
        if PLACEHOLDER in own and not self.trigger_word.strip():
            problems.add(where, _no_trigger_word(self.setting))


def contains_word(text: str, word: str) -> bool:
    """Returns True if a text contains a word, not as a part of a longer one: `cat` is not in `category`.

    Only ASCII letters and digits lengthen a word, because some languages have no spaces between words.
    """
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.ASCII) is not None


def _no_trigger_word(setting: str) -> str:
    return (
        f"contains [trigger], but {setting}.trigger_word is not set; set it, or write the word in the caption"
    )
