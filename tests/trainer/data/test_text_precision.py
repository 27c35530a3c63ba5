"""T5's precision under `auto`: by the free memory, and by what the cache has."""

import pytest
import torch

from halfbyte.trainer.data.cache.encodings import encode_missing
from halfbyte.trainer.data.cache.store import store_of
from halfbyte.trainer.data.text_precision import choose_t5_quant
from halfbyte.trainer.families import t5
from halfbyte.trainer.families.encoders import load_encoders
from halfbyte.trainer.families.flux.family import Flux

from counting_encoders import CountingEncoders

CAPTIONS = ["a", "b", "c"]
PLENTY = 2**40


@pytest.fixture
def family(mini_flux, monkeypatch):
    monkeypatch.setattr(t5, "_LARGE", 10**5)
    return Flux.open(str(mini_flux), None, 24)


def chosen(family, cache, free, setting="auto"):
    store_of.cache_clear()
    return choose_t5_quant(setting, family, cache, CAPTIONS, dtype=torch.bfloat16, free=free)


def fill(family, cache, quant, captions):
    """Caches captions under the fingerprint of a precision."""
    encoders = load_encoders(
        family, device=torch.device("cpu"), dtype=torch.bfloat16, memo=cache / "digests", t5_quant=quant
    )
    fake = CountingEncoders("vae", encoders.text_fingerprint)
    encode_missing(cache, fake, [], captions)


def test_free_memory_decides_for_a_large_t5(family, tmp_path):
    needed = t5.bf16_bytes(family.t5.path)
    assert chosen(family, tmp_path, needed) == "none"
    assert chosen(family, tmp_path, needed - 1) == "int8"
    assert chosen(family, tmp_path, None) == "int8"
    for setting in ("none", "int8", "nf4"):
        assert chosen(family, tmp_path, 0, setting) == setting


def test_a_small_t5_is_never_quantized(mini_flux, tmp_path):
    assert chosen(Flux.open(str(mini_flux), None, 24), tmp_path, 0) == "none"


def test_cached_captions_keep_their_precision(family, tmp_path):
    fill(family, tmp_path, "int8", CAPTIONS[:2])
    assert chosen(family, tmp_path, PLENTY) == "int8"
    fill(family, tmp_path, "none", CAPTIONS)
    assert chosen(family, tmp_path, PLENTY) == "none"
    assert chosen(family, tmp_path, 0) == "none", "nothing is left to encode"


def test_bf16_that_does_not_fit_is_not_chosen_for_a_part(family, tmp_path):
    fill(family, tmp_path, "none", CAPTIONS[:2])
    assert chosen(family, tmp_path, PLENTY) == "none"
    assert chosen(family, tmp_path, 0) == "int8"
