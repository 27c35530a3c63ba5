"""The store of the loopback Hub: repositories with commits, each a complete tree, and large files by SHA-256."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIRST = "0123456789abcdef0123456789abcdef01234567"  # the commit of a repository that is served from a folder
LARGE = (".safetensors", ".png")  # stored as large files, like on the Hub


@dataclass(frozen=True)
class Blob:
    """A file in a tree."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """The git blob id. For a large file, the id of the LFS pointer that git stores instead."""
        text = self.content
        if self.large:
            text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(text)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


Tree = dict[str, Blob]


@dataclass
class Repository:
    """A repository: a list of commits with their trees, the newest last."""

    name: str
    kind: str = "model"
    private: bool = False
    gated: bool = False
    commits: list[tuple[str, Tree]] = field(default_factory=list)

    @classmethod
    def of_folder(cls, name: str, folder: Path, *, gated: bool = False, kind: str = "model") -> "Repository":
        """Creates a repository with one commit of the folder's files."""
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        tree = {
            path.relative_to(folder).as_posix(): Blob(path.read_bytes(), path.suffix in LARGE)
            for path in files
        }
        return cls(name, kind, gated=gated, commits=[(FIRST, tree)])

    @classmethod
    def new(cls, name: str, *, private: bool = False, kind: str = "model") -> "Repository":
        """Creates a repository like the Hub does, with a first commit."""
        repository = cls(name, kind, private)
        repository.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", large=False)})
        return repository

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def tree(self) -> Tree:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, Tree] | None:
        """Returns the commit id and tree of a revision, given as branch or commit id."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)

    def commit(self, tree: Tree) -> str:
        """Adds a commit, whose id is a hash of its content and its parent. Returns the id."""
        digest = hashlib.sha1(self.head.encode() if self.commits else self.name.encode())
        for path, blob in sorted(tree.items()):
            digest.update(f"{path}:{blob.oid}\n".encode())
        self.commits.append((digest.hexdigest(), tree))
        return self.head


@dataclass
class Store:
    """The complete data of a Hub."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)  # by kind and name
    accounts: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # the response of whoami, by token
    large: dict[str, bytes] = field(default_factory=dict)

    def add(self, repository: Repository) -> Repository:
        self.repositories[repository.kind, repository.name] = repository
        return repository

    def model(self, name: str) -> Repository:
        return self.repositories["model", name]

    def apply(self, tree: Tree, operation: Mapping[str, Any]) -> None:
        """Applies one operation of a commit. Raises KeyError for a large file that was never uploaded."""
        key, value = operation["key"], operation["value"]
        if key == "file":
            tree[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
        elif key == "lfsFile":
            tree[value["path"]] = Blob(self.large[value["oid"]], large=True)
        elif key == "deletedFile":
            del tree[value["path"]]
        else:
            raise ValueError(key)


def account(name: str, *, role: str = "write", orgs: Mapping[str, str] | None = None, **rights: Any) -> Any:
    """Returns the response of whoami. `orgs` maps organizations to the account's role in them."""
    token = {"displayName": "test", "role": role, **rights}
    return {
        "type": "user",
        "name": name,
        "orgs": [{"type": "org", "name": org, "roleInOrg": role} for org, role in (orgs or {}).items()],
        "auth": {"type": "access_token", "accessToken": token},
    }
