"""The images that recipes/flux_mini.yaml trains and validates on, in a style that pretraining leaves out."""

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from scripts.mini.images.captions import styled
from scripts.mini.images.corpus import HELD_OUT_GROUP, Corpus
from scripts.mini.images.styles import HELD_OUT_STYLE, STYLES, Style

TRAINED = (
    "cat", "tiger face", "octopus", "butterfly", "parrot", "elephant", "red apple", "hamburger", "ice cream",
    "carrot", "bicycle", "rocket", "sailboat", "tractor", "castle", "house", "cactus", "umbrella", "key",
    "camera", "robot", "wrapped gift", "alarm clock", "grinning face",
)  # fmt: skip
# In the styles of pretraining, so that the model learns that the word makes the style, and keeps the rest.
KEPT = ("lion", "penguin", "lemon", "bus", "tent", "sunflower", "red heart", "scissors")
HELD_OUT = (
    "dog", "owl", "turtle", "crab", "snail", "strawberry", "pizza", "cupcake", "automobile", "airplane",
    "locomotive", "church", "mushroom", "teapot", "crown", "ghost",
)  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """Names drawn in one style, under one of its captions."""

    names: tuple[str, ...]
    style: Style
    caption: str


_BLUEPRINT = "a blueprint of {a}"
FOLDERS = {
    "train": (Drawn(TRAINED, HELD_OUT_STYLE, _BLUEPRINT), Drawn(KEPT, STYLES["plain"], "a picture of {a}")),
    "heldout": (Drawn(HELD_OUT, HELD_OUT_STYLE, _BLUEPRINT),),
}


def write_blueprints(corpus: Corpus, folder: Path) -> None:
    """Writes `train/` and `heldout/`, each with its captions in metadata.jsonl."""
    for name, parts in FOLDERS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        lines = [line for part in parts for line in _write(corpus, part, folder / name)]
        (folder / name / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write(corpus: Corpus, part: Drawn, folder: Path) -> list[str]:
    """Writes the images; returns their lines of metadata."""
    lines: list[str] = []
    for name in part.names:
        index = corpus.index(name)
        assert corpus.emoji[index].group != HELD_OUT_GROUP
        picture = part.style.draw(corpus.sprites[index : index + 1].float() / 255)[0]
        file = f"{name.replace(' ', '_')}.png"
        pixels = picture.permute(1, 2, 0).mul(255).round().byte()
        Image.fromarray(pixels.numpy()).save(folder / file, optimize=True)
        lines.append(json.dumps({"file_name": file, "text": styled(name, part.style, part.caption)}))
    return lines
