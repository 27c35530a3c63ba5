"""Compares loss and adapter gradients of our step with the same step in fp32 over the same dequantized weights.

The reference is diffusers' transformer with stock PEFT, built from the packed base: dequantized to bf16, as
our products see it, and then cast to fp32. Before that it takes the step in bf16 as well, which shows the
effect of bf16 on this model. All steps see the same inputs, rounded to bf16 before the transformer; A and B
are random.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.quant.convert.dequantize import dequantize_model
from halfbyte.trainer.adapters.lora import trained_parameters
from halfbyte.trainer.data.batches import Batch
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.randomness import generator
from halfbyte.trainer.runtime.device_memory import free_unused
from halfbyte.trainer.training.module import DiffusionModule
from scripts.bench.models import MODELS, family_of, random_denoiser
from scripts.bench.trained_model import ROW, TrainedModel, adapt, default_objective

_BY_LAYER, _FP32, _BF16 = "ours by layer", "fp32", "diffusers and PEFT in bf16"


@dataclass(frozen=True)
class Gradients:
    """The loss and the gradients of a step."""

    loss: float
    adapter: Tensor  # (n,) fp32 on the CPU: of all A and B, in the model's order

    @classmethod
    def of(cls, module: DiffusionModule, batch: Batch, *, autocast: bool) -> "Gradients":
        """Returns the gradients of one step, and frees those of the model."""
        with torch.autocast(batch.latent_mean.device.type, torch.bfloat16, enabled=autocast):
            loss = module.loss(batch)
        loss.backward()
        parameters = list(trained_parameters(module.denoiser).values())
        grads = []
        for parameter in parameters:
            assert parameter.grad is not None, "an adapter without a gradient"
            grads.append(parameter.grad.float().cpu().flatten())
            parameter.grad = None
        return cls(loss.item(), torch.cat(grads))

    def off(self, other: "Gradients") -> float:
        """Returns the distance of the adapter's gradients, relative to the other's norm."""
        difference = torch.linalg.vector_norm(self.adapter - other.adapter, dtype=torch.float64)
        return float(difference / torch.linalg.vector_norm(other.adapter, dtype=torch.float64))


def agreement(
    model: str, px: int, rank: int, checkpoints: Sequence[str], attention: str | None, device: torch.device
) -> list[dict[str, Any]]:
    """Returns, per way to take the step, its loss and the errors of its loss and gradients."""
    family = family_of(model)
    batch = random_batch(model, family, px).to(device)
    found = {_BY_LAYER: _ours(model, _BY_LAYER, rank, ["full"], attention, batch)["full"]}
    for checkpoint, gradients in _ours(model, "ours", rank, checkpoints, attention, batch).items():
        found[f"ours, {checkpoint}"] = gradients
    found |= _references(model, family, rank, batch)
    reference, by_layer = found[_FP32], found[_BY_LAYER]
    return [
        {
            "step": step,
            "loss": gradients.loss,
            "loss_off": abs(gradients.loss - reference.loss) / abs(reference.loss),
            "gradients_off": gradients.off(reference),
            "off_by_layer": gradients.off(by_layer),
        }
        for step, gradients in found.items()
    ]


def random_batch(model: str, family: Family, px: int) -> Batch:
    """Returns one sample of random numbers with the sizes and spread of real ones."""
    config, side = family.denoiser_config, px // family.vae_scale
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(1, family.vae_config["latent_channels"], side, side, generator=draws)
    text = torch.randn(1, MODELS[model][3], config["joint_attention_dim"], generator=draws)
    pooled = torch.randn(1, config["pooled_projection_dim"], generator=draws)
    return Batch((0,), latents, torch.ones_like(latents), text.bfloat16(), pooled.bfloat16())


def _ours(
    model: str, row: str, rank: int, checkpoints: Sequence[str], attention: str | None, batch: Batch
) -> dict[str, Gradients]:
    device = batch.latent_mean.device
    trained = TrainedModel(model, ROW[row], rank, device, stream=False, optimizer="adamw")
    _fill_up(trained.denoiser)
    found = {}
    for checkpoint in checkpoints:
        trained.settle(checkpoint, attention)
        found[checkpoint] = Gradients.of(trained.module, batch, autocast=True)
    del trained
    free_unused(device)
    return found


def _references(model: str, family: Family, rank: int, batch: Batch) -> dict[str, Gradients]:
    device = batch.latent_mean.device
    denoiser: Any = random_denoiser(model, family, "ours", device)
    dequantize_model(denoiser, torch.bfloat16)
    adapt(denoiser, family, rank, fused=False)
    denoiser.to(device)
    _fill_up(denoiser)
    denoiser.enable_gradient_checkpointing()
    module = default_objective(family, denoiser)
    found = {_BF16: Gradients.of(module, batch, autocast=True)}
    denoiser.float()

    def in_fp32(**inputs: Any) -> Any:
        # The objective's inputs are in bf16: exactly the values that the other steps see.
        return denoiser(**{name: _cast_up(given) for name, given in inputs.items()})

    module.forward_fn = in_fp32
    found[_FP32] = Gradients.of(module, batch, autocast=False)
    return found


def _cast_up(given: Any) -> Any:
    return given.float() if isinstance(given, Tensor) and given.dtype == torch.bfloat16 else given


def _fill_up(denoiser: nn.Module) -> None:
    """Fills B, which starts at zero and would leave A without a gradient, with the spread of A."""
    for name, parameter in trained_parameters(denoiser).items():
        if ".lora_B." in name:
            drawn = torch.randn(parameter.shape, generator=generator(0, f"up/{name}"))
            parameter.data.copy_(drawn / parameter.shape[1])  # the layer's rank


def agreement_table(found: Sequence[dict[str, Any]]) -> str:
    """Returns Markdown with a line per way to take the step."""
    heads = ("step", "loss", "loss off", "adapter gradients off", f"off {_BY_LAYER}")
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for one in found:
        offs = (
            f"{100 * one[key]:.{digits}f} %"
            for key, digits in (("loss_off", 3), ("gradients_off", 2), ("off_by_layer", 2))
        )
        lines.append(f"| {one['step']} | {one['loss']:.4f} | {' | '.join(offs)} |")
    return "\n".join(lines)
