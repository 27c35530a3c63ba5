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
from halfbyte.trainer.training.preservation import Preservation
from halfbyte.trainer.training.skipped_steps import SkippedSteps


@dataclass(frozen=True)
class Objective:
    """The training objective: the expectation over sigma of weight(sigma) * loss(prediction, noise - x0)."""

    timesteps: TimestepScheme
    shift: Shift
    weighting: Weighting
    loss: Loss
    guidance_scale: float

    @classmethod
    def of(cls, section: ObjectiveSection) -> Self:
        """Returns the objective of a recipe's section."""
        return cls(section.timesteps, section.shift, section.weighting, section.loss, section.guidance_scale)


@dataclass(frozen=True)
class NoisyBatch:
    """One point on the path from data to noise for each sample, with the velocity at that point."""

    noisy: Tensor  # (B, C, H/8, W/8) fp32: (1 - sigma) x0 + sigma noise
    target: Tensor  # (B, C, H/8, W/8) fp32: noise - x0
    sigma: Tensor  # (B,) fp32


class DiffusionModule(LightningModule):
    """One training step: the denoiser with its adapters, the objective and the optimizer.

    All random numbers are functions of the seed and a sample's position in the run, so no random state is
    saved.

    One optimizer step takes `accumulate_grad_batches` micro-batches. Lightning calls, in this order:

    - for every micro-batch: `training_step`; `zero_grad`, before the first backward only; then the backward
      of the loss divided by the number of micro-batches.
    - after the last backward: unscaling of the gradients (float16 only), `on_before_optimizer_step`,
      `configure_gradient_clipping` and `optimizer.step`.
    - for every micro-batch: `on_train_batch_end` of the callbacks, see `callbacks.StepCallback`.
    """

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
        preserve: Preservation | None = None,
        skipped_steps: SkippedSteps | None = None,
    ) -> None:
        """Puts the denoiser into training mode.

        lr_factor: optimizer step, counted from 0 -> factor of the learning rate. build_weights: makes the
        average of the weights that samples and checkpoints use; None for no average. forward_fn: called
        instead of the denoiser, see `GraphedDenoiser`. skipped_steps: leaves out steps whose values are not finite;
        None takes every step.
        """
        super().__init__()
        self.family = family
        self.denoiser = denoiser.train()  # enables the adapters' dropout; Lightning does not change the mode
        self.forward_fn = forward_fn
        self.skipped_steps = skipped_steps
        self.objective = objective
        self.preserve = preserve
        self.build_optimizer = build_optimizer
        self.build_weights = build_weights
        self.weights = TrainedWeights()
        self.lr_factor = lr_factor
        self.compute_dtype = compute_dtype
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.first_step = first_step
        self.grad_norm: Tensor | None = None
        self.losses: list[Tensor] = []  # one loss per micro-batch since the last optimizer step
        self.validation_loss: float | None = None  # None unless it was measured after the last optimizer step
        # DDP must not broadcast or track the frozen base: it is identical in every process already.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, p in self.named_parameters() if not p.requires_grad
        ] + [name for name, _ in self.named_buffers()]

    @property
    def skips_now(self) -> bool:
        """True if the last step was left out because its values are not finite."""
        return self.skipped_steps is not None and self.skipped_steps.now

    @property
    def step(self) -> int:
        """Optimizer steps done, including the steps before a resume."""
        return self.first_step + int(self.trainer.global_step)

    def corrupt(self, batch: Batch) -> NoisyBatch:
        """Draws latent x0, noise and sigma, and mixes them: (1 - sigma) x0 + sigma noise."""
        shape = batch.latent_mean.shape[1:]
        # Latents are drawn from the VAE's posterior, then noise and sigma: each from its own keyed generator,
        # so a sample gets the same numbers whatever batch or process it is in.
        draw = {name: self.normal(name, batch) for name in ("posterior", "noise")}
        u = [uniform(self.seed, "timestep", p) for p in batch.positions]
        latents = self.family.scale_latents(batch.latent_mean + batch.latent_std * draw["posterior"])
        # u is float64, because the quantile functions of the timestep schemes are steep near 0 and 1.
        sigma = self.objective.timesteps.sigmas(torch.tensor(u, dtype=torch.float64))
        sigma = self.objective.shift.apply(sigma, self.family.image_tokens(shape[1], shape[2]))
        # Rounded to values that the model's input can hold, so that noise level and timestep agree exactly.
        sigma = self.family.representable(sigma, self.compute_dtype).to(latents.device)
        weight = sigma[:, None, None, None]
        noise = draw["noise"]
        return NoisyBatch((1 - weight) * latents + weight * noise, noise - latents, sigma)

    def normal(self, purpose: str, batch: Batch) -> Tensor:
        """Returns standard normal noise, (B, C, H/8, W/8) fp32, keyed by purpose and sample.

        Drawn on the CPU, so that every device trains with the same numbers.
        """
        shape = batch.latent_mean.shape[1:]
        drawn = [torch.randn(shape, generator=generator(self.seed, purpose, p)) for p in batch.positions]
        return torch.stack(drawn).to(batch.latent_mean.device)

    def loss(self, batch: Batch) -> Tensor:
        """Computes the objective of one micro-batch, an fp32 scalar: its mean over the samples times `batch.share`.

        The mean of these over the micro-batches of a step is the mean over the samples of the step.
        """
        point = self.corrupt(batch)
        text = TextEmbedding(
            batch.prompt_embeds.to(self.compute_dtype), batch.pooled_prompt_embeds.to(self.compute_dtype)
        )
        forward_fn = self.denoiser if self.forward_fn is None else self.forward_fn
        inputs = (point.noisy.to(self.compute_dtype), point.sigma, text, self.objective.guidance_scale)
        distance = self.objective.loss.per_sample
        if self.preserve is None:
            velocity = self.family.predict(forward_fn, *inputs)
        else:
            velocity, drifted, kept = self.preserve.predict(self.family, self.denoiser, forward_fn, *inputs)
        per_sample = distance(velocity, point.target, batch.pixel_weight)
        if batch.loss_weight is not None:
            per_sample = per_sample * batch.loss_weight
        if self.preserve is not None:
            per_sample = per_sample + self.preserve.weight * distance(drifted, kept)
        return batch.share * (self.objective.weighting.weights(point.sigma) * per_sample).mean()

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Computes the loss of one micro-batch; Lightning runs the backward.

        Lightning divides the loss by the number of micro-batches before the backward, so the accumulated
        gradient is that of their mean, which is the mean over the samples of the step.
        """
        # Dropout uses torch's global generators. Seeding them here by position means that checkpoints need
        # not save their state.
        torch.manual_seed(key(self.seed, "dropout", *batch.positions))
        loss = self.loss(batch)
        # Undivided, for the metrics. Kept on the device: reading the value would wait for the GPU.
        self.losses.append(loss.detach())
        return loss

    def cpu(self) -> Self:
        """Does nothing and leaves the model on its device.

        Lightning calls `cpu()` when training ends. That would copy the base, 6 GB, to the host, and the last
        sample images would be generated with a model that is no longer on their device.
        """
        return self

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Builds the optimizer over the trained parameters, and the average of the weights if there is one."""
        parameters = trained_parameters(self.denoiser)
        optimizer = self.build_optimizer(list(parameters.items()))
        if self.build_weights is not None:
            self.weights = self.build_weights(parameters, optimizer)
        return optimizer

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clips the gradients by their norm over all adapters, and keeps that norm for the metrics.

        Drops the gradients of a step that is left out: no optimizer updates a parameter without one, its state
        or its weight decay.

        Lightning calls this once per optimizer step, on the accumulated gradients. In float16 they are
        unscaled by then, so the bound applies to their true size.
        """
        # An infinite bound clips nothing, but computes the norm.
        parameters = list(trained_parameters(self.denoiser).values())
        bound = self.max_grad_norm if self.max_grad_norm is not None else float("inf")
        self.grad_norm = nn.utils.clip_grad_norm_(parameters, bound).detach()
        if self.skipped_steps is not None and self.skipped_steps.is_skipped(
            self.step + 1, self.losses, self.grad_norm, scaled=self.compute_dtype == torch.float16
        ):
            for parameter in parameters:
                parameter.grad = None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Sets the learning rate; Lightning calls this once per optimizer step, before clipping.

        The rate depends only on the step, so there is no scheduler state to save.
        """
        # `base_lr` is in the parameter group, so a checkpoint saves it with the optimizer. Without it a
        # resumed run would multiply the factor with an `lr` that already contains one.
        for group in optimizer.param_groups:
            base = group.setdefault("base_lr", float(group["lr"]))
            group["lr"] = base * self.lr_factor(self.step)


def training_module(
    recipe: Recipe,
    family: Family,
    denoiser: nn.Module,
    dtype: torch.dtype,
    kind: type[DiffusionModule] = DiffusionModule,
    preserve: Preservation | None = None,
) -> DiffusionModule:
    """Returns the recipe's training step for use outside a run: without schedule, average or CUDA graphs.

    preserve: its embedding of the class caption; without it that part of the objective is left out.

    kind: the class to build, `DiffusionModule` or a subclass.
    """
    return kind(
        family,
        denoiser,
        Objective.of(recipe.objective),
        build_optimizer=recipe.optimizer.build,
        lr_factor=lambda step: 1.0,
        compute_dtype=dtype,
        max_grad_norm=recipe.train.max_grad_norm,
        seed=recipe.train.seed,
        preserve=preserve,
    )
