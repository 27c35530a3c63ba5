"""The profile of a step: which products are an adapter's, in both passes of every way to run one, and other kinds."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from halfbyte.quant.lora.linear_group import GroupLayer, LinearGroup
from halfbyte.quant.lora.low_rank import AdaptedWeight, low_rank_linears
from scripts.bench.step_profile import LowRankSides, adapter_ms, kind_of, profiled, with_adapter
from scripts.bench.trained_model import ROW, TrainedModel

ROWS, WIDTH, OUTPUTS, RANK = 10, 64, 48, 8
SIDES = LowRankSides(frozenset({RANK}))
INTO, OUT_OF = (
    (RANK, ROWS, WIDTH),
    (RANK, ROWS, OUTPUTS),
)  # the adapter's two products, sides in order of length
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")


def products(work):
    """(sides of the adapter's products, how many products there were)"""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        work()
    found = [event for event in trace.events() if event.name in PRODUCTS]
    mine = [event for event in found if SIDES.has(event.name, event.input_shapes)]
    matrices = [[shape for shape in event.input_shapes if len(shape) == 2] for event in mine]
    # The last two of addmm_ are its matrices; mm may be given a third to write to.
    pairs = [
        shapes[:2] if event.name != "aten::addmm_" else shapes[1:3]
        for event, shapes in zip(mine, matrices, strict=True)
    ]
    return sorted(tuple(sorted((*left, right[1]))) for left, right in pairs), len(found)


def drawn(*shape, learns=False):
    return torch.randn(*shape, requires_grad=learns)


def test_adapter_products_are_identified_in_a_fused_layer():
    x = drawn(ROWS, WIDTH, learns=True)
    layer = AdaptedWeight(
        drawn(OUTPUTS, WIDTH),
        drawn(OUTPUTS),
        drawn(RANK, WIDTH, learns=True),
        drawn(OUTPUTS, RANK, learns=True),
        1.0,
    )
    result = []
    assert products(lambda: result.extend(low_rank_linears(x, [layer]))) == (sorted([INTO, OUT_OF]), 3)
    assert products(lambda: result[0].sum().backward()) == (sorted(2 * [INTO, OUT_OF]), 5)


def test_adapter_products_are_identified_in_a_fused_block():
    layer = GroupLayer(drawn(OUTPUTS, WIDTH), drawn(OUTPUTS), drawn(RANK, WIDTH), drawn(OUTPUTS, RANK), 1.0)
    group = LinearGroup([layer])
    x, grad = drawn(ROWS, WIDTH + RANK), drawn(ROWS, OUTPUTS + RANK)
    assert products(lambda: group.forward(x)) == (sorted([INTO, OUT_OF]), 3)
    seen, xa = x[:, :WIDTH], group.xa(x)
    learned = products(lambda: group.gradients(grad, seen, xa, wants_input=True))
    assert learned == (sorted(2 * [INTO, OUT_OF]), 5)


def test_adapter_products_are_identified_in_stock_peft():
    model = nn.Sequential(nn.Linear(WIDTH, OUTPUTS))
    inject_adapter_in_model(LoraConfig(r=RANK, target_modules=["0"]), model)
    x, result = drawn(ROWS, WIDTH, learns=True), []
    assert products(lambda: result.append(model(x))) == (sorted([INTO, OUT_OF]), 3)
    assert products(lambda: result[0].sum().backward()) == (sorted(2 * [INTO, OUT_OF]), 5)


@pytest.mark.parametrize(
    ("operator", "shapes", "is_adapters"),
    [
        ("aten::mm", [[4096, 3072], [3072, 48]], True),
        ("aten::mm", [[4096, 3072], [3072, 48], []], True),
        ("aten::bmm", [[1, 4096, 16], [1, 16, 3072]], True),
        ("aten::addmm", [[3072], [4096, 16], [16, 3072], [], []], True),
        ("aten::mm", [[16, 4096], [4096, 3072]], True),
        ("aten::mm", [[4096, 3072], [3072, 9216]], False),
        ("aten::addmm", [[16], [1, 256], [256, 3072], [], []], False),
        ("aten::mul", [[4096, 16], [16, 3072]], False),
        ("aten::mm", [], False),
    ],
)
def test_a_product_is_an_adapters_by_its_sides(operator, shapes, is_adapters):
    assert LowRankSides(frozenset({16, 48, 64})).has(operator, shapes) is is_adapters


def test_a_models_sides_are_its_rank_and_the_stacks_of_it():
    model = TrainedModel("flux_mini", ROW["ours"], 8, torch.device("cpu"), stream=False, optimizer="adamw")
    assert LowRankSides.of(model.denoiser, 8, model.tokens(64)).sides == {8, 24, 32}
    with pytest.raises(ValueError, match=r"rank 8 have sides of \[8\]"):
        LowRankSides.of(model.denoiser, 8, [8, 100])
    with pytest.raises(ValueError, match=r"rank 16 have sides of \[16, 64\]"):
        LowRankSides.of(model.denoiser, 16, model.tokens(64))


def test_stacked_ranks_are_rounded_up_as_in_fused_blocks():
    assert LowRankSides.of(nn.Module(), 6, []).sides == {6, 8, 18, 24}


def event(name, shapes, *kernels):
    return SimpleNamespace(
        name=name,
        input_shapes=shapes,
        kernels=[SimpleNamespace(name=kernel, duration=microseconds) for kernel, microseconds in kernels],
    )


def test_on_a_gpu_the_adapters_time_is_that_of_the_kernels_its_products_launched():
    events = [
        event("aten::mm", [[4096, 3072], [3072, 8]], ("nvjet_tst_64x8", 500.0), ("Memset (Device)", 7.0)),
        event("aten::mm", [[4096, 3072], [3072, 9216]], ("nvjet_tst_256x128", 9000.0)),
        event("aten::copy_", [[4096, 8], [4096, 8]], ("direct_copy_kernel", 3.0)),
        event("aten::addmm", [[3072], [4096, 8], [8, 3072]], ("cutlass_80_gemm", 250.0)),
        event("nvjet_tst_64x8", []),
    ]
    taken = adapter_ms(events, SIDES)
    assert taken == pytest.approx(0.75)
    kinds = with_adapter({"attention": 2.0, "product": 9.75, "idle": 1.0}, taken)
    assert kinds == pytest.approx({"attention": 2.0, "product": 9.0, "adapter": 0.75, "idle": 1.0})
    assert list(kinds) == ["attention", "product", "adapter", "idle"]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "product"),
        ("_stack_kernel", "dequantize"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("_layer_norm_kernel", "elementwise"),
    ],
)
def test_kernels_by_their_names(kernel, kind):
    assert kind_of(kernel) == kind


@pytest.mark.parametrize("row", ["ours", "bf16"])
def test_a_step_on_a_cpu_by_operators(row):
    if torch.cuda.is_available():
        pytest.skip("with a GPU kernels are measured")
    model = TrainedModel("flux_mini", ROW[row], 8, torch.device("cpu"), stream=False, optimizer="adamw")
    model.settle("full", None)
    model.step(0, 64)
    seconds = []

    def step():
        seconds.append(model.step(1, 64))
        return seconds[0]

    sides = LowRankSides.of(model.denoiser, 8, model.tokens(64))
    kinds, operators = profiled(step, adapter=sides)
    assert sum(kinds.values()) == pytest.approx(1e3 * seconds[0])
    assert all(kinds[kind] > 0 for kind in ("attention", "product", "adapter", "optimizer", "copy", "idle"))
    assert (kinds["dequantize"] > 0) is (row == "ours")
    assert operators[0][1] == max(taken for _, taken, _ in operators)
