"""Caches masks on the latent grid, so that no image is decoded during training."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.trainer.data.cache.entry import DamagedEntry
from halfbyte.trainer.data.cache.entry_cache import (
    EntryCache,
    file_digest_of,
    is_small,
    key_of,
    subject_of,
)
from halfbyte.trainer.data.cache.fill import Filling, fill
from halfbyte.trainer.data.pictures.mask import coverage
from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.sources.contents import load_mask
from halfbyte.trainer.data.views.buckets import View
from halfbyte.trainer.runtime.progress import OnProgress
from halfbyte.trainer.wording import printable

# Increment this when the averaging of masks changes, so that older entries are no longer used.
_VERSION = 1


class MaskCache(EntryCache[View]):
    """The masks of views on the latent grid."""

    kind = "masks"
    shapes = {"coverage": (None, None)}  # noqa: RUF012 - a class constant
    dtype = torch.float32

    def __init__(self, folder: Path, vae_scale: int) -> None:
        """`vae_scale` is the number of pixels along a side of a latent cell."""
        super().__init__(folder)
        self._cache = folder
        self._vae_scale = vae_scale

    def key(self, item: View) -> bytes:
        """Returns the key of the entry of a view of a masked image."""
        return key_of(_subject(item.sample), self._made_from(item))

    def file(self, item: View) -> Path:
        """Returns the path of a view's entry in the layout of older versions."""
        name = f"{file_digest_of(self._made_from(item))}.safetensors"
        return _files_folder(self._folder, item.sample) / name

    def name(self, item: View) -> str:
        """Returns the image's path."""
        return f"{printable(item.sample.path)} (mask)"

    def check(self, item: View, tensors: Mapping[str, Tensor]) -> None:
        """Raises DamagedEntry if the mask has not the size of the view's latents."""
        width, height = _grid(item, self._vae_scale)
        if tensors["coverage"].shape != (height, width):
            raise DamagedEntry(f"it has the shape {tuple(tensors['coverage'].shape)}")

    def read(self, view: View) -> Tensor:
        """Reads a mask, (h, w) fp32 from 0 to 1. Raises DataError if the entry is missing or unusable."""
        return self.tensors(view)["coverage"]

    def add_missing(
        self,
        views: Sequence[View],
        *,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        progress: OnProgress | None = None,
    ) -> list[View]:
        """Caches the masks of views that have one and whose entry is missing or damaged; each process does its share.

        Returns the views of this process that show nothing of their masks; of a large cache, only the views whose masks
        were made now. `workers` processes decode the masks; 0: this one does.

        Raises:
            DataError: a mask changed since it was found.
            DiskError: the cache cannot be written.
        """
        masked = {self.key(view): view for view in views if view.sample.mask is not None}
        own = list(masked.values())[rank::world_size]
        if not own:
            return []
        if world_size > 1:
            self.wait_for_others()
        filling = Filling(self._cache, len(own), world_size, progress)
        absent = self.missing(own, filling.count)
        if absent:
            prepare = partial(_averaged, vae_scale=self._vae_scale)
            fill(self, [(absent, 1)], prepare, _rows, filling, maker="the mask", workers=workers)
        looked_at = own if is_small(self._sizes(own)) else absent
        return [view for view in looked_at if not self.read(view).any()]

    def _made_from(self, view: View) -> list[object]:
        return [_VERSION, view.box, view.width, view.height, view.flip, self._vae_scale]


def _averaged(view: View, *, vae_scale: int) -> NDArray[np.float32]:
    sample = view.sample
    size, grid = (sample.width, sample.height), _grid(view, vae_scale)
    made: NDArray[np.float32] = coverage(load_mask(sample), view.box, size, grid, flip=view.flip).numpy()
    return made


def _rows(masks: Sequence[NDArray[np.float32]]) -> list[Mapping[str, Tensor]]:
    return [{"coverage": torch.from_numpy(mask)} for mask in masks]


def _grid(view: View, vae_scale: int) -> tuple[int, int]:
    return view.width // vae_scale, view.height // vae_scale


def _subject(sample: Sample) -> bytes:
    assert sample.mask is not None, "only masked images have a mask"
    return subject_of(sample.mask.sha256, sample.sha256)


def _files_folder(folder: Path, sample: Sample) -> Path:
    assert sample.mask is not None, "only masked images have a mask"
    return folder / sample.mask.sha256[:2] / f"{sample.mask.sha256}-{sample.sha256[:32]}"
