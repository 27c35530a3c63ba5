"""The files that drawn pictures are kept in: each with what it takes to draw it again, and a grid of all."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from halfbyte.quant.files.atomic import write_file
from halfbyte.trainer.sample.contact_sheet import Row, contact_sheet

LIST_FILE = "pictures.json"
GRID_FILE = "grid.png"
PNG_KEY = "halfbyte"
"""The PNG text with a picture's JSON."""


@dataclass(frozen=True)
class Job:
    """One picture to draw."""

    place: int  # of the prompt, in the list
    prompt: str
    strength: float | None  # None: there is no adapter
    seed: int
    seed_place: int  # of the seed, among those of its prompt

    @property
    def file_name(self) -> str:
        """Says which picture it is."""
        strength = "" if self.strength is None else f"-strength{_shown(self.strength)}"
        return f"prompt{self.place:02d}{strength}-seed{self.seed}.png"


def _shown(strength: float) -> str:
    """Every digit that tells it from others."""
    return repr(strength).removesuffix(".0")


class PictureFolder:
    """A folder that is made with its first picture; what was there before is never written over."""

    def __init__(self, asked: Path | None, below: Path) -> None:
        """`asked`, which is new or empty; else the next free number in a folder of pictures below `below`."""
        self._asked = asked
        self._numbered = below / "pictures"
        self._root: Path | None = None
        self._records: list[dict[str, Any]] = []
        self._pictures: list[tuple[Job, Image.Image]] = []

    @property
    def root(self) -> Path:
        """The folder."""
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
            except FileExistsError:  # another process took it
                number += 1
            else:
                return folder

    def add(self, job: Job, picture: Image.Image, common: dict[str, Any]) -> Path:
        """Writes a picture; `common` is what all of them were drawn with."""
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
        """Writes the list of pictures, and the grid, whose path it gives."""
        text = json.dumps(self._records, indent=1, ensure_ascii=False)
        write_file(self.root / LIST_FILE, text + "\n")
        grid = self.root / GRID_FILE
        _grid(heading, self._pictures).save(grid)
        return grid


def _grid(heading: Sequence[str], pictures: Sequence[tuple[Job, Image.Image]]) -> Image.Image:
    """Prompts down; strengths across, within each the seeds."""
    columns = sorted({_column(job) for job, _ in pictures})
    several = {column[1] for column in columns}
    drawn = {(job.place, _column(job)): picture for job, picture in pictures}
    prompts = {job.place: job for job, _ in sorted(pictures, key=lambda entry: entry[0].place)}
    seeds = {job.seed_place: job.seed for job, _ in pictures}
    shared = len({(job.seed_place, job.seed) for job, _ in pictures}) == len(several)
    titles = []
    for strength, place in columns:
        parts = [] if strength is None else [f"strength {_shown(strength)}"]
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
    """What a picture's file says of how it was drawn."""
    with Image.open(picture) as opened:
        record: dict[str, Any] = json.loads(opened.info[PNG_KEY])
    return record


@dataclass(frozen=True)
class DrawnWith:
    """What all pictures of a call share."""

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
        """As JSON holds it."""
        return asdict(self)
