"""Caches packed bases on disk, so each model is quantized only once.

Later runs read a quarter of the bytes, already packed. An entry is a folder that stock diffusers can read,
plus a manifest. Its name is a hash of everything that determines its content. An entry is used only if its
files match the digests in the manifest.
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

# Increase it whenever quantization gives different bytes or the manifest changes.
_FORMAT = 1
_MANIFEST = "manifest.json"
# Disk space to leave free for checkpoints and the rest of the system.
_SPARE_BYTES = 10**9


class BaseCache:
    """A folder of packed bases. Several processes may use it at the same time."""

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
        """Loads the model like `load_quantized` does, from the cache if possible.

        If the cache has no valid entry, quantizes the source and stores the result for the next run. A cache
        that cannot be written only causes a warning. A source that is already quantized is loaded without the
        cache.

        Raises:
            ValueError: The source cannot be loaded.
        """
        folder = source.path
        load = partial(load_quantized, model_cls, dtype=dtype, device=device, progress=progress, place=place)
        if read_config(folder, model_cls.__name__).get("quantization_config") is not None:
            return load(folder, recipe)
        settings = {
            "format": _FORMAT,
            "model": model_cls.__name__,
            "dtype": str(dtype),
            # CPU and GPU may compute double-quantized scales that differ in the last digit.
            "device": device.type,
            "quant": recipe.as_json(),
        }
        damaged = None
        fingerprint = self._known_fingerprint(source)
        if fingerprint is not None and (entry := self._entry(settings, fingerprint)).is_dir():
            try:
                model = self._read(entry, recipe, load)
                log.info("loaded the packed base from the cache: %s", entry)
                return model
            except (ValueError, OSError) as error:
                log.warning("the packed base %s is damaged and will be rebuilt: %s", entry, error)
                damaged = _identity(entry)
        model = self._quantized(source, recipe, load)
        fingerprint = self._known_fingerprint(source)
        if fingerprint is None:
            log.warning("the packed base is not cached, because %s changed while it was read", folder)
        else:
            self._keep(model, self._entry(settings, fingerprint), settings, source, damaged)
        return model

    def _entry(self, settings: dict[str, Any], fingerprint: str) -> Path:
        made_from = json.dumps([settings, fingerprint], sort_keys=True)
        return self._folder / sha256_of(made_from)[:32]

    def _known_fingerprint(self, source: Component) -> str | None:
        """Returns a hash that identifies the source's content, or None if that needs its weights to be read."""
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
        """Quantizes the source. Its digests are computed while it loads, so its bytes are read only once."""
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
        """Loads the model of an entry. Raises ValueError if a file differs from the manifest."""
        files = _read_manifest(entry / _MANIFEST)
        for name, (size, _) in files.items():
            found = (entry / name).stat().st_size
            if found != size:
                raise ValueError(f"{entry / name}: got {found} bytes, expected {size}")
        read = {CONFIG_FILE: file_digest(entry / CONFIG_FILE)}
        model = load(
            entry,
            # The files do not record how their scales were chosen.
            replace(recipe, scale_search=None),
            on_file=lambda file, digest: read.__setitem__(file.name, digest),
        )
        for name, digest in read.items():
            if name not in files or files[name][1] != digest:
                raise ValueError(f"{entry / name}: the content differs from the manifest")
        return model

    def _keep(
        self,
        model: nn.Module,
        entry: Path,
        settings: dict[str, Any],
        source: Component,
        damaged: tuple[int, int] | None,
    ) -> None:
        """Writes an entry, replacing a `damaged` one.

        Does nothing if another process wrote or is writing it.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _lock(entry.with_name(f".{entry.name}.lock")) as locked:
                if not locked or (entry.is_dir() and _identity(entry) != damaged):
                    return
                shutil.rmtree(entry, ignore_errors=True)
                # What a killed process of version 0.2 or older left.
                shutil.rmtree(entry.with_name(f".{entry.name}.tmp"), ignore_errors=True)
                needed = sum(tensor.nbytes for tensor in model.state_dict().values())
                free = shutil.disk_usage(self._folder).free
                if needed + _SPARE_BYTES > free:
                    raise OSError(f"it needs {file_size(needed)}, and {file_size(free)} are free on the disk")
                with work_folder(entry) as work:
                    save_quantized(model, work)
                    _write_manifest(work, settings, source)
                    put_in_place(work, entry)
                log.info("cached the packed base in %s (%.1f GB)", entry, needed / 1e9)
        except OSError as error:
            log.warning(
                "cannot cache the packed base in %s, so the next run quantizes again: %s",
                self._folder,
                error,
            )


def _identity(entry: Path) -> tuple[int, int]:
    status = entry.stat()
    return status.st_ino, status.st_ctime_ns


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Tries to take a file lock and yields True if this process holds it.

    The lock ends when the process ends.
    """
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
    # Read the files back from disk, so the digests describe their actual content.
    files = {
        file.name: {"bytes": file.stat().st_size, "digest": file_digest(file)}
        for file in sorted(folder.iterdir())
    }
    # The source is only information for people. Entries are identified by content, wherever the source is
    # stored.
    manifest = {"settings": settings, "source": str(source), "files": files}
    write_file(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Reads the size and digest of each file, by name."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    try:
        return {name: (facts["bytes"], facts["digest"]) for name, facts in manifest["files"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a valid manifest") from error
