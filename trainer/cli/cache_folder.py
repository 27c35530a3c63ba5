"""Lists and deletes the entries of the cache folder."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.runtime.sizes import file_size

KINDS = ("images", "latents", "masks", "texts", "bases", "digests")


@dataclass(frozen=True)
class Holding:
    """The number and total size of the cached files of one kind."""

    kind: str
    files: int
    nbytes: int


def holdings(folder: Path) -> tuple[Holding, ...]:
    """Returns the number and size of the files of each kind. A folder that does not exist counts as empty."""
    listed = []
    for kind in KINDS:
        sizes = [file.stat().st_size for file in (folder / kind).rglob("*") if file.is_file()]
        listed.append(Holding(kind, len(sizes), sum(sizes)))
    return tuple(listed)


def bases(folder: Path) -> tuple[str, ...]:
    """Returns one line per packed base: its entry, model class, size, source and quantization."""
    # torch, which takes seconds to import, is only needed to describe a base.
    manifests = sorted((folder / "bases").glob("*/manifest.json"))
    if not manifests:
        return ()
    from halfbyte.quant.convert.recipe import QuantRecipe

    lines = []
    for manifest in manifests:
        try:
            read = json.loads(manifest.read_text(encoding="utf-8"))
            settings = read["settings"]
            nbytes = sum(file["bytes"] for file in read["files"].values())
            quant = QuantRecipe.of_json(settings["quant"]).describe()
            # Entries of older versions have no source.
            source = read.get("source", "unknown source")
            lines.append(
                f"{manifest.parent.name}  {settings['model']}  {file_size(nbytes)}  {source}  {quant}"
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            lines.append(f"{manifest.parent.name}  damaged; rebuilt by the next run that needs it")
    return tuple(lines)


def clear(folder: Path, kind: str) -> Holding:
    """Deletes all entries of a kind and returns their number and size.

    Raises:
        RecipeError: The kind is unknown, or its folder cannot be deleted.
    """
    if kind not in KINDS:
        raise RecipeError(f"--clear: got {kind!r}, accepted: {', '.join(KINDS)}")
    deleted = next(holding for holding in holdings(folder) if holding.kind == kind)
    if (folder / kind).is_dir():
        try:
            shutil.rmtree(folder / kind)
        except OSError as error:
            raise RecipeError(f"--clear: cannot delete {folder / kind}: {error}") from error
    return deleted
