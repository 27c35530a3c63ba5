"""Chooses the files of a Hub data set that are read: by its card, or by the names of folders and files."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from halfbyte.trainer.wording import in_prose, shown

# As the datasets library recognizes splits in names that are not listed in a card.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = {word: split for split, words in _SPLITS.items() for word in words}


@dataclass(frozen=True)
class Choice:
    """The settings that choose files of a data set."""

    inner: str = ""  # a folder of the repository, or a pattern
    config: str | None = None
    split: str | None = None


def chosen_files(names: Sequence[str], card: Mapping[str, Any], choice: Choice) -> list[str]:
    """Returns the files of one configuration and split, sorted.

    Args:
        names: all files of the repository. card: the metadata of its README.

    Raises:
        ValueError: the configuration or the split does not exist, or several could be meant.
    """
    visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if choice.inner:
        visible = _inside(visible, choice.inner)
    splits = _listed(visible, card, choice) if not choice.inner or choice.config is not None else None
    if splits is None:
        splits = _named(visible)
    if choice.split is None:
        wanted = "train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None
        if wanted is None and splits:
            raise ValueError(f"has the splits {', '.join(splits)}; set split to one of them")
        found = visible if wanted is None else splits[wanted]
    elif choice.split not in splits:
        listed = in_prose(splits) if splits else "none, because it has no splits"
        raise ValueError(f"has no split {shown(choice.split)}, expected {listed}")
    else:
        found = splits[choice.split]
    if not found:
        raise ValueError("has no files" + (f" that match {shown(choice.inner)}" if choice.inner else ""))
    return sorted(found)


def _inside(names: Sequence[str], inner: str) -> list[str]:
    return [name for name in names if name.startswith(f"{inner}/") or fnmatchcase(name, inner)]


def _listed(names: Sequence[str], card: Mapping[str, Any], choice: Choice) -> dict[str, list[str]] | None:
    """Returns the files of each split as the card lists them; None if it lists none."""
    configs = {
        str(one.get("config_name")): one
        for one in card.get("configs") or ()
        if isinstance(one, Mapping) and one.get("config_name") is not None
    }
    if choice.config is not None and choice.config not in configs:
        listed = in_prose(configs) if configs else "none, because its card lists none"
        raise ValueError(f"has no configuration {shown(choice.config)}, expected {listed}")
    if not configs:
        return None
    default = [name for name, one in configs.items() if one.get("default") or name == "default"]
    name = choice.config or (default or list(configs))[0]
    if choice.config is None and not default and len(configs) > 1:
        raise ValueError(f"has the configurations {', '.join(configs)}; set config to one of them")
    patterns = _patterns(configs[name].get("data_files"))
    if patterns is None:
        folder = configs[name].get("data_dir")
        if not folder:
            return None
        inside = _inside(names, str(folder).strip("/"))
        return _named(inside) or {"train": inside}
    return {
        split: [own for own in names if any(_matches(own, pattern) for pattern in every)]
        for split, every in patterns.items()
    }


def _patterns(given: object) -> dict[str, list[str]] | None:
    """Returns the patterns of each split in a card's data_files: a pattern, a list, or a list of splits."""
    if isinstance(given, str):
        return {"train": [given]}
    if not isinstance(given, list):
        return None
    found: defaultdict[str, list[str]] = defaultdict(list)
    for one in given:
        if isinstance(one, str):
            found["train"].append(one)
        elif isinstance(one, Mapping) and isinstance(one.get("split"), str):
            path = one.get("path")
            found[one["split"]] += [str(part) for part in (path if isinstance(path, list) else [path])]
    return dict(found) or None


def _matches(name: str, pattern: str) -> bool:
    """Returns True if a file is one of a card's pattern, in which ** stands for any folders."""
    pattern = pattern.removeprefix("./")
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern.replace("**/", ""))


def _named(names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the files of each split by words in their names; empty if none has such a word."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        words = re.split(r"[^A-Za-z]+", name.rpartition(".")[0].lower())
        split = next((_WORDS[word] for word in words if word in _WORDS), None)
        if split is not None:
            found[split].append(name)
    return {split: found[split] for split in _SPLITS if split in found}
