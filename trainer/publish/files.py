"""Collects the files of a run that a push uploads: only files that an export writes, and only complete ones."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from halfbyte.quant.files.digest import sha256_file, sha256_of
from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.quant.load.transformer import read_config
from halfbyte.trainer.adapters.formats import FORMATS, PEFT_CONFIG, PEFT_FILE
from halfbyte.trainer.adapters.listed_digests import PROVENANCE_FILE, require_intact
from halfbyte.trainer.adapters.saved import ADAPTER_FILE, read_saved
from halfbyte.trainer.data.pictures.decode import DECODE_ERRORS, decoded_size
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.export.provenance import BASE_ERROR_FILE, read_provenance
from halfbyte.trainer.run_folder.folder import RunFolder

BASE = "transformer"
SAMPLES = "samples"
_OTHER_FORMATS = tuple(kind for kind in FORMATS if kind != "diffusers")


@dataclass(frozen=True)
class PushFile:
    """A file to push, with its name in the repository."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 digest by which the Hub identifies a large file."""
        if isinstance(self.content, bytes):
            return sha256_of(self.content)
        return sha256_file(self.content)

    def git_digest(self) -> str:
        """Returns the git blob id (SHA-1) by which the Hub identifies a small file."""
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def adapter_files(run: RunFolder) -> list[PushFile]:
    """Lists the files of the exported adapter in all formats.

    Raises:
        RecipeError: There is no exported adapter, or a file is incomplete.
    """
    folder = run.adapter
    if not (folder / ADAPTER_FILE).is_file():
        raise RecipeError(
            f"{run.root}: has no adapter/{ADAPTER_FILE}, so the run is not finished; finish it with --resume, or"
            " export a checkpoint with: halfbyte export RUN --checkpoint STEP"
        )
    read_saved(folder / ADAPTER_FILE)
    if not (folder / PROVENANCE_FILE).is_file():
        raise RecipeError(
            f"{folder}: has no {PROVENANCE_FILE}, so it was exported by an older version; export it again with:"
            " halfbyte export RUN --base"
        )
    read_provenance(folder / PROVENANCE_FILE)  # a damaged one is refused before it is used to check the files
    paths = [folder / name for name in (PROVENANCE_FILE, ADAPTER_FILE, PEFT_FILE, PEFT_CONFIG)]
    for kind in _OTHER_FORMATS:
        paths += sorted((folder / kind).glob("*.safetensors"))
    return list(_complete(folder, (path for path in paths if path.is_file())))


def base_files(run: RunFolder) -> list[PushFile]:
    """Lists the files of the exported base. The list is empty if the base was not exported.

    Raises:
        RecipeError: A file of the base is missing or incomplete.
    """
    folder = run.base
    if not folder.is_dir():
        return []
    try:
        read_config(folder)
        with ShardedWeights(folder) as weights:
            index = () if weights.index is None else (weights.index,)
            paths = [folder / "config.json", folder / BASE_ERROR_FILE, *index, *weights.files]
    except ValueError as error:
        raise RecipeError(f"{error}; export it again with: halfbyte export RUN --base") from error
    return [
        PushFile(f"{BASE}/{file.name}", file.content)
        for file in _complete(folder, (path for path in paths if path.is_file()))
    ]


@dataclass(frozen=True)
class SamplePicture:
    """The sample images of one prompt."""

    prompt: str
    trained: PushFile  # generated with the adapter
    base: PushFile | None  # generated before training


def sample_pictures(run: RunFolder, prompts: tuple[str, ...], step: int) -> list[SamplePicture]:
    """Lists the sample images of all prompts that have one at the step.

    Raises:
        RecipeError: An image is incomplete.
    """
    pictures = []
    for place, prompt in enumerate(prompts):
        trained, base = (run.samples / f"step-{at:06d}-{place:02d}.png" for at in (step, 0))
        if not trained.is_file():
            continue
        before = PushFile(f"{SAMPLES}/{place:02d}-base.png", _checked_image(base)) if base.is_file() else None
        pictures.append(
            SamplePicture(prompt, PushFile(f"{SAMPLES}/{place:02d}.png", _checked_image(trained)), before)
        )
    return pictures


def _complete(folder: Path, paths: Iterator[Path]) -> Iterator[PushFile]:
    """Yields the files, named by their path in `folder`.

    Raises RecipeError for an incomplete safetensors file.
    """
    for path in paths:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise RecipeError(
                    f"{path}: not a complete safetensors file ({error}); export it again"
                ) from error
        require_intact(path)
        yield PushFile(path.relative_to(folder).as_posix(), path)


def _checked_image(path: Path) -> Path:
    """Returns the path if the image decodes completely. Raises RecipeError if it does not."""
    try:
        decoded_size(path.read_bytes())
    except DECODE_ERRORS as error:
        raise RecipeError(f"{path}: not a complete image ({error}); delete it to push without it") from error
    return path
