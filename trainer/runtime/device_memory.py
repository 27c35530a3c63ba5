"""Memory that is held for nothing."""

import gc

import torch


def free_unused(device: torch.device) -> None:
    """Gives memory back to the device that no tensor holds any longer."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
