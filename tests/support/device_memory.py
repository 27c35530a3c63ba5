"""What GPU tests ask of torch's allocator."""

import gc

import torch


def reserved() -> int:
    """Bytes that are held once all that nobody needs is given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def hands_blocks_back() -> bool:
    """Whether memory that is freed is given back, which a recording that never ended prevents."""
    kept = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    held = torch.cuda.memory_reserved()
    del kept
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() < held
