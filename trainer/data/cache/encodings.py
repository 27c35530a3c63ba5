"""Caches latents and text embeddings on disk, so that the VAE and the text encoders need not stay in memory.

The key of an entry is a hash of everything it is made from: the image's bytes, the crop, the caption, the encoders.
File names do not matter: a renamed image is found again, and a changed image never gets an old entry. Several processes
on several machines may fill one cache at once, because each writes files of its own, see `shard`.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.trainer.data.cache.entry import DamagedEntry
from halfbyte.trainer.data.cache.entry_cache import (
    EntryCache,
    file_digest_of,
    key_of,
    subject_of,
)
from halfbyte.trainer.data.cache.fill import Filling, fill
from halfbyte.trainer.data.cache.pixels import decoded_view, unit_pixels
from halfbyte.trainer.data.views.buckets import Size, View
from halfbyte.trainer.families.embedding import Encoders, LatentMoments, TextEmbedding
from halfbyte.trainer.runtime.progress import OnProgress
from halfbyte.trainer.wording import printable, shown

# Increment this when the preparation of pixels changes, so that older entries are no longer used.
_PIXELS_VERSION = 1
# Of images whose color profile is named sRGB and is not: version 1 did not convert their colors.
_MISNAMED_PIXELS_VERSION = 2


class LatentCache(EntryCache[View]):
    """The VAE's posteriors by view. An entry of an image also shows that the image decodes."""

    kind = "latents"
    shapes = {"mean": (None, None, None), "std": (None, None, None)}  # noqa: RUF012 - a class constant
    dtype = torch.float32

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """`fingerprint` is the encoders' latent_fingerprint."""
        super().__init__(folder)
        self._fingerprint = fingerprint

    @classmethod
    def has_decoded(cls, folder: Path, sha256: str) -> bool:
        """Returns True if an image with this SHA-256 has been decoded before, so that it need not be checked again."""
        known = cls.store(folder).has_subject(subject_of(sha256))
        return known or (folder / cls.kind / sha256[:2] / sha256).is_dir()

    def key(self, item: View) -> bytes:
        """Returns the key of a view's entry."""
        return key_of(subject_of(item.sample.sha256), self._made_from(item))

    def file(self, item: View) -> Path:
        """Returns the path of a view's entry in the layout of older versions."""
        sha256 = item.sample.sha256
        return self._folder / sha256[:2] / sha256 / f"{file_digest_of(self._made_from(item))}.safetensors"

    def name(self, item: View) -> str:
        """Returns the image's path."""
        return printable(item.sample.path)

    def check(self, item: View, tensors: Mapping[str, Tensor]) -> None:
        """Raises DamagedEntry if the latents have not the proportions of the view."""
        height, width = tensors["mean"].shape[1:]
        if tensors["std"].shape != tensors["mean"].shape or item.width * height != item.height * width:
            raise DamagedEntry(f"it has latents of {width}x{height} for {item.width}x{item.height} pixels")

    def read(self, view: View) -> LatentMoments:
        """Reads the posterior's mean and std, (1, C, H/8, W/8) fp32. Raises DataError if the entry is unusable."""
        tensors = self.tensors(view)
        return LatentMoments(tensors["mean"][None], tensors["std"][None])

    def _made_from(self, view: View) -> list[object]:
        version = _MISNAMED_PIXELS_VERSION if view.sample.misnamed_profile else _PIXELS_VERSION
        return [version, view.box, view.width, view.height, view.flip, self._fingerprint]


class TextCache(EntryCache[str]):
    """The text encoders' embeddings by caption."""

    kind = "texts"
    shapes = {"prompt_embeds": (None, None), "pooled_prompt_embeds": (None,)}  # noqa: RUF012 - a class constant
    dtype = torch.bfloat16

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """`fingerprint` is the encoders' text_fingerprint."""
        super().__init__(folder)
        self._fingerprint = fingerprint

    def key(self, item: str) -> bytes:
        """Returns the key of a caption's entry."""
        return key_of(subject_of(item), [self._fingerprint])

    def file(self, item: str) -> Path:
        """Returns the path of a caption's entry in the layout of older versions."""
        digest = file_digest_of([item, self._fingerprint])
        return self._folder / digest[:2] / f"{digest}.safetensors"

    def name(self, item: str) -> str:
        """Returns the caption, cut to a few words."""
        return shown(item)

    def read(self, caption: str) -> TextEmbedding:
        """Reads the embedding, (1, T, D), and the pooled one, (1, P). Raises DataError if the entry is unusable."""
        tensors = self.tensors(caption)
        return TextEmbedding(tensors["prompt_embeds"][None], tensors["pooled_prompt_embeds"][None])


def encode_missing(
    folder: Path,
    encoders: Encoders,
    views: Sequence[View],
    captions: Sequence[str],
    *,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: OnProgress | None = None,
) -> tuple[LatentCache, TextCache]:
    """Encodes the views and captions that the cache lacks, and the empty caption. Returns both caches.

    Each of `world_size` processes encodes its share; all must have returned before any reads from the caches. `workers`
    processes decode the images; 0: this one does. Batches are filled up to `Encoders.text_batch` or `image_batch`, so
    that an entry does not depend on which others are missing, see `fill`.

    Raises:
        DataError: if an image changed or an encoder's output is not finite.
        DiskError: if the disk is too small or full.
    """
    latents = LatentCache(folder, encoders.latent_fingerprint)
    texts = TextCache(folder, encoders.text_fingerprint)
    if world_size > 1:
        latents.wait_for_others()
        texts.wait_for_others()
    own_views = list({latents.key(view): view for view in views}.values())[rank::world_size]
    own_captions = list(dict.fromkeys(["", *captions]))[rank::world_size]
    filling = Filling(folder, len(own_views) + len(own_captions), world_size, progress)
    missing_captions = texts.missing(own_captions, filling.count)
    missing_views = latents.missing(own_views, filling.count)

    def text_rows(batch: Sequence[str]) -> list[dict[str, Tensor]]:
        made = encoders.encode_texts(batch)
        rows = zip(made.prompt_embeds, made.pooled_prompt_embeds, strict=True)
        return [{"prompt_embeds": embeds, "pooled_prompt_embeds": pooled} for embeds, pooled in rows]

    def latent_rows(batch: Sequence[NDArray[np.uint8]]) -> list[dict[str, Tensor]]:
        made = encoders.encode_images(unit_pixels(torch.from_numpy(np.stack(batch)), encoders.device))
        rows = zip(made.mean.float(), made.std.float(), strict=True)
        return [{"mean": mean, "std": std} for mean, std in rows]

    if missing_captions:
        sized = [(missing_captions, encoders.text_batch)]
        fill(texts, sized, str, text_rows, filling, maker="the text encoder", workers=0)
    if missing_views:
        by_size = groupby(sorted(missing_views, key=_size), key=_size)
        groups = [(list(alike), encoders.image_batch(*size)) for size, alike in by_size]
        fill(latents, groups, decoded_view, latent_rows, filling, maker="the VAE", workers=workers)
    filling.report()
    return latents, texts


def _size(view: View) -> Size:
    return view.width, view.height
