"""Runs training steps of a miniature, with recordings and without."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte.trainer.adapters.lora import trained_parameters
from halfbyte.trainer.cuda_graphs.denoiser import GraphedDenoiser
from halfbyte.trainer.data.batches import Batch
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.sd3.family import SD3

from fake_recorders import Recorders
from steps import adapted, batch_for, module_of

FAMILIES = pytest.mark.parametrize(("family_class", "fixture"), [(Flux, "mini_flux"), (SD3, "mini_sd3")])


class Setup:
    """A miniature with adapters and its training module; `recorders` None: without recordings."""

    def __init__(
        self,
        family: Family,
        *,
        recorders: Recorders | None,
        dtype: torch.dtype = torch.float32,
        keep: Any = "inputs",
    ) -> None:
        self.family = family
        self.denoiser = adapted(family, dtype=dtype, settings=BlockSettings(keep)).train()
        self.module = module_of(family, self.denoiser, dtype)
        self.dtype = dtype
        if recorders is not None:
            self.module.forward_fn = GraphedDenoiser(self.denoiser, recorder=recorders)

    @property
    def graphed(self) -> GraphedDenoiser:
        graphed = self.module.forward_fn
        assert isinstance(graphed, GraphedDenoiser)
        return graphed

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return trained_parameters(self.denoiser)

    def backward(self, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype != torch.float32):
            loss = self.module.loss(batch)
        loss.backward()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.parameters.values() if p.grad is not None]


def batches(family: Family, count: int, sides: tuple[int, ...] = (8,)) -> list[Batch]:
    """Returns different batches of images of 8 x side latent pixels, with the sides in turn."""
    made = []
    for number in range(count):
        side = sides[number % len(sides)]
        batch = batch_for(family, (2 * number, 2 * number + 1))
        wide = torch.randn(2, 16, 8, side, generator=torch.Generator().manual_seed(number))
        made.append(
            Batch(batch.positions, wide, wide.abs() * 0.1, batch.prompt_embeds, batch.pooled_prompt_embeds)
        )
    return made


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Returns True if both lists are bitwise identical."""
    return len(ours) == len(theirs) and all(
        torch.equal(one, other) for one, other in zip(ours, theirs, strict=True)
    )
