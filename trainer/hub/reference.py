"""Parses the names of Hub repositories in settings."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

# owner/name, with the characters that the Hub accepts.
_HUB_NAME = re.compile(r"(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9][\w.-]{0,95}/\w(?:[\w.-]{0,94}\w)?", re.ASCII)


@dataclass(frozen=True)
class HubReference:
    """A Hub repository given as owner/name or owner/name@revision in a setting that also accepts local paths."""

    name: str
    revision: str | None  # a branch, tag or commit; None: the main branch

    @classmethod
    def of(cls, path: Path | None) -> Self | None:
        """Returns the repository that `path` names, or None for a local file or folder, whose path is absolute."""
        if path is None or path.is_absolute():
            return None
        name, _, revision = path.as_posix().partition("@")
        return cls(name, revision or None) if is_repository(name) else None

    def at(self, commit: str) -> Path:
        """Returns the repository at a commit, written as in a recipe: owner/name@commit."""
        return Path(f"{self.name}@{commit}")


def is_folder(path: str) -> bool:
    """Returns True if a model path has the form of a local folder."""
    return path.startswith(("./", "../", "/", "~")) or path in (".", "..")


def is_repository(path: str) -> bool:
    """Returns True if a model path has the form of a Hub repository: owner/name."""
    return _HUB_NAME.fullmatch(path) is not None


@dataclass(frozen=True)
class HubPart:
    """A part of the model, or an adapter, that came from a Hub repository other than the base's."""

    repository: str
    revision: str  # the commit
    subfolder: str | None = None
