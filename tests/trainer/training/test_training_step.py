"""One training step against a float64 reference that dequantizes the base and uses plain autograd."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.trainer.adapters.lora import trained_parameters
from halfbyte.trainer.data.batches import Batch
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.offload.activations import HostStore
from halfbyte.trainer.families.sd3.family import SD3
from halfbyte.trainer.objective.losses import LOSSES
from halfbyte.trainer.runtime.world import join, read_world

from steps import adapted, batch_for, family_at, module_of

SETTINGS = [
    BlockSettings("inputs", whole=False),
    BlockSettings("everything", whole=False),
    BlockSettings("inputs"),
    BlockSettings("inputs", store=HostStore()),
    BlockSettings("attention"),
    BlockSettings("everything"),
]


def in_float64(family, dtype):
    """Returns the same model in float64, with plain linear layers of the dequantized weights and PEFT's
    adapters."""
    denoiser = adapted(family, dtype=dtype, fused=False)
    for name, layer in list(denoiser.named_modules()):
        if isinstance(layer, Linear4bit):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight = nn.Parameter(layer.dequantize(torch.float32).double(), requires_grad=False)
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias.detach().double(), requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), leaf, plain)
    return denoiser.double()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("family_class", "fixture"), [(Flux, "mini_flux"), (SD3, "mini_sd3")])
def test_adapter_gradients_match_float64(request, family_class, fixture, settings):
    family = family_at(request.getfixturevalue(fixture), family_class)
    batch = batch_for(family)

    denoiser = adapted(family, dtype=torch.float32, settings=settings).train()
    loss = module_of(family, denoiser, torch.float32).loss(batch)
    loss.backward()

    reference = in_float64(family, torch.float32)
    module = module_of(family, reference, torch.float32)
    # Built with fp32, so that sigma is rounded as in the fp32 run; everything after it is float64.
    module.compute_dtype = torch.float64
    expected = module.loss(batch)
    expected.backward()

    assert torch.allclose(loss.double(), expected.double(), rtol=1e-5)
    wanted = trained_parameters(reference)
    for name, parameter in trained_parameters(denoiser).items():
        difference = (parameter.grad - wanted[name].grad).norm()
        # SD3's last block computes text queries that nothing uses: their gradient is exactly zero.
        assert difference <= 2e-4 * wanted[name].grad.norm(), name


def gradients(module, batch, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = module.loss(batch)
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in trained_parameters(module.denoiser).values()])


def test_bf16_gradients_are_as_good_as_plain_linears(mini_flux):
    """bf16 causes more error here than 4 bits, so the comparison is with nn.Linear over the same weights in
    bf16."""
    family = family_at(mini_flux, Flux)
    batch = batch_for(family)
    ours = gradients(module_of(family, adapted(family, dtype=torch.bfloat16), torch.bfloat16), batch, True)
    plain = in_float64(family, torch.bfloat16).bfloat16()
    for parameter in trained_parameters(plain).values():
        parameter.data = parameter.data.float()
    theirs = gradients(module_of(family, plain, torch.bfloat16), batch, True)
    exact_module = module_of(family, in_float64(family, torch.bfloat16), torch.bfloat16)
    point = exact_module.corrupt(batch)
    exact_module.corrupt = lambda _: point  # the same sigma, which bf16 can represent
    exact_module.compute_dtype = torch.float64
    exact = gradients(exact_module, batch)
    assert (ours - exact).norm() <= 1.05 * (theirs - exact).norm()
    assert (ours - theirs).norm() < 0.05 * exact.norm()


def test_a_samples_noise_depends_only_on_its_position(mini_flux):
    family = family_at(mini_flux, Flux)
    module = module_of(family, nn.Linear(1, 1), torch.bfloat16)
    both = module.corrupt(batch_for(family, positions=(4, 9)))
    swapped = batch_for(family, positions=(9, 4))
    swapped = Batch(
        swapped.positions,
        swapped.latent_mean.flip(0),
        swapped.latent_std.flip(0),
        swapped.prompt_embeds,
        swapped.pooled_prompt_embeds,
    )
    again = module.corrupt(swapped)
    assert torch.equal(both.noisy, again.noisy.flip(0))
    assert torch.equal(both.sigma, again.sigma.flip(0))
    other_seed = module_of(family, nn.Linear(1, 1), torch.bfloat16, seed=4).corrupt(batch_for(family, (4, 9)))
    assert not torch.equal(both.sigma, other_seed.sigma)


def test_the_path_and_its_velocity(mini_flux):
    family = family_at(mini_flux, Flux)
    module = module_of(family, nn.Linear(1, 1), torch.float32)
    point = module.corrupt(batch_for(family))
    # x_t + (1 - sigma) v = noise and x_t - sigma v = x0; the VAE's config sets the mean and scale of x0.
    sigma = point.sigma[:, None, None, None]
    noise = point.noisy + (1 - sigma) * point.target
    latents = point.noisy - sigma * point.target
    batch = batch_for(family)
    expected = family.scale_latents(batch.latent_mean)
    assert abs(float(noise.std()) - 1) < 0.05
    assert float((latents - expected).abs().mean()) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("family_class", "fixture"), [(Flux, "mini_flux"), (SD3, "mini_sd3")])
def test_cuda_gradients_match_the_cpus(request, family_class, fixture, settings):
    """Covers attention, kernels and autocast on CUDA: a wrong backward would be far off, or NaN."""
    join(read_world({}))
    family = family_at(request.getfixturevalue(fixture), family_class)
    steps = []
    for device in ("cpu", "cuda"):
        denoiser = adapted(family, dtype=torch.bfloat16, settings=settings).to(device).train()
        module = module_of(family, denoiser, torch.bfloat16)
        with torch.autocast(device, torch.bfloat16):
            module.loss(batch_for(family).to(device)).backward()
        grads = [p.grad.flatten().cpu() for p in trained_parameters(denoiser).values()]
        steps.append(torch.cat(grads))
    ours, theirs = steps
    assert (ours - theirs).norm() < 0.05 * ours.norm()


def test_a_loss_weight_multiplies_the_loss_of_its_sample(mini_flux):
    family = family_at(mini_flux, Flux)
    module = module_of(family, adapted(family, dtype=torch.float32).eval(), torch.float32)
    batch = batch_for(family)
    alone = [
        module.loss(
            Batch(
                (position,),
                batch.latent_mean[[row]],
                batch.latent_std[[row]],
                batch.prompt_embeds[[row]],
                batch.pooled_prompt_embeds[[row]],
            )
        )
        for row, position in enumerate(batch.positions)
    ]
    weighted = module.loss(replace(batch, loss_weight=torch.tensor([0.25, 3.0])))
    assert torch.allclose(
        weighted.double(), (0.25 * alone[0].double() + 3 * alone[1].double()) / 2, rtol=1e-5
    )
    assert module.loss(replace(batch, loss_weight=torch.ones(2))).equal(module.loss(batch))


@pytest.mark.parametrize("name", ["mse", "huber", "l1"])
def test_a_masked_loss_is_the_weighted_mean_of_each_sample(mini_flux, name):
    family = family_at(mini_flux, Flux)
    module = module_of(family, adapted(family, dtype=torch.float32).eval(), torch.float32)
    module.objective = replace(module.objective, loss=LOSSES[name](name=name))
    batch = batch_for(family)
    weight = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    weight[:, :, :4] = 0
    masked = module.loss(replace(batch, pixel_weight=weight))
    # The reference: every element's distance in float64, weighted by its latent cell.
    point = module.corrupt(batch)
    text = TextEmbedding(batch.prompt_embeds.float(), batch.pooled_prompt_embeds.float())
    scale = module.objective.guidance_scale
    velocity = family.predict(module.denoiser, point.noisy, point.sigma, text, scale).double()
    distance = module.objective.loss.elementwise(velocity, point.target.double())
    wide = weight.double().expand_as(distance)
    expected = torch.stack([(d * w).sum() / w.sum() for d, w in zip(distance, wide, strict=True)])
    expected = expected * module.objective.weighting.weights(point.sigma).double()
    assert torch.allclose(masked.double(), expected.mean(), rtol=1e-5)
    # Where the weight is 0, the target does not matter; equal weights are no weights; no weight at all is no loss.
    assert module.loss(replace(batch, pixel_weight=torch.zeros_like(weight))) == 0
    same = module.loss(replace(batch, pixel_weight=torch.full_like(weight, 0.3)))
    assert torch.allclose(same, module.loss(batch), rtol=1e-5)
