"""A training run, from recipe to exported files: each stage needs only what the one before left."""

import logging
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from rich.console import Console
from torch import nn

from halfbyte.quant.convert import QuantizedLinear, QuantRecipe
from halfbyte.trainer import checkpoint
from halfbyte.trainer.adapters import TrainedLayers, add_lora, load_adapter_state
from halfbyte.trainer.callbacks import Checkpointer, Interruption, Recorder, Sampler
from halfbyte.trainer.errors import OutOfMemory, RecipeError
from halfbyte.trainer.export import export_adapter, export_base, is_quantized
from halfbyte.trainer.families.base import Family
from halfbyte.trainer.launch import World, barrier, join
from halfbyte.trainer.metrics import MetricsWriter, StepMetrics, read_metrics
from halfbyte.trainer.module import DiffusionModule, Objective
from halfbyte.trainer.prepare import Prepared, prepare
from halfbyte.trainer.progress import Progress, Shown
from halfbyte.trainer.recipe import Recipe
from halfbyte.trainer.registry import FAMILIES
from halfbyte.trainer.report import (
    Closing,
    Opening,
    closing_lines,
    opening_lines,
    write_lines,
    write_summary,
)
from halfbyte.trainer.run_folder import RunFolder, claim
from halfbyte.trainer.sampling import PictureSampler, SampleSettings

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PRECISION = {"bfloat16": "bf16-mixed", "float16": "16-mixed", "float32": "32-true"}


def run(recipe: Recipe, world: World, *, console: Console, resume: bool) -> bool:
    """Trains and exports; True when the run is finished, False when it was interrupted and can be resumed.

    Raises HalfbyteError for everything a user can mend, before anything in `output.dir` is touched.
    """
    started = time.perf_counter()
    folder = RunFolder(recipe.output.dir)
    claim(folder, recipe, resume=resume)
    _check_precision(recipe, world)
    model = recipe.model
    family = FAMILIES[model.family].open(model.path, model.revision, model.max_sequence_length)
    join(world)
    prepared = prepare(recipe, family, world, console)
    saved = _saved_state(folder, recipe, world) if resume else None
    first_step = saved.position.step if saved else 0

    loaded = _load(recipe, family, world, console)
    denoiser = loaded.denoiser
    barrier(world)  # no process may find the folder of another one's start
    write_lines(console, opening_lines(_opening(recipe, family, world, loaded, prepared)))
    sampler = PictureSampler(
        family,
        denoiser,
        prepared.prompts,
        prepared.empty,
        _sample_settings(recipe),
        folder=folder.samples,
        device=world.device,
        dtype=DTYPES[recipe.quant.compute_dtype],
    )
    if world.leads:
        folder.root.mkdir(parents=True, exist_ok=True)
        folder.recipe.write_text(recipe.to_yaml(), encoding="utf-8")
        if saved is None:
            sampler.draw(0)
    barrier(world)
    if saved is not None:
        load_adapter_state(denoiser, saved.adapter)
        console.print(f"resuming at step {first_step} from {saved.folder}", highlight=False)
    ready = time.perf_counter() - started
    console.print(f"ready after {ready:.1f} s", highlight=False)

    finished = _fit(recipe, family, world, prepared, denoiser, folder, saved, sampler, console)
    if not finished.done:
        console.print(
            f"stopped at step {finished.step} of {recipe.train.steps}; go on with --resume", highlight=False
        )
        return False
    if world.leads:
        _export(recipe, family, denoiser, folder, sampler, finished, console)
    barrier(world)
    return True


@dataclass(frozen=True)
class _Finished:
    done: bool
    step: int
    seconds: float


def _check_precision(recipe: Recipe, world: World) -> None:
    if recipe.quant.compute_dtype == "float16" and world.device.type == "cpu":
        raise RecipeError(
            "quant.compute_dtype: float16 needs a CUDA device, and this run is on the CPU; use bfloat16 or float32"
        )


def _saved_state(folder: RunFolder, recipe: Recipe, world: World) -> checkpoint.Checkpoint | None:
    saved = checkpoint.newest(folder.checkpoints)
    if saved is None:
        log.warning("--resume: %s has no whole checkpoint; starting at step 0", folder.root)
        return None
    wanted = recipe.train.batch_size * world.size
    if saved.position.global_batch != wanted:
        raise RecipeError(
            f"--resume: the run had {saved.position.global_batch} samples a micro-batch over all processes, this"
            f" start has {wanted}; start as many processes as before, or change train.batch_size to match"
        )
    if saved.position.step > recipe.train.steps:
        raise RecipeError(
            f"--resume: the run is at step {saved.position.step}, train.steps is {recipe.train.steps}; give more"
        )
    return saved


def quant_recipe(recipe: Recipe) -> QuantRecipe | None:
    """The recipe's quant section as the quant layer takes it; None leaves the base as it is."""
    if recipe.quant.type == "none":
        return None
    return QuantRecipe(
        quant_type=recipe.quant.type,
        double_quant=recipe.quant.double_quant,
        compute_dtype=DTYPES[recipe.quant.compute_dtype],
        skip=recipe.quant.skip,
        llm_int8_threshold=recipe.quant.llm_int8_threshold,
        scale_search=None if recipe.quant.scale_search == "none" else recipe.quant.scale_search,
    )


@dataclass(frozen=True)
class _Loaded:
    denoiser: nn.Module
    trained: TrainedLayers
    quantized_layers: int
    footprint: int


def _load(recipe: Recipe, family: Family, world: World, console: Console) -> _Loaded:
    loading = Shown(console, "loading the transformer", "tensor")
    denoiser = family.load_denoiser(
        quant_recipe(recipe),
        device=world.device,
        dtype=DTYPES[recipe.quant.compute_dtype],
        progress=loading,
    )
    loading.close()
    model: Any = denoiser
    footprint = int(model.get_memory_footprint())
    if recipe.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    targets = recipe.lora.targets
    trained = add_lora(
        denoiser,
        rank=recipe.lora.rank,
        alpha=recipe.lora.alpha,
        dropout=recipe.lora.dropout,
        targets=family.lora_targets(targets) if isinstance(targets, str) else list(targets),
        init=recipe.lora.init,
        seed=recipe.train.seed,
        fused=recipe.train.fused_adapters,
    )
    if recipe.train.fused_adapters:
        family.share_inputs(denoiser)
    quantized = sum(isinstance(module, QuantizedLinear) for module in denoiser.modules())
    return _Loaded(denoiser.eval(), trained, quantized, footprint)


def _opening(recipe: Recipe, family: Family, world: World, loaded: _Loaded, prepared: Prepared) -> Opening:
    return Opening(
        recipe,
        family,
        world,
        loaded.trained,
        quantized_layers=loaded.quantized_layers,
        footprint=loaded.footprint,
        pictures=len(prepared.samples),
        views=prepared.views,
        sizes=prepared.sizes,
    )


def _sample_settings(recipe: Recipe) -> SampleSettings:
    sample = recipe.sample
    return SampleSettings(sample.steps, sample.guidance_scale, sample.width, sample.height, sample.seed)


def _fit(
    recipe: Recipe,
    family: Family,
    world: World,
    prepared: Prepared,
    denoiser: nn.Module,
    folder: RunFolder,
    saved: checkpoint.Checkpoint | None,
    sampler: PictureSampler,
    console: Console,
) -> _Finished:
    train = recipe.train
    first_step = saved.position.step if saved else 0
    module = DiffusionModule(
        family,
        denoiser,
        Objective(
            recipe.objective.timesteps,
            recipe.objective.shift,
            recipe.objective.weighting,
            recipe.objective.loss,
            recipe.objective.guidance_scale,
        ),
        build_optimizer=recipe.optimizer.build,
        lr_factor=lambda step: recipe.lr_schedule.factor(step, train.steps),
        compute_dtype=DTYPES[recipe.quant.compute_dtype],
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        first_step=first_step,
    )
    writer = MetricsWriter(folder.root, first_step) if world.leads else None
    shown = Progress(console, "training", total=train.steps, done=first_step) if world.leads else None
    interruption = Interruption(world)
    global_batch = train.batch_size * world.size
    callbacks = [
        Recorder(
            world,
            writer,
            shown,
            samples_per_step=global_batch * train.grad_accumulation,
            every=recipe.output.log_every,
            last_step=train.steps,
        ),
        interruption,
        Checkpointer(
            world,
            folder.checkpoints,
            every=recipe.checkpoint.every,
            keep=recipe.checkpoint.keep,
            last_step=train.steps,
            global_batch=global_batch,
            resume=saved,
        ),
        Sampler(world, sampler.draw, every=recipe.sample.every, last_step=train.steps),
    ]
    trainer = Trainer(
        accelerator="cuda" if world.device.type == "cuda" else "cpu",
        devices=world.local_size if world.device.type == "cpu" or world.size > 1 else [world.device.index],
        num_nodes=world.nodes,
        strategy=_strategy(world),
        precision=_PRECISION[recipe.quant.compute_dtype],
        max_epochs=1,
        max_steps=train.steps - first_step,
        accumulate_grad_batches=train.grad_accumulation,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    began = time.perf_counter()
    try:
        if first_step < train.steps:
            with warnings.catch_warnings():
                # The cache is read faster than a worker process could hand it over.
                warnings.filterwarnings("ignore", message=".*does not have many workers.*")
                trainer.fit(module, prepared.loader(recipe, world, first_step * train.grad_accumulation))
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            "the device ran out of memory in training; the last checkpoint is whole. The cheapest changes:"
            " train.gradient_checkpointing=true, train.batch_size=1 (with train.grad_accumulation raised),"
            " data.resolution=768"
        ) from error
    finally:
        if shown is not None:
            shown.close()
        if writer is not None:
            writer.close()
    done = first_step >= train.steps or not interruption.stopped or module.step >= train.steps
    return _Finished(
        done, module.step if first_step < train.steps else first_step, time.perf_counter() - began
    )


def _strategy(world: World) -> Strategy:
    if world.size == 1:
        return SingleDeviceStrategy(device=world.device)
    return DDPStrategy(process_group_backend=world.backend, gradient_as_bucket_view=True)


def _export(
    recipe: Recipe,
    family: Family,
    denoiser: nn.Module,
    folder: RunFolder,
    sampler: PictureSampler,
    finished: _Finished,
    console: Console,
) -> None:
    denoiser.eval()
    sampler.draw(recipe.train.steps)
    pictures = sampler.compare(0, recipe.train.steps, folder.comparison)
    adapter = export_adapter(family, denoiser, folder.adapter)
    base = None
    if recipe.output.export_base and is_quantized(denoiser):
        console.print("exporting the quantized base", highlight=False)
        base = export_base(denoiser, folder.base)
    saved = checkpoint.folders(folder.checkpoints)
    rows = read_metrics(folder.root / "metrics.csv")
    first, last = _ends(rows)
    closing = Closing(
        steps=recipe.train.steps,
        seconds=finished.seconds,
        first_loss=first,
        last_loss=last,
        adapter=adapter,
        base=base,
        checkpoint=saved[-1] if saved else None,
        samples=pictures,
        metrics=folder.root / "metrics.csv",
    )
    write_summary(closing, folder.root / "summary.json")
    write_lines(console, closing_lines(closing))


def _ends(rows: list[StepMetrics]) -> tuple[float | None, float | None]:
    """Mean loss over the first and last tenth of the rows: single losses say little, sigma differs in each."""
    if not rows:
        return None, None
    tenth = max(1, len(rows) // 10)
    return (
        sum(row.loss for row in rows[:tenth]) / tenth,
        sum(row.loss for row in rows[-tenth:]) / tenth,
    )
