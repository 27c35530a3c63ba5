"""A model repository on the Hub as a push sees it: what it holds, and one commit that makes it what it shall be."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from halfbyte.trainer.errors import HubError
from halfbyte.trainer.export.provenance import PROVENANCE_FILE
from halfbyte.trainer.hub.failures import hub_errors, page, status_of, with_retries
from halfbyte.trainer.pretrained.license import CARD_FILE
from halfbyte.trainer.publish.files import BASE, PushFile
from halfbyte.trainer.runtime.progress import UploadLog


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


_NEW = (
    ".gitattributes",
    CARD_FILE,
)  # what a new repository holds, the second where a licence was chosen for it
_LARGE = 10**7  # bytes; each file from here on is uploaded by itself and told


@dataclass(frozen=True)
class Remote:
    """A repository at its newest commit."""

    name: str
    commit: str | None
    private: bool
    files: Mapping[str, RepoFile]
    pushed: Mapping[str, Digest]  # what the last push wrote
    blank_card: bool  # its README.md is metadata alone, as the Hub makes it

    def holds_pushed(self, name: str) -> bool:
        """Whether a push wrote the file, and nobody has changed it since."""
        return name in self.files and name in self.pushed and self.pushed[name].fits(self.files[name])


@dataclass(frozen=True)
class RepoChange:
    """What it takes to make a repository hold the files, and no others that an earlier push has left."""

    add: tuple[PushFile, ...]
    delete: tuple[str, ...]
    kept: int  # files that need not be sent
    notes: tuple[str, ...]  # what becomes of what is there, line by line

    def __bool__(self) -> bool:
        return bool(self.add or self.delete)


def find_repository(name: str) -> Remote | None:
    """What is there under the name; None where nothing is.

    Raises HubError where it is no model repository, or one that holds something that no push has put there.
    """
    api = HfApi()
    doing = f"push: what {name} holds"
    with hub_errors(doing, name):
        try:
            info = with_retries(lambda: api.model_info(name))
        except GatedRepoError:
            raise
        except RepositoryNotFoundError as error:
            if status_of(error) == 401:
                raise
            _refuse_other_kinds(api, name)
            return None
        if info.id.lower() != name.lower():
            raise HubError(f"push: {name} is now called {info.id}; push to that name: {page(info.id)}")
        entries = (
            [] if info.sha is None else list(api.list_repo_tree(name, recursive=True, revision=info.sha))
        )
        files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        pushed = read_pushed(_content(name, PROVENANCE_FILE, info.sha)) if PROVENANCE_FILE in files else {}
        remote = Remote(name, info.sha, bool(info.private), files, pushed, blank_card=False)
        if CARD_FILE in files and not remote.holds_pushed(CARD_FILE):
            card = _content(name, CARD_FILE, info.sha).decode(errors="replace")
            remote = replace(remote, blank_card=not REGEX_YAML_BLOCK.sub("", card, count=1).strip())
    foreign = sorted(files.keys() - set(_NEW))
    if foreign and PROVENANCE_FILE not in files:
        raise HubError(
            f"push: {name} holds something else ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}), which"
            f" a push would overwrite; choose another name, or delete what is there: {page(name)}/tree/main"
        )
    return remote


def _content(name: str, file: str, commit: str | None) -> bytes:
    # Beside the client's cache, which would take the folder for a whole one.
    with tempfile.TemporaryDirectory() as cache:
        path = with_retries(lambda: hf_hub_download(name, file, revision=commit, cache_dir=cache))
        return Path(path).read_bytes()


def require_write(remote: Remote) -> None:
    """Asks the Hub itself whether the token may write there; raises HubError where it may not."""
    with hub_errors(f"push: whether {remote.name} may be written to", remote.name):
        with_retries(lambda: HfApi().auth_check(remote.name, write=True))


def create(name: str, *, private: bool) -> Remote:
    """Makes the repository; raises HubError."""
    with hub_errors(f"push: creating {name}", name):
        try:
            with_retries(lambda: HfApi().create_repo(name, private=private))
        except HfHubHTTPError as error:
            if status_of(error) != 409:
                raise
            # It is there by now: made by somebody else, or by a request whose answer was lost.
    remote = find_repository(name)
    if remote is None:
        raise HubError(f"push: {name} was created, but cannot be found; see {page(name)}, and push again")
    return remote


def change(files: Sequence[PushFile], remote: Remote | None, *, drop_base: bool = False) -> RepoChange:
    """What is still to be done; nothing that the repository holds already.

    Of what is there no more is deleted than an earlier push wrote and nobody has changed since; its quantized base only
    for another one, or where that is asked for by `drop_base`. A card that was written by hand is kept.
    """
    there = {} if remote is None else remote.files
    pushed = {} if remote is None else remote.pushed
    ours = {name for name in pushed if remote is not None and remote.holds_pushed(name)}
    keeps_card = remote is not None and CARD_FILE in there and CARD_FILE not in ours and not remote.blank_card
    sent = [file for file in files if not (file.name == CARD_FILE and keeps_card)]
    names = {file.name for file in files}
    has_base = any(name.startswith(f"{BASE}/") for name in names)
    base = {name for name in ours if name.startswith(f"{BASE}/")} if not (has_base or drop_base) else set()
    staying = base | ({CARD_FILE} if keeps_card else set())
    record = {file.name: Digest.of(file) for file in sent if file.name != PROVENANCE_FILE}
    record |= {name: pushed[name] for name in staying if name in pushed}
    sent = [with_pushed(file, record) if file.name == PROVENANCE_FILE else file for file in sent]
    add = tuple(file for file in sent if not _same(file, there.get(file.name)))
    delete = tuple(sorted(ours - names - base))
    notes = [f"{name}: deleted, as an earlier push wrote it and this one has none" for name in delete]
    notes += [
        f"{file.name}: overwritten, although it was changed by hand"
        for file in add
        if file.name in pushed and file.name in there and file.name not in ours
    ]
    if keeps_card:
        notes.append(
            f"{CARD_FILE}: kept as it was written by hand; delete it there to have it written by the push"
        )
    if base:
        notes.append(f"{BASE}/: the quantized base of an earlier push is kept; --no-base deletes it")
    return RepoChange(add, delete, len(sent) - len(add), tuple(notes))


def commit(todo: RepoChange, remote: Remote, progress: UploadLog, *, title: str) -> str:
    """Uploads what is not there, and puts all of it into one commit, whose id it returns. Raises HubError.

    todo: by `change`. Nobody sees an uploaded file before the commit, and what an earlier, interrupted push has
    uploaded is not sent again.
    """
    api = HfApi()
    with hub_errors(f"push: uploading to {remote.name}", remote.name):
        additions = {file: CommitOperationAdd(file.name, file.content) for file in todo.add}
        _upload(api, additions, remote.name, progress)
    deletions = [CommitOperationDelete(name) for name in todo.delete]
    with hub_errors(f"push: the commit to {remote.name}", remote.name):
        try:
            # With a parent no commit is made twice, also where the answer to the first was lost.
            made = with_retries(
                lambda: api.create_commit(
                    remote.name,
                    [*additions.values(), *deletions],
                    commit_message=title,
                    parent_commit=remote.commit,
                )
            )
        except HfHubHTTPError as error:
            if status_of(error) not in (409, 412):
                raise
            return _committed_before(todo, remote, error)
    return made.oid


def _upload(
    api: HfApi, additions: Mapping[PushFile, CommitOperationAdd], name: str, progress: UploadLog
) -> None:
    small = [file for file in additions if file.size < _LARGE]
    for file in additions:
        if file.size >= _LARGE:
            progress.announce(file.name, file.size)
            api.preupload_lfs_files(name, [additions[file]], free_memory=False)
    if small:
        progress.announce(f"{len(small)} small files", sum(file.size for file in small))
        api.preupload_lfs_files(name, [additions[file] for file in small], free_memory=False)


def _committed_before(todo: RepoChange, remote: Remote, error: Exception) -> str:
    """The newest commit, where it holds what was to be committed: then only the answer had been lost."""
    now = find_repository(remote.name)
    if now is None or now.commit is None:
        raise error
    if not all(_same(file, now.files.get(file.name)) for file in todo.add) or now.files.keys() & set(
        todo.delete
    ):
        raise error
    return now.commit


def _same(file: PushFile, there: RepoFile | None) -> bool:
    if there is None or there.size != file.size:
        return False
    return there.blob_id == file.git_digest() if there.lfs is None else there.lfs.sha256 == file.sha256


def _refuse_other_kinds(api: HfApi, name: str) -> None:
    """A model could be made beside a dataset or space of that name, but is not what anybody means."""
    for kind in ("dataset", "space"):
        if with_retries(lambda kind=kind: api.repo_exists(name, repo_type=kind)):  # type: ignore[misc]
            raise HubError(
                f"push: {name} is a {kind} ({page(name, kind)}); expected a model repository, or a name that is free"
            )


_FIELD = "pushed"

_LARGE = 10**7  # bytes; the Hub keeps no file from here on in git itself


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
