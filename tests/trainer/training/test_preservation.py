"""Tests of differential output preservation: its loss against separate predictions, and that the base is the base."""

from dataclasses import replace

import pytest
import torch

from halfbyte.trainer.adapters.lora import trained_parameters, without_adapters
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.sd3.family import SD3
from halfbyte.trainer.training.preservation import Preservation

from steps import adapted, batch_for, family_at, module_of, text_of

FAMILIES = [(Flux, "mini_flux"), (SD3, "mini_sd3")]


@pytest.fixture(params=FAMILIES, ids=["flux", "sd3"])
def parts(request):
    family_class, fixture = request.param
    family = family_at(request.getfixturevalue(fixture), family_class)
    denoiser = adapted(family, dtype=torch.float32)
    return family, denoiser, module_of(family, denoiser, torch.float32)


def test_the_loss_is_the_sum_of_two_separate_ones(parts):
    family, denoiser, module = parts
    batch = replace(batch_for(family), loss_weight=torch.tensor([0.5, 2.0]))
    alone = module.loss(batch)
    module.preserve = Preservation(text_of(family, 3), 0.7)
    both = module.loss(batch)

    point = module.corrupt(batch)
    own = TextEmbedding(
        *(tensor.expand(2, *tensor.shape[1:]) for tensor in vars(module.preserve.embedding).values())
    )
    inputs = (point.noisy, point.sigma, own, module.objective.guidance_scale)
    drifted = family.predict(denoiser, *inputs)
    with without_adapters(denoiser):
        kept = family.predict(denoiser, *inputs)
    distance = module.objective.loss.per_sample(drifted.double(), kept.double()).double()
    drift = (module.objective.weighting.weights(point.sigma).double() * distance).mean()
    assert drift > 0
    assert torch.allclose(both.double(), alone.double() + 0.7 * drift, rtol=1e-5)


def test_its_gradient_pulls_towards_the_base(parts):
    family, denoiser, module = parts
    batch = batch_for(family)
    module.loss(batch).backward()
    before = {name: p.grad.clone() for name, p in trained_parameters(denoiser).items()}
    denoiser.zero_grad()
    module.preserve = Preservation(text_of(family, 3), 1.0)
    module.loss(batch).backward()
    changed = sum(not p.grad.equal(before[name]) for name, p in trained_parameters(denoiser).items())
    assert changed > len(before) // 2

    # Steps along the gradient of this part alone reduce it.
    def drift():
        return module.loss(batch) - replace_preserve(module, None, batch)

    first = drift()
    gradients = torch.autograd.grad(drift(), list(trained_parameters(denoiser).values()), allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(trained_parameters(denoiser).values(), gradients, strict=True):
            if gradient is not None:
                parameter -= 1e-3 * gradient
    assert drift() < first


def replace_preserve(module, preserve, batch):
    """Returns the loss with another preservation, and puts the module's own back."""
    own, module.preserve = module.preserve, preserve
    try:
        return module.loss(batch)
    finally:
        module.preserve = own


def test_an_adapter_that_does_nothing_has_drifted_nowhere(parts):
    family, denoiser, module = parts
    with torch.no_grad():
        for name, parameter in trained_parameters(denoiser).items():
            if ".lora_B." in name:
                parameter.zero_()
    batch = batch_for(family)
    alone = module.loss(batch)
    module.preserve = Preservation(text_of(family, 3), 5.0)
    # Twice the batch may round differently.
    assert torch.allclose(module.loss(batch), alone, rtol=1e-5)


def test_adapters_are_on_again_and_learn_after_the_base_was_used(parts):
    _, denoiser, _ = parts
    learned = {name for name, p in denoiser.named_parameters() if p.requires_grad}
    with pytest.raises(RuntimeError, match="in between"), without_adapters(denoiser):
        raise RuntimeError("in between")
    assert {name for name, p in denoiser.named_parameters() if p.requires_grad} == learned
