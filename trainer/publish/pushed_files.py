"""What a push has written into a repository, as halfbyte.json there says; all else in it is somebody's own work."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.hf_api import RepoFile

from halfbyte.trainer.publish.files import PushFile

_FIELD = "pushed"
_LARGE = 10**7  # bytes; the Hub keeps no file from here on in git itself


@dataclass(frozen=True)
class Digest:
    """What the Hub may call a file's content by."""

    sha256: str
    git: str | None = None  # None of a large file

    @classmethod
    def of(cls, file: PushFile) -> "Digest":
        """Of a file that is pushed."""
        return cls(file.sha256, file.git_digest() if file.size < _LARGE else None)

    def fits(self, there: RepoFile) -> bool:
        """Whether the file in the repository has this content."""
        return there.blob_id == self.git if there.lfs is None else there.lfs.sha256 == self.sha256


def with_pushed(provenance: PushFile, pushed: Mapping[str, Digest]) -> PushFile:
    """halfbyte.json as it is pushed: the adapter's, and the files that are the push's."""
    content = provenance.content if isinstance(provenance.content, bytes) else provenance.content.read_bytes()
    files = {
        name: {"sha256": digest.sha256} | ({} if digest.git is None else {"git": digest.git})
        for name, digest in sorted(pushed.items())
    }
    return PushFile(
        provenance.name, (json.dumps(json.loads(content) | {_FIELD: files}, indent=1) + "\n").encode()
    )


def read_pushed(text: bytes) -> dict[str, Digest]:
    """By name, from a repository's halfbyte.json; nothing where it does not say."""
    try:
        facts: Any = json.loads(text)
        return {name: Digest(entry["sha256"], entry.get("git")) for name, entry in facts[_FIELD].items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}
