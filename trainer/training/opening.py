"""The summary that a run prints before training: every setting that decides the result."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.trainer.adapters.lora import TrainedLayers
from halfbyte.trainer.data.read_sets import SetSummary
from halfbyte.trainer.denoiser.attention import AttentionChoice
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.sizes import file_size, memory_size
from halfbyte.trainer.runtime.world import World


@dataclass(frozen=True)
class Opening:
    """The facts about a run that are known right before training."""

    recipe: Recipe
    family: Family
    world: World
    trained: TrainedLayers
    quant: QuantRecipe | None  # the base's quantization; None: not quantized, in the compute dtype
    quantized_layers: int
    footprint: int  # bytes of the frozen base
    streamed: int  # bytes of the base that stay in host memory
    data: Sequence[SetSummary]  # one for each data set
    sizes: Sequence[tuple[int, int]]  # width and height in pixels of every bucket
    mean_batch: float  # samples of a micro-batch over all processes, in the mean
    attention: AttentionChoice
    held_out: int  # validation images
    texts: int  # different captions and prompts that were encoded
    text_bytes: int  # of their encodings in the cache


def opening_lines(opening: Opening) -> list[tuple[str, str]]:
    """Returns a label and a text for each setting that decides the result, including defaults."""
    recipe, family, trained = opening.recipe, opening.family, opening.trained
    dtype = recipe.quant.compute_dtype
    if opening.quant is None:
        base = f"not quantized, {dtype}"
    else:
        base = f"{opening.quant.describe()}; {opening.quantized_layers} layers, computed in {dtype}"
    where = (
        f", of which {memory_size(opening.streamed)} is streamed from host memory" if opening.streamed else ""
    )
    objective = recipe.objective
    tokens = sorted(
        {family.image_tokens(h // family.vae_scale, w // family.vae_scale) for w, h in opening.sizes}
    )
    train, world = recipe.train, opening.world
    step = opening.mean_batch * train.grad_accumulation
    samples = f"{step:g}" if isinstance(train.batch_size, int) else f"about {step:.1f}"
    return [
        ("model", f"{family.describe_source()} ({recipe.model.family})"),
        ("base", f"{base}; {memory_size(opening.footprint)}{where}"),
        (
            "trains",
            f"{_adapter_kind(recipe)} rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g} on {trained.layers} of"
            f" {trained.total_layers} linear layers: {trained.parameters:,} parameters in fp32",
        ),
        *data_rows(opening.data),
        ("captions", _captions(opening)),
        ("validation", _validation_plan(recipe, opening.held_out)),
        ("attention", f"{opening.attention.backend}: {opening.attention.reason}"),
        ("blocks", _blocks(recipe, opening.quant)),
        ("launches", _launches(recipe, world)),
        ("timesteps", objective.timesteps.describe()),
        ("shift", f"{objective.shift.describe()}; {_shift_note(opening, tokens)}"),
        ("weighting", f"{objective.weighting.describe()}; loss {objective.loss.describe()}"),
        ("guidance", family.describe_guidance(objective.guidance_scale)),
        ("optimizer", f"{recipe.optimizer.describe()}; schedule {recipe.lr_schedule.describe()}"),
        ("weights", f"{_evaluated_weights(recipe)}, in validation, samples and exports"),
        (
            "run",
            f"{train.steps} steps of {samples} samples ({train.batch_size} x {train.grad_accumulation} micro-batches"
            f" x {_processes(world)}), about"
            f" {train.steps * step / sum(one.uses for one in opening.data):.1f} {_passes(opening.data)}, seed"
            f" {train.seed}",
        ),
    ]


def data_rows(sets: Sequence[SetSummary]) -> list[tuple[str, str]]:
    """Returns a row for each data set."""
    if len(sets) == 1:
        return [("data", f"{_images(sets[0])}, {_sizes(sets[0])}")]
    rows = []
    for number, one in enumerate(sets, start=1):
        settings = one.settings
        times = f" x {settings.repeats:g}" if settings.weight is None else ""
        kind = "" if settings.kind == "train" else f", {settings.kind}"
        weight = "" if settings.loss_weight == 1 else f", loss weight {settings.loss_weight:g}"
        rows.append(
            (
                f"data {number}",
                f"{settings.path.name}{kind}: {_images(one)}{times}, {one.share:.0%} of the samples{weight},"
                f" {_sizes(one)}",
            )
        )
    return rows


def _images(one: SetSummary) -> str:
    references = f", {one.references} reference images" if one.references else ""
    return f"{one.images} images, {one.views} views{references}"


def _sizes(one: SetSummary) -> str:
    by_resolution = []
    for resolution, sizes in one.sizes.items():
        prefix = f"{resolution} px: " if len(one.sizes) > 1 else ""
        by_resolution.append(prefix + ", ".join(f"{w}x{h}" for w, h in sizes))
    text = f"sizes {'; '.join(by_resolution)}; cropping removes {one.cropped:.0%}, {one.enlarged} enlarged"
    return f"{text}; left out: {one.left_out}" if one.left_out else text


def _captions(opening: Opening) -> str:
    """Describes how many captions are cached, and how those of each set vary."""
    text = f"{opening.texts} different texts with prompts, {file_size(opening.text_bytes)} in the cache"
    sets = [one.settings for one in opening.data]
    for number, given in enumerate(sets, start=1):
        if given.varies_tags:
            where = f" in data {number}" if len(sets) > 1 else ""
            shuffled = "shuffled" if given.shuffle_tags else "in place"
            text += f"; tags{where} {shuffled}, {given.keep_tags} kept, {given.tag_dropout:.0%} dropped"
    return text


def _passes(sets: Sequence[SetSummary]) -> str:
    """Names the epochs: passes over the images, unless some images count more often than others."""
    samples = sum(one.uses for one in sets)
    if samples == sum(one.images for one in sets):
        return "passes over the images"
    return f"epochs of {samples} samples"


def _blocks(recipe: Recipe, quant: QuantRecipe | None) -> str:
    """Describes how the blocks run, and the checkpointing mode that really applies."""
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
        return f"each block as one function; checkpointing {asked}"
    kept = asked if asked in ("none", "full") else f"full, because {asked} needs fused blocks"
    return f"layer by layer ({', '.join(reasons)}); checkpointing {kept}"


def _launches(recipe: Recipe, world: World) -> str:
    """Describes how a step's kernels are launched."""
    if not recipe.train.cuda_graphs:
        return "kernel by kernel (train.cuda_graphs: false)"
    if world.device.type != "cuda":
        return f"operation by operation: train.cuda_graphs has no effect on {world.device.type}"
    return "as CUDA graphs, recorded at the first step of each size"


def _adapter_kind(recipe: Recipe) -> str:
    lora = recipe.lora
    kind = ("rs" if lora.rslora else "") + ("DoRA" if lora.dora else "LoRA")
    patterns = {**lora.rank_pattern, **lora.alpha_pattern}
    return f"{kind} (other rank or alpha for {', '.join(patterns)})" if patterns else kind


def _evaluated_weights(recipe: Recipe) -> str:
    """Describes the weights that validation, sample images and exports use."""
    if recipe.ema.decay is not None:
        return f"the moving average of the adapter, decay {recipe.ema.decay:g} per step"
    return "the optimizer's average of the weights" if recipe.optimizer.averages else "the trained weights"


def _validation_plan(recipe: Recipe, held_out: int) -> str:
    """Describes what validation measures, and when."""
    if not held_out:
        return "none: no images are held out (set validation.path or validation.held_out)"
    every = recipe.validation.every
    levels = ", ".join(f"{sigma:g}" for sigma in recipe.validation.sigmas)
    when = f"every {every} steps, and before and after training" if every else "before and after training"
    return f"{held_out} held-out images, at sigma {levels}, {when}"


def _shift_note(opening: Opening, tokens: Sequence[int]) -> str:
    """Describes the shift's effect on sigma 0.5 at the run's image sizes, and the model's own shift."""
    middle = torch.tensor([0.5], dtype=torch.float64)
    extremes = sorted({tokens[0], tokens[-1]})
    moved = ", ".join(
        f"{float(opening.recipe.objective.shift.apply(middle, count)):.3f} at {count} image tokens"
        for count in extremes
    )
    scheduler = opening.family.scheduler_config
    if scheduler.get("use_dynamic_shifting"):
        own = "dynamic by resolution"
    else:
        own = f"static {scheduler.get('shift', 1.0):g}"
    return f"sigma 0.5 becomes {moved} (the model's own sampler: {own})"


def _processes(world: World) -> str:
    return (
        f"1 process on {world.device.type}"
        if world.size == 1
        else f"{world.size} processes on {world.device.type}"
    )
