"""Fake encoders that need no model and record their calls, and a folder of images to encode."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.data.views.buckets import Cropping, View, views_of
from halfbyte.trainer.families.embedding import Encoders, LatentMoments, TextEmbedding


class CountingEncoders(Encoders):
    """Encodes an image as the average colors of 8 x 8 patches, a caption as its bytes; records its calls."""

    def __init__(self, latent_fingerprint: str = "vae1", text_fingerprint: str = "text1") -> None:
        self.latent_fingerprint = latent_fingerprint
        self.text_fingerprint = text_fingerprint
        self.pictures: list[tuple[int, ...]] = []
        self.captions: list[str] = []

    def encode_images(self, pixels: Tensor) -> LatentMoments:
        self.pictures += [tuple(one.shape) for one in pixels]
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return LatentMoments(mean, mean.abs() + 0.1)

    def encode_texts(self, captions: Sequence[str]) -> TextEmbedding:
        self.captions += captions
        return embedding_of(captions)


def embedding_of(captions: Sequence[str]) -> TextEmbedding:
    """Returns each caption's first 8 bytes as (B, 8, 4), and their sum as the pooled embedding (B, 4)."""
    codes = torch.zeros(len(captions), 8, 4)
    for row, caption in enumerate(captions):
        for place, code in enumerate(caption.encode()[:8]):
            codes[row, place] = code
    return TextEmbedding(codes.bfloat16(), codes.sum(1).bfloat16())


def write_pictures(folder: Path) -> Path:
    """Writes four images of three shapes, each of a single color, with caption files."""
    folder.mkdir()
    shapes = {"a": (64, 48), "b": (64, 48), "c": (48, 64), "d": (64, 64)}
    for number, (name, shape) in enumerate(shapes.items()):
        Image.new("RGB", shape, (60 * number, 255 - 60 * number, 30)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"cap {name}", encoding="utf-8")
    return folder


def views_in(folder: Path, prefix: str = "", **cropping: object) -> list[View]:
    groups = views_of(read_samples(folder, CaptionStyle(prefix)), [Cropping(32, 16, **cropping)], seed=0)
    return [view for group in groups for view in group]


def captions_of(views: Sequence[View]) -> list[str]:
    return [view.sample.caption for view in views]
