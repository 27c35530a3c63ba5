"""Chooses T5's precision for `model.text_encoder_quant: auto`: by the free memory, and by what is cached already."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from halfbyte.quant.load.transformer import stored_quantization
from halfbyte.trainer.data.cache.encodings import TextCache
from halfbyte.trainer.families.encoders import text_fingerprint
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.t5 import T5Quant, T5Setting, resolve_quant
from halfbyte.trainer.pretrained.file_digests import FileDigests

log = logging.getLogger(__name__)


def choose_t5_quant(
    setting: T5Setting,
    family: Family,
    cache: Path,
    captions: Sequence[str],
    *,
    dtype: torch.dtype,
    free: int | None,
) -> T5Setting:
    """Returns the precision that T5 is loaded in; only `auto` is a choice.

    It is none (bf16) if that fits `free` bytes of device memory, and else int8. If the cache has more of the captions
    in the other precision, it is that one, so that a resumed run, or one on another card, keeps its embeddings. bf16
    that does not fit is chosen only if nothing is left to encode.

    Args:
        cache: the cache's folder.
        captions: all texts of the run.
        free: None if it is unknown, as on the CPU.
    """
    path, named_by = family.t5.path, family.t5.setting
    fits = resolve_quant(setting, path, free=free, named_by=named_by)
    if setting != "auto" or stored_quantization(path) is not None:
        return setting
    if fits == "none" and resolve_quant(setting, path, named_by=named_by) == "none":
        return fits  # a small T5, which is never quantized
    digests = FileDigests(cache / "digests")
    texts = list(dict.fromkeys(["", *captions]))

    def cached(quant: T5Quant) -> int:
        return TextCache(cache, text_fingerprint(family, digests, dtype, quant)).count(texts)

    other: T5Quant = "int8" if fits == "none" else "none"
    before = cached(other)
    if before > cached(fits) and (other == "int8" or before == len(texts)):
        log.info(
            "model.text_encoder_quant: auto is %s, because %d of %d texts are cached in it",
            other,
            before,
            len(texts),
        )
        return other
    return fits
