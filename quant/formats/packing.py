"""Reads and writes the statistics of a 4-bit weight in the format of bitsandbytes files.

Next to a weight `P.weight`, the packed codes, a file contains:

- `P.weight.absmax`: the scales of the blocks, fp32, or uint8 with double quantization
- `P.weight.quant_map`: the table of 16 values
- `P.weight.nested_absmax` and `P.weight.nested_quant_map`: with double quantization, scales and table of the
  scales
- `P.weight.quant_state.bitsandbytes__nf4` (or `__fp4`): UTF-8 JSON in a uint8 tensor with the settings, and
  with double quantization the offset of the scales

Every tensor and every key is checked. A weight that does not match the format exactly raises a ValueError
that names the tensor.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.quantize_4bit import operands, reference
from halfbyte.kernels.rows import WEIGHT_DTYPES
from halfbyte.quant.formats.nf4 import NestedState, QuantState

STATE_PREFIX = "quant_state.bitsandbytes__"
STATISTICS = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    *(STATE_PREFIX + quant_type for quant_type in operands.QUANT_TYPES),
)

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}
_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_MAX_JSON_BYTES = 4096  # bitsandbytes and this package write about 200
_MAX_DIMENSIONS = 8
# A table in a file differs from the built-in one by the rounding of a division at most. Any other table
# belongs to another quantization type.
_TABLE_TOLERANCE = 1e-6


def split_key(key: str) -> tuple[str, str] | None:
    """Splits `P.weight.absmax` into (`P.weight`, `absmax`); returns None if the key names no statistic."""
    for suffix in STATISTICS:
        if key.endswith("." + suffix):
            weight = key.removesuffix("." + suffix)
            if weight.endswith("weight"):
                return weight, suffix
    return None


def pack_state(state: QuantState) -> dict[str, Tensor]:
    """Returns a weight's statistics to save, by suffix.

    With double quantization this reads the offset from the device, which synchronizes.
    """
    facts: dict[str, Any] = {
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(state.shape),
    }
    # Adding zero turns FP4's -0 into bitsandbytes' +0. It also copies the table: layers share tables, and
    # safetensors rejects tensors that share memory.
    tensors = {"absmax": state.absmax, "quant_map": state.code + 0.0}
    if state.nested is not None:
        facts["nested_blocksize"] = state.nested.blocksize
        facts["nested_dtype"] = "float32"
        facts["nested_offset"] = state.nested.offset.item()
        tensors["nested_absmax"] = state.nested.absmax
        tensors["nested_quant_map"] = state.nested.code.clone()
    encoded = json.dumps(facts).encode()
    tensors[STATE_PREFIX + state.quant_type] = torch.tensor(list(encoded), dtype=torch.uint8)
    return tensors


def unpack_state(name: str, packed: Tensor, statistics: Mapping[str, Tensor]) -> QuantState:
    """Reads the state of the weight `name` from its statistics by suffix, on the packed weight's device.

    Raises ValueError, naming the tensor, if a tensor or key is missing, duplicated, unknown, of the wrong
    type or size, or not finite.
    """
    unknown = sorted(set(statistics) - set(STATISTICS))
    if unknown:
        raise ValueError(f"{name}.{unknown[0]}: unknown statistic; accepted: {', '.join(STATISTICS)}")
    state_keys = [suffix for suffix in statistics if suffix.startswith(STATE_PREFIX)]
    if len(state_keys) != 1:
        found = ", ".join(state_keys) if state_keys else "none"
        raise ValueError(f"{name}: expected one {STATE_PREFIX}nf4 or {STATE_PREFIX}fp4, found {found}")
    quant_type = state_keys[0].removeprefix(STATE_PREFIX)
    where = f"{name}.{state_keys[0]}"
    facts = _read_json(where, statistics[state_keys[0]])
    nested = (
        "nested_absmax" in statistics or "nested_quant_map" in statistics or bool(_NESTED_KEYS & set(facts))
    )
    _check_keys(where, facts, _KEYS | _NESTED_KEYS if nested else _KEYS)
    if facts["quant_type"] != quant_type:
        raise ValueError(f"{where}: quant_type is {facts['quant_type']!r}, but the key says {quant_type!r}")
    shape = _shape(where, facts["shape"])
    numel = math.prod(shape)
    blocksize = _blocksize(where, "blocksize", facts["blocksize"])
    dtype = _DTYPES.get(facts["dtype"]) if isinstance(facts["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{where}: dtype is {facts['dtype']!r}, accepted: {', '.join(_DTYPES)}")
    _check_tensor(name, packed, torch.uint8, ((numel + 1) // 2, 1))

    blocks = math.ceil(numel / blocksize)
    absmax_dtype = torch.uint8 if nested else torch.float32
    absmax = _statistic(name, "absmax", statistics, packed.device, absmax_dtype, (blocks,))
    _table(name, "quant_map", statistics, reference.CODES[quant_type])
    nested_state = _nested_state(name, where, facts, statistics, packed.device, blocks) if nested else None
    return QuantState(
        quant_type=quant_type,
        shape=torch.Size(shape),
        dtype=dtype,
        blocksize=blocksize,
        code=reference.on_device(f"{quant_type.upper()}_CODE", packed.device),
        absmax=absmax,
        nested=nested_state,
    )


def _nested_state(
    name: str,
    where: str,
    facts: dict[str, Any],
    statistics: Mapping[str, Tensor],
    device: torch.device,
    blocks: int,
) -> NestedState:
    blocksize = _blocksize(where, "nested_blocksize", facts["nested_blocksize"])
    if facts["nested_dtype"] != "float32":
        raise ValueError(f"{where}: nested_dtype is {facts['nested_dtype']!r}, accepted: float32")
    groups = (math.ceil(blocks / blocksize),)
    absmax = _statistic(name, "nested_absmax", statistics, device, torch.float32, groups)
    offset = facts["nested_offset"]
    _check_offset(where, offset, _DTYPES[facts["dtype"]], statistics["nested_absmax"], blocks)
    return NestedState(
        absmax=absmax,
        # bitsandbytes uses the table of the file, so this does too, after checking it against the built-in
        # one.
        code=_table(name, "nested_quant_map", statistics, reference.DYNAMIC_CODE).to(device),
        offset=torch.tensor(float(offset), dtype=torch.float32, device=device),
        blocksize=blocksize,
    )


def _check_offset(where: str, offset: Any, dtype: torch.dtype, deviations: Tensor, blocks: int) -> None:
    """Checks that `offset` can be the mean of `blocks` scales.

    deviations: (groups,) fp32, the nested absmax: the largest deviation from the mean in each group.
    """
    limit = torch.finfo(dtype).max
    if type(offset) not in (int, float) or not 0 <= offset <= limit:
        raise ValueError(
            f"{where}: nested_offset is {str(offset)[:80]}, expected a number from 0 to {limit:g}, the mean of the"
            f" scales of a {dtype} weight"
        )
    deviations = deviations[deviations > 0]
    if not deviations.numel():
        return
    smallest, largest = (float(value) for value in torch.aminmax(deviations))
    # A possible mean satisfies two bounds:
    # - A scale that differs from `offset` in fp32 differs by at least a unit in the last place, which is at
    #   least offset * 2^-24. No smaller deviation is possible, and 2^25 leaves a factor of two.
    # - Scales are not negative, so each scale below the mean deviates by at most `offset`, and all of them
    #   together by at most blocks * offset. The deviations above the mean have the same sum, so none of them
    #   exceeds blocks * offset. The factor 2 leaves room for rounding.
    if offset > smallest * 2**25 or largest > 2 * blocks * offset:
        raise ValueError(
            f"{where}: nested_offset is {offset}, which cannot be the mean of scales whose largest deviations from it"
            f" are {smallest:g} to {largest:g}; the file is damaged"
        )


def _read_json(where: str, tensor: Tensor) -> dict[str, Any]:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > _MAX_JSON_BYTES:
        raise ValueError(
            f"{where}: got {tensor.dtype} {tuple(tensor.shape)}, expected at most {_MAX_JSON_BYTES} bytes of JSON as"
            " a uint8 vector"
        )
    try:
        facts = json.loads(bytes(tensor.tolist()).decode(), object_pairs_hook=_unique)
    # RecursionError: deeply nested brackets exhaust the parser's stack.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not the JSON of a quantization state: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(facts).__name__}")
    return facts


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    facts = dict(pairs)
    if len(facts) != len(pairs):
        raise ValueError("duplicate key")
    return facts


def _check_keys(where: str, facts: dict[str, Any], expected: set[str]) -> None:
    missing, unknown = sorted(expected - set(facts)), sorted(set(facts) - expected)
    if missing or unknown:
        raise ValueError(
            f"{where}: missing keys {missing}, unknown keys {unknown}; expected {sorted(expected)}"
        )


def _shape(where: str, value: Any) -> tuple[int, ...]:
    sizes = value if isinstance(value, list) and 0 < len(value) <= _MAX_DIMENSIONS else []
    if not sizes or not all(type(size) is int and 0 < size < 2**40 for size in sizes):
        raise ValueError(f"{where}: shape is {str(value)[:80]}, expected a list of positive sizes")
    return tuple(sizes)


def _blocksize(where: str, key: str, value: Any) -> int:
    if type(value) is not int or value not in operands.BLOCKSIZES:
        raise ValueError(f"{where}: {key} is {value!r}, accepted: {', '.join(map(str, operands.BLOCKSIZES))}")
    return value


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")


def _statistic(
    name: str,
    suffix: str,
    statistics: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> Tensor:
    if suffix not in statistics:
        raise ValueError(f"{name}.{suffix}: missing; the file contains {', '.join(sorted(statistics))}")
    tensor = statistics[suffix]
    _check_tensor(f"{name}.{suffix}", tensor, dtype, shape)
    if dtype.is_floating_point and not tensor.isfinite().all():
        raise ValueError(f"{name}.{suffix}: contains NaN or infinite values; the file is damaged")
    if dtype.is_floating_point and suffix.endswith("absmax") and (tensor < 0).any():
        raise ValueError(f"{name}.{suffix}: contains negative scales; the file is damaged")
    return tensor.to(device)


def _table(name: str, suffix: str, statistics: Mapping[str, Tensor], expected: Tensor) -> Tensor:
    table = _statistic(name, suffix, statistics, torch.device("cpu"), torch.float32, tuple(expected.shape))
    if not torch.allclose(table, expected, rtol=0, atol=_TABLE_TOLERANCE):
        raise ValueError(
            f"{name}.{suffix}: not the table of this quantization type; the restored weights would be wrong"
        )
    return table
