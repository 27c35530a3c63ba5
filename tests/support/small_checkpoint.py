"""Writes checkpoints of one small layer, for tests of their folders."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.recipe.batch_sizes import BatchSize
from halfbyte.trainer.run_folder import checkpoint


def save(root: Path, step: int, *, samples: BatchSize = 1) -> Path:
    """Saves a checkpoint of a step with two micro-batches of `samples`; returns its folder."""
    weight = torch.nn.Parameter(torch.full((4, 3), float(step)))
    optimizer = torch.optim.AdamW([("layer.lora_A.weight", weight)], lr=0.1)
    weight.grad = torch.ones(4, 3)
    optimizer.step()
    return checkpoint.write_checkpoint(
        root,
        checkpoint.snapshot(
            checkpoint.Position(step, step * 2, samples),
            write_adapter=lambda folder: save_file(
                {"transformer.layer.lora_A.weight": weight.detach()}, f"{folder}/{ADAPTER_FILE}"
            ),
            optimizer=checkpoint.named_optimizer_state(optimizer),
            scaler={},
        ),
    )
