"""Loads the tokenizers of a pipeline and checks that they know the words of a plain sentence."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer, T5Tokenizer

from halfbyte.quant.files.json_object import LFS_POINTER, is_lfs_pointer
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.pretrained.component import PIPELINE
from halfbyte.trainer.wording import shown

# The sets of files that a tokenizer can be read from. With only its tokenizer_config.json, transformers builds a
# tokenizer without words.
_FILES: dict[type[Any], tuple[tuple[str, ...], ...]] = {
    CLIPTokenizer: (("tokenizer.json",), ("vocab.json", "merges.txt")),
    T5Tokenizer: (("tokenizer.json",), ("spiece.model",)),
}
_CONFIG = "tokenizer_config.json"
# The regular expressions of CLIP's and T5's tokenizers. Each takes a time in proportion to the text.
_PATTERNS = frozenset(
    {
        r"\s+",
        " {2,}",
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    }
)
_SENTENCE = "a photo of a dog in the park"


def check_tokenizer_files(tokenizer_cls: type[Any], folder: Path) -> None:
    """Checks that a tokenizer's files are there.

    Raises:
        RecipeError: A file is missing, or Git-LFS has put a pointer in its place.
    """
    sets = _FILES[tokenizer_cls]
    complete = [names for names in sets if all((folder / name).is_file() for name in names)]
    if not complete:
        # The set of which some files are there, else all.
        begun = [names for names in sets if any((folder / name).is_file() for name in names)] or sets
        missing = " or ".join(
            " and ".join(name for name in names if not (folder / name).is_file()) for names in begun
        )
        raise RecipeError(
            f"{PIPELINE}: {folder}: {missing} missing; without it, all captions would become unknown tokens. Download"
            " the folder again"
        )
    if not (folder / _CONFIG).is_file():
        raise RecipeError(
            f"{PIPELINE}: {folder / _CONFIG} is missing, which has the tokenizer's length and special tokens; download"
            " the folder again"
        )
    for name in (*complete[0], _CONFIG):
        try:
            pointer = is_lfs_pointer(folder / name)
        except OSError as error:
            raise RecipeError(f"{PIPELINE}: {folder / name}: cannot be read: {error.strerror}") from error
        if pointer:
            raise RecipeError(f"{PIPELINE}: {folder / name}: not a tokenizer's file {LFS_POINTER}")


def load_tokenizer(
    tokenizer_cls: type[Any], folder: Path, *, vocabulary: int, longest: int | None = None
) -> Any:
    """Loads a tokenizer.

    transformers takes the words from its files, but not the regular expressions in `tokenizer.json`, which could
    be such that a caption takes hours. This is checked, because another version might.

    vocabulary: the number of tokens that the text encoder knows. longest: the number of tokens that it takes;
    None: it takes any.

    Raises:
        RecipeError: The files are damaged, or the tokenizer does not fit the text encoder.
    """
    check_tokenizer_files(tokenizer_cls, folder)
    where = f"{PIPELINE}: {folder}"
    try:
        tokenizer = tokenizer_cls.from_pretrained(folder, local_files_only=True)
        patterns = set(_patterns(json.loads(tokenizer.backend_tokenizer.to_str()))) - _PATTERNS
        if patterns:
            raise RecipeError(
                f"{where}: the tokenizer has the regular expression {shown(min(patterns))}, which is not one of"
                f" {tokenizer_cls.__name__}'s and could take hours for a caption; download the folder again"
            )
        words = list(tokenizer(_SENTENCE, add_special_tokens=False).input_ids)
        ids = list(tokenizer(_SENTENCE).input_ids)
        special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
        length = tokenizer.model_max_length
    except RecipeError:
        raise
    except Exception as error:
        # The library checks nothing; a damaged file can cause any exception, also Rust's.
        reason = f"{type(error).__name__}: {error}"
        raise RecipeError(
            f"{where}: no {tokenizer_cls.__name__} can be loaded from it: {reason}; download the folder again"
        ) from error
    if None in special[:2]:
        raise RecipeError(f"{where}: the tokenizer has no pad or end token; download the folder again")
    if set(words) <= set(special):
        raise RecipeError(
            f"{where}: the tokenizer knows no word of {_SENTENCE!r}; its vocabulary is damaged: download the folder"
            " again"
        )
    highest = max([*ids, *(token for token in special if token is not None)])
    if highest >= vocabulary:
        raise RecipeError(
            f"{where}: the tokenizer uses token {highest}, but its text encoder knows {vocabulary} tokens; expected the"
            " tokenizer of the same model"
        )
    if longest is not None and not (isinstance(length, int) and 2 < length <= longest):
        raise RecipeError(
            f"{where}: model_max_length is {length}, but its text encoder takes {longest} tokens; expected the"
            " tokenizer of the same model"
        )
    return tokenizer


def _patterns(node: Any) -> Iterator[str]:
    """Yields the regular expressions in a tokenizer's JSON."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "Regex":
                yield str(value)
            elif key != "vocab":  # long, and without any
                yield from _patterns(value)
    elif isinstance(node, list):
        for item in node:
            if isinstance(item, dict):
                yield from _patterns(item)
