"""Times the blocks' elementwise kernels on one GPU and the same expressions in torch, eager and compiled.

    python -m scripts.bench.elementwise results.json [PART OF A ROW'S NAME]

First it checks every kernel against `kernels/*/reference.py`; if one is wrong, it times nothing. Times are
microseconds on the device: medians over replays of a CUDA graph that goes through more buffers than the L2
cache holds. The share is the time in which the necessary bytes can be copied at the measured copy rate,
divided by the kernel's time. torch's forwards and backwards follow diffusers; a backward of torch is timed
together with its forward.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels.copy_rows import ops as copy_ops
from halfbyte.kernels.gelu import ops as gelu_ops
from halfbyte.kernels.gelu import reference as gelu_reference
from halfbyte.kernels.modulation import ops as modulation_ops
from halfbyte.kernels.modulation import reference
from halfbyte.kernels.qk_rope import ops as qk_rope_ops
from halfbyte.kernels.qk_rope import reference as qk_rope_reference
from halfbyte.kernels.qk_rope.ops import Stream
from scripts.bench.kernels_4bit import ceilings, graph_us, sets

BF16 = torch.bfloat16
LARGEST_ERROR = (
    3e-4  # relative to the norm of a bf16 result: both sides round equal sums, added in another order
)
EPS = 1e-6
# Tokens (text, image), width, heads.
SHAPES = {
    "FLUX 1024 px": (512, 4096, 3072, 24),
    "FLUX 512 px": (512, 1024, 3072, 24),
    "SD3.5 large 1024 px": (333, 4096, 2432, 38),
}
Call = Callable[[], Any]


@dataclass
class Case:
    """One function at one shape, and the bytes that its forward and backward must at least read and write."""

    what: str
    forward_bytes: int
    backward_bytes: int
    inputs: Callable[[], tuple[Tensor, ...]]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    torch_forward: Callable[..., Any] | None  # the same function in torch; None: not timed
    learned: tuple[int, ...]  # indices of the inputs that get gradients in torch


@dataclass
class Row:
    """Microseconds of one case, for forward and backward."""

    what: str
    shape: str
    ours: dict[str, float] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)
    eager: dict[str, float] = field(default_factory=dict)
    compiled: dict[str, float] = field(default_factory=dict)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=BF16)


def norm_case(tokens: int, width: int) -> Case:
    def torch_forward(x: Tensor, dy: Tensor, residual: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return functional.layer_norm(x, (width,), eps=EPS) * (1 + scale[:, None]) + shift[:, None]

    size = 2 * tokens * width
    return Case(
        "norm, modulate",
        2 * size,
        4 * size,
        lambda: (*(randn(1, tokens, width) for _ in range(3)), randn(1, width), randn(1, width)),
        lambda x, dy, residual, scale, shift: modulation_ops.layer_norm_modulate(x, scale, shift),
        lambda x, dy, residual, scale, shift: modulation_ops.layer_norm_modulate_backward(
            dy, x, scale, residual
        ),
        torch_forward,
        (0,),
    )


def learned_norm_case(tokens: int, width: int) -> Case:
    case = norm_case(tokens, width)
    case.what = "norm, learned modulation"
    case.backward = lambda x, dy, residual, scale, shift: modulation_ops.layer_norm_modulate_grads(
        dy, x, scale, residual
    )
    case.learned = (0, 3, 4)
    return case


def residual_case(tokens: int, width: int) -> Case:
    size = 2 * tokens * width
    return Case(
        "gated residual",
        3 * size,
        2 * size,
        lambda: (randn(1, tokens, width), randn(1, tokens, width), randn(1, tokens, width), randn(1, width)),
        lambda x, update, dy, gate: modulation_ops.gated_residual(x, gate, update),
        lambda x, update, dy, gate: modulation_ops.gated_residual_backward(dy, gate),
        lambda x, update, dy, gate: x + gate[:, None] * update,
        (0, 1),
    )


def learned_residual_case(tokens: int, width: int) -> Case:
    case = residual_case(tokens, width)
    case.what = "learned gated residual"
    case.backward_bytes = 6 * tokens * width
    case.backward = lambda x, update, dy, gate: modulation_ops.gated_residual_grads(dy, gate, update)
    case.learned = (0, 1, 3)
    return case


def gelu_case(tokens: int, width: int) -> Case:
    hidden = 4 * width

    def forward(x: Tensor, dy: Tensor, joint: Tensor) -> Tensor:
        return gelu_ops.gelu_tanh(x, joint[..., width:])

    def torch_forward(x: Tensor, dy: Tensor, joint: Tensor) -> Tensor:
        return functional.gelu(x, approximate="tanh")

    size = 2 * tokens * hidden
    return Case(
        "GELU",
        2 * size,
        3 * size,
        lambda: (
            randn(1, tokens, hidden),
            randn(1, tokens, hidden + width),
            randn(1, tokens, hidden + width),
        ),
        forward,
        lambda x, dy, joint: gelu_ops.gelu_tanh_backward(dy[..., width:], x),
        torch_forward,
        (0,),
    )


def adapters_case(tokens: int, width: int) -> Case:
    """Forward: copies attention's output next to the MLP's. Backward: GELU's with both adapters' gradients."""
    hidden, rank = 4 * width, 16

    def backward(x: Tensor, dy: Tensor, part: Tensor, gb: Tensor, xa: Tensor, room: Tensor) -> Any:
        return gelu_ops.gelu_tanh_gradients(dy[0, :, width:], x[0], gb, xa, room)

    return Case(
        "copy; GELU with adapters",
        4 * tokens * width,
        6 * tokens * hidden,
        lambda: (
            randn(1, tokens, hidden),
            randn(1, tokens, hidden + width),
            randn(1, tokens, width),
            randn(tokens, rank),
            randn(tokens, rank),
            randn(tokens, hidden),
        ),
        lambda x, dy, part, *_: copy_ops.copy_rows(part, dy[..., :width]),
        backward,
        None,
        (),
    )


def joint_case(lengths: tuple[int, ...], width: int, heads: int, rotated: bool) -> Case:
    head_dim = width // heads
    tokens, count = sum(lengths), len(lengths)
    angles = torch.rand(tokens, head_dim // 2, device="cuda").repeat_interleave(2, dim=1)
    rope = (angles.cos(), angles.sin()) if rotated else None

    def inputs() -> tuple[Tensor, ...]:
        parts = [randn(1, length, width) for length in lengths for _ in range(3)]
        return (
            *parts,
            *(randn(1, tokens, heads, head_dim) for _ in range(3)),
            randn(head_dim),
            randn(head_dim),
        )

    def streams(tensors: tuple[Tensor, ...]) -> list[Stream]:
        return [Stream(*tensors[3 * i : 3 * i + 3], *tensors[-2:]) for i in range(count)]

    def torch_forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        joint = []
        for part in range(2):
            normed = [
                functional.rms_norm(
                    tensors[3 * i + part].unflatten(-1, (heads, -1)), (head_dim,), tensors[part - 2], EPS
                )
                for i in range(count)
            ]
            whole = torch.cat(normed, dim=1) if count > 1 else normed[0]
            joint.append(apply_rotary_emb(whole, rope, sequence_dim=1) if rope else whole)
        if count > 1:
            joint.append(
                torch.cat([tensors[3 * i + 2].unflatten(-1, (heads, -1)) for i in range(count)], dim=1)
            )
        return tuple(joint)

    size = 2 * tokens * width
    angle_bytes = 8 * tokens * head_dim if rotated else 0
    return Case(
        f"q, k to joint, {count} stream{'s' if count > 1 else ''}",
        (6 if count > 1 else 4) * size + angle_bytes,
        6 * size + angle_bytes,
        inputs,
        lambda *tensors: qk_rope_ops.qk_norm_rope(streams(tensors), rope, heads=heads),
        lambda *tensors: qk_rope_ops.qk_norm_rope_backward(*tensors[-5:-2], streams(tensors), rope),
        torch_forward,
        tuple(i for i in range(3 * count) if count > 1 or i < 2),
    )


def cases(text: int, image: int, width: int, heads: int) -> list[Case]:
    tokens = text + image
    rotated = heads == 24  # only FLUX has RoPE
    return [
        norm_case(tokens, width),
        learned_norm_case(tokens, width),
        residual_case(tokens, width),
        learned_residual_case(tokens, width),
        gelu_case(tokens, width),
        adapters_case(tokens, width),
        joint_case((text, image), width, heads, rotated),
        joint_case((tokens,), width, heads, rotated),
    ]


def check() -> None:
    """Checks each kernel against its reference on random inputs and poisoned memory; exits if one is wrong."""
    x, update, dy, residual = (randn(2, 100, 3072) for _ in range(4))
    scale, shift, gate = randn(2, 3 * 3072).chunk(3, dim=1)
    pairs = {
        "layer_norm_modulate": (x, scale, shift, EPS),
        "layer_norm_modulate_backward": (dy, x, scale, residual, EPS),
        "layer_norm_modulate_grads": (dy, x, scale, residual, EPS),
        "gated_residual": (x, gate, update, False),
        "gated_residual_backward": (dy, gate),
        "gated_residual_grads": (dy, gate, update),
    }
    for name, arguments in pairs.items():
        torch.full((1 << 24,), float("nan"), device="cuda")
        outputs = getattr(torch.ops.halfbyte, name).default(*arguments)
        require(name, outputs, getattr(reference, name)(*arguments))
    torch.full((1 << 24,), float("nan"), device="cuda")
    require("gelu_tanh", gelu_ops.gelu_tanh(x), gelu_reference.gelu_tanh(x))
    require(
        "gelu_tanh_backward", gelu_ops.gelu_tanh_backward(dy, x), gelu_reference.gelu_tanh_backward(dy, x)
    )
    room, gb, xa = randn(100, 3072), randn(100, 16), randn(100, 24)
    found = gelu_ops.gelu_tanh_gradients(dy[0], x[0], gb, xa, room)
    require(
        "gelu_tanh_gradients",
        (room, *found),
        gelu_reference.gelu_tanh_gradients(dy[0], x[0], gb, xa),
    )
    require("copy_rows", copy_ops.copy_rows(x.mT), x.mT)
    weight, (cos, sin) = randn(128), torch.randn(2, 100, 128, device="cuda")
    stream = Stream(x, update, dy, weight, weight)
    query, key, _ = qk_rope_ops.qk_norm_rope([stream], (cos, sin), heads=24)
    for name, out, source in (("query", query, x), ("key", key, update)):
        require(name, out, qk_rope_reference.norm_rope([source], [weight], cos, sin, 24, EPS))
    grads = qk_rope_ops.qk_norm_rope_backward(query, key, key, [stream], (cos, sin))
    for name, out, grad, source in (("dq", grads[0][0], query, x), ("dk", grads[0][1], key, update)):
        require(name, out, qk_rope_reference.norm_rope_backward(grad, [source], [weight], cos, sin, EPS)[0])


def require(name: str, outputs: Any, expected: Any) -> None:
    pairs = zip(outputs, expected, strict=True) if isinstance(outputs, tuple) else [(outputs, expected)]
    for ours, theirs in pairs:
        error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
        if not error < LARGEST_ERROR:
            raise SystemExit(
                f"{name}: got relative error {error:.1e}, expected below {LARGEST_ERROR:.0e}; fix the kernel,"
                " nothing was timed"
            )


def torch_step(function: Callable[..., Any], tensors: tuple[Tensor, ...], learned: tuple[int, ...]) -> Any:
    """Runs forward and backward of torch's expression and returns the gradients of the inputs `learned`."""
    inputs = [t.detach().requires_grad_(i in learned) for i, t in enumerate(tensors)]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.empty_like(output) for output in outputs]
    return torch.autograd.grad(outputs, [inputs[i] for i in learned], grads)


def bench(case: Case, shape: str, copy_rate: float, peers: bool) -> Row:
    buffers = [case.inputs() for _ in range(sets(case.forward_bytes + case.backward_bytes))]
    row = Row(case.what, shape)
    for name, function, size in (
        ("forward", case.forward, case.forward_bytes),
        ("backward", case.backward, case.backward_bytes),
    ):
        row.ours[name] = graph_us([lambda b=b, f=function: f(*b) for b in buffers])
        row.share[name] = size / copy_rate * 1e6 / row.ours[name]
    if peers and case.torch_forward is not None:
        for times, function in (
            (row.eager, case.torch_forward),
            (row.compiled, torch.compile(case.torch_forward, dynamic=False, fullgraph=True)),
        ):
            with torch.no_grad():
                times["forward"] = graph_us([lambda b=b, f=function: f(*b) for b in buffers])
            times["both"] = graph_us(
                [lambda b=b, f=function: torch_step(f, b, case.learned) for b in buffers]
            )
    return row


def line(row: Row) -> str:
    cells = [f"{row.ours[name]:8.1f}{row.share[name]:6.0%}" for name in ("forward", "backward")]
    for peer in (row.eager, row.compiled):
        cells += [f"{peer[name]:9.1f}" if name in peer else " " * 9 for name in ("forward", "both")]
    return f"{row.what:28}" + "".join(cells)


def main(path: str, named: str = "") -> None:
    torch.seed()
    check()
    copy_rate, _ = ceilings()
    print(f"every kernel agrees with its reference; copy {copy_rate / 1e12:.2f} TB/s", flush=True)
    print(
        f"{'':28}{'forward':>8}{'':6}{'backward':>8}{'':6}{'eager':>9}{'both':>9}{'compiled':>9}{'both':>9}  us"
    )
    rows = []
    for name, shape in SHAPES.items():
        print(f"{name}, {shape[0]} + {shape[1]} tokens x {shape[2]}", flush=True)
        for case in (case for case in cases(*shape) if named in case.what):
            rows.append(bench(case, name, copy_rate, peers=name != "SD3.5 large 1024 px"))
            print(line(rows[-1]), flush=True)
            torch.cuda.empty_cache()
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_second": copy_rate,
        "rows": [asdict(row) for row in rows],
    }
    with open(path, "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: scripts/bench/elementwise.py RESULTS.json [PART OF A ROW'S NAME]")
    if not torch.cuda.is_available():
        raise SystemExit("scripts/bench/elementwise.py: no CUDA device")
    main(*sys.argv[1:])
