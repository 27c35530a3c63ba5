"""What the cache folder holds, and getting rid of it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.runtime.sizes import file_size

KINDS = ("latents", "texts", "bases", "digests")


@dataclass(frozen=True)
class Holding:
    """All that one kind of entry takes."""

    kind: str
    files: int
    nbytes: int


def holdings(folder: Path) -> tuple[Holding, ...]:
    """What each kind takes; nothing where there is no such folder."""
    listed = []
    for kind in KINDS:
        sizes = [file.stat().st_size for file in (folder / kind).rglob("*") if file.is_file()]
        listed.append(Holding(kind, len(sizes), sum(sizes)))
    return tuple(listed)


def bases(folder: Path) -> tuple[str, ...]:
    """A line for each packed base: what it is of, what it takes, where it is from and how it is packed."""
    lines = []
    for manifest in sorted((folder / "bases").glob("*/manifest.json")):
        try:
            read = json.loads(manifest.read_text(encoding="utf-8"))
            settings = read["settings"]
            nbytes = sum(file["bytes"] for file in read["files"].values())
            quant = QuantRecipe.of_json(settings["quant"]).describe()
            # Entries of older versions do not say it.
            source = read.get("source", "unknown source")
            lines.append(
                f"{manifest.parent.name}  {settings['model']}  {file_size(nbytes)}  {source}  {quant}"
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            lines.append(f"{manifest.parent.name}  damaged; the next start that needs it makes it anew")
    return tuple(lines)


def clear(folder: Path, kind: str) -> Holding:
    """Deletes all entries of a kind; gives what they took. Raises RecipeError for an unknown kind."""
    if kind not in KINDS:
        raise RecipeError(f"--clear: got {kind!r}, accepted: {', '.join(KINDS)}")
    taken = next(holding for holding in holdings(folder) if holding.kind == kind)
    if (folder / kind).is_dir():
        try:
            shutil.rmtree(folder / kind)
        except OSError as error:
            raise RecipeError(f"--clear: {folder / kind} cannot be deleted: {error}") from error
    return taken
