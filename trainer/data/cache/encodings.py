"""Caches latents and text embeddings on disk, so that the VAE and the text encoders need not stay in memory.

The key of an entry is a hash of everything it is made from: the image's bytes, the crop, the caption, the encoders.
File names do not matter: a renamed image is found again, and a changed image never gets an old entry. Entries are
written atomically, and several processes may fill one cache.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from halfbyte.quant.files.digest import sha256_of
from halfbyte.trainer.data.cache.entry import DamagedEntry, read_entry, write_entry
from halfbyte.trainer.data.sources.contents import load_pixels
from halfbyte.trainer.data.views.buckets import Size, View
from halfbyte.trainer.errors import DataError, DiskError
from halfbyte.trainer.families.embedding import Encoders, LatentMoments, TextEmbedding
from halfbyte.trainer.runtime.progress import OnProgress
from halfbyte.trainer.runtime.sizes import file_size
from halfbyte.trainer.wording import printable, shown

log = logging.getLogger(__name__)

# Increment this when the preparation of pixels changes, so that older entries are no longer used.
_PIXELS_VERSION = 1
# Of images whose color profile is named sRGB and is not: version 1 did not convert their colors.
_MISNAMED_PIXELS_VERSION = 2

_Shapes = Mapping[str, Sequence[int | None]]  # by tensor; None: any length
_LATENTS: _Shapes = {"mean": (None, None, None), "std": (None, None, None)}
_TEXTS: _Shapes = {"prompt_embeds": (None, None), "pooled_prompt_embeds": (None,)}

_Item = TypeVar("_Item")


class LatentCache:
    """The VAE's posteriors by view, in one folder per image. The folder's existence shows that the image decodes."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """`fingerprint` is the encoders' latent_fingerprint."""
        self._folder = folder / "latents"
        self._fingerprint = fingerprint

    @staticmethod
    def has_decoded(folder: Path, sha256: str) -> bool:
        """Returns True if an image with this SHA-256 has been decoded before, so that it need not be checked again."""
        return (folder / "latents" / sha256[:2] / sha256).is_dir()

    def path(self, view: View) -> Path:
        """Returns the path of the view's entry, which need not exist."""
        version = _MISNAMED_PIXELS_VERSION if view.sample.misnamed_profile else _PIXELS_VERSION
        made_from = [version, view.box, view.width, view.height, view.flip, self._fingerprint]
        sha256 = view.sample.sha256
        return self._folder / sha256[:2] / sha256 / f"{_digest(made_from)}.safetensors"

    def read(self, view: View) -> LatentMoments:
        """Reads the posterior's mean and std, (1, C, H/8, W/8) fp32. Raises DataError if the entry is unusable."""
        path, what = self.path(view), printable(view.sample.path)
        tensors = _read(path, _LATENTS, torch.float32, what)
        height, width = tensors["mean"].shape[1:]
        if tensors["std"].shape != tensors["mean"].shape or view.width * height != view.height * width:
            raise DataError(
                f"{what}: cache entry {path} has latents of {width}x{height} for {view.width}x{view.height} pixels;"
                " delete it and start again"
            )
        return LatentMoments(tensors["mean"][None], tensors["std"][None])

    def write(self, view: View, moments: LatentMoments) -> None:
        """Writes one view's mean and std, (1, C, H/8, W/8), as fp32. Raises DataError if they are not finite."""
        tensors = {"mean": moments.mean[0].float(), "std": moments.std[0].float()}
        write_entry(self.path(view), tensors, f"{printable(view.sample.path)}: the VAE")

    def missing(self, views: Iterable[View], on_sound: Callable[[], None] = lambda: None) -> list[View]:
        """Returns the views that have no intact entry, without duplicates. Logs a warning for damaged entries.

        Reads every entry completely to verify its checksum, and calls `on_sound` for each intact one.
        """
        return _without_entry({self.path(view): view for view in views}, _LATENTS, torch.float32, on_sound)


class TextCache:
    """The text encoders' embeddings by caption."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """`fingerprint` is the encoders' text_fingerprint."""
        self._folder = folder / "texts"
        self._fingerprint = fingerprint

    def path(self, caption: str) -> Path:
        """Returns the path of the caption's entry, which need not exist."""
        digest = _digest([caption, self._fingerprint])
        return self._folder / digest[:2] / f"{digest}.safetensors"

    def read(self, caption: str) -> TextEmbedding:
        """Reads the embedding, (1, T, D), and the pooled one, (1, P). Raises DataError if the entry is unusable."""
        tensors = _read(self.path(caption), _TEXTS, torch.bfloat16, shown(caption))
        return TextEmbedding(tensors["prompt_embeds"][None], tensors["pooled_prompt_embeds"][None])

    def write(self, caption: str, embedding: TextEmbedding) -> None:
        """Writes one caption's embedding, (1, T, D) and (1, P). Raises DataError if it is not finite."""
        tensors = {
            "prompt_embeds": embedding.prompt_embeds[0],
            "pooled_prompt_embeds": embedding.pooled_prompt_embeds[0],
        }
        write_entry(self.path(caption), tensors, f"{shown(caption)}: the text encoder")

    def missing(self, captions: Iterable[str], on_sound: Callable[[], None] = lambda: None) -> list[str]:
        """Returns the captions that have no intact entry, without duplicates. Logs a warning for damaged entries.

        Reads every entry completely to verify its checksum, and calls `on_sound` for each intact one.
        """
        return _without_entry(
            {self.path(caption): caption for caption in captions}, _TEXTS, torch.bfloat16, on_sound
        )


def encode_missing(
    folder: Path,
    encoders: Encoders,
    views: Sequence[View],
    captions: Sequence[str],
    *,
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
    progress: OnProgress | None = None,
) -> tuple[LatentCache, TextCache]:
    """Encodes the views and captions that the cache lacks, and the empty caption. Returns both caches.

    Each of `world_size` processes encodes its share; all must have returned before any reads from the caches. With
    batch_size 1 an entry does not depend on which others are missing; larger batches may change its last bits.

    Raises:
        DataError: if an image changed or an encoder's output is not finite.
        DiskError: if the disk is too small or full.
    """
    latents = LatentCache(folder, encoders.latent_fingerprint)
    texts = TextCache(folder, encoders.text_fingerprint)
    own_views = list({latents.path(view): view for view in views}.values())[rank::world_size]
    own_captions = list(dict.fromkeys(["", *captions]))[rank::world_size]
    tally = _Tally(len(own_views) + len(own_captions), progress)
    missing_captions = texts.missing(own_captions, tally)
    missing_views = latents.missing(own_views, tally)
    for number, batch in enumerate(_batches(missing_captions, batch_size)):
        _encode_texts(texts, encoders, batch)
        if number == 0:
            _check_space(folder, texts.path(batch[0]), len(missing_captions) * world_size)
        tally(len(batch))
    by_size = sorted(missing_views, key=lambda view: (view.width, view.height))
    for size, alike in groupby(by_size, key=lambda view: (view.width, view.height)):
        for view_batch in _batches(alike, batch_size):
            _encode_views(latents, encoders, view_batch, size)
            if view_batch[0] is by_size[0]:
                _check_space(folder, latents.path(by_size[0]), len(missing_views) * world_size)
            tally(len(view_batch))
    return latents, texts


class _Tally:
    """Counts finished entries and reports them to `progress`."""

    def __init__(self, total: int, progress: OnProgress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self(0)

    def __call__(self, ready: int = 1) -> None:
        self._done += ready
        if self._progress is not None:
            self._progress(self._done, self._total)


def _encode_texts(texts: TextCache, encoders: Encoders, captions: list[str]) -> None:
    embedding = encoders.encode_texts(captions)
    rows = zip(embedding.prompt_embeds.split(1), embedding.pooled_prompt_embeds.split(1), strict=True)
    for caption, row in zip(captions, rows, strict=True):
        texts.write(caption, TextEmbedding(*row))


def _encode_views(latents: LatentCache, encoders: Encoders, views: list[View], size: Size) -> None:
    pixels = torch.stack([load_pixels(view.sample, view.box, size, view.flip) for view in views])
    moments = encoders.encode_images(pixels)
    for view, row in zip(views, zip(moments.mean.split(1), moments.std.split(1), strict=True), strict=True):
        latents.write(view, LatentMoments(*row))


def _check_space(folder: Path, first: Path, entries: int) -> None:
    """Raises DiskError if the disk has no room for `entries` entries of the size of `first`, which is written."""
    needed = first.stat().st_size * (entries - 1)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskError(
            f"the cache {folder} needs {file_size(needed)} more, but its disk has only {file_size(free)} free;"
            " set data.cache_dir to a folder on a larger disk"
        )


def _batches(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _digest(made_from: list[object]) -> str:
    return sha256_of(json.dumps(made_from))


def _read(path: Path, shapes: _Shapes, dtype: torch.dtype, what: object) -> dict[str, Tensor]:
    try:
        return read_entry(path, shapes, dtype)
    except FileNotFoundError as error:
        raise DataError(
            f"{what}: not in the cache ({path} does not exist); start again to encode it"
        ) from error
    except DamagedEntry as error:
        raise DataError(
            f"{what}: cache entry {path} cannot be read ({error}); delete it and start again"
        ) from error


def _is_sound(path: Path, shapes: _Shapes, dtype: torch.dtype) -> bool:
    try:
        read_entry(path, shapes, dtype)
    except (FileNotFoundError, DamagedEntry):
        return False
    return True


def _without_entry(
    items: dict[Path, _Item], shapes: _Shapes, dtype: torch.dtype, on_sound: Callable[[], None]
) -> list[_Item]:
    absent: list[_Item] = []
    for path, item in items.items():
        if not path.is_file():
            absent.append(item)
        elif not _is_sound(path, shapes, dtype):
            log.warning("cache entry %s is damaged and will be encoded again", path)
            absent.append(item)
        else:
            on_sound()
    return absent
