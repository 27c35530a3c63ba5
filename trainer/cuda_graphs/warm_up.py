"""Ahead of training, each size of picture is run once as ever, recorded, and replayed beside what it gave before.

The adapters hold other values while a step is recorded than when it is compared: what was recorded has to follow them
where they lie. A recording that gives something else is not trained with.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.trainer.cuda_graphs.denoiser import MOST_SHAPES, GraphedDenoiser
from halfbyte.trainer.cuda_graphs.recorder import relative_difference
from halfbyte.trainer.data.buckets import Size
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family

# Attention's backward sums in no fixed order, which in bf16 is some 1e-3; what is read or written in a wrong place is
# off by its own size.
_LARGEST_DIFFERENCE = 0.02
_SHIFT = 0.01  # of the adapters; B is zero at the beginning


class _Step(NamedTuple):
    """What a forward and backward gave."""

    velocity: Tensor  # (B, C, H/8, W/8) fp32
    norms: Tensor  # of each parameter's gradient; 0 where there is none


def warm_up(
    graphed: GraphedDenoiser,
    family: Family,
    sizes: Sequence[Size],
    text: TextEmbedding,
    *,
    guidance_scale: float,
    compute_dtype: torch.dtype,
) -> None:
    """Records a step of each size of picture, `MOST_SHAPES` at the most; runs the others once. Changes nothing else.

    text: of a whole batch, on the denoiser's device in the compute dtype. Where a recording does not give what the
    step itself gave, all are dropped, with a warning, and steps run as ever.
    """

    def run(size: Size) -> _Step:
        noisy = _noisy(family, len(text.prompt_embeds), size).to(text.prompt_embeds.device, compute_dtype)
        sigma = torch.ones(len(noisy), device=noisy.device)
        with torch.autocast(noisy.device.type, compute_dtype, enabled=compute_dtype != torch.float32):
            velocity = family.predict(graphed, noisy, sigma, text, guidance_scale)
        velocity.sum().backward()
        norms = [
            velocity.new_zeros(()) if parameter.grad is None else parameter.grad.norm()
            for parameter in graphed.parameters
        ]
        graphed.drop_gradients()
        return _Step(velocity.detach().float(), torch.stack(norms).float())

    with _shifted(graphed):
        expected = {size: run(size) for size in sizes}
    recorded = list(expected)[:MOST_SHAPES]
    for size in recorded:
        run(size)
    with _shifted(graphed):
        for size in recorded:
            if not graphed.works:
                return
            off = _difference(run(size), expected[size])
            if not off <= _LARGEST_DIFFERENCE:
                width, height = size
                graphed.give_up(f"a recorded step of {width}x{height} gave something else, by {off:.1%}")


@contextmanager
def _shifted(graphed: GraphedDenoiser) -> Iterator[None]:
    """Within it the parameters that learn hold other values, in the same places."""
    parameters: list[Tensor] = [*graphed.parameters]
    with torch.no_grad():
        before = [parameter.clone() for parameter in parameters]
        torch._foreach_add_(parameters, _SHIFT)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)


def _noisy(family: Family, batch: int, size: Size) -> Tensor:
    width, height = size
    scale = family.vae_scale
    shape = (batch, family.vae_config["latent_channels"], height // scale, width // scale)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _difference(ours: _Step, theirs: _Step) -> float:
    """The larger of the relative differences; NaN where something is not finite."""
    found = [relative_difference(one, other) for one, other in zip(ours, theirs, strict=True)]
    return torch.stack(found).max().item()
