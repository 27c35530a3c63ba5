"""Finds what a family's text encoders do not read of a caption, because it has too many tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.requirements import tokenizer_of
from halfbyte.trainer.families.stock_parts import load_tokenizers

_AT_ONCE = 1000  # captions that are tokenized together


@dataclass(frozen=True)
class TokenLimit:
    """The limit of one text encoder, or of several with the same tokens."""

    encoder: str  # for messages
    tokens: int  # with the start and end tokens
    tokenizer: Any

    def cut(self, captions: Sequence[str]) -> list[str]:
        """Returns the end of each caption that the encoder does not read; empty if it reads all."""
        ends = [""] * len(captions)
        # An ASCII character is at most one token; T5 may have another for the start of the first word.
        doubtful = [
            place for place, text in enumerate(captions) if not text.isascii() or len(text) + 2 > self.tokens
        ]
        for start in range(0, len(doubtful), _AT_ONCE):
            places = doubtful[start : start + _AT_ONCE]
            encoded = self.tokenizer(
                [captions[place] for place in places], return_offsets_mapping=True, verbose=False
            )
            for place, ids, spans in zip(places, encoded.input_ids, encoded.offset_mapping, strict=True):
                if len(ids) > self.tokens:
                    # The last token that is kept is the end token.
                    ends[place] = captions[place][spans[self.tokens - 1][0] :].strip()
        return ends


def token_limits(family: Family) -> list[TokenLimit]:
    """Returns the limits of a family's encoders, T5 first.

    Raises:
        RecipeError: A tokenizer is damaged, see `load_tokenizers`.
    """
    tokenizers = load_tokenizers(family)
    t5 = tokenizer_of(family.t5_component)
    limits = [TokenLimit("T5", family.max_sequence_length, tokenizers[t5])]
    # All CLIPs of a family have the same tokens.
    clip = next((tokenizer for name, tokenizer in tokenizers.items() if name != t5), None)
    return limits if clip is None else [*limits, TokenLimit("CLIP", clip.model_max_length, clip)]
