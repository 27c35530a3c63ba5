"""The warm-up before training compares each recording with the eager step and changes nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from halfbyte.trainer.cuda_graphs.warm_up import warm_up
from halfbyte.trainer.data.batches import Batch
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.flux.family import Flux

from fake_recorders import Broken, Recorders, Rerun
from recorded_steps import FAMILIES, Setup, batches, same
from steps import family_at


class Stale(Rerun):
    """Always returns its first result, as if the recording had captured a copy of the adapters."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        made, again = super().record(work)
        kept: list[Tensor] = []

        def stale() -> None:
            again()
            if not kept:
                kept.append(made.clone())
            made.copy_(kept[0])

        return made, stale


def warmed(setup: Setup, batch: Batch) -> None:
    """Runs a warm-up for images that are 8 and 12 latent pixels wide."""
    scale = setup.family.vae_scale
    warm_up(
        setup.graphed,
        setup.family,
        [(len(batch.positions), (8 * scale, 8 * scale)), (len(batch.positions), (12 * scale, 8 * scale))],
        TextEmbedding(batch.prompt_embeds, batch.pooled_prompt_embeds),
        guidance_scale=setup.module.objective.guidance_scale,
        compute_dtype=setup.dtype,
    )


@FAMILIES
def test_a_warm_up_records_each_size_and_changes_nothing_else(
    request: pytest.FixtureRequest, family_class: type[Family], fixture: str
) -> None:
    family, recorders = family_at(request.getfixturevalue(fixture), family_class), Recorders()
    setup = Setup(family, recorders=recorders, dtype=torch.bfloat16)
    plain = Setup(family, recorders=None, dtype=torch.bfloat16)
    first, second = batches(family, 2, (8, 12))
    before = torch.get_rng_state()
    warmed(setup, first)
    assert torch.equal(torch.get_rng_state(), before)
    assert setup.gradients() == []
    assert same(list(setup.parameters.values()), list(plain.parameters.values()))
    assert recorders.counts == (4, 8)
    for batch in (first, second):
        assert torch.equal(setup.backward(batch), plain.backward(batch))
    assert recorders.counts == (4, 12)
    assert same(setup.gradients(), plain.gradients())


def test_a_recording_that_does_not_follow_the_adapters_is_not_used(
    mini_flux: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family, recorders = family_at(mini_flux, Flux), Recorders(Stale)
    setup, plain = Setup(family, recorders=recorders), Setup(family, recorders=None)
    (batch,) = batches(family, 1, (8,))
    warmed(setup, batch)
    (warning,) = caplog.records
    assert warning.message.startswith("train.cuda_graphs: ")
    assert "%" in warning.message  # by how much the recording was off
    assert not setup.graphed.works
    assert same(list(setup.parameters.values()), list(plain.parameters.values()))
    assert torch.equal(setup.backward(batch), plain.backward(batch))
    assert same(setup.gradients(), plain.gradients())


def test_a_warm_up_ends_if_nothing_can_be_recorded(mini_flux: Path, caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup(family_at(mini_flux, Flux), recorders=Recorders(Broken))
    (batch,) = batches(setup.family, 1, (8,))
    warmed(setup, batch)
    assert caplog.text.count("train.cuda_graphs: ") == 1
    assert setup.gradients() == []
