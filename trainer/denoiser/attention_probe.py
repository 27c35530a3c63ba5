"""Tries attention's backends where a crash does no harm: `python -m halfbyte.trainer.denoiser.attention_probe`.

Forward and backward at a run's own shapes and memory layouts, one backend after the other, from the one that is
known to be right to the one that is known to fault; each prints a line of JSON when it is through. What the process
does not live to print has failed. Gradients are compared as well: a backward can be wrong in silence.
"""

import argparse
import json
import statistics

import torch
from torch import Tensor

from halfbyte.kernels.attention.ops import attention, attention_backward, flash4_version

_ORDER = ("efficient", "flash", "flash4", "cudnn")
# Of 16-bit outputs and gradients, as a share of the norm; a wrong backward is off by its whole size.
TOLERANCE = 0.02
_CHECKED_HEADS = 2  # the first and the last: all of them in fp32 would not fit beside a model
_TIMED = 5


def backends_here() -> tuple[str, ...]:
    """Those whose packages are installed, in the order in which they are tried."""
    return tuple(name for name in _ORDER if name != "flash4" or flash4_version() is not None)


def exact(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients of one head, each (B, S, D), in fp32 by the definition."""
    parts = [part.float().requires_grad_() for part in (query, key, value)]
    weights = (parts[0] @ parts[1].transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    out = weights @ parts[2]
    return [out.detach(), *torch.autograd.grad(out, parts, grad.float())]


def error(backend: str, query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> float:
    """The largest relative error of output and gradients (B, S, H, D) over the checked heads; inf for a NaN."""
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
    """Median of a forward and a backward on the device."""
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
    """Prints `{"backend", "error", "seconds"}` for each backend that is there and takes the shapes and type."""
    draws = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, tokens, heads, head_dim, device=device, generator=draws).to(dtype) for _ in range(3)
    )
    # As a block's backward has it: the first columns of the gradient of a wider matrix.
    wide = torch.randn(1, tokens, 2 * heads * head_dim, device=device, generator=draws).to(dtype)
    grad = wide[..., : heads * head_dim].unflatten(-1, (heads, head_dim))
    for backend in backends_here():
        try:
            found = error(backend, query, key, value, grad)
            took = seconds(backend, query, key, value, grad)
        # Whatever a package that is not ours raises for a device or shapes that it does not take.
        except Exception as refused:
            reason = (str(refused) or type(refused).__name__).splitlines()[0]
            result: dict[str, str | float] = {"backend": backend, "refused": reason}
        else:
            result = {"backend": backend, "error": found, "seconds": took}
        print(json.dumps(result), flush=True)


def main() -> None:
    """The arguments are a run's own shapes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="as torch names it")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--head-dim", type=int, required=True)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    probe(device, getattr(torch, arguments.dtype), arguments.tokens, arguments.heads, arguments.head_dim)


if __name__ == "__main__":
    main()
