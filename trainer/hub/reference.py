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


_HUB_DATA = re.compile(r"hf:/{1,2}datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")
_SLASHED = re.compile(r"hf:/{1,2}datasets/([^/@]+/[^/@]+)@(refs/(?:pr|convert)/[^/]+)(?:/(.+))?")


@dataclass(frozen=True)
class HubData:
    """A data set on the Hub: hf://datasets/owner/name, with @revision and a folder or pattern if they are given."""

    name: str
    revision: str | None  # a branch, tag or commit; None: the main branch
    inner: str = ""  # a folder of the repository, or a pattern of files; empty: the whole repository

    @classmethod
    def of(cls, path: Path | str | None) -> Self | None:
        """Returns the data set that a path names; None for other paths. pathlib makes one slash of two."""
        found = _SLASHED.fullmatch(str(path)) or _HUB_DATA.fullmatch(str(path))
        if found is None or not is_repository(found[1]):
            return None
        return cls(found[1], found[2], (found[3] or "").strip("/"))

    def at(self, commit: str) -> "HubData":
        """Returns the data set at a commit."""
        return HubData(self.name, commit, self.inner)

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"hf://datasets/{self.name}{revision}" + (f"/{self.inner}" if self.inner else "")


def written_path(path: Path) -> str:
    """Returns a path as it is written in a recipe."""
    data = HubData.of(path)
    return str(path) if data is None else str(data)


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
