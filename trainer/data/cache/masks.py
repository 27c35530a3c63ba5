"""Caches masks on the latent grid, so that no image is decoded during training."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.quant.files.digest import sha256_of
from halfbyte.trainer.data.cache.entry import DamagedEntry, read_entry, write_entry
from halfbyte.trainer.data.pictures.mask import coverage
from halfbyte.trainer.data.records.sample import Mask, Sample
from halfbyte.trainer.data.sources.contents import load_mask
from halfbyte.trainer.data.views.buckets import View
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.runtime.progress import OnProgress
from halfbyte.trainer.wording import printable

# Increment this when the averaging of masks changes, so that older entries are no longer used.
_VERSION = 1


class MaskCache:
    """The masks of views on the latent grid, in one folder per mask and image."""

    def __init__(self, folder: Path, vae_scale: int) -> None:
        """`vae_scale` is the number of pixels along a side of a latent cell."""
        self._folder = folder / "masks"
        self._vae_scale = vae_scale

    @staticmethod
    def has_checked(folder: Path, sample: Sample) -> bool:
        """Returns True if the sample's mask has been cached before, so that it need not be checked again."""
        assert sample.mask is not None
        return _folder_of(folder / "masks", sample, sample.mask).is_dir()

    def path(self, view: View) -> Path:
        """Returns the path of the entry of a view of a masked image; it need not exist."""
        assert view.sample.mask is not None
        made_from = [_VERSION, view.box, view.width, view.height, view.flip, self._vae_scale]
        name = f"{sha256_of(json.dumps(made_from))}.safetensors"
        return _folder_of(self._folder, view.sample, view.sample.mask) / name

    def read(self, view: View) -> Tensor:
        """Reads a mask, (h, w) fp32 from 0 to 1. Raises DataError if the entry is missing or unusable."""
        path = self.path(view)
        try:
            return self._entry(view)
        except FileNotFoundError as error:
            raise DataError(
                f"{printable(view.sample.path)}: its mask is not in the cache ({path} does not exist); start again"
            ) from error
        except DamagedEntry as error:
            raise DataError(
                f"{printable(view.sample.path)}: the cached mask {path} cannot be read ({error}); delete it and start"
                " again"
            ) from error

    def _entry(self, view: View) -> Tensor:
        shape = {"coverage": self._grid(view)[::-1]}
        return read_entry(self.path(view), shape, torch.float32)["coverage"]

    def _grid(self, view: View) -> tuple[int, int]:
        return view.width // self._vae_scale, view.height // self._vae_scale

    def add_missing(
        self, views: Sequence[View], *, rank: int = 0, world_size: int = 1, progress: OnProgress | None = None
    ) -> list[View]:
        """Caches the masks of views that have one and whose entry is missing or damaged; each process does its share.

        Returns the views of this process that show nothing of their masks.

        Raises:
            DataError: a mask changed since it was found.
            DiskError: the cache cannot be written.
        """
        masked = {self.path(view): view for view in views if view.sample.mask is not None}
        own = list(masked.values())[rank::world_size]
        black = []
        for number, view in enumerate(own, start=1):
            if not self._read_or_make(view).any():
                black.append(view)
            if progress is not None:
                progress(number, len(own))
        return black

    def _read_or_make(self, view: View) -> Tensor:
        try:
            return self._entry(view)
        except (FileNotFoundError, DamagedEntry):
            sample = view.sample
            size = (sample.width, sample.height)
            made = coverage(load_mask(sample), view.box, size, self._grid(view), flip=view.flip)
            write_entry(self.path(view), {"coverage": made}, f"{printable(view.sample.path)}: the mask")
            return made


def _folder_of(folder: Path, sample: Sample, mask: Mask) -> Path:
    return folder / mask.sha256[:2] / f"{mask.sha256}-{sample.sha256[:32]}"
