"""Checks attention backends in a separate process, where a crash does no harm.

Run as `python -m halfbyte.trainer.denoiser.attention_probe`. It runs forward and backward at a run's own
shapes and memory layouts, one backend after the other, the most reliable first and the one known to crash
last. Each backend prints one line of JSON when it is done; a backend whose line is missing crashed the
process. The gradients are checked too, because a backward can be wrong without any error.
"""

import argparse
import json
import statistics

import torch
from torch import Tensor

from halfbyte.kernels.attention.ops import attention, attention_backward, flash4_version

_ORDER = ("efficient", "flash", "flash4", "cudnn")
# Largest relative error, in norm, of 16-bit outputs and gradients. A wrong backward has an error of about 1.
TOLERANCE = 0.02
_CHECKED_HEADS = 2  # the first and the last; all heads in fp32 would not fit into memory next to a model
_TIMED = 5


def backends_here() -> tuple[str, ...]:
    """Returns the backends whose packages are installed, in the order in which they are checked."""
    return tuple(name for name in _ORDER if name != "flash4" or flash4_version() is not None)


def exact(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> list[Tensor]:
    """Returns output and gradients of one head, each (B, S, D), by softmax(q k^T / sqrt(D)) v in fp32."""
    parts = [part.float().requires_grad_() for part in (query, key, value)]
    weights = (parts[0] @ parts[1].transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    out = weights @ parts[2]
    return [out.detach(), *torch.autograd.grad(out, parts, grad.float())]


def error(backend: str, query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> float:
    """Returns the largest relative error of output and gradients over the checked heads; inf for a NaN."""
    out, statistic = attention(query, key, value, backend)
    found = [out, *attention_backward(grad, query, key, value, out, statistic, backend)]
    if not all(bool(part.isfinite().all()) for part in found):
        return float("inf")
    worst = 0.0
    for head in sorted({0, query.shape[2] - 1})[:_CHECKED_HEADS]:
        wanted = exact(*(part[:, :, head] for part in (query, key, value, grad)))
        for part, right in zip(found, wanted, strict=True):
            difference = (part[:, :, head].float() - right).norm() / right.norm()
            worst = max(worst, float(difference))
    return worst


def seconds(backend: str, query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> float:
    """Returns the median time of one forward and backward on the device, in seconds."""
    times = []
    for _ in range(_TIMED + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        out, statistic = attention(query, key, value, backend)
        attention_backward(grad, query, key, value, out, statistic, backend)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[1:])


def probe(device: torch.device, dtype: torch.dtype, tokens: int, heads: int, head_dim: int) -> None:
    """Prints one line of JSON per installed backend: its error and seconds, or why it refused."""
    draws = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, tokens, heads, head_dim, device=device, generator=draws).to(dtype) for _ in range(3)
    )
    # Laid out as in a block's backward, where it is the first columns of a wider matrix's gradient.
    wide = torch.randn(1, tokens, 2 * heads * head_dim, device=device, generator=draws).to(dtype)
    grad = wide[..., : heads * head_dim].unflatten(-1, (heads, head_dim))
    for backend in backends_here():
        try:
            found = error(backend, query, key, value, grad)
            took = seconds(backend, query, key, value, grad)
        # Other packages raise anything for a device or shapes that they do not support.
        except Exception as refused:
            reason = (str(refused) or type(refused).__name__).splitlines()[0]
            result: dict[str, str | float] = {"backend": backend, "refused": reason}
        else:
            result = {"backend": backend, "error": found, "seconds": took}
        print(json.dumps(result), flush=True)


def main() -> None:
    """Parses a run's shapes from the command line and probes the backends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="torch's name of the device")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--head-dim", type=int, required=True)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    probe(device, getattr(torch, arguments.dtype), arguments.tokens, arguments.heads, arguments.head_dim)


if __name__ == "__main__":
    main()
