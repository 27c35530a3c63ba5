"""Where a training step's time goes on the device, by kind of kernel."""

import re
from collections.abc import Callable, Mapping

from torch.profiler import ProfilerActivity, profile

# By the kernel's name, the first that fits. The adapters' thin products are cuBLAS kernels like the base's and are
# told apart by nothing in their names: they count as products.
KINDS: dict[str, str] = {
    "dequantize": r"dequantize|stack_kernel|kDequantizeBlockwise|few_rows|linear_rows|gemv_4bit",
    "attention": r"flash|fmha|sdpa|cudnn.*(attn|attention)|efficient_attention|cunn_SoftMax",
    "product": r"gemm|nvjet|cutlass|wgmma|xmma|splitKreduce|cublas|gemv",
    "optimizer": r"FusedAdam|fused_adam|multi_tensor|adamw",
    "copy": r"Memcpy|Memset|copy_kernel|CatArrayBatched|direct_copy",
    "elementwise": r".*",
}


def kind_of(kernel: str) -> str:
    """The kind a kernel's name says it is."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))


def profiled(
    step: Callable[[], float], steps: int = 2
) -> tuple[Mapping[str, float], list[tuple[str, float, int]]]:
    """Milliseconds a step of each kind, `idle` being what no kernel filled, and the kernels that took most."""
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
    return kinds, sorted(kernels, key=lambda kernel: -kernel[1])
