"""A model repository on the Hub as a push sees it: what it holds, and one commit that makes it what it shall be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from halfbyte.trainer.errors import HubError
from halfbyte.trainer.hub_answers import page, patiently, status_of, told
from halfbyte.trainer.progress import Announced
from halfbyte.trainer.provenance import PROVENANCE_FILE
from halfbyte.trainer.push_files import PushFile, is_of_a_push

_NOBODYS = (".gitattributes",)  # what a new repository holds
_LARGE = 10**7  # bytes; each file from here on is uploaded by itself and told


@dataclass(frozen=True)
class Remote:
    """A repository at its newest commit."""

    name: str
    commit: str | None
    private: bool
    files: Mapping[str, RepoFile]


@dataclass(frozen=True)
class Change:
    """What it takes to make a repository hold the files, and no others that an earlier push has left."""

    add: tuple[PushFile, ...]
    delete: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.add or self.delete)


def find(name: str) -> Remote | None:
    """What is there under the name; None where nothing is.

    Raises HubError where it is no model repository, or one that holds something that no push has put there.
    """
    api = HfApi()
    doing = f"push: what {name} holds"
    with told(doing, name):
        try:
            info = patiently(lambda: api.model_info(name))
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
    foreign = sorted(files.keys() - set(_NOBODYS))
    if foreign and PROVENANCE_FILE not in files:
        raise HubError(
            f"push: {name} holds something else ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}), which"
            f" a push would overwrite; choose another name, or delete what is there: {page(name)}/tree/main"
        )
    return Remote(name, info.sha, bool(info.private), files)


def require_write(remote: Remote) -> None:
    """Asks the Hub itself whether the token may write there; raises HubError where it may not."""
    with told(f"push: whether {remote.name} may be written to", remote.name):
        patiently(lambda: HfApi().auth_check(remote.name, write=True))


def create(name: str, *, private: bool) -> Remote:
    """Makes the repository; raises HubError."""
    with told(f"push: creating {name}", name):
        try:
            patiently(lambda: HfApi().create_repo(name, private=private))
        except HfHubHTTPError as error:
            if status_of(error) != 409:
                raise
            # It is there by now: made by somebody else, or by a request whose answer was lost.
    remote = find(name)
    if remote is None:
        raise HubError(f"push: {name} was created, but cannot be found; see {page(name)}, and push again")
    return remote


def change(files: Sequence[PushFile], remote: Remote | None) -> Change:
    """What is still to be done; nothing that the repository holds already."""
    there = {} if remote is None else remote.files
    names = {file.name for file in files}
    stale = (name for name in there if is_of_a_push(name) and name not in names)
    return Change(
        tuple(file for file in files if not _same(file, there.get(file.name))), tuple(sorted(stale))
    )


def commit(
    files: Sequence[PushFile], todo: Change, remote: Remote, progress: Announced, *, title: str
) -> str:
    """Uploads what is not there, and puts all of it into one commit, whose id it returns. Raises HubError.

    todo: by `change`. Nobody sees an uploaded file before the commit, and what an earlier, interrupted push has
    uploaded is not sent again.
    """
    api = HfApi()
    with told(f"push: uploading to {remote.name}", remote.name):
        additions = {file: CommitOperationAdd(file.name, file.content) for file in todo.add}
        _upload(api, additions, remote.name, progress)
    deletions = [CommitOperationDelete(name) for name in todo.delete]
    with told(f"push: the commit to {remote.name}", remote.name):
        try:
            # With a parent no commit is made twice, also where the answer to the first was lost.
            made = patiently(
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
            return _committed_before(files, remote, error)
    return made.oid


def _upload(
    api: HfApi, additions: Mapping[PushFile, CommitOperationAdd], name: str, progress: Announced
) -> None:
    small = [file for file in additions if file.size < _LARGE]
    for file in additions:
        if file.size >= _LARGE:
            progress.announce(file.name, file.size)
            api.preupload_lfs_files(name, [additions[file]], free_memory=False)
    if small:
        progress.announce(f"{len(small)} small files", sum(file.size for file in small))
        api.preupload_lfs_files(name, [additions[file] for file in small], free_memory=False)


def _committed_before(files: Sequence[PushFile], remote: Remote, error: Exception) -> str:
    """The newest commit, where it holds what was to be committed: then only the answer had been lost."""
    now = find(remote.name)
    if now is None or now.commit is None or change(files, now):
        raise error
    return now.commit


def _same(file: PushFile, there: RepoFile | None) -> bool:
    if there is None or there.size != file.size:
        return False
    return there.blob_id == file.git_digest() if there.lfs is None else there.lfs.sha256 == file.sha256()


def _refuse_other_kinds(api: HfApi, name: str) -> None:
    """A model could be made beside a dataset or space of that name, but is not what anybody means."""
    for kind in ("dataset", "space"):
        if patiently(lambda kind=kind: api.repo_exists(name, repo_type=kind)):  # type: ignore[misc]
            raise HubError(
                f"push: {name} is a {kind} ({page(name, kind)}); expected a model repository, or a name that is free"
            )
