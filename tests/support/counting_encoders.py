"""Fake encoders that need no model and record their calls, and a folder of images to encode."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save, save_file
from torch import Tensor

from halfbyte.trainer.data.cache.entry import checksum
from halfbyte.trainer.data.cache.entry_cache import EntryCache
from halfbyte.trainer.data.cache.shard import HEADER_BYTES, ShardWriter, read_payload
from halfbyte.trainer.data.cache.store import Place, store_of
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.data.views.buckets import Cropping, View, views_of
from halfbyte.trainer.families.embedding import Encoders, LatentMoments, TextEmbedding


class CountingEncoders(Encoders):
    """Encodes an image as the average colors of 8 x 8 patches, a caption as its bytes; records its calls."""

    def __init__(
        self, latent_fingerprint: str = "vae1", text_fingerprint: str = "text1", batch: int = 1
    ) -> None:
        self.latent_fingerprint = latent_fingerprint
        self.text_fingerprint = text_fingerprint
        self.batch = batch
        self.pictures: list[tuple[int, ...]] = []
        self.captions: list[str] = []

    @property
    def text_batch(self) -> int:
        return self.batch

    def image_batch(self, width: int, height: int) -> int:
        return self.batch

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


def place_of(cache: EntryCache[Any], item: Any) -> Place:
    """Returns where the newest entry of an item is."""
    store = store_of(cache.shards)
    store.refresh(again=True)
    return store.find(cache.key(item))[0]


def entry_bytes(cache: EntryCache[Any], item: Any) -> bytes:
    """Returns the content of an item's newest entry."""
    place = place_of(cache, item)
    return read_payload(place.shard, cache.key(item), place.offset, place.length)


def change_byte(cache: EntryCache[Any], item: Any, place: int = -3, bit: int = 2) -> None:
    """Flips a bit of an item's entry; `place`: a byte of its header (from 0) or of its content (from the end)."""
    found = place_of(cache, item)
    end = found.offset + HEADER_BYTES + found.length
    with found.shard.open("r+b") as file:
        file.seek(found.offset + place if place >= 0 else end + place)
        changed = bytes([file.read(1)[0] ^ (1 << bit)])
        file.seek(-1, 1)
        file.write(changed)


def replace_entry(cache: EntryCache[Any], item: Any, tensors: dict[str, Tensor]) -> None:
    """Adds an entry with other tensors and their correct checksum, as another program might."""
    with ShardWriter(cache.shards) as writer:
        writer.add(cache.key(item), save(tensors))
    store_of(cache.shards).refresh(again=True)


def move_to_files(cache: EntryCache[Any], items: Iterable[Any]) -> list[Path]:
    """Turns the entries of the items into those of older versions, one file each, and returns the files."""
    files = []
    for item in items:
        tensors = cache.tensors(item)
        files.append(cache.file(item))
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, files[-1], metadata={"crc32": checksum(tensors)})
    shutil.rmtree(cache.shards)
    store_of.cache_clear()
    return files
