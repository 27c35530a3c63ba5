"""Names of Hub repositories as settings give them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

# owner/name as the Hub accepts it.
_HUB_NAME = re.compile(r"(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9][\w.-]{0,95}/\w(?:[\w.-]{0,94}\w)?", re.ASCII)


@dataclass(frozen=True)
class HubReference:
    """A Hub repository where a file or folder could be named too: owner/name, or owner/name@revision."""

    name: str
    revision: str | None  # a branch, tag or commit; None: the main branch

    @classmethod
    def of(cls, path: Path | None) -> Self | None:
        """None for files and folders, whose paths are absolute by now."""
        if path is None or path.is_absolute():
            return None
        name, _, revision = path.as_posix().partition("@")
        return cls(name, revision or None) if is_repository(name) else None

    def at(self, commit: str) -> Path:
        """The same repository at a commit, as a recipe would name it."""
        return Path(f"{self.name}@{commit}")


def is_folder(path: str) -> bool:
    """Whether a model's path is written as a folder's."""
    return path.startswith(("./", "../", "/", "~")) or path in (".", "..")


def is_repository(path: str) -> bool:
    """Whether a model's path is written as a Hub repository's."""
    return _HUB_NAME.fullmatch(path) is not None


@dataclass(frozen=True)
class HubPart:
    """What a Hub repository other than that of the base gave."""

    repository: str
    revision: str  # the commit
    subfolder: str | None = None
