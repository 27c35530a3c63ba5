"""Queries to torch's CUDA allocator for GPU tests."""

import gc

import torch


def reserved() -> int:
    """Returns the reserved bytes after all cached memory is freed."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def hands_blocks_back() -> bool:
    """Returns True if freed memory goes back to the device; a graph capture that never ended prevents that."""
    kept = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    before = torch.cuda.memory_reserved()
    del kept
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() < before
