"""The pictures that recipes/flux_mini.yaml trains on and is judged by: the style that pretraining never saw."""

import json
from pathlib import Path

from PIL import Image
from pretrain_captions import styled
from pretrain_corpus import HELD_OUT_GROUP, Corpus
from pretrain_styles import HELD_OUT_STYLE

TRAINED = (
    "cat", "tiger face", "octopus", "butterfly", "parrot", "elephant", "red apple", "hamburger", "ice cream",
    "carrot", "bicycle", "rocket", "sailboat", "tractor", "castle", "house", "cactus", "umbrella", "key",
    "camera", "robot", "wrapped gift", "alarm clock", "grinning face",
)  # fmt: skip
HELD_OUT = (
    "dog", "owl", "turtle", "crab", "snail", "strawberry", "pizza", "cupcake", "automobile", "airplane",
    "locomotive", "church", "mushroom", "teapot", "crown", "ghost",
)  # fmt: skip


def write_blueprints(corpus: Corpus, folder: Path) -> None:
    """Writes `train/` and `heldout/`, each with its captions in metadata.jsonl."""
    assert not set(TRAINED) & set(HELD_OUT)
    for part, names in (("train", TRAINED), ("heldout", HELD_OUT)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        for name in names:
            index = corpus.index(name)
            assert corpus.emoji[index].group != HELD_OUT_GROUP
            picture = HELD_OUT_STYLE.draw(corpus.sprites[index : index + 1].float() / 255)[0]
            pixels = picture.permute(1, 2, 0).mul(255).round().byte()
            file = f"{name.replace(' ', '_')}.png"
            Image.fromarray(pixels.numpy()).save(folder / part / file, optimize=True)
            text = styled(name, HELD_OUT_STYLE, HELD_OUT_STYLE.captions[0])
            lines.append(json.dumps({"file_name": file, "text": text}))
        (folder / part / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
