"""What a run says of itself: the settings that decide the result before it, where everything is after it."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from halfbyte.quant.convert.replace_linears import QuantRecipe
from halfbyte.trainer.adapters.lora import TrainedLayers
from halfbyte.trainer.denoiser.attention import AttentionChoice
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.world import World
from halfbyte.trainer.sample.image_distance import PictureChange
from halfbyte.trainer.training.metrics import Measurement


@dataclass(frozen=True)
class Opening:
    """What is known when training is about to start."""

    recipe: Recipe
    family: Family
    world: World
    trained: TrainedLayers
    quant: QuantRecipe | None  # how the base is held; None: in the compute dtype
    quantized_layers: int
    footprint: int  # bytes of the frozen base
    streamed: int  # those of them that stay in the host's memory
    pictures: int
    views: int  # cached crops and mirrors of them
    sizes: Sequence[tuple[int, int]]  # width and height in pixels of every bucket
    attention: AttentionChoice
    held_out: int  # pictures that validation measures


def opening_lines(opening: Opening) -> list[tuple[str, str]]:
    """Label and text for each thing that decides the result; nothing that matters is left to a guess."""
    recipe, family, trained = opening.recipe, opening.family, opening.trained
    dtype = recipe.quant.compute_dtype
    if opening.quant is None:
        base = f"not quantized, {dtype}"
    else:
        base = f"{opening.quant.describe()}; {opening.quantized_layers} layers, computed in {dtype}"
    where = f", {_bytes(opening.streamed)} of it streamed from host memory" if opening.streamed else ""
    objective = recipe.objective
    tokens = sorted(
        {family.image_tokens(h // family.vae_scale, w // family.vae_scale) for w, h in opening.sizes}
    )
    train, world = recipe.train, opening.world
    step = train.batch_size * train.grad_accumulation * world.size
    return [
        ("model", f"{family.describe_source()} ({recipe.model.family})"),
        ("base", f"{base}; {_bytes(opening.footprint)}{where}"),
        (
            "trains",
            f"{_adapter_kind(recipe)} rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g} on {trained.layers} of"
            f" {trained.total_layers} linear layers: {trained.parameters:,} parameters in fp32",
        ),
        (
            "data",
            f"{opening.pictures} pictures, {opening.views} views, sizes"
            f" {', '.join(f'{w}x{h}' for w, h in opening.sizes)}",
        ),
        ("validation", _validation_plan(recipe, opening.held_out)),
        ("attention", f"{opening.attention.backend}: {opening.attention.reason}"),
        ("blocks", _blocks(recipe, opening.quant)),
        ("launches", _launches(recipe, world)),
        ("timesteps", objective.timesteps.describe()),
        ("shift", f"{objective.shift.describe()}; {_shift_note(opening, tokens)}"),
        ("weighting", f"{objective.weighting.describe()}; loss {objective.loss.describe()}"),
        ("guidance", family.describe_guidance(objective.guidance_scale)),
        ("optimizer", f"{recipe.optimizer.describe()}; schedule {recipe.lr_schedule.describe()}"),
        ("seen", _seen_weights(recipe)),
        (
            "run",
            f"{train.steps} steps of {step} samples ({train.batch_size} x {train.grad_accumulation} micro-batches"
            f" x {_processes(world)}), about"
            f" {train.steps * step / max(1, opening.pictures):.1f} passes over the pictures, seed {train.seed}",
        ),
    ]


def _blocks(recipe: Recipe, quant: QuantRecipe | None) -> str:
    """How the blocks run, and what they keep for the backward."""
    train, lora = recipe.train, recipe.lora
    by_layer = {
        "train.fused_blocks: false": not train.fused_blocks,
        "train.fused_adapters: false": not train.fused_adapters,
        "an int8 base": quant is not None and quant.quant_type == "int8",
        "lora.dora: true": lora.dora,
        f"lora.dropout: {lora.dropout:g}": lora.dropout > 0,
    }
    reasons = [setting for setting, holds in by_layer.items() if holds]
    asked = train.gradient_checkpointing
    if not reasons:
        return f"each as one function; checkpointing {asked}"
    kept = asked if asked in ("none", "full") else f"full, which {asked} is layer by layer"
    return f"layer by layer ({', '.join(reasons)}); checkpointing {kept}"


def _launches(recipe: Recipe, world: World) -> str:
    """How a step's kernels get to the device."""
    if not recipe.train.cuda_graphs:
        return "kernel by kernel (train.cuda_graphs: false)"
    if world.device.type != "cuda":
        return f"operation by operation: train.cuda_graphs means nothing on {world.device.type}"
    return "as CUDA graphs, recorded at the first step of each size"


def _adapter_kind(recipe: Recipe) -> str:
    lora = recipe.lora
    kind = ("rs" if lora.rslora else "") + ("DoRA" if lora.dora else "LoRA")
    patterns = {**lora.rank_pattern, **lora.alpha_pattern}
    return f"{kind} (otherwise at {', '.join(patterns)})" if patterns else kind


def _seen_weights(recipe: Recipe) -> str:
    """What validation, samples and exports are made with."""
    if recipe.ema.decay is not None:
        return f"the moving average of the adapter, decay {recipe.ema.decay:g} a step"
    return "the average that the optimizer keeps" if recipe.optimizer.averages else "the weights that train"


def _validation_plan(recipe: Recipe, held_out: int) -> str:
    """What is measured, and when."""
    if not held_out:
        return "none: no pictures are held out (validation.path or validation.held_out)"
    every = recipe.validation.every
    levels = ", ".join(f"{sigma:g}" for sigma in recipe.validation.sigmas)
    when = f"every {every} steps, before and after" if every else "before and after"
    return f"{held_out} pictures that are not trained on, at sigma {levels}, {when}"


def _shift_note(opening: Opening, tokens: Sequence[int]) -> str:
    """What becomes of sigma 0.5 at the run's sizes, beside what the model's own scheduler is set to."""
    middle = torch.tensor([0.5], dtype=torch.float64)
    shown = sorted({tokens[0], tokens[-1]})
    moved = ", ".join(
        f"{float(opening.recipe.objective.shift.apply(middle, count)):.3f} at {count} image tokens"
        for count in shown
    )
    scheduler = opening.family.scheduler_config
    if scheduler.get("use_dynamic_shifting"):
        own = "dynamic by resolution"
    else:
        own = f"static {scheduler.get('shift', 1.0):g}"
    return f"sigma 0.5 becomes {moved} (the model's own sampler: {own})"


def write_lines(console: Console, lines: Sequence[tuple[str, str]]) -> None:
    """Prints labels and texts as two columns."""
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        console.print(f"{label:<{width}}  {text}", markup=False, highlight=False)


@dataclass(frozen=True)
class LevelChange:
    """What training did to the validation loss at one noise level."""

    sigma: float
    base: float
    trained: float


@dataclass(frozen=True)
class ValidationChange:
    """What training did to the validation loss: `base` is step 0, the model with its adapter as it starts."""

    pictures: int
    base: float
    trained: float
    change_percent: float
    by_sigma: Sequence[LevelChange]


def validation_change(measured: Sequence[Measurement], pictures: int) -> ValidationChange | None:
    """From the rows of validation.csv; None where nothing was measured at step 0 or after it."""
    if len(measured) < 2 or measured[0].step != 0:
        return None
    base, trained = measured[0], measured[-1]
    return ValidationChange(
        pictures,
        base.loss,
        trained.loss,
        100 * (trained.loss / base.loss - 1),
        [LevelChange(sigma, loss, trained.by_sigma[sigma]) for sigma, loss in base.by_sigma.items()],
    )


@dataclass(frozen=True)
class Closing:
    """What a finished run left, as summary.json holds it."""

    steps: int
    seconds: float  # of training alone
    first_loss: float | None  # mean over the first tenth of the logged steps
    last_loss: float | None
    adapter: Path
    base: Path | None
    checkpoint: Path | None
    samples: Path | None
    metrics: Path
    validation: ValidationChange | None
    pictures: PictureChange | None  # towards sample.references


def closing_lines(closing: Closing) -> list[tuple[str, str]]:
    """Label and text for each thing a user looks for after a run."""
    lines = [("trained", f"{closing.steps} steps in {closing.seconds:.0f} s")]
    if closing.first_loss is not None and closing.last_loss is not None:
        lines.append(
            (
                "loss",
                f"{closing.first_loss:.4f} -> {closing.last_loss:.4f} (means of the first and last tenth)",
            )
        )
    if closing.validation is not None:
        levels = ", ".join(
            f"{100 * (one.trained / one.base - 1):+.1f} % at {one.sigma:g}"
            for one in closing.validation.by_sigma
        )
        lines.append(("validation", f"{validation_result(closing.validation)}; by sigma {levels}"))
    lines.append(("adapter", str(closing.adapter)))
    if closing.base is not None:
        lines.append(("base", str(closing.base)))
    if closing.samples is not None:
        lines.append(("samples", str(closing.samples)))
    if closing.pictures is not None:
        lines.append(("pictures", picture_result(closing.pictures)))
    lines.append(
        (
            "metrics",
            f"{closing.metrics} (also: tensorboard --logdir {shlex.quote(str(closing.metrics.parent))})",
        )
    )
    if closing.checkpoint is not None:
        lines.append(("checkpoint", str(closing.checkpoint)))
    return lines


def validation_result(change: ValidationChange) -> str:
    """One line, without the levels."""
    return (
        f"loss {change.base:.4f} -> {change.trained:.4f} ({change.change_percent:+.1f} %) on {change.pictures}"
        " pictures that were not trained on"
    )


def picture_result(change: PictureChange) -> str:
    """One line."""
    return (
        f"distance from {change.pictures} reference pictures {change.base.rmse:.3f} -> {change.trained.rmse:.3f}"
        f" (RMSE of colours in 0 to 1), structural similarity {change.base.ssim:.3f} -> {change.trained.ssim:.3f}"
    )


def write_summary(closing: Closing, path: Path) -> None:
    """The same as JSON."""
    path.write_text(json.dumps(asdict(closing), indent=1, default=str) + "\n", encoding="utf-8")


def _processes(world: World) -> str:
    return (
        f"1 process on {world.device.type}"
        if world.size == 1
        else f"{world.size} processes on {world.device.type}"
    )


def _bytes(count: int) -> str:
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.1f} MiB"
