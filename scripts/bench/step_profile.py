"""Measures where a step's time goes, by kind of work: kernels on a GPU, operators on a CPU.

The adapters' thin products are cuBLAS kernels like the base's, with the same names. Their shapes differ: one
of their three sides is the adapter's rank, or that of layers whose A are stacked, see `LowRankSides`. The
shapes are recorded in a separate step that is launched kernel by kernel, because recording the processor's
side costs time. Forward and backward, our functions, PEFT's and compiled code all multiply by torch's own
operators. Where our fused blocks extend the base's product by the adapter's ranks, that product counts as the
base's.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight

# Patterns for the name of a kernel or of a CPU operator; the first match counts.
KINDS: dict[str, str] = {
    "dequantize": r"dequantize|stack_kernel|kDequantizeBlockwise|few_rows|linear_rows|gemv_4bit",
    "attention": r"flash|fmha|sdpa|cudnn.*(attn|attention)|efficient_attention|cunn_SoftMax",
    "product": r"gemm|nvjet|cutlass|wgmma|xmma|splitKreduce|cublas|gemv",
    "optimizer": r"FusedAdam|fused_adam|multi_tensor|adamw",
    "copy": r"Memcpy|Memset|copy_kernel|CatArrayBatched|direct_copy",
    "elementwise": r".*",
}
# Operators that include the time of the operators they call, the outermost first.
_CPU_WHOLES: dict[str, str] = {
    "optimizer": r"^Optimizer\.step",
    "dequantize": r"^dequantize$|::dequantize",
    "attention": r"scaled_dot_product|^halfbyte::attention",
}
_CPU_KINDS: dict[str, str] = {
    "product": r"::(mm|addmm_?|bmm|baddbmm_?|linear|matmul|conv\w*|gemm_4bit|gemv_4bit)$",
    "copy": r"::(copy_|_to_copy|clone|contiguous|cat|stack|fill_|zero_)$",
    "elementwise": r".*",
}
# Positions of the two matrices among the arguments.
_FIRST_MATRIX = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1}
# Layers that share an input stack their A: queries, keys and values, and a parallel MLP.
_STACKS = (1, 3, 4)
_ALIGNMENT = 8  # fused blocks round the sum of ranks up to a multiple of it

Kernels = list[tuple[str, float, int]]


@dataclass(frozen=True)
class LowRankSides:
    """The side lengths that identify a product as an adapter's."""

    sides: frozenset[int]

    @classmethod
    def of(cls, denoiser: nn.Module, rank: int, tokens: Iterable[int]) -> "LowRankSides":
        """Returns the sides of adapters of one rank.

        tokens: rows of the step's products. Layers without an adapter may have such a length: FLUX's x_embedder and
        proj_out are 64 wide, and their three products count as the adapters' at rank 16, a few microseconds.

        Raises:
            ValueError: the step has such a length anyway.
        """
        stacked = {count * rank for count in _STACKS}
        sides = stacked | {-(-side // _ALIGNMENT) * _ALIGNMENT for side in stacked}
        layers: list[Any] = [module for module in denoiser.modules() if hasattr(module, "lora_A")]
        others = {side for layer in layers for side in (layer.in_features, layer.out_features)} | set(tokens)
        if sides & others:
            raise ValueError(
                f"products of adapters of rank {rank} have sides of {sorted(sides & others)}, as others have: ask for"
                " another rank or size to tell them apart"
            )
        return cls(frozenset(sides))

    def has(self, operator: str, shapes: Sequence[Sequence[int]]) -> bool:
        """Returns True if the operator with arguments of these shapes is an adapter's product."""
        first = _FIRST_MATRIX.get(operator)
        if first is None or len(shapes) < first + 2:
            return False
        left, right = shapes[first], shapes[first + 1]
        return len(left) >= 2 and len(right) >= 2 and not self.sides.isdisjoint((*left[-2:], right[-1]))


_NO_ADAPTER = LowRankSides(frozenset())


def kind_of(kernel: str) -> str:
    """Returns the kind that a kernel's name indicates."""
    return _first(KINDS, kernel)


def profiled(
    step: Callable[[], float],
    steps: int = 2,
    *,
    adapter: LowRankSides = _NO_ADAPTER,
    launched: Callable[[], float] | None = None,
) -> tuple[Mapping[str, float], Kernels]:
    """Returns milliseconds per step of each kind, with `idle` for the time without a kernel, and the slowest kernels.

    adapter: lists its products separately, as the kind `adapter`.
    launched: `step` launched kernel by kernel, if `step` is a graph.
    """
    if not torch.cuda.is_available():
        return _profiled_on_cpu(step, adapter)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        seconds = sum(step() for _ in range(steps))
    kinds = dict.fromkeys(KINDS, 0.0)
    kernels = []
    for event in trace.key_averages():
        taken = event.self_device_time_total / 1e3 / steps
        if taken > 0:
            kinds[kind_of(event.key)] += taken
            kernels.append((event.key, taken, event.count // steps))
    kinds["idle"] = 1e3 * seconds / steps - sum(kinds.values())
    if adapter.sides:
        with profile(
            activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True
        ) as launches:
            (launched or step)()
        kinds = with_adapter(kinds, adapter_ms(launches.events(), adapter))
    return kinds, _by_time(kernels)


def adapter_ms(events: Iterable[Any], adapter: LowRankSides) -> float:
    """Returns milliseconds of the adapter's products, from a profile's events with shapes."""
    return sum(
        kernel.duration / 1e3
        for event in events
        if adapter.has(event.name, event.input_shapes)
        for kernel in event.kernels
        if kind_of(kernel.name) == "product"
    )


def with_adapter(kinds: Mapping[str, float], taken: float) -> dict[str, float]:
    """Returns the kinds with the adapter's part subtracted from the products and listed after them."""
    parts: dict[str, float] = {}
    for kind, total in kinds.items():
        if kind == "product":
            parts |= {"product": total - taken, "adapter": taken}
        else:
            parts[kind] = total
    return parts


def _profiled_on_cpu(step: Callable[[], float], adapter: LowRankSides) -> tuple[Mapping[str, float], Kernels]:
    """Returns the operators' times, each without those it calls; `idle` is Python's and autograd's time.

    It profiles one step only: torch reads about a thousand events per second.
    """
    with _named_dequantize(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        seconds = step()
    kinds = with_adapter(dict.fromkeys(KINDS, 0.0), 0.0)
    operators: dict[str, tuple[float, int]] = {}
    for event in trace.events():
        if "::" not in event.name or event.name.startswith("autograd::"):
            continue
        taken = event.self_cpu_time_total / 1e3
        kinds["adapter" if adapter.has(event.name, event.input_shapes) else _kind_on_cpu(event)] += taken
        before, count = operators.get(event.name, (0.0, 0))
        operators[event.name] = before + taken, count + 1
    if not adapter.sides:
        del kinds["adapter"]
    kinds["idle"] = 1e3 * seconds - sum(kinds.values())
    return kinds, _by_time([(name, taken, count) for name, (taken, count) in operators.items()])


def _kind_on_cpu(event: Any) -> str:
    caller, kind = event, None
    while caller is not None:
        kind = next((whole for whole, names in _CPU_WHOLES.items() if re.search(names, caller.name)), kind)
        caller = caller.cpu_parent
    return kind or _first(_CPU_KINDS, event.name)


@contextmanager
def _named_dequantize() -> Iterator[None]:
    """Names the unpacking of a weight, which called eagerly is a sequence of torch's small operators."""
    plain = PackedWeight.dequantize

    def named(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
        with record_function("dequantize"):
            return plain(weight, dtype)

    with patch.object(PackedWeight, "dequantize", named):
        yield


def _by_time(kernels: Kernels) -> Kernels:
    return sorted(kernels, key=lambda kernel: -kernel[1])


def _first(kinds: Mapping[str, str], name: str) -> str:
    return next(kind for kind, pattern in kinds.items() if re.search(pattern, name, re.IGNORECASE))
