"""Tests LoRA layers: outputs and gradients against float64 and PEFT, saved tensors, and PEFT's adapter methods."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from halfbyte.kernels.linear_4bit import accumulate_ops
from halfbyte.quant.formats.nf4 import QuantSpec
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.lora.layers import LORA_LAYERS, LoraLinear, LoraLinear4bit, lora_linears

from tensors import noise, relative_error

RANK, ALPHA = 4, 6


def make_base(inputs=96, outputs=80, *, bias=True, quantized=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias).to(dtype).requires_grad_(False)
    if quantized:
        return Linear4bit.from_linear(linear, spec=QuantSpec(), compute_dtype=dtype)
    return linear


def adapt(base, layer_class=None, *, seed=0, rank=RANK, alpha=ALPHA, **options):
    """Adds an fp32 adapter with random A and B to the base; `layer_class` selects PEFT's layer as a reference."""
    layer_class = layer_class or LORA_LAYERS[type(base)]
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=False, **options)
    layer = layer_class(base, "default", config=config, r=rank, lora_alpha=alpha)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return layer


def peft_layer_of(layer, **options):
    """Returns PEFT's own layer on the same base, with the same adapter."""
    rank, alpha = layer.r["default"], layer.lora_alpha["default"]
    twin = adapt(layer.base_layer, peft_layer.Linear, rank=rank, alpha=alpha, **options)
    twin.load_state_dict(layer.state_dict())
    return twin


def factors(layer, adapter="default"):
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def dense(base):
    return base.dequantize(torch.float64) if isinstance(base, Linear4bit) else base.weight.double()


def float64_reference(layer, x, upstream):
    """Computes the output and the gradients of x, A and B in float64, with plain autograd."""
    x = x.detach().double().requires_grad_(True)
    down, up = (factor.detach().double().requires_grad_(True) for factor in factors(layer))
    bias = None if layer.base_layer.bias is None else layer.base_layer.bias.double()
    y = nn.functional.linear(x, dense(layer.base_layer), bias)
    y = y + layer.scaling["default"] * (x @ down.t()) @ up.t()
    return [y, *torch.autograd.grad(y, (x, down, up), upstream.double())]


def run_layer(layer, x, upstream):
    x = x.detach().requires_grad_(True)
    y = layer(x)
    return [y, *torch.autograd.grad(y, (x, *factors(layer)), upstream)]


@pytest.mark.parametrize("rows", [(), (1,), (2,), (7,), (16,), (17,), (40,), (2, 5), (0,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_output_and_gradients_match_float64(rows, bias, quantized, dtype, bound):
    layer = adapt(make_base(bias=bias, quantized=quantized, dtype=dtype))
    x, upstream = noise(*rows, 96, dtype=dtype), noise(*rows, 80, dtype=dtype, seed=1)
    for ours, expected in zip(
        run_layer(layer, x, upstream), float64_reference(layer, x, upstream), strict=True
    ):
        assert ours.shape == expected.shape
        if expected.norm() > 0:
            assert relative_error(ours, expected) < bound
    assert all(factor.dtype == torch.float32 for factor in factors(layer))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha": RANK}, {"rank": 1, "alpha": 0.3}])
@pytest.mark.parametrize("quantized", [True, False])
def test_output_and_gradients_match_peft(options, quantized):
    layer = adapt(make_base(quantized=quantized), **options)
    peft_options = {name: value for name, value in options.items() if name == "use_rslora"}
    x, upstream = noise(9, 96), noise(9, 80, seed=1)
    reference = peft_layer_of(layer, **peft_options)
    assert reference.scaling == layer.scaling
    for ours, theirs in zip(run_layer(layer, x, upstream), run_layer(reference, x, upstream), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_bf16_sum_is_rounded_once():
    """The base's product is added to the adapter's in fp32, so the error is smaller than with PEFT's two roundings."""
    layer = adapt(make_base(256, 256, quantized=False, dtype=torch.bfloat16))
    layer.lora_B["default"].weight.data *= 0.02  # an update that is small against the base, as in practice
    x, upstream = noise(64, 256, dtype=torch.bfloat16), noise(64, 256, dtype=torch.bfloat16, seed=1)
    expected = float64_reference(layer, x, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run_layer(layer, x, upstream), run_layer(peft_layer_of(layer), x, upstream)
    for mine, peft, right in list(zip(ours, theirs, expected, strict=True))[:2]:
        assert relative_error(mine, right) < 0.85 * relative_error(peft, right)
        # No bf16 result is better than the float64 result rounded once.
        assert relative_error(mine, right) < 1.15 * relative_error(right.bfloat16(), right)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_dtypes_match_the_base_layer(x_dtype, autocast, quantized):
    layer = adapt(make_base(quantized=quantized, dtype=torch.bfloat16))
    if not (quantized or autocast) and x_dtype == torch.float32:
        pytest.skip("nn.Linear rejects it as well")
    x = noise(3, 96, dtype=x_dtype).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, base = layer(x), layer.base_layer(x)
    y.sum().backward()
    assert y.dtype == base.dtype
    assert x.grad.dtype == x_dtype
    assert factors(layer)[0].grad.dtype == torch.float32


def saved_by(call):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        call()
    return [(tuple(tensor.shape), tensor.dtype) for tensor in saved]


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_backward_saves_the_input_and_the_small_factors(quantized, compiled):
    torch._dynamo.reset()
    layer = adapt(make_base(quantized=quantized, dtype=torch.bfloat16))
    x = noise(40, 96, dtype=torch.bfloat16).requires_grad_(True)
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    call(x)
    shapes = [(40, 96), (40, RANK), (RANK, 96), (80, RANK)]
    large = {(80, 96), (40, 80), (80 * 96 // 2, 1)}
    kept = saved_by(lambda: call(x))
    if not compiled:
        assert kept == [(shape, torch.bfloat16) for shape in shapes]
    # Compiled, the backward may save a weight if it is the parameter itself and not a copy.
    allowed = {(80 * 96 // 2, 1)} if quantized else {(80, 96), (96, 80)}
    assert not {shape for shape, _ in kept} & (large - allowed)


def test_compiled_4bit_layer_does_not_save_its_dequantized_weight():
    torch._dynamo.reset()
    layer = make_base(dtype=torch.bfloat16)
    x = noise(40, 96, dtype=torch.bfloat16).requires_grad_(True)
    call = torch.compile(layer, backend="aot_eager", fullgraph=True)
    call(x)
    assert all(dtype == torch.uint8 for _, dtype in saved_by(lambda: call(x)))


def test_only_trainable_tensors_get_gradients():
    layer = adapt(make_base())
    layer.lora_A["default"].weight.requires_grad_(False)
    layer.base_layer.bias.requires_grad_(True)
    layer(noise(5, 96)).sum().backward()
    down, up = factors(layer)
    assert down.grad is None
    assert up.grad.norm() > 0
    assert torch.equal(layer.base_layer.bias.grad, torch.full((80,), 5.0))
    assert layer.base_layer.weight.grad is None


GROUPS = {
    "three equal": [{"seed": 1}, {"seed": 2}, {"seed": 3}],
    "one wider": [{"seed": 1}, {"seed": 2, "outputs": 144, "rank": 2, "alpha": 5}],
    "packed and plain": [{"seed": 1}, {"seed": 2, "quantized": False}],
    "one without adapter": [{"seed": 1}, {"seed": 2, "rank": None}, {"seed": 3}],
    "one with dropout": [{"seed": 1}, {"seed": 2, "lora_dropout": 1e-9}, {"seed": 3}],
}


def group_of(descriptions, dtype=torch.float32):
    layers = []
    for description in descriptions:
        options = dict(description)
        base_options = {key: options.pop(key) for key in ("outputs", "quantized") if key in options}
        base = make_base(**base_options, dtype=dtype, seed=options["seed"])
        layers.append(base if options.get("rank", RANK) is None else adapt(base, **options))
    return nn.ModuleList(layers)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_group_matches_separate_layers(name, dtype, tolerance):
    layers = group_of(GROUPS[name], dtype)
    parameters = [parameter for parameter in layers.parameters() if parameter.requires_grad]
    x = noise(2, 5, 96, dtype=dtype).requires_grad_(True)

    def run(outputs):
        loss = sum((y.float() ** 2).sum() for y in outputs)
        return [*outputs, *torch.autograd.grad(loss, (x, *parameters))]

    together = run(lora_linears(x, layers))
    for ours, expected in zip(together, run([layer(x) for layer in layers]), strict=True):
        assert (ours - expected).norm() <= tolerance * expected.norm()


def test_group_is_one_autograd_function_and_saves_its_input_once():
    layers = group_of(GROUPS["three equal"])
    x = noise(40, 96).requires_grad_(True)
    outputs = lora_linears(x, layers)
    assert len({y.grad_fn.next_functions[0][0] for y in outputs}) == 1
    kept = saved_by(lambda: lora_linears(x, layers))
    assert (
        kept
        == [((40, 96), torch.float32), ((40, 12), torch.float32), ((12, 96), torch.float32)]
        + [((80, 4), torch.float32)] * 3
    )


class Block(nn.Module):
    def __init__(self, seed, checkpointed):
        super().__init__()
        self.together = group_of([{"seed": seed}, {"seed": seed + 1, "quantized": False}], torch.bfloat16)
        self.down = adapt(make_base(80, 96, dtype=torch.bfloat16, seed=seed + 2))
        self.checkpointed = checkpointed

    def hidden(self, x):
        left, right = lora_linears(x, self.together)
        return self.down(nn.functional.silu(left) * right)

    def forward(self, x):
        return x + (checkpoint(self.hidden, x, use_reentrant=False) if self.checkpointed else self.hidden(x))


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_equal_blocks_compile_once_without_graph_breaks(checkpointed, autocast):
    torch._dynamo.reset()
    blocks = nn.Sequential(*(Block(10 * number, checkpointed) for number in range(3)))
    x = noise(4, 7, 96, dtype=torch.bfloat16).requires_grad_(True)
    parameters = [parameter for parameter in blocks.parameters() if parameter.requires_grad]

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = blocks(x)
        return [y, *torch.autograd.grad((y.float() ** 2).sum(), (x, *parameters))]

    expected = step()
    counter = CompileCounterWithBackend("aot_eager")
    for block in blocks:
        block.compile(fullgraph=True, backend=counter)
    assert all(map(torch.equal, step(), expected))
    assert counter.frame_count == 1


def test_ops_pass_opcheck():
    weight = make_base(64, 32).packed_weight()
    for name, *tensors in (
        ("add_product_", torch.zeros(3, 32), noise(3, 8), noise(8, 32)),
        ("add_linear_4bit_", torch.zeros(3, 32), noise(3, 64), *weight),
        ("add_linear_4bit_input_grad_", torch.zeros(3, 64), noise(3, 32), *weight),
    ):
        torch.library.opcheck(getattr(torch.ops.halfbyte, name).default, tensors)
    out = torch.ones(3, 32)
    accumulate_ops.add_linear_4bit(out, noise(3, 64), weight)
    torch.testing.assert_close(out, 1 + noise(3, 64) @ weight.dequantize(torch.float32).t())


@pytest.mark.parametrize("quantized", [True, False])
def test_dropout_applies_to_the_adapter_only(quantized):
    layer = adapt(make_base(quantized=quantized), lora_dropout=0.25)
    x = torch.ones(4000, 96)
    base = layer.base_layer(x)
    torch.manual_seed(0)
    updates = (layer(x) - base).detach()
    down, up = factors(layer)
    whole = layer.scaling["default"] * (x[:1] @ down.t() @ up.t()).detach()
    # Dropout scales up the values that it keeps, so the mean does not change; the standard deviation is that of 96
    # independent masks.
    assert (updates.mean(0) - whole[0]).norm() < 0.05 * whole.norm()
    product = layer.scaling["default"] * up @ down
    spread = (product.square().sum(1) * 0.25 / 0.75).sqrt()
    torch.testing.assert_close(updates.std(0), spread.detach(), rtol=0.1, atol=0)
    layer.eval()
    torch.testing.assert_close(layer(x) - base, whole.expand(4000, -1), rtol=1e-3, atol=1e-4)


def test_gradients_through_dropout_match_float64():
    layer = adapt(make_base(), lora_dropout=0.5)
    x = noise(6, 96).requires_grad_(True)
    torch.manual_seed(3)
    mask = nn.functional.dropout(torch.ones(6, 96), 0.5)
    torch.manual_seed(3)
    y = layer(x)
    grads = torch.autograd.grad(y.square().sum(), (x, *factors(layer)))

    reference_x = x.detach().double().requires_grad_(True)
    down, up = (factor.detach().double().requires_grad_(True) for factor in factors(layer))
    right = nn.functional.linear(reference_x, dense(layer.base_layer), layer.base_layer.bias.double())
    right = right + layer.scaling["default"] * ((reference_x * mask) @ down.t()) @ up.t()
    expected = torch.autograd.grad(right.square().sum(), (reference_x, down, up))
    assert relative_error(y, right) < 1e-6
    assert all(
        relative_error(ours, reference) < 1e-5 for ours, reference in zip(grads, expected, strict=True)
    )
    kept = saved_by(lambda: layer(x))
    assert ((6, 96), torch.float32) in kept
    assert len([shape for shape, _ in kept if shape == (6, 96)]) == 2, "the dropped input and its mask"


def second_adapter(layer, name="second", seed=5, **options):
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, **options)
    layer.update_layer(name, 2, 2, config)
    for number, factor in enumerate(factors(layer, name)):
        factor.data = noise(*factor.shape, seed=seed + number) * 0.1


def is_fused(layer, x):
    function = layer(x).grad_fn
    return function is not None and "LowRank" in type(function.next_functions[0][0]).__name__


def test_switching_and_disabling_adapters():
    layer, x = adapt(make_base()), noise(5, 96)
    first = layer(x)
    second_adapter(layer)
    layer.set_adapter("second")
    base = layer.base_layer(x)
    down, up = factors(layer, "second")
    torch.testing.assert_close(layer(x), base + x @ down.t() @ up.t(), rtol=1e-5, atol=1e-5)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    layer.set_adapter("default")
    assert torch.equal(layer(x), first)
    layer.delete_adapter("default")
    torch.testing.assert_close(layer(x), base + x @ down.t() @ up.t(), rtol=1e-5, atol=1e-5)
    layer.set_scale("second", 3)
    torch.testing.assert_close(layer(x), base + 3 * x @ down.t() @ up.t(), rtol=1e-5, atol=1e-5)
    layer.delete_adapter("second")
    assert torch.equal(layer(x), base)


def test_unsupported_states_use_pefts_forward():
    x = noise(5, 96)
    several = adapt(make_base())
    assert is_fused(several, x)
    second_adapter(several)
    several.set_adapter(["default", "second"])
    biased = adapt(make_base(), lora_bias=True)
    merged = adapt(make_base(quantized=False))
    before = merged(x)
    merged.merge()
    hooked = adapt(make_base())
    hooked.base_layer.register_forward_hook(lambda module, args, output: output + 1)
    trained_base = adapt(make_base(quantized=False))
    trained_base.base_layer.weight.requires_grad_(True)
    torch.testing.assert_close(merged(x), before, rtol=1e-4, atol=1e-4)
    for layer in (several, biased, merged, hooked, trained_base):
        assert not is_fused(layer, x)
        assert torch.equal(layer(x), peft_layer.Linear.forward(layer, x))
        together = lora_linears(x, [layer, several, biased])
        assert torch.equal(together[0], layer(x))
    assert hooked(x).sum() > adapt(make_base())(x).sum()


def test_other_base_classes_use_pefts_forward():
    class Odd(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    layer = adapt(Odd(96, 80), LoraLinear)
    x = noise(5, 96)
    assert torch.equal(layer(x), peft_layer.Linear.forward(layer, x))


def test_merging_into_a_4bit_base_is_rejected():
    layer = adapt(make_base())
    assert isinstance(layer, LoraLinear4bit)
    with pytest.raises(ValueError, match=r"merge.*4-bit"):
        layer.merge()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 4, 16, 40])
def test_gpu_matches_float64_for_few_and_many_rows(rows):
    layer = adapt(make_base(512, 320, dtype=torch.bfloat16)).cuda()
    x = noise(rows, 512, dtype=torch.bfloat16).cuda()
    upstream = noise(rows, 320, dtype=torch.bfloat16, seed=1).cuda()
    for ours, expected in zip(
        run_layer(layer, x, upstream), float64_reference(layer, x, upstream), strict=True
    ):
        assert relative_error(ours, expected) < 8e-3
