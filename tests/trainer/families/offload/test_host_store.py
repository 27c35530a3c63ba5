"""Streams in host memory: they come back as they went, in whatever order, and their memory is used again."""

import gc

import pytest
import torch

from halfbyte.trainer.families.offload.activations import HostStore

GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.mark.parametrize("device", DEVICES)
def test_what_went_out_comes_back(device):
    store = HostStore()
    tensors = [torch.randn(2, 30, 8, device=device).bfloat16() for _ in range(5)]
    expected = [tensor.cpu().clone() for tensor in tensors]
    held = [store.put(tensor) for tensor in tensors]
    del tensors
    for place in (4, 3, 0, 2, 1, 4):  # the order of a backward, and others
        back = held[place].get()
        assert back.device.type == device
        assert torch.equal(back.cpu(), expected[place])


@pytest.mark.parametrize("device", DEVICES)
def test_buffers_serve_the_next_step(device):
    store = HostStore()
    buffers = set()
    for step in range(3):
        held = [store.put(torch.full((4, 4), float(10 * step + place), device=device)) for place in range(3)]
        buffers |= {part._buffer.data_ptr() for part in held}
        for place in (2, 1, 0):
            assert float(held[place].get()[0, 0]) == 10 * step + place
        del held
        gc.collect()
    assert len(buffers) == 3


@GPU
def test_the_device_does_not_hold_what_waits_on_the_host():
    store = HostStore()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    held = []
    for _ in range(8):
        held.append(store.put(torch.zeros(1 << 20, device="cuda")))
        torch.cuda.synchronize()
    torch.zeros(1, device="cuda")  # the allocator looks at its events
    assert torch.cuda.memory_allocated() - before <= 2 * (4 << 20)
