"""Writes generated images with the settings needed to reproduce them, and a grid of all images."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from halfbyte.quant.files.atomic import write_file
from halfbyte.trainer.data.pictures.decode import open_picture
from halfbyte.trainer.sample.contact_sheet import Row, contact_sheet

LIST_FILE = "pictures.json"
GRID_FILE = "grid.png"
PNG_KEY = "halfbyte"
"""The key of the PNG text chunk that holds an image's settings as JSON."""


@dataclass(frozen=True)
class Job:
    """One image to generate."""

    place: int  # index of the prompt in the list
    prompt: str
    strength: float | None  # of the adapter; None: there is none
    seed: int
    seed_place: int  # index of the seed among those of the prompt

    @property
    def file_name(self) -> str:
        """The image's file name, with prompt index, strength and seed."""
        strength = "" if self.strength is None else f"-strength{_strength_text(self.strength)}"
        return f"prompt{self.place:02d}{strength}-seed{self.seed}.png"


def _strength_text(strength: float) -> str:
    """Formats a strength with all significant digits, so that file names differ."""
    return repr(strength).removesuffix(".0")


class PictureFolder:
    """A folder of images, created with its first image. Never overwrites existing files."""

    def __init__(self, asked: Path | None, below: Path) -> None:
        """Uses the folder `asked`, which must be new or empty; if None, the next free number in `below`/pictures."""
        self._asked = asked
        self._numbered = below / "pictures"
        self._root: Path | None = None
        self._records: list[dict[str, Any]] = []
        self._pictures: list[tuple[Job, Image.Image]] = []

    @property
    def root(self) -> Path:
        """The folder's path. Creates the folder on first use."""
        if self._root is None:
            self._root = self._numbered_folder() if self._asked is None else self._asked
            self._root.mkdir(parents=True, exist_ok=True)
        return self._root

    def _numbered_folder(self) -> Path:
        self._numbered.mkdir(parents=True, exist_ok=True)
        taken = [int(path.name) for path in self._numbered.iterdir() if path.name.isdecimal()]
        number = max(taken, default=0) + 1
        while True:
            folder = self._numbered / f"{number:03d}"
            try:
                folder.mkdir()
            except FileExistsError:  # another process has just created it
                number += 1
            else:
                return folder

    def add(self, job: Job, picture: Image.Image, common: dict[str, Any]) -> Path:
        """Writes an image and returns its path. `common` holds the settings that all images share."""
        path = self.root / job.file_name
        record = {
            "file": job.file_name,
            "prompt": job.prompt,
            "seed": job.seed,
            "strength": job.strength,
        } | common
        text = PngInfo()
        text.add_itxt("prompt", job.prompt)
        text.add_itxt(PNG_KEY, json.dumps(record, ensure_ascii=False))
        picture.save(path, pnginfo=text)
        self._records.append(record)
        self._pictures.append((job, picture))
        return path

    def finish(self, heading: Sequence[str]) -> Path:
        """Writes the list of images and the grid. Returns the grid's path."""
        text = json.dumps(self._records, indent=1, ensure_ascii=False)
        write_file(self.root / LIST_FILE, text + "\n")
        grid = self.root / GRID_FILE
        _grid(heading, self._pictures).save(grid)
        return grid


def _grid(heading: Sequence[str], pictures: Sequence[tuple[Job, Image.Image]]) -> Image.Image:
    """Draws the grid: one row per prompt, one column per strength and, within it, seed."""
    columns = sorted({_column(job) for job, _ in pictures})
    seed_places = {column[1] for column in columns}
    drawn = {(job.place, _column(job)): picture for job, picture in pictures}
    prompts = {job.place: job for job, _ in sorted(pictures, key=lambda entry: entry[0].place)}
    seeds = {job.seed_place: job.seed for job, _ in pictures}
    # If all prompts have the same seeds, the columns name them; otherwise each row does.
    shared = len({(job.seed_place, job.seed) for job, _ in pictures}) == len(seed_places)
    titles = []
    for strength, place in columns:
        parts = [] if strength is None else [f"strength {_strength_text(strength)}"]
        if shared:
            parts.append(f"seed {seeds[place]}")
        titles.append(", ".join(parts))
    rows = [
        Row(
            job.prompt if shared else f"{job.prompt} (seed {job.seed})",
            [drawn.get((place, column)) for column in columns],
        )
        for place, job in prompts.items()
    ]
    return contact_sheet(heading, titles, rows, [], of=0)


def _column(job: Job) -> tuple[float | None, int]:
    return job.strength, job.seed_place


def read_record(picture: Path) -> dict[str, Any]:
    """Reads the settings from an image file."""
    with open_picture(picture.read_bytes()) as opened:
        record: dict[str, Any] = json.loads(opened.info[PNG_KEY])
    return record


@dataclass(frozen=True)
class DrawnWith:
    """The settings that all images of a call share."""

    base: dict[str, Any]
    adapter: dict[str, Any] | None
    steps: int
    guidance_scale: float
    width: int
    height: int
    max_sequence_length: int
    quant: dict[str, Any]
    text_encoder_quant: str
    dtype: str
    attention: str
    compiled: bool
    offload: str
    device_map: str | None
    halfbyte: str

    def record(self) -> dict[str, Any]:
        """Returns the settings as plain values for JSON."""
        return asdict(self)
