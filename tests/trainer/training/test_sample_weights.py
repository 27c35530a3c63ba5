"""Tests that every sample of a step has the same weight in its gradient, whatever micro-batches it is divided into."""

from dataclasses import replace

import pytest
import torch

from halfbyte.trainer.adapters.lora import trained_parameters
from halfbyte.trainer.data.batches import Batch
from halfbyte.trainer.families.flux.family import Flux

from steps import adapted, batch_for, family_at, module_of


def of_size(batch: Batch, side: int) -> Batch:
    """Returns a batch with latents of `side` x `side`."""
    draws = torch.Generator().manual_seed(side)
    shape = (len(batch.positions), batch.latent_mean.shape[1], side, side)
    mean, std = torch.randn(shape, generator=draws), torch.rand(shape, generator=draws)
    return replace(batch, latent_mean=mean, latent_std=std)


def only(batch: Batch, row: int) -> Batch:
    tensors = {name: value[row : row + 1] for name, value in vars(batch).items() if torch.is_tensor(value)}
    return replace(batch, positions=batch.positions[row : row + 1], share=1.0, **tensors)


def test_a_step_is_the_mean_over_its_samples(mini_flux):
    family = family_at(mini_flux, Flux)
    denoiser = adapted(family, dtype=torch.float32).train()
    module = module_of(family, denoiser, torch.float32)
    parameters = trained_parameters(denoiser)

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(loss, list(parameters.values()))
        return [gradient.double() for gradient in found]

    # Three small images in one micro-batch, one large image in the other, which needs the memory of several.
    step = [of_size(batch_for(family, (0, 1, 2)), 4), of_size(batch_for(family, (3,)), 8)]
    shares = [3 / 2, 1 / 2]
    weighted = torch.tensor([1.0, 0.5, 2.0])
    step = [replace(batch, share=share) for batch, share in zip(step, shares, strict=True)]
    step[0] = replace(step[0], loss_weight=weighted)

    losses = [module.loss(batch) for batch in step]
    ours = [sum(parts) / 2 for parts in zip(*map(gradients, losses), strict=True)]

    singles = [module.loss(only(batch, row)) for batch in step for row in range(len(batch.positions))]
    reference = [sum(parts) / 4 for parts in zip(*map(gradients, singles), strict=True)]
    loss = sum(single.double() for single in singles) / 4
    assert (sum(losses) / 2).item() == pytest.approx(loss.item(), rel=1e-6)
    assert any(gradient.abs().max() > 0 for gradient in reference)
    for mine, theirs in zip(ours, reference, strict=True):
        # Relative to the whole tensor: some of its elements nearly cancel in float32.
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
