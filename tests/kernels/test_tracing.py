"""When an op is called as a function, and when it has to go through torch's dispatcher to be seen."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from halfbyte.kernels.dispatch import is_differentiated, is_eager
from halfbyte.kernels.int8 import ops as int8_ops
from halfbyte.kernels.linear_4bit import accumulate_ops
from halfbyte.kernels.linear_4bit import ops as linear_ops
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight
from halfbyte.quant.formats.nf4 import QuantSpec
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.layers.linear8bit import Linear8bit


class Seen(TorchDispatchMode):
    """Notes the names of our ops."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "halfbyte":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    return Linear4bit.from_linear(nn.Linear(128, 96), spec=QuantSpec(), compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def layer8():
    torch.manual_seed(0)
    return Linear8bit.from_linear(nn.Linear(128, 96), compute_dtype=torch.float32)


def test_plain_tensors_and_parameters_are_eager(layer):
    assert is_eager(torch.zeros(2))
    assert is_eager(nn.Parameter(torch.zeros(2)))
    assert is_eager(layer.weight)


def test_whoever_watches_makes_it_not_eager():
    x = torch.zeros(2, 3)
    with Seen():
        assert not is_eager(x)
    with FakeTensorMode() as mode:
        assert not is_eager(torch.zeros(2))
    for fake in (mode.from_tensor(x), mode.from_tensor(nn.Parameter(x))):
        assert not is_eager(fake)
    assert not is_eager(torch.zeros(2, device="meta"))
    asked = []
    torch.vmap(lambda row: asked.append(is_eager(row)) or row)(x)
    torch.compile(lambda t: t + is_eager(t), backend="eager", fullgraph=True)(x)
    assert asked == [False]
    assert torch.compile(lambda t: t + is_eager(t), backend="eager", fullgraph=True)(x).sum() == 0
    assert is_eager(x)


def test_what_is_differentiated():
    x, wanted = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert not is_differentiated(x, None)
    assert is_differentiated(x, None, wanted)
    with torch.no_grad():
        assert not is_differentiated(x, wanted)


def calls(layer, layer8):
    """Each function that may skip the dispatcher, on fresh outputs."""
    x, grad = torch.randn(5, 128), torch.randn(5, 96)
    weight, eight = layer.packed_weight(), layer8.int8_weight()

    def added(function, out, *arguments):
        out = out.clone()
        function(out, *arguments)
        return out

    return {
        "dequantize_4bit_double": lambda: weight.dequantize(torch.float32),
        "linear_4bit": lambda: linear_ops.linear_4bit(x, weight, layer.bias),
        "linear_4bit_input_grad": lambda: linear_ops.linear_4bit_input_grad(grad, weight),
        "add_product_": lambda: added(
            accumulate_ops.add_product, grad, x, weight.dequantize(torch.float32).t()
        ),
        "add_linear_4bit_": lambda: added(accumulate_ops.add_linear_4bit, grad, x, weight),
        "add_linear_4bit_input_grad_": lambda: added(
            accumulate_ops.add_linear_4bit_input_grad, x, grad, weight
        ),
        "dequantize_int8": lambda: int8_ops.dequantize_int8(eight.quantized, eight.absmax, torch.float32),
        "linear_int8": lambda: int8_ops.linear_int8(x, *eight[:2], layer8.bias, eight.threshold),
        "linear_int8_input_grad": lambda: int8_ops.linear_int8_input_grad(grad, *eight[:2]),
    }


def test_both_ways_give_the_same_bits(layer, layer8):
    for name, call in calls(layer, layer8).items():
        directly = call()
        with Seen() as seen:
            dispatched = call()
        assert name in seen.names
        assert torch.equal(directly, dispatched), name


@pytest.mark.parametrize("kept", [True, False])
def test_selective_checkpointing_can_keep_the_product(layer, kept, monkeypatch):
    """The weight is unpacked for the product, again for the gradient, and once more where the product is not kept."""
    x = torch.randn(3, 128, requires_grad=True)
    unpacked = []
    dequantize = PackedWeight.dequantize
    monkeypatch.setattr(
        PackedWeight, "dequantize", lambda *arguments: (unpacked.append(1), dequantize(*arguments))[1]
    )

    def policy(context, op, *args, **kwargs):
        keep = kept and op is torch.ops.halfbyte.linear_4bit.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    y = checkpoint(lambda x: layer(x).sin(), x, use_reentrant=False, context_fn=contexts)
    y.sum().backward()
    assert len(unpacked) == (2 if kept else 3)
    plain = x.detach().clone().requires_grad_(True)
    layer(plain).sin().sum().backward()
    assert torch.equal(x.grad, plain.grad)
