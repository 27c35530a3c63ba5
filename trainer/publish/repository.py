"""Compares a model repository on the Hub with a push, and makes the one commit that updates it."""

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

from halfbyte.trainer.adapters.listed_digests import PROVENANCE_FILE
from halfbyte.trainer.errors import HubError
from halfbyte.trainer.hub.failures import hub_errors, page, status_of, with_retries
from halfbyte.trainer.pretrained.license import CARD_FILE
from halfbyte.trainer.publish.files import BASE, PushFile
from halfbyte.trainer.runtime.progress import UploadLog


@dataclass(frozen=True)
class Digest:
    """The digests by which the Hub may identify a file's content."""

    sha256: str
    git: str | None = None  # None for a large file

    @classmethod
    def of(cls, file: PushFile) -> "Digest":
        """Computes the digests of a file to push."""
        return cls(file.sha256, file.git_digest() if file.size < _LARGE else None)

    def fits(self, remote_file: RepoFile) -> bool:
        """Returns True if the file in the repository has this content."""
        lfs = remote_file.lfs
        return remote_file.blob_id == self.git if lfs is None else lfs.sha256 == self.sha256


# The files of a new repository. It has a card if a license was chosen when it was created.
_NEW = (".gitattributes", CARD_FILE)
# Bytes. The Hub stores no file of this size or larger in git itself, and a push uploads and reports each
# separately.
_LARGE = 10**7


@dataclass(frozen=True)
class Remote:
    """The state of a repository at its newest commit."""

    name: str
    commit: str | None
    private: bool
    files: Mapping[str, RepoFile]
    pushed: Mapping[str, Digest]  # the files that the last push wrote
    blank_card: bool  # README.md holds only metadata, as the Hub creates it

    def holds_pushed(self, name: str) -> bool:
        """Returns True if a push wrote the file and it has not changed since."""
        return name in self.files and name in self.pushed and self.pushed[name].fits(self.files[name])


@dataclass(frozen=True)
class RepoChange:
    """The additions and deletions that bring a repository to the state of a push."""

    add: tuple[PushFile, ...]
    delete: tuple[str, ...]
    kept: int  # files that the repository already has
    notes: tuple[str, ...]  # lines about existing files that are deleted, overwritten or kept

    def __bool__(self) -> bool:
        return bool(self.add or self.delete)


def find_repository(name: str) -> Remote | None:
    """Returns the model repository of that name, or None if it does not exist.

    Raises:
        HubError: The name belongs to a dataset or space, the repository has been renamed, or it holds files
            that no push wrote.
    """
    api = HfApi()
    doing = f"push: reading {name}"
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
            raise HubError(f"push: {name} was renamed to {info.id}; push to the new name: {page(info.id)}")
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
            f"push: {name} holds files that no push wrote ({', '.join(foreign[:3])}"
            f"{', ...' if len(foreign) > 3 else ''}) and that a push would overwrite; choose another name, or delete"
            f" the files: {page(name)}/tree/main"
        )
    return remote


def _content(name: str, file: str, commit: str | None) -> bytes:
    # Not into the client's cache, where this one file would look like a complete snapshot.
    with tempfile.TemporaryDirectory() as cache:
        path = with_retries(lambda: hf_hub_download(name, file, revision=commit, cache_dir=cache))
        return Path(path).read_bytes()


def require_write(remote: Remote) -> None:
    """Asks the Hub to confirm that the token may write to the repository.

    Raises:
        HubError: The token may not write there.
    """
    with hub_errors(f"push: checking write access to {remote.name}", remote.name):
        with_retries(lambda: HfApi().auth_check(remote.name, write=True))


def create(name: str, *, private: bool) -> Remote:
    """Creates the repository and returns it.

    Raises:
        HubError: The repository cannot be created.
    """
    with hub_errors(f"push: creating {name}", name):
        try:
            with_retries(lambda: HfApi().create_repo(name, private=private))
        except HfHubHTTPError as error:
            if status_of(error) != 409:
                raise
            # It exists by now: somebody else created it, or a request of ours whose response was lost.
    remote = find_repository(name)
    if remote is None:
        raise HubError(f"push: {name} was created but cannot be found; see {page(name)}, then push again")
    return remote


def change(files: Sequence[PushFile], remote: Remote | None, *, drop_base: bool = False) -> RepoChange:
    """Computes the files to add to and to delete from the repository.

    Files that the repository already has are not sent. A file is deleted only if an earlier push wrote it and
    it has not changed since. The base of an earlier push is deleted only if this push has a base too, or with
    `drop_base`. A model card that was written by hand is kept.
    """
    existing = {} if remote is None else remote.files
    pushed = {} if remote is None else remote.pushed
    ours = {name for name in pushed if remote is not None and remote.holds_pushed(name)}
    keeps_card = (
        remote is not None and CARD_FILE in existing and CARD_FILE not in ours and not remote.blank_card
    )
    sent = [file for file in files if not (file.name == CARD_FILE and keeps_card)]
    names = {file.name for file in files}
    has_base = any(name.startswith(f"{BASE}/") for name in names)
    base = {name for name in ours if name.startswith(f"{BASE}/")} if not (has_base or drop_base) else set()
    staying = base | ({CARD_FILE} if keeps_card else set())
    record = {file.name: Digest.of(file) for file in sent if file.name != PROVENANCE_FILE}
    record |= {name: pushed[name] for name in staying if name in pushed}
    sent = [with_pushed(file, record) if file.name == PROVENANCE_FILE else file for file in sent]
    add = tuple(file for file in sent if not _same(file, existing.get(file.name)))
    delete = tuple(sorted(ours - names - base))
    notes = [f"{name}: deleted; an earlier push wrote it, and this push does not have it" for name in delete]
    notes += [
        f"{file.name}: overwritten, although it was changed by hand"
        for file in add
        if file.name in pushed and file.name in existing and file.name not in ours
    ]
    if keeps_card:
        notes.append(
            f"{CARD_FILE}: kept, because it was written by hand; to have the push write it, delete it on the Hub"
        )
    if base:
        notes.append(f"{BASE}/: kept from an earlier push; --no-base deletes it")
    return RepoChange(add, delete, len(sent) - len(add), tuple(notes))


def commit(todo: RepoChange, remote: Remote, progress: UploadLog, *, title: str) -> str:
    """Uploads the files and commits all changes of `todo` at once. Returns the id of the commit.

    Uploaded files are not visible before the commit. Files that an interrupted push has already uploaded are
    not sent again.

    Raises:
        HubError: An upload or the commit fails.
    """
    api = HfApi()
    with hub_errors(f"push: uploading to {remote.name}", remote.name):
        additions = {file: CommitOperationAdd(file.name, file.content) for file in todo.add}
        _upload(api, additions, remote.name, progress)
    deletions = [CommitOperationDelete(name) for name in todo.delete]
    with hub_errors(f"push: the commit to {remote.name}", remote.name):
        try:
            # parent_commit prevents a second commit when the response to the first one was lost.
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
    """Returns the newest commit if it already has all changes. Raises `error` if it does not.

    The commit has them if only the response to our commit request was lost.
    """
    now = find_repository(remote.name)
    if now is None or now.commit is None:
        raise error
    if not all(_same(file, now.files.get(file.name)) for file in todo.add) or now.files.keys() & set(
        todo.delete
    ):
        raise error
    return now.commit


def _same(file: PushFile, remote_file: RepoFile | None) -> bool:
    if remote_file is None or remote_file.size != file.size:
        return False
    lfs = remote_file.lfs
    return remote_file.blob_id == file.git_digest() if lfs is None else lfs.sha256 == file.sha256


def _refuse_other_kinds(api: HfApi, name: str) -> None:
    """Raises HubError if the name belongs to a dataset or space.

    The Hub would create a model of the same name, but that is hardly the user's intention.
    """
    for kind in ("dataset", "space"):
        if with_retries(lambda kind=kind: api.repo_exists(name, repo_type=kind)):  # type: ignore[misc]
            raise HubError(
                f"push: {name} is a {kind} ({page(name, kind)}); expected a model repository or an unused name"
            )


_FIELD = "pushed"


def with_pushed(provenance: PushFile, pushed: Mapping[str, Digest]) -> PushFile:
    """Returns halfbyte.json with the digests of the files that the push writes."""
    content = provenance.content if isinstance(provenance.content, bytes) else provenance.content.read_bytes()
    files = {
        name: {"sha256": digest.sha256} | ({} if digest.git is None else {"git": digest.git})
        for name, digest in sorted(pushed.items())
    }
    return PushFile(
        provenance.name, (json.dumps(json.loads(content) | {_FIELD: files}, indent=1) + "\n").encode()
    )


def read_pushed(text: bytes) -> dict[str, Digest]:
    """Reads the digests of the last push's files, by name, from a repository's halfbyte.json.

    Empty if it has none.
    """
    try:
        facts: Any = json.loads(text)
        return {name: Digest(entry["sha256"], entry.get("git")) for name, entry in facts[_FIELD].items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}
