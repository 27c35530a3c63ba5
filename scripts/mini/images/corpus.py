"""The corpus of the mini pipelines: every emoji of Noto Color Emoji as a 64-pixel image, with name and keywords.

It comes from three Debian packages: fonts-noto-color-emoji (SIL Open Font License 1.1), unicode-data (names
and groups) and unicode-cldr-core (keywords; both under the Unicode license).
"""

import json
import re
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PACKAGES = ("fonts-noto-color-emoji", "unicode-data", "unicode-cldr-core")
FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NAMES = "usr/share/unicode/emoji/emoji-test.txt"
KEYWORDS = ("annotations/en.xml", "annotationsDerived/en.xml")

SIDE = 64  # pixels of an image's side
_DRAWN = 56  # pixels of the emoji's longer side
_STRIKE = 109  # the only size, in pixels per em, for which the font has bitmaps: 136 x 128
_COLUMNS = 50  # of the sheet that a corpus is saved as

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_VARIATION = "\ufe0f"  # selects the color form of a character; keywords are listed without it

# Concepts that pretraining never sees, in any style: for measuring how a new concept is learned.
HELD_OUT_GROUP = "musical-instrument"


@dataclass(frozen=True)
class Emoji:
    """One concept."""

    characters: str
    name: str
    group: str  # Unicode's subgroup, such as animal-mammal
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """All concepts and their sprites."""

    emoji: tuple[Emoji, ...]
    sprites: Tensor  # (N, 4, 64, 64) uint8: red, green, blue, opacity

    def without(self, group: str) -> "Corpus":
        """Returns the concepts of all other groups."""
        kept = [index for index, emoji in enumerate(self.emoji) if emoji.group != group]
        return Corpus(tuple(self.emoji[index] for index in kept), self.sprites[kept])

    def index(self, name: str) -> int:
        """Returns the position of the emoji with a name.

        Raises:
            ValueError: no emoji has the name.
        """
        for index, emoji in enumerate(self.emoji):
            if emoji.name == name:
                return index
        raise ValueError(f"no emoji is named {name!r}; the names are those of Unicode's emoji-test.txt")

    def save(self, folder: Path) -> None:
        """Writes `emoji.jsonl` and one lossless sheet of all sprites."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = -(-len(self.emoji) // _COLUMNS)
        sheet = Image.new("RGBA", (_COLUMNS * SIDE, rows * SIDE))
        for index, sprite in enumerate(self.sprites):
            corner = (index % _COLUMNS * SIDE, index // _COLUMNS * SIDE)
            sheet.paste(Image.fromarray(sprite.permute(1, 2, 0).numpy()), corner)
        sheet.save(folder / "sprites.webp", lossless=True, quality=100, method=4, exact=True)
        lines = [json.dumps(asdict(emoji), ensure_ascii=False) for emoji in self.emoji]
        (folder / "emoji.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Corpus":
        """Reads the files that `save` wrote."""
        lines = (folder / "emoji.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        emoji = tuple(Emoji(r["characters"], r["name"], r["group"], tuple(r["keywords"])) for r in rows)
        sheet = torch.from_numpy(np.array(Image.open(folder / "sprites.webp").convert("RGBA")))
        tiles = sheet.reshape(-1, SIDE, _COLUMNS, SIDE, 4).permute(0, 2, 4, 1, 3)
        return cls(emoji, tiles.reshape(-1, 4, SIDE, SIDE)[: len(emoji)].contiguous())


def fetch_packages(folder: Path) -> None:
    """Downloads the three packages with apt and unpacks them in the folder; needs no root."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True)
        package.unlink()


def draw_corpus(packages: Path) -> Corpus:
    """Reads and draws the emoji of unpacked packages, in Unicode's order.

    It leaves out skin tones of people and hands, which repeat the same drawings five times, and emoji that
    this version of the font does not have.
    """
    keywords = _read_keywords(packages)
    font = ImageFont.truetype(packages / FONT, _STRIKE, layout_engine=ImageFont.Layout.RAQM)
    emoji: list[Emoji] = []
    sprites: list[Tensor] = []
    for characters, name, group in _read_names(packages / NAMES):
        sprite = _draw(font, characters)
        if sprite is not None:
            words = keywords.get(characters.replace(_VARIATION, ""), ())
            emoji.append(Emoji(characters, name, group, tuple(word for word in words if word != name)))
            sprites.append(sprite)
    return Corpus(tuple(emoji), torch.stack(sprites))


def _read_names(file: Path) -> list[tuple[str, str, str]]:
    """Yields (characters, name, subgroup) of every fully qualified emoji without a skin tone."""
    found: list[tuple[str, str, str]] = []
    group = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# subgroup: "):
            group = line.removeprefix("# subgroup: ")
        match = re.match(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.+)", line)
        if match is None:
            continue
        points = [int(point, 16) for point in match[1].split()]
        if not any(point in _SKIN_TONES for point in points):
            found.append(("".join(map(chr, points)), _plain(match[2]), group))
    return found


def _read_keywords(packages: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for file in KEYWORDS:
        root = ET.parse(packages / "usr/share/unicode/cldr/common" / file).getroot()
        for node in root.iter("annotation"):
            if "type" not in node.attrib and node.text:
                found[node.attrib["cp"]] = tuple(_plain(word.strip()) for word in node.text.split("|"))
    return found


def _plain(text: str) -> str:
    """Returns the name in lower case, without marks that no caption would have."""
    return re.sub(r"[“”’!:.,]", "", text.lower()).replace("&", "and")


def _draw(font: ImageFont.FreeTypeFont, characters: str) -> Tensor | None:
    """Returns the centered emoji, (4, 64, 64) uint8; None where the font has no single image of it."""
    canvas = Image.new("RGBA", (300, 200))
    ImageDraw.Draw(canvas).text((20, 20), characters, font=font, embedded_color=True)
    box = canvas.getbbox()
    # Two images next to each other are a sequence that the font cannot join.
    if box is None or box[2] - box[0] > 140 or font.getlength(characters) > 140:
        return None
    strike = canvas.crop((20, box[1], 156, box[3])) if box[2] <= 156 else canvas.crop(box)
    strike = strike.crop(strike.getbbox())
    scale = _DRAWN / 136
    size = (max(1, round(strike.width * scale)), max(1, round(strike.height * scale)))
    # Colors are weighted by opacity; otherwise the transparent black around would darken the rim.
    small = strike.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    sprite = Image.new("RGBA", (SIDE, SIDE))
    sprite.paste(small, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    pixels = torch.from_numpy(np.array(sprite)).permute(2, 0, 1)
    return pixels * (pixels[3:] > 0)  # the same black at every transparent pixel, as in the saved sheet
