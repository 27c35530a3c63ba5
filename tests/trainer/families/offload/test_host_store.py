"""Activations in host memory: they come back unchanged in any order, and their buffers are reused."""

import gc

import pytest
import torch

from halfbyte.trainer.families.offload.activations import HostStore

GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_come_back_unchanged(device):
    store = HostStore()
    tensors = [torch.randn(2, 30, 8, device=device).bfloat16() for _ in range(5)]
    expected = [tensor.cpu().clone() for tensor in tensors]
    held = [store.put(tensor) for tensor in tensors]
    del tensors
    for place in (4, 3, 0, 2, 1, 4):  # a backward's order, then others
        back = held[place].get()
        assert back.device.type == device
        assert torch.equal(back.cpu(), expected[place])


@pytest.mark.parametrize("device", DEVICES)
def test_buffers_are_reused_in_the_next_step(device):
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
def test_offloaded_tensors_take_no_device_memory():
    store = HostStore()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    held = []
    for _ in range(8):
        held.append(store.put(torch.zeros(1 << 20, device="cuda")))
        torch.cuda.synchronize()
    torch.zeros(1, device="cuda")  # makes the allocator check its events and free the copied tensors
    assert torch.cuda.memory_allocated() - before <= 2 * (4 << 20)
