"""Times a linear layer with its LoRA adapter, forward and backward, against PEFT over bitsandbytes and bf16.

    python -m scripts.bench.lora_layer results.json

Needs CUDA and PEFT; PEFT over bitsandbytes' Linear4bit is timed where bitsandbytes can be imported. Where
halfbyte is not installed, a folder of links takes its place:

    PYTHONPATH=$(scripts/dev/import_folder) python -m scripts.bench.lora_layer results.json

First every layer is compared with float64; nothing is timed if one is wrong. A step is a forward and a
backward under bf16 autocast with fp32 adapters of rank 16, an input that requires a gradient, and an upstream
gradient. Its time is the median of steps launched from Python, so it includes the cost of the launches;
`device` is the same step replayed as a CUDA graph. `kept` is the memory that a forward leaves for its
backward, without the output. `limit` is the work of the base at the rate of an 8192-cubed bf16 product.
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from halfbyte.quant.formats.nf4 import QuantSpec
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.lora.layers import LoraLinear, LoraLinear4bit, lora_linears

try:
    import bitsandbytes
    from peft.tuners.lora.bnb import Linear4bit as PeftOverBitsandbytes
except ImportError:
    bitsandbytes = None

BF16 = torch.bfloat16
RANK, ALPHA = 16, 16
ROWS = (1, 512, 1536, 4608)
# The output widths of layers that share an input, and the input's width.
SHAPES = {
    "3072x3072": ((3072,), 3072),
    "12288x3072": ((12288,), 3072),
    "3072x12288": ((3072,), 12288),
    "3072x15360": ((3072,), 15360),
    "9216x3072 (q, k, v)": ((3072, 3072, 3072), 3072),
    "21504x3072 (q, k, v, mlp)": ((3072, 3072, 3072, 12288), 3072),
}
# A bf16 output has a relative error of 2^-9 per element; sums over the rank and several layers a little more.
LARGEST_ERROR = 8e-3

Step = Callable[[], tuple[Tensor, ...]]


@dataclass
class Timing:
    """The measurements of one way to compute a layer."""

    step_us: float
    device_us: float | None  # None where the step cannot be recorded as a graph
    kept_bytes: int


@dataclass
class Row:
    """One shape with one number of rows."""

    shape: str
    rows: int
    limit_us: float
    ways: dict[str, Timing] = field(default_factory=dict)


def linears(shape: str) -> list[nn.Linear]:
    """Returns new frozen bf16 layers whose weights have the scale of FLUX's."""
    outputs, width = SHAPES[shape]
    layers = []
    for n in outputs:
        layer = nn.Linear(width, n, device="cuda", dtype=BF16).requires_grad_(False)
        nn.init.normal_(layer.weight, std=0.02)
        layers.append(layer)
    return layers


def bitsandbytes_layer(linear: nn.Linear) -> nn.Module:
    """Returns the same layer in bitsandbytes' NF4 with double quantization."""
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        compute_dtype=BF16,
        compress_statistics=True,
        quant_type="nf4",
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    layer.bias = nn.Parameter(linear.bias, requires_grad=False)
    return layer.cuda()


def adapted(base: nn.Module, layer_class: type[nn.Module], seed: int) -> nn.Module:
    """Returns `base` with an fp32 adapter whose two factors are random."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=False)
    layer = layer_class(base, "default", config=config, r=RANK, lora_alpha=ALPHA)
    draws = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = 0.01 * torch.randn(parameter.shape, generator=draws).cuda()
            parameter.requires_grad_(True)
    return layer.train()


def ways_of(shape: str) -> dict[str, tuple[list[nn.Module], list[Tensor]]]:
    """Returns, per way, its layers and the weights that they represent."""
    plain = linears(shape)
    packed = [Linear4bit.from_linear(linear, spec=QuantSpec(), compute_dtype=BF16) for linear in plain]
    dense, dequantized = [linear.weight for linear in plain], [layer.dequantize(BF16) for layer in packed]

    def under(bases: list[nn.Module], layer_class: type[nn.Module]) -> list[nn.Module]:
        return [adapted(base, layer_class, seed) for seed, base in enumerate(bases)]

    ways = {
        "ours nf4": (under(packed, LoraLinear4bit), dequantized),
        "ours bf16": (under(plain, LoraLinear), dense),
        "peft bf16": (under(plain, peft_layer.Linear), dense),
        "peft over our nf4": (under(packed, peft_layer.Linear), dequantized),
    }
    if bitsandbytes:
        theirs = [bitsandbytes_layer(linear) for linear in plain]
        weights = [
            bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(BF16)
            for layer in theirs
        ]
        ways["peft over bitsandbytes"] = (under(theirs, PeftOverBitsandbytes), weights)
    return ways


def forward(layers: list[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    with torch.autocast("cuda", BF16):
        if isinstance(layers[0], LoraLinear):
            return lora_linears(x, layers)
        return tuple(layer(x) for layer in layers)


def trained(layers: list[nn.Module]) -> list[nn.Parameter]:
    return [p for layer in layers for name, p in layer.named_parameters() if "lora_" in name]


def step_of(layers: list[nn.Module], x: Tensor, upstream: list[Tensor]) -> Step:
    """Returns a step, forward and backward, that gives the gradients of x and of the adapters."""
    wanted = (x, *trained(layers))

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(layers, x), wanted, upstream)

    return step


def inputs_for(shape: str, rows: int) -> tuple[Tensor, list[Tensor]]:
    outputs, width = SHAPES[shape]
    x = torch.randn(1, rows, width, device="cuda", dtype=BF16).requires_grad_(True)
    return x, [torch.randn(1, rows, n, device="cuda", dtype=BF16) for n in outputs]


def relative_error(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected).norm() / expected.norm()).item()


def check(shape: str, rows: int) -> None:
    """Compares outputs and gradients of every way with float64 over its own weights; exits on an error."""
    x, upstream = inputs_for(shape, rows)
    for way, (layers, weights) in ways_of(shape).items():
        outputs = forward(layers, x)
        grads = torch.autograd.grad(outputs, (x, *trained(layers)), upstream)
        exact_x = x.detach().double().requires_grad_(True)
        factors = [p.detach().double().requires_grad_(True) for p in trained(layers)]
        exact = [
            nn.functional.linear(exact_x, weight.double(), layer.base_layer.bias.double())
            + layer.scaling["default"] * (exact_x @ down.t()) @ up.t()
            for layer, weight, down, up in zip(layers, weights, factors[::2], factors[1::2], strict=True)
        ]
        exact_grads = torch.autograd.grad(exact, (exact_x, *factors), [grad.double() for grad in upstream])
        for number, (out, expected) in enumerate(
            zip((*outputs, *grads), (*exact, *exact_grads), strict=True)
        ):
            error = relative_error(out, expected)
            if not error < LARGEST_ERROR:
                raise SystemExit(
                    f"{way} {shape} {rows} rows: result {number} is off by {error:.1e} from float64: nothing was timed"
                )


def step_us(step: Step, repeats: int = 30) -> float:
    """Returns the median microseconds of a step launched from Python, ten in a row between two events."""
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 10 * 1e3)
    return statistics.median(times)


def device_us(step: Step, repeats: int = 30) -> float | None:
    """Returns the median microseconds of the step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:  # something in it waits for the device
        torch.cuda.synchronize()
        return None
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 10 * 1e3)
    return statistics.median(times)


def kept_bytes(layers: list[nn.Module], x: Tensor) -> int:
    """Returns the bytes that a forward leaves allocated for its backward, without its outputs."""
    forward(layers, x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    outputs = forward(layers, x)
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before - sum(output.nbytes for output in outputs)


def product_rate() -> float:
    """Returns the operations per second of an 8192-cubed bf16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    return 2 * 8192**3 / step_us(lambda: (a @ b,), repeats=5) * 1e6


def bench(shape: str, rows: int, rate: float) -> Row:
    outputs, width = SHAPES[shape]
    row = Row(shape, rows, 4 * rows * width * sum(outputs) / rate * 1e6)
    for way, (layers, _) in ways_of(shape).items():
        x, upstream = inputs_for(shape, rows)
        step = step_of(layers, x, upstream)
        row.ways[way] = Timing(step_us(step), device_us(step), kept_bytes(layers, x))
    return row


def table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        lines.append(f"{row.shape}, {row.rows} rows: limit {row.limit_us:.0f} us")
        for way, timing in row.ways.items():
            device = "" if timing.device_us is None else f"{timing.device_us:.0f}"
            lines.append(
                f"  {way:24}{timing.step_us:10.0f} us{device:>10} us on device"
                f"{timing.kept_bytes / 2**20:10.1f} MiB kept"
            )
    return "\n".join(lines)


def main(path: str) -> None:
    torch.seed()
    for shape in SHAPES:
        for rows in (1, 2, 40, 512):
            check(shape, rows)
    print("every layer agrees with float64", flush=True)
    rate = product_rate()
    print(f"bf16 product {rate / 1e12:.0f} TFLOP/s", flush=True)
    rows = [bench(shape, count, rate) for shape in SHAPES for count in ROWS]
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "product_operations_per_second": rate,
        "rows": [asdict(row) for row in rows],
    }
    with open(path, "w") as file:
        json.dump(result, file, indent=1)
    print(table(rows))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: scripts/bench/lora_layer.py RESULTS.json")
    if not torch.cuda.is_available():
        raise SystemExit("scripts/bench/lora_layer.py: no CUDA device")
    main(sys.argv[1])
