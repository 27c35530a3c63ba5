"""One training step, the same for every model, loss and optimizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from halfbyte.trainer.adapters.lora import trained_parameters
from halfbyte.trainer.data.batches import Batch
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.objective.losses import Loss
from halfbyte.trainer.objective.shift import Shift
from halfbyte.trainer.objective.timesteps import TimestepScheme
from halfbyte.trainer.objective.weighting import Weighting
from halfbyte.trainer.optim.averages import TrainedWeights
from halfbyte.trainer.randomness import generator, key, uniform
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.recipe.sections import ObjectiveSection


@dataclass(frozen=True)
class Objective:
    """What is minimized: the expectation over sigma of weight(sigma) * loss(prediction, noise - x0)."""

    timesteps: TimestepScheme
    shift: Shift
    weighting: Weighting
    loss: Loss
    guidance_scale: float

    @classmethod
    def of(cls, section: ObjectiveSection) -> Self:
        """The one that a recipe asks for."""
        return cls(section.timesteps, section.shift, section.weighting, section.loss, section.guidance_scale)


@dataclass(frozen=True)
class NoisyBatch:
    """A point on the path from data to noise for each sample, and the velocity there."""

    noisy: Tensor  # (B, C, H/8, W/8) fp32: (1 - sigma) x0 + sigma noise
    target: Tensor  # (B, C, H/8, W/8) fp32: noise - x0
    sigma: Tensor  # (B,) fp32


class DiffusionModule(LightningModule):
    """The denoiser with its adapters, the objective, and the optimizer as functions of (seed, position)."""

    def __init__(
        self,
        family: Family,
        denoiser: nn.Module,
        objective: Objective,
        *,
        build_optimizer: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
        lr_factor: Callable[[int], float],
        compute_dtype: torch.dtype,
        max_grad_norm: float | None,
        seed: int,
        first_step: int = 0,
        build_weights: Callable[[Mapping[str, nn.Parameter], torch.optim.Optimizer], TrainedWeights]
        | None = None,
        forward_fn: Callable[..., Any] | None = None,
    ) -> None:
        """`build_weights` makes the average that is used in place of the weights that train; `forward_fn` is called
        in place of the denoiser, see `GraphedDenoiser`."""
        super().__init__()
        self.family = family
        self.denoiser = denoiser.train()  # adapters' dropout; Lightning leaves the mode as it is
        self.forward_fn = forward_fn
        self.objective = objective
        self.build_optimizer = build_optimizer
        self.build_weights = build_weights
        self.weights = TrainedWeights()
        self.lr_factor = lr_factor
        self.compute_dtype = compute_dtype
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.first_step = first_step
        self.grad_norm: Tensor | None = None
        self.losses: list[Tensor] = []  # of the micro-batches since the last optimizer step
        self.validation_loss: float | None = None  # where it was measured after the last optimizer step
        # The frozen base is the same in every process already: DDP need neither broadcast nor watch it.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, p in self.named_parameters() if not p.requires_grad
        ] + [name for name, _ in self.named_buffers()]

    @property
    def step(self) -> int:
        """Optimizer steps done, those before a resume included."""
        return self.first_step + int(self.trainer.global_step)

    def corrupt(self, batch: Batch) -> NoisyBatch:
        """Draws latent, noise and sigma for each sample from its position in the run."""
        shape = batch.latent_mean.shape[1:]
        draw = {name: self.normal(name, batch) for name in ("posterior", "noise")}
        u = [uniform(self.seed, "timestep", p) for p in batch.positions]
        latents = self.family.scale_latents(batch.latent_mean + batch.latent_std * draw["posterior"])
        sigma = self.objective.timesteps.sigmas(torch.tensor(u, dtype=torch.float64))
        sigma = self.objective.shift.apply(sigma, self.family.image_tokens(shape[1], shape[2]))
        sigma = self.family.representable(sigma, self.compute_dtype).to(latents.device)
        weight = sigma[:, None, None, None]
        noise = draw["noise"]
        return NoisyBatch((1 - weight) * latents + weight * noise, noise - latents, sigma)

    def normal(self, purpose: str, batch: Batch) -> Tensor:
        """Standard normal numbers of the shape of the batch's latents, on their device, keyed by the samples."""
        shape = batch.latent_mean.shape[1:]
        drawn = [torch.randn(shape, generator=generator(self.seed, purpose, p)) for p in batch.positions]
        return torch.stack(drawn).to(batch.latent_mean.device)

    def loss(self, batch: Batch) -> Tensor:
        """The objective on one micro-batch: a scalar, fp32."""
        point = self.corrupt(batch)
        text = TextEmbedding(
            batch.prompt_embeds.to(self.compute_dtype), batch.pooled_prompt_embeds.to(self.compute_dtype)
        )
        velocity = self.family.predict(
            self.denoiser if self.forward_fn is None else self.forward_fn,
            point.noisy.to(self.compute_dtype),
            point.sigma,
            text,
            self.objective.guidance_scale,
        )
        per_sample = self.objective.loss.per_sample(velocity, point.target)
        return (self.objective.weighting.weights(point.sigma) * per_sample).mean()

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Lightning's hook."""
        # Dropout draws from torch's global generators; seeded here, they need not be saved.
        torch.manual_seed(key(self.seed, "dropout", *batch.positions))
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        return loss

    def cpu(self) -> Self:
        """Stays where it is. Lightning calls this when training ends: the base would be copied to the host, 6 GB of
        it, and the last samples drawn with a model that is no longer on their device."""
        return self

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Lightning's hook."""
        parameters = trained_parameters(self.denoiser)
        optimizer = self.build_optimizer(list(parameters.items()))
        if self.build_weights is not None:
            self.weights = self.build_weights(parameters, optimizer)
        return optimizer

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Lightning's hook: clips by the norm over all adapters, and keeps the norm for the metrics."""
        parameters = list(trained_parameters(self.denoiser).values())
        bound = self.max_grad_norm if self.max_grad_norm is not None else float("inf")
        self.grad_norm = nn.utils.clip_grad_norm_(parameters, bound).detach()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Lightning's hook: the learning rate is a function of the step alone, so it has no state to save."""
        for group in optimizer.param_groups:
            base = group.setdefault("base_lr", float(group["lr"]))
            group["lr"] = base * self.lr_factor(self.step)


def training_module(
    recipe: Recipe,
    family: Family,
    denoiser: nn.Module,
    dtype: torch.dtype,
    kind: type[DiffusionModule] = DiffusionModule,
) -> DiffusionModule:
    """The recipe's training step, outside of a run."""
    return kind(
        family,
        denoiser,
        Objective.of(recipe.objective),
        build_optimizer=recipe.optimizer.build,
        lr_factor=lambda step: 1.0,
        compute_dtype=dtype,
        max_grad_norm=recipe.train.max_grad_norm,
        seed=recipe.train.seed,
    )
