"""Packed bases on disk, so that a model is quantized once: later starts read a quarter of the bytes, ready packed.

An entry is a folder as stock diffusers reads it, with a manifest beside the weights. It is named by everything
that its bytes follow from, and believed only if its files are those of the manifest, to the digest.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.files.atomic import put_in_place, work_folder, write_file
from halfbyte.quant.files.digest import file_digest, sha256_of
from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.quant.load.fill import OnLayerLoaded, OnProgress
from halfbyte.quant.load.serialize import CONFIG_FILE, save_quantized
from halfbyte.quant.load.transformer import load_quantized, read_config
from halfbyte.trainer.pretrained.component import Component
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.runtime.sizes import file_size

log = logging.getLogger(__name__)

# Raised whenever quantization gives other bytes, or the manifest another content.
_FORMAT = 1
_MANIFEST = "manifest.json"
# Left free on the disk for checkpoints and the rest of the system.
_SPARE_BYTES = 10**9


class BaseCache:
    """One folder of packed bases; several processes may use it at once."""

    def __init__(self, folder: Path, digests: FileDigests) -> None:
        self._folder = folder
        self._digests = digests

    def load(
        self,
        model_cls: type[ModelMixin],
        source: Component,
        recipe: QuantRecipe,
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: OnProgress | None = None,
        place: OnLayerLoaded | None = None,
    ) -> nn.Module:
        """As `load_quantized` of the source's folder: the kept one, or made anew and kept for the next start.

        A cache that cannot be written is warned about, and no more. Raises ValueError where the source itself
        cannot be loaded.
        """
        folder = source.path
        load = partial(load_quantized, model_cls, dtype=dtype, device=device, progress=progress, place=place)
        if read_config(folder, model_cls.__name__).get("quantization_config") is not None:
            return load(folder, recipe)
        settings = {
            "format": _FORMAT,
            "model": model_cls.__name__,
            "dtype": str(dtype),
            # The double-quantized scales of CPU and GPU may differ in the last step.
            "device": device.type,
            "quant": recipe.as_json(),
        }
        damaged = None
        fingerprint = self._known_fingerprint(source)
        if fingerprint is not None and (entry := self._entry(settings, fingerprint)).is_dir():
            try:
                model = self._read(entry, recipe, load)
                log.info("the packed base is %s", entry)
                return model
            except (ValueError, OSError) as error:
                log.warning("the packed base %s is damaged and made anew: %s", entry, error)
                damaged = _identity(entry)
        model = self._quantized(source, recipe, load)
        fingerprint = self._known_fingerprint(source)
        if fingerprint is None:
            log.warning("the packed base is not kept: %s changed while it was read", folder)
        else:
            self._keep(model, self._entry(settings, fingerprint), settings, source, damaged)
        return model

    def _entry(self, settings: dict[str, Any], fingerprint: str) -> Path:
        made_from = json.dumps([settings, fingerprint], sort_keys=True)
        return self._folder / sha256_of(made_from)[:32]

    def _known_fingerprint(self, source: Component) -> str | None:
        """What names the source's content, as far as that is known without reading its weights."""
        if source.revision is not None:
            return source.fingerprint(self._digests)
        parts = []
        folder = source.path
        with ShardedWeights(folder) as weights:
            parts.append((folder / CONFIG_FILE).read_bytes())
            for file in weights.files:
                known = self._digests.known(file)
                if known is None:
                    return None
                parts.append(f"\n{file.name}:{known}".encode())
        return sha256_of(b"".join(parts))

    def _quantized(self, source: Component, recipe: QuantRecipe, load: Callable[..., nn.Module]) -> nn.Module:
        """The model from its source, whose digests are noted on the way: its bytes are read once for both."""
        folder = source.path
        if source.revision is not None:
            return load(folder, recipe)
        with ShardedWeights(folder) as weights:
            before = {file: file.stat() for file in weights.files}
        return load(
            folder,
            recipe,
            on_file=lambda file, digest: self._digests.remember(file, before[file], digest),
        )

    def _read(self, entry: Path, recipe: QuantRecipe, load: Callable[..., nn.Module]) -> nn.Module:
        """The model of an entry. Raises ValueError where a file is not what the manifest says."""
        files = _read_manifest(entry / _MANIFEST)
        for name, (size, _) in files.items():
            found = (entry / name).stat().st_size
            if found != size:
                raise ValueError(f"{entry / name}: {found} bytes, not {size}")
        read = {CONFIG_FILE: file_digest(entry / CONFIG_FILE)}
        model = load(
            entry,
            # The files do not say how their scales were found.
            replace(recipe, scale_search=None),
            on_file=lambda file, digest: read.__setitem__(file.name, digest),
        )
        for name, digest in read.items():
            if name not in files or files[name][1] != digest:
                raise ValueError(f"{entry / name}: its content is not what was written")
        return model

    def _keep(
        self,
        model: nn.Module,
        entry: Path,
        settings: dict[str, Any],
        source: Component,
        damaged: tuple[int, int] | None,
    ) -> None:
        """Writes an entry, unless another process does or has; in place of a `damaged` one."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _lock(entry.with_name(f".{entry.name}.lock")) as locked:
                if not locked or (entry.is_dir() and _identity(entry) != damaged):
                    return
                shutil.rmtree(entry, ignore_errors=True)
                needed = sum(tensor.nbytes for tensor in model.state_dict().values())
                free = shutil.disk_usage(self._folder).free
                if needed + _SPARE_BYTES > free:
                    raise OSError(f"it takes {file_size(needed)}, and {file_size(free)} are left there")
                with work_folder(entry) as work:
                    save_quantized(model, work)
                    _write_manifest(work, settings, source)
                    put_in_place(work, entry)
                log.info("the packed base is kept in %s (%.1f GB)", entry, needed / 1e9)
        except OSError as error:
            log.warning(
                "the packed base is not kept in %s, and the next start quantizes again: %s",
                self._folder,
                error,
            )


def _identity(entry: Path) -> tuple[int, int]:
    status = entry.stat()
    return status.st_ino, status.st_ctime_ns


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Whether this process holds the lock, which goes with the process if that dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _write_manifest(folder: Path, settings: dict[str, Any], source: Component) -> None:
    # Read back, so that the digests are of what is there and not of what should be.
    files = {
        file.name: {"bytes": file.stat().st_size, "digest": file_digest(file)}
        for file in sorted(folder.iterdir())
    }
    # The source for readers alone: what tells entries apart is its content, wherever that lies.
    manifest = {"settings": settings, "source": str(source), "files": files}
    write_file(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Name -> size and digest of each file."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    try:
        return {name: (facts["bytes"], facts["digest"]) for name, facts in manifest["files"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a manifest") from error
