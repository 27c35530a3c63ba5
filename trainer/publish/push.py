"""Implements `halfbyte push`: commits a run's adapter, quantized base, samples and model card to the Hub."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from halfbyte.trainer.adapters.listed_digests import PROVENANCE_FILE
from halfbyte.trainer.errors import HubError, RecipeError
from halfbyte.trainer.export.provenance import read_base_error, read_provenance
from halfbyte.trainer.hub.account import require_writer
from halfbyte.trainer.hub.client import prepare_client
from halfbyte.trainer.hub.failures import page
from halfbyte.trainer.hub.reference import is_repository
from halfbyte.trainer.pretrained.license import CARD_FILE
from halfbyte.trainer.publish.files import BASE, PushFile, adapter_files, base_files, sample_pictures
from halfbyte.trainer.publish.model_card import CardFacts, model_card, read_validation_summary
from halfbyte.trainer.publish.repository import change, commit, create, find_repository, require_write
from halfbyte.trainer.run_folder.folder import RunFolder, written_recipe
from halfbyte.trainer.runtime.progress import UploadLog
from halfbyte.trainer.runtime.sizes import file_size


@dataclass(frozen=True)
class PushRequest:
    """The options of a push. A repository or visibility of None is taken from the run's recipe."""

    run: Path
    repository: str | None = None
    private: bool | None = None  # only used if the push creates the repository
    step: int | None = None  # push the export of this checkpoint; None: of the finished run
    base: bool | None = None  # push the quantized base; None: push it if it was exported


@dataclass(frozen=True)
class Push:
    """A push that is ready to upload: every file exists and is complete."""

    repository: str
    private: bool
    title: str  # of the commit
    files: tuple[PushFile, ...]
    card: str
    drop_base: bool  # delete the base of an earlier push


def prepare_push(request: PushRequest) -> Push:
    """Collects the files and writes the model card without contacting the Hub.

    Raises:
        RecipeError: An option is invalid, or the run is incomplete or damaged.
    """
    run = RunFolder(request.run)
    if not run.recipe.is_file():
        raise RecipeError(
            f"{request.run}: contains no {run.recipe.name}; expected the folder of a run (a recipe's output.dir)"
        )
    recipe = written_recipe(run)
    repository = request.repository or recipe.output.push_to_hub
    if repository is None or not is_repository(repository):
        got = "nothing, and output.push_to_hub is null" if repository is None else repr(repository)
        raise RecipeError(f"--repo: got {got}; expected a Hub repository as owner/name")
    target = run if request.step is None else _exported(run, request.step)
    base = [] if request.base is False else base_files(target)
    if request.base and not base:
        raise RecipeError(f"--base: {target.root} has no {BASE}/; export it with: halfbyte export RUN --base")
    files = [*adapter_files(target), *base]
    provenance = read_provenance(target.adapter / PROVENANCE_FILE)
    step = provenance.step
    if request.step not in (None, step):
        raise RecipeError(
            f"--checkpoint: {run.root} has no export of step {request.step}; export it with: halfbyte export RUN"
            f" --checkpoint {request.step}"
        )
    pictures = tuple(sample_pictures(run, recipe.sample.prompts, step))
    for picture in pictures:
        files += [file for file in (picture.trained, picture.base) if file is not None]
    card = model_card(
        CardFacts(
            repository,
            recipe,
            provenance,
            tuple(file.name for file in files),
            pictures,
            read_base_error(target.base) if base else None,
            read_validation_summary(run, step),
        )
    )
    files.append(PushFile(CARD_FILE, card.encode()))
    private = recipe.output.hub_private if request.private is None else request.private
    title = f"{recipe.output.dir.name}, step {step}"
    ordered = tuple(sorted(files, key=lambda file: file.name))
    return Push(repository, private, title, ordered, card, drop_base=request.base is False)


def _exported(run: RunFolder, step: int) -> RunFolder:
    """Returns the folder of a checkpoint's export: the run itself for the last step, else exports/step-N."""
    folder = RunFolder(run.root / "exports" / f"step-{step:06d}")
    return folder if folder.root.is_dir() else run


def check_push(repository: str) -> None:
    """Checks the login, the token's permissions, and the repository's name and kind, without uploading.

    Raises:
        HubError: A push to the repository would fail.
    """
    prepare_client(bars=True)
    require_writer(repository)
    remote = find_repository(repository)
    if remote is not None:
        require_write(remote)


def push(ready: Push, console: Console) -> None:
    """Uploads the push in one commit.

    Creates the repository if it does not exist. Files that it already has are not sent again.

    Raises:
        HubError: The Hub cannot be reached or rejects the push.
    """
    prepare_client(bars=console.is_terminal)
    require_writer(ready.repository)
    remote = find_repository(ready.repository)
    if remote is None:
        remote = create(ready.repository, private=ready.private)
        console.print(f"created {page(remote.name)} ({_visibility(remote.private)})", highlight=False)
    elif not remote.private and ready.private:
        console.print(
            f"warning: {page(remote.name)} already exists and stays public; to make it private, change its settings on"
            " the Hub",
            highlight=False,
        )
    todo = change(ready.files, remote, drop_base=ready.drop_base)
    for note in todo.notes:
        console.print(note, highlight=False)
    if not todo:
        console.print(f"up to date: {page(remote.name)} at {remote.commit}", highlight=False)
        return
    total = sum(file.size for file in todo.add)
    made = commit(todo, remote, UploadLog(console, "uploading", total), title=ready.title)
    console.print(
        f"pushed {len(todo.add)} files ({file_size(total)}), {todo.kept} unchanged, {len(todo.delete)} deleted:"
        f" {page(remote.name)} at {made}",
        highlight=False,
    )


def listing(ready: Push) -> list[str]:
    """Returns the lines of a dry run: the files to push, the changes to existing files, and the model card."""
    width = max(len(file.name) for file in ready.files)
    lines = [f"{page(ready.repository)} ({_visibility(ready.private)} if the push creates it)"]
    lines += [f"  {file.name:<{width}} {file_size(file.size):>10}" for file in ready.files]
    total = sum(file.size for file in ready.files)
    return [
        *lines,
        *_outlook(ready),
        f"{len(ready.files)} files, {file_size(total)}; nothing was uploaded",
        "",
        f"{CARD_FILE}:",
        ready.card,
    ]


def _outlook(ready: Push) -> tuple[str, ...]:
    prepare_client(bars=False)
    try:
        return change(ready.files, find_repository(ready.repository), drop_base=ready.drop_base).notes
    except HubError as error:
        return (f"the push would fail now: {error}",)


def _visibility(private: bool) -> str:
    return "private" if private else "public"
