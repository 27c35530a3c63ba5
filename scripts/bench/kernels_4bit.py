"""Times the 4-bit and int8 kernels on one GPU, next to bitsandbytes, a plain copy and bf16 products.

    python -m scripts.bench.kernels_4bit results.json

First it checks every kernel against `kernels/*/reference.py`; if one is wrong, it times nothing. It needs
torch with Triton. It times bitsandbytes if that can be imported. If halfbyte is not installed, a folder of
links replaces it:

    mkdir -p .typing/halfbyte; for p in kernels quant trainer recipes; do ln -sfn ../../$p
    .typing/halfbyte/$p; done PYTHONPATH=.typing python -m scripts.bench.kernels_4bit results.json

Times are medians over replays of a CUDA graph. The graph goes through several sets of buffers, more than the
L2 cache holds, each with its own outputs. `limit` is the time in which the kernel's bytes can be copied, at
the copy rate measured in the same run. For a product it is that or, if larger, the time for its operations at
the measured rate of an 8192 x 8192 x 8192 bf16 product.
"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.int8 import cuda as int8_cuda
from halfbyte.kernels.int8 import ops as int8_ops
from halfbyte.kernels.int8 import reference as int8_reference
from halfbyte.kernels.linear_4bit import ops as linear_ops
from halfbyte.kernels.quantize_4bit import cuda as cuda_4bit
from halfbyte.kernels.quantize_4bit import reference, scale_search
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight

try:
    import bitsandbytes
    import bitsandbytes.functional as bnb
except ImportError:
    bitsandbytes = bnb = None

BF16 = torch.bfloat16
BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256
ROTATED_BYTES = 600_000_000  # ten times an H200's L2

# (N, K) of FLUX's linears, and how many the transformer has of each.
FLUX = {
    (18432, 3072): 38,
    (9216, 3072): 38,
    (3072, 3072): 269,
    (12288, 3072): 76,
    (3072, 12288): 38,
    (3072, 15360): 38,
    (3072, 256): 2,
    (3072, 768): 1,
    (3072, 4096): 1,
    (3072, 64): 1,
    (6144, 3072): 1,
}
DEQUANTIZE = [(3072, 3072), (12288, 3072), (3072, 12288), (18432, 3072), (21504, 3072), (3072, 15360)]
DEQUANTIZE += [(2432, 2432), (9728, 2432), (2432, 9728), (14592, 2432)]  # SD3.5 large
LINEAR = [
    (3072, 3072),
    (12288, 3072),
    (3072, 12288),
    (21504, 3072),
    (3072, 15360),
    (2432, 2432),
    (9728, 2432),
]
LINEAR_ROWS = (512, 1536, 4608)
FEW_ROWS = [(18432, 3072), (9216, 3072), (3072, 3072), (14592, 2432)]  # modulation and embedding layers


@dataclass
class Row:
    """One line of the table; times are in microseconds."""

    what: str
    shape: tuple[int, ...]  # (M, N, K) or (N, K)
    limit: float
    ours: float
    ours_plain: float | None = None  # launched from Python one by one
    bitsandbytes: float | None = None
    bf16: float | None = None  # F.linear, or a copy of the same number of bytes


def plain_us(calls: list[Callable[[], Any]], repeats: int = 5) -> float:
    """Returns microseconds per call when the calls are launched from Python one by one."""
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls) * 1e3)
    return statistics.median(times)


def graph_us(calls: list[Callable[[], Any]], repeats: int = 15) -> float:
    """Returns microseconds per call in a CUDA graph of all calls, each output in its own memory."""
    for call in (calls[0], calls[-1]):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    outputs = []  # keep them, so that the graph does not reuse their memory
    with torch.cuda.graph(graph):
        for call in calls:
            outputs.append(call())
    # The GPU raises its clocks only under load: the first milliseconds are up to 10 % slower.
    deadline = time.perf_counter() + 0.05
    while time.perf_counter() < deadline:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls) * 1e3)
    return statistics.median(times)


def random_weight(shape: tuple[int, int], dtype: torch.dtype = BF16) -> Tensor:
    return (torch.randn(shape, device="cuda", dtype=torch.float32) * 0.02).to(dtype)


def quantize(weight: Tensor) -> PackedWeight:
    device = weight.device
    return PackedWeight(
        *cuda_4bit.quantize_4bit_double(weight, "nf4", BLOCKSIZE, NESTED_BLOCKSIZE),
        reference.NF4_CODE.to(device),
        reference.DYNAMIC_CODE.to(device),
        (weight.shape[0], weight.shape[1]),
        BLOCKSIZE,
        NESTED_BLOCKSIZE,
    )


def dequantize(weight: PackedWeight) -> Tensor:
    *tensors, shape, blocksize, nested_blocksize = weight
    return cuda_4bit.dequantize_4bit_double(*tensors, shape, BF16, blocksize, nested_blocksize)


def packed_bytes(shape: tuple[int, int]) -> float:
    values = shape[0] * shape[1]
    return values / 2 + values / BLOCKSIZE * (1 + 4 / NESTED_BLOCKSIZE)


def sets(size: float) -> int:
    """Returns how many sets of buffers of `size` bytes to rotate through."""
    return max(4, min(64, round(ROTATED_BYTES / size)))


def poison() -> None:
    """Fills memory with NaN and frees it; the next outputs reuse it, so unwritten values show as NaN."""
    for size in (1 << 16, 1 << 20, 1 << 24, 1 << 26):
        torch.full((size,), float("nan"), device="cuda")


def require(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"{what}: the result differs from the reference; fix the kernel, nothing was timed")


def relative_error(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def check(shapes: list[tuple[int, int]]) -> None:
    """Checks every kernel against its reference on new random weights; exits if one is wrong."""
    for shape, quant_type, dtype in itertools.product(
        shapes, ("nf4", "fp4"), (BF16, torch.float16, torch.float32)
    ):
        weight = random_weight(shape, dtype)
        packed, absmax = reference.quantize_4bit(weight, quant_type, BLOCKSIZE)
        poison()
        double = cuda_4bit.quantize_4bit_double(weight, quant_type, BLOCKSIZE, NESTED_BLOCKSIZE)
        require(torch.equal(double[0], packed), f"quantize {quant_type} {shape} {dtype}")
        single = cuda_4bit.quantize_4bit(weight, quant_type, BLOCKSIZE)
        require(torch.equal(single[1], absmax), f"absmax {quant_type} {shape} {dtype}")
        code, nested_code = reference.CODES[quant_type].cuda(), reference.DYNAMIC_CODE.cuda()
        scale = reference.dequantize_absmax(*double[1:], nested_code, NESTED_BLOCKSIZE)
        poison()
        out = cuda_4bit.dequantize_4bit_double(
            *double, code, nested_code, shape, dtype, BLOCKSIZE, NESTED_BLOCKSIZE
        )
        expected = reference.dequantize_4bit(packed, scale, code, shape, dtype, BLOCKSIZE)
        require(torch.equal(out, expected), f"dequantize {quant_type} {shape} {dtype}")
        poison()
        out = cuda_4bit.dequantize_4bit(*single, code, shape, dtype, BLOCKSIZE)
        expected = reference.dequantize_4bit(packed, absmax, code, shape, dtype, BLOCKSIZE)
        require(torch.equal(out, expected), f"dequantize single {quant_type} {shape} {dtype}")
    for shape, rows in itertools.product([(3072, 3072), (264, 1032)], (1, 2, 4, 9, 16, 40)):
        weight = random_weight(shape)
        quantized = quantize(weight)
        x = torch.randn(rows, shape[1], device="cuda", dtype=BF16)
        exact = dequantize(quantized).double()
        poison()
        y = linear_ops.linear_4bit(x, quantized)
        require(relative_error(y, x.double() @ exact.t()) < 5e-3, f"linear {rows} rows {shape}")
        dx = linear_ops.linear_4bit_input_grad(y, quantized)
        require(relative_error(dx, y.double() @ exact) < 5e-3, f"input grad {rows} rows {shape}")
        rows8, absmax8 = int8_cuda.quantize_rows(weight)
        require(torch.equal(rows8, int8_reference.quantize_rows(weight)[0]), f"int8 rows {shape}")
        x[0, 5] = 30.0
        y = int8_cuda.linear_int8(x, rows8, absmax8, None, 6.0)
        expected = int8_reference.linear_int8(x, rows8, absmax8, None, 6.0)
        require(relative_error(y, expected) < 5e-3, f"int8 linear {rows} rows {shape}")


def ceilings() -> tuple[float, float]:
    """Returns (bytes/s of a 4 GiB copy, read plus written; operations/s of an 8192^3 bf16 product)."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / plain_us([lambda: target.copy_(source)] * 3) * 1e6
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    return copy, 2 * 8192**3 / plain_us([lambda: a @ b] * 5) * 1e6


def bench_dequantize(shape: tuple[int, int], copy_rate: float) -> Row:
    size = packed_bytes(shape) + 2 * shape[0] * shape[1]
    weights = [quantize(random_weight(shape)) for _ in range(sets(size))]
    calls = [lambda w=w: dequantize(w) for w in weights]
    sources = [torch.randint(0, 255, (int(size) // 2,), dtype=torch.uint8, device="cuda") for _ in weights]
    row = Row("dequantize", shape, size / copy_rate * 1e6, graph_us(calls), plain_us(calls))
    row.bf16 = graph_us([lambda s=s: s.clone() for s in sources])
    if bnb:
        states = [bnb.quantize_4bit(random_weight(shape), quant_type="nf4", compress_statistics=True)]
        states += [(states[0][0].clone(), states[0][1]) for _ in weights[1:]]
        row.bitsandbytes = plain_us([lambda s=s: bnb.dequantize_4bit(*s) for s in states])
    return row


def bench_quantize_all(copy_rate: float) -> list[Row]:
    """Times double quantization of all of FLUX's linears from bf16 in one graph, and of single weights."""
    weights = {shape: [random_weight(shape) for _ in range(min(count, 8))] for shape, count in FLUX.items()}
    queue = [weights[shape][i % len(weights[shape])] for shape, count in FLUX.items() for i in range(count)]
    size = sum(2 * w.numel() + packed_bytes((w.shape[0], w.shape[1])) for w in queue)
    calls = [lambda w=w: cuda_4bit.quantize_4bit_double(w, "nf4", BLOCKSIZE, NESTED_BLOCKSIZE) for w in queue]
    total = Row("quantize FLUX", (sum(w.numel() for w in queue),), size / copy_rate * 1e6, 0.0)
    total.ours = graph_us(calls, repeats=5) * len(calls)
    total.ours_plain = plain_us(calls, repeats=2) * len(calls)
    rows = [total]
    for shape in ((3072, 3072), (12288, 3072)):
        of_shape = [
            lambda w=w: cuda_4bit.quantize_4bit_double(w, "nf4", BLOCKSIZE, NESTED_BLOCKSIZE)
            for w in weights[shape]
        ]
        limit = (2 * shape[0] * shape[1] + packed_bytes(shape)) / copy_rate * 1e6
        rows.append(Row("quantize", shape, limit, graph_us(of_shape), plain_us(of_shape)))
        if bnb:
            theirs = [
                lambda w=w: bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
                for w in weights[shape]
            ]
            theirs[0]()
            rows[-1].bitsandbytes = plain_us(theirs, repeats=3)
    return rows


def bench_scale_search(shape: tuple[int, int], copy_rate: float) -> Row:
    """Times `scale_search: mse` for one weight; the limit is that of plain quantization."""
    weight = random_weight(shape)
    size = 2 * shape[0] * shape[1] + packed_bytes(shape)
    calls = [lambda: scale_search.quantize_4bit_double(weight, "nf4", BLOCKSIZE, NESTED_BLOCKSIZE)] * 2
    calls[0]()
    took = plain_us(calls, repeats=3)
    return Row("scale search", shape, size / copy_rate * 1e6, took, took)


def bench_linear(shape: tuple[int, int], m: int, copy_rate: float, product_rate: float) -> Row:
    n, k = shape
    size = packed_bytes(shape) + 2 * m * (n + k)
    masters = [random_weight(shape) for _ in range(min(sets(2 * n * k), 16))]
    weights = [quantize(w) for w in masters]
    if m <= 16:
        weights = [quantize(masters[0]) for _ in range(sets(packed_bytes(shape)))]
    x = torch.randn(m, k, device="cuda", dtype=BF16)
    limit = max(size / copy_rate, 2 * m * n * k / product_rate) * 1e6
    calls = [lambda w=w: linear_ops.linear_4bit(x, w) for w in weights]
    row = Row("linear", (m, n, k), limit, graph_us(calls), plain_us(calls))
    row.bf16 = graph_us([lambda w=w: torch.nn.functional.linear(x, w) for w in masters])
    if bnb:
        packed, state = bnb.quantize_4bit(masters[0], quant_type="nf4", compress_statistics=True)
        copies = [packed.clone() for _ in weights]
        row.bitsandbytes = plain_us(
            [lambda p=p: bitsandbytes.matmul_4bit(x, p.t(), quant_state=state) for p in copies]
        )
    return row


def bench_input_grad(shape: tuple[int, int], m: int, copy_rate: float) -> Row:
    n, k = shape
    weights = [quantize(random_weight(shape)) for _ in range(sets(packed_bytes(shape)))]
    grad = torch.randn(m, n, device="cuda", dtype=BF16)
    calls = [lambda w=w: linear_ops.linear_4bit_input_grad(grad, w) for w in weights]
    limit = (packed_bytes(shape) + 2 * m * (n + k)) / copy_rate * 1e6
    return Row("input grad", (m, n, k), limit, graph_us(calls), plain_us(calls))


def bench_int8(shape: tuple[int, int], m: int, copy_rate: float, product_rate: float) -> Row:
    n, k = shape
    masters = [random_weight(shape) for _ in range(4)]
    weights = [int8_ops.quantize_int8(w) for w in masters]
    x = torch.randn(m, k, device="cuda", dtype=BF16)
    calls = [lambda w=w: int8_ops.linear_int8(x, *w, None, 0.0) for w in weights]
    limit = max((n * k + 2 * m * (n + k)) / copy_rate, m * n * k / product_rate) * 1e6
    row = Row("int8 linear", (m, n, k), limit, graph_us(calls), plain_us(calls))
    row.bf16 = graph_us([lambda w=w: torch.nn.functional.linear(x, w) for w in masters])
    return row


def table(rows: list[Row]) -> str:
    lines = [f"{'':14}{'shape':>20}{'limit':>9}{'ours':>9}{'share':>7}{'plain':>9}{'bnb':>9}{'bf16':>9}  us"]
    for row in rows:
        optional = [row.ours_plain, row.bitsandbytes, row.bf16]
        cells = "".join(f"{'' if value is None else f'{value:.1f}':>9}" for value in optional)
        shape = "x".join(map(str, row.shape))
        share = row.limit / row.ours
        lines.append(f"{row.what:14}{shape:>20}{row.limit:9.1f}{row.ours:9.1f}{share:7.0%}{cells}")
    return "\n".join(lines)


def main(path: str) -> None:
    torch.seed()
    check([(3072, 3072), (264, 1032), (7, 9)])
    print("every kernel agrees with its reference", flush=True)
    copy_rate, product_rate = ceilings()
    print(f"copy {copy_rate / 1e12:.2f} TB/s, bf16 product {product_rate / 1e12:.0f} TFLOP/s", flush=True)
    rows = [bench_dequantize(shape, copy_rate) for shape in DEQUANTIZE]
    rows += bench_quantize_all(copy_rate)
    rows.append(bench_scale_search((12288, 3072), copy_rate))
    for shape, m in itertools.product(FEW_ROWS, (1, 2, 4, 8, 16)):
        rows.append(bench_linear(shape, m, copy_rate, product_rate))
    rows += [bench_input_grad((18432, 3072), m, copy_rate) for m in (1, 16)]
    for shape, m in itertools.product(LINEAR, LINEAR_ROWS):
        rows.append(bench_linear(shape, m, copy_rate, product_rate))
    for m in LINEAR_ROWS:
        rows.append(bench_int8((12288, 3072), m, copy_rate, product_rate))
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_second": copy_rate,
        "product_operations_per_second": product_rate,
        "rows": [asdict(row) for row in rows],
    }
    with open(path, "w") as file:
        json.dump(result, file, indent=1)
    print(table(rows))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: scripts/bench/kernels_4bit.py RESULTS.json")
    if not torch.cuda.is_available():
        raise SystemExit("scripts/bench/kernels_4bit.py: no CUDA device")
    main(sys.argv[1])
