"""Checks when an op may call its kernel directly and when it must go through torch's dispatcher."""

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


class OpRecorder(TorchDispatchMode):
    """Records the names of our ops."""

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


def test_observers_make_a_tensor_not_eager():
    x = torch.zeros(2, 3)
    with OpRecorder():
        assert not is_eager(x)
    with FakeTensorMode() as mode:
        assert not is_eager(torch.zeros(2))
    for fake in (mode.from_tensor(x), mode.from_tensor(nn.Parameter(x))):
        assert not is_eager(fake)
    assert not is_eager(torch.zeros(2, device="meta"))
    answers = []
    torch.vmap(lambda row: answers.append(is_eager(row)) or row)(x)
    torch.compile(lambda t: t + is_eager(t), backend="eager", fullgraph=True)(x)
    assert answers == [False]
    assert torch.compile(lambda t: t + is_eager(t), backend="eager", fullgraph=True)(x).sum() == 0
    assert is_eager(x)


def test_is_differentiated():
    x, trained = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert not is_differentiated(x, None)
    assert is_differentiated(x, None, trained)
    with torch.no_grad():
        assert not is_differentiated(x, trained)


def calls(layer, layer8):
    """Returns a call of each function that may skip the dispatcher, by op name, each with a new output."""
    x, grad = torch.randn(5, 128), torch.randn(5, 96)
    weight, eight = layer.packed_weight(), layer8.int8_weight()

    def accumulate(function, out, *arguments):
        out = out.clone()
        function(out, *arguments)
        return out

    return {
        "dequantize_4bit_double": lambda: weight.dequantize(torch.float32),
        "linear_4bit": lambda: linear_ops.linear_4bit(x, weight, layer.bias),
        "linear_4bit_input_grad": lambda: linear_ops.linear_4bit_input_grad(grad, weight),
        "add_product_": lambda: accumulate(
            accumulate_ops.add_product, grad, x, weight.dequantize(torch.float32).t()
        ),
        "add_linear_4bit_": lambda: accumulate(accumulate_ops.add_linear_4bit, grad, x, weight),
        "add_linear_4bit_input_grad_": lambda: accumulate(
            accumulate_ops.add_linear_4bit_input_grad, x, grad, weight
        ),
        "dequantize_int8": lambda: int8_ops.dequantize_int8(eight.quantized, eight.absmax, torch.float32),
        "linear_int8": lambda: int8_ops.linear_int8(x, *eight[:2], layer8.bias, eight.threshold),
        "linear_int8_input_grad": lambda: int8_ops.linear_int8_input_grad(grad, *eight[:2]),
    }


def test_direct_and_dispatched_results_are_bitwise_identical(layer, layer8):
    for name, call in calls(layer, layer8).items():
        directly = call()
        with OpRecorder() as recorder:
            dispatched = call()
        assert name in recorder.names
        assert torch.equal(directly, dispatched), name


@pytest.mark.parametrize("kept", [True, False])
def test_selective_checkpointing_can_keep_the_product(layer, kept, monkeypatch):
    """Counts dequantizations: product and gradient need one each; recomputing the product needs a third."""
    x = torch.randn(3, 128, requires_grad=True)
    dequantized = []
    dequantize = PackedWeight.dequantize
    monkeypatch.setattr(
        PackedWeight, "dequantize", lambda *arguments: (dequantized.append(1), dequantize(*arguments))[1]
    )

    def policy(context, op, *args, **kwargs):
        keep = kept and op is torch.ops.halfbyte.linear_4bit.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    y = checkpoint(lambda x: layer(x).sin(), x, use_reentrant=False, context_fn=contexts)
    y.sum().backward()
    assert len(dequantized) == (2 if kept else 3)
    plain = x.detach().clone().requires_grad_(True)
    layer(plain).sin().sum().backward()
    assert torch.equal(x.grad, plain.grad)
