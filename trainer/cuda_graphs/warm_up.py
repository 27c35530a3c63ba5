"""Records a training step of each image size and batch size before training and compares it with the eager step.

For each of them, three runs on the same inputs:

    1. eagerly, with shifted adapters             the expected result
    2. recorded, with the adapters' own values
    3. replayed, with shifted adapters again      must agree with the first

Because the adapters change between recording and replay, the check also finds a recording that captured a
copy of the adapters instead of reading them where they are. If a replay disagrees, training runs without
recordings.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.trainer.cuda_graphs.denoiser import MOST_SHAPES, GraphedDenoiser
from halfbyte.trainer.cuda_graphs.recorder import relative_difference
from halfbyte.trainer.data.views.buckets import Size
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family

# Attention's backward sums in no fixed order, which in bf16 makes a difference of about 1e-3. A kernel that
# reads or writes a wrong address causes an error as large as the result itself.
_LARGEST_DIFFERENCE = 0.02
_SHIFT = 0.01  # added to the adapters; without it B is zero at the start of training and A has no gradient


Shape = tuple[int, Size]  # images of one process's micro-batch, and their width and height in pixels


class _Step(NamedTuple):
    """The result of one forward and backward."""

    velocity: Tensor  # (B, C, H/8, W/8) fp32
    norms: Tensor  # (parameters,) fp32: the norm of each parameter's gradient; 0 without a gradient


def warm_up(
    graphed: GraphedDenoiser,
    family: Family,
    shapes: Sequence[Shape],
    text: TextEmbedding,
    *,
    guidance_scale: float,
    compute_dtype: torch.dtype,
) -> None:
    """Records a step for at most `MOST_SHAPES` shapes of a batch and runs the others once.

    Weights, gradients and random state stay unchanged. If a replay differs from the eager step, drops all
    recordings with a warning; steps then run eagerly.
    text: the embeddings of one caption, on the denoiser's device in the compute dtype.
    """

    def run(shape: Shape) -> _Step:
        noisy = _noisy(family, shape).to(text.prompt_embeds.device, compute_dtype)
        sigma = torch.ones(len(noisy), device=noisy.device)
        texts = _repeated(text, len(noisy))
        with torch.autocast(noisy.device.type, compute_dtype, enabled=compute_dtype != torch.float32):
            velocity = family.predict(graphed, noisy, sigma, texts, guidance_scale)
        velocity.sum().backward()
        norms = [
            velocity.new_zeros(()) if parameter.grad is None else parameter.grad.norm()
            for parameter in graphed.parameters
        ]
        graphed.drop_gradients()
        return _Step(velocity.detach().float(), torch.stack(norms).float())

    # The first call of a shape runs eagerly. All shapes come first, so that no eager step has to find memory
    # next to the recordings' pool.
    with _shifted(graphed):
        expected = {shape: run(shape) for shape in shapes}
    # The second call is recorded.
    recorded = list(expected)[:MOST_SHAPES]
    for shape in recorded:
        run(shape)
    # The third is a replay.
    with _shifted(graphed):
        for shape in recorded:
            if not graphed.works:
                return
            off = _difference(run(shape), expected[shape])
            if not off <= _LARGEST_DIFFERENCE:  # also True for NaN
                width, height = shape[1]
                graphed.give_up(
                    f"the recorded step of {width}x{height} px differs from the eager one by {off:.1%},"
                    f" expected at most {_LARGEST_DIFFERENCE:.0%}"
                )


@contextmanager
def _shifted(graphed: GraphedDenoiser) -> Iterator[None]:
    """Adds `_SHIFT` to the trained parameters in place within the context, then restores their values."""
    parameters: list[Tensor] = [*graphed.parameters]
    with torch.no_grad():
        before = [parameter.clone() for parameter in parameters]
        torch._foreach_add_(parameters, _SHIFT)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)


def _noisy(family: Family, shape: Shape) -> Tensor:
    """Returns random latents (batch, C, H/8, W/8) fp32 on the CPU, the same ones at every call."""
    batch, (width, height) = shape
    channels, scale = family.vae_config["latent_channels"], family.vae_scale
    generator = torch.Generator().manual_seed(0)
    return torch.randn((batch, channels, height // scale, width // scale), generator=generator)


def _repeated(text: TextEmbedding, batch: int) -> TextEmbedding:
    """Returns the embeddings of one caption for a whole batch."""
    embeds, pooled = (
        part[:1].expand(batch, *part.shape[1:]).contiguous()
        for part in (text.prompt_embeds, text.pooled_prompt_embeds)
    )
    return TextEmbedding(embeds, pooled)


def _difference(ours: _Step, theirs: _Step) -> float:
    """Returns the larger relative difference of velocity and norms; NaN if a value is NaN or infinite."""
    found = [relative_difference(one, other) for one, other in zip(ours, theirs, strict=True)]
    return torch.stack(found).max().item()
