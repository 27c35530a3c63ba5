"""Stock diffusers with bitsandbytes on the CPU: the judge of our files.

diffusers refuses bitsandbytes without a GPU by a check alone; with the check taken out, everything else of it
runs here. The judge loads in eval mode; where the CPU has AVX-512, bitsandbytes' eval forward repacks weights in
place and rounds otherwise, so compare outputs after `.train()`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer


class _OnCpu:
    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        pass

    def update_device_map(self, device_map: Any) -> dict[str, str]:
        return {"": "cpu"}


class _FourBit(_OnCpu, BnB4BitDiffusersQuantizer):
    pass


class _EightBit(_OnCpu, BnB8BitDiffusersQuantizer):
    pass


@contextmanager
def stock_bitsandbytes_on_cpu() -> Iterator[None]:
    """Within it, stock `from_pretrained` takes quantized folders and BitsAndBytesConfig on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", _FourBit)
        patch.setitem(AUTO_QUANTIZER_MAPPING, "bitsandbytes_8bit", _EightBit)
        yield
