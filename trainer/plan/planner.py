"""Predicts a run before anything is loaded: device and host memory by phase, steps and time.

Needs only configurations and shapes, and works on any machine. The training step comes from a dry run
(`dry_run`); everything else is computed from shapes.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch

from halfbyte.quant.files.digest import CHUNK_BYTES, READING_THREADS
from halfbyte.trainer.cuda_graphs.denoiser import MOST_SHAPES
from halfbyte.trainer.data.size_limits import refuse_large
from halfbyte.trainer.data.views.buckets import Size
from halfbyte.trainer.denoiser.settings import DTYPES
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.plan.batches import PlannedBatch, planned_batches
from halfbyte.trainer.plan.dry_run import ADAPTERS, BLOCK_KEEPS, GRADIENTS, DryRun, DryRunStep
from halfbyte.trainer.plan.encoder_memory import (
    auto_in_bf16,
    decoder_bytes,
    picture_encoder_bytes,
    text_encoder_bytes,
    text_working_bytes,
)
from halfbyte.trainer.plan.memory_tracker import INSIDE, WORKING
from halfbyte.trainer.plan.phases import (
    GATHERED,
    PRODUCTS_BYTES,
    READING_BYTES,
    RECORDED,
    RECORDED_GAPS,
    STARTED_BYTES,
    Phase,
    RunPlan,
    Work,
)
from halfbyte.trainer.plan.pictures import PlannedPictures, largest_size, planned_pictures
from halfbyte.trainer.recipe.batch_sizes import batch_at
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.sizes import memory_size


class Planner:
    """Plans a recipe and its variants; variants that share a dry run reuse its result."""

    def __init__(self, recipe: Recipe, family: Family, notes: Sequence[str] = ()) -> None:
        """Checks the image sizes; `notes` are lines about the family that every plan repeats.

        Raises:
            RecipeError: the model cannot take the recipe's image size.
        """
        refuse_large(recipe, family)
        self.recipe = recipe
        self.family = family
        self.notes = notes
        self._dry_runs: dict[object, DryRun] = {}
        self._steps: dict[object, DryRunStep] = {}
        self._predictions: dict[object, DryRunStep] = {}
        self._encoders: dict[object, Phase] = {}
        self._decoders: dict[object, tuple[int, int]] = {}

    @cached_property
    def pictures(self) -> PlannedPictures:
        """The training and validation images. Raises DataError, see `planned_pictures`."""
        return planned_pictures(self.recipe, self.family)

    def size(self, recipe: Recipe) -> Size:
        """Returns the largest size of a training image at the recipe's resolution, in pixels."""
        return self._at_resolution(recipe, self.pictures.largest)

    def _at_resolution(self, recipe: Recipe, size: Size) -> Size:
        """Returns `size` of the planner's recipe, or the square of `recipe`'s resolution if that differs."""
        side = recipe.data.largest_resolution
        return size if side == self.recipe.data.largest_resolution else (side, side)

    def batches(self, recipe: Recipe) -> list[PlannedBatch]:
        """Returns the micro-batches of a recipe, one for each resolution that occurs, the smallest first."""
        return planned_batches(recipe, self.recipe, self.pictures)

    def plan(self, recipe: Recipe | None = None) -> RunPlan:
        """Returns the plan of the planner's recipe, or of a variant with settings that `changes` may change."""
        recipe = recipe or self.recipe
        size = self.size(recipe)
        step = self.step(recipe)
        sampling = self._sample(recipe)
        *before, export = self._without_steps(recipe)
        phases = [*before, self._train(recipe, step), *([sampling[0]] if sampling else []), export]
        train = recipe.train
        drawings = 2 + (train.steps - 1) // recipe.sample.every if recipe.sample.every else 2
        batches = self.batches(recipe)
        samples = sum(one.share * one.samples for one in batches)  # of a micro-batch, in the mean
        return RunPlan(
            phases,
            size,
            steps=train.steps,
            pictures=self.pictures.count,
            epoch=self.pictures.epoch,
            seen=round(train.steps * samples * train.grad_accumulation),
            step=self._mean_work(recipe, batches),
            draws=drawings * len(recipe.sample.prompts),
            drawing=sampling[1] if sampling else Work(),
            texts=self.pictures.texts,
            notes=(*self.notes, *self.pictures.notes, *self._batch_notes(recipe), *self._notes(recipe)),
        )

    def _mean_work(self, recipe: Recipe, batches: Sequence[PlannedBatch]) -> Work:
        """Returns the work of an optimizer step, in the mean over the micro-batches."""
        train = recipe.train
        steps = [(one.share * train.grad_accumulation, self._step(recipe, one)) for one in batches]
        copied = self.dry_run(recipe).visitors.copied
        return Work(
            round(sum(share * step.flops for share, step in steps)),
            0 if train.cuda_graphs else round(sum(share * step.calls for share, step in steps)),
            round(sum(share * (copied + step.host) for share, step in steps)),
        )

    def _batch_notes(self, recipe: Recipe) -> list[str]:
        if isinstance(recipe.train.batch_size, int):
            return []
        largest = self.largest_batch(recipe)
        return [
            f"a step takes most memory at {largest.resolution} px, with {largest.samples} images per micro-batch"
        ]

    def _notes(self, recipe: Recipe) -> Iterator[str]:
        """Yields what the run does differently where more memory is free than the plan asks for."""
        model = recipe.model
        free = auto_in_bf16(self.family, model.text_encoder_quant, model.stream_text_encoder)
        if free is not None:
            yield (
                f"model.text_encoder_quant: T5 is planned in int8; auto loads it in bf16 where {memory_size(free)} of"
                " device memory are free"
            )

    def fits(self, recipe: Recipe, budget: int) -> bool:
        """Returns True if every phase of the recipe's plan fits `budget` bytes.

        Checks the phases without a dry run first, because a dry run takes longest.
        """
        without_steps = max(phase.device_bytes for phase in self._without_steps(recipe))
        return without_steps <= budget and self.plan(recipe).largest.device_bytes <= budget

    def _without_steps(self, recipe: Recipe) -> list[Phase]:
        """Returns the phases that need no dry run: the three before training, and the export as the last."""
        return [
            self._encode_texts(recipe),
            self._encode_pictures(recipe, self._largest_encoded(recipe)),
            self._load(recipe),
            self._export(recipe),
        ]

    def step(self, recipe: Recipe) -> DryRunStep:
        """Returns the dry run of the micro-batch that takes most memory, at its largest image size."""
        return self._step(recipe, self.largest_batch(recipe))

    def largest_batch(self, recipe: Recipe) -> PlannedBatch:
        """Returns the micro-batch that takes most memory."""
        batches = self.batches(recipe)
        # A batch with no more images of no more pixels than another's is not the largest: it needs no dry run.
        candidates = [one for one in batches if not any(one.is_within(other) for other in batches)]
        if len(candidates) == 1:
            return candidates[0]
        return max(candidates, key=lambda one: self._step(recipe, one).peak.nbytes)

    def _step(self, recipe: Recipe, batch: PlannedBatch) -> DryRunStep:
        if recipe.train.cuda_graphs and not self._more_than_recorded(recipe):
            # A recorded step starts without gradients. The eager step that does find accumulated gradients
            # peaks below the memory that recording adds, so it never decides the phase's peak.
            recipe = _without_accumulation(recipe)
        train = recipe.train
        key = (
            *self._layers(recipe),
            train.gradient_checkpointing,
            batch.samples,
            train.grad_accumulation == 1,
            batch.size,
        )
        if key not in self._steps:
            train = train.model_copy(update={"batch_size": batch.samples})
            of_one_size = recipe.model_copy(update={"train": train})
            self._steps[key] = self.dry_run(recipe).step(of_one_size, *batch.size)
        return self._steps[key]

    def _prediction(self, recipe: Recipe, batch_size: int, size: Size) -> DryRunStep:
        """Returns the dry run of a forward without a backward."""
        key = (*self._layers(recipe), batch_size, size)
        if key not in self._predictions:
            self._predictions[key] = self.dry_run(recipe).prediction(batch_size, *size)
        return self._predictions[key]

    def _measured(self, recipe: Recipe) -> list[DryRunStep]:
        """Returns the dry runs of validation, one for each batch size, at its largest image."""
        batch, sizes = recipe.train.batch_size, self.pictures.held_out_sizes
        if isinstance(batch, int) or recipe.data.resolutions != self.recipe.data.resolutions:
            most = max(one.samples for one in self.batches(recipe))
            return [
                self._prediction(recipe, most, self._at_resolution(recipe, self.pictures.largest_held_out))
            ]
        return [
            self._prediction(recipe, batch_at(batch, side), largest_size(own)) for side, own in sizes.items()
        ]

    def _largest_encoded(self, recipe: Recipe) -> Size:
        sizes = {self.pictures.largest}
        if recipe.validation.wanted:
            sizes.add(self.pictures.largest_held_out)
        return self._at_resolution(recipe, largest_size(sizes))

    def dry_run(self, recipe: Recipe) -> DryRun:
        """Returns the recipe's layers on meta. Raises RecipeError, see `DryRun`."""
        key = self._layers(recipe)
        if key not in self._dry_runs:
            self._dry_runs[key] = DryRun(recipe, self.family)
        return self._dry_runs[key]

    @staticmethod
    def _layers(recipe: Recipe) -> tuple[object, ...]:
        return (
            recipe.quant,
            recipe.lora.model_dump_json(),
            recipe.train.fused_adapters,
            recipe.train.fused_blocks,
            recipe.train.stream_blocks,
        )

    def training_bytes(self, recipe: Recipe) -> int:
        """Returns the bytes of all tensors at the peak of a training step, which most changes reduce."""
        return self._train(recipe, self.step(recipe)).allocated

    def _kept(self, recipe: Recipe) -> dict[str, int]:
        """Returns the memory that stays on the device for all of training, by kind."""
        dry_run = self.dry_run(recipe)
        held = dry_run.held
        optimizer = recipe.optimizer.memory(dry_run.shapes)
        parts = {**held, f"optimizer state ({recipe.optimizer.name})": optimizer.state}
        if recipe.ema.decay is not None:
            parts["ema"] = held[ADAPTERS]
        return {**parts, "cuBLAS workspace": PRODUCTS_BYTES}

    def _recorded(self, recipe: Recipe) -> dict[str, int]:
        """Returns the memory that CUDA graphs hold from the second step to the last, by kind."""
        if not recipe.train.cuda_graphs:
            return {}
        within = self.step(_without_accumulation(recipe)).peak.by_kind
        memory = sum(within.get(kind, 0) for kind in (BLOCK_KEEPS, WORKING, INSIDE, GRADIENTS))
        memory += min(memory, RECORDED_GAPS)
        # cuBLAS has another workspace for the stream that the graphs are recorded on.
        return {RECORDED: memory + PRODUCTS_BYTES, GATHERED: self.dry_run(recipe).held[ADAPTERS]}

    def _train(self, recipe: Recipe, step: DryRunStep) -> Phase:
        kept, recorded = self._kept(recipe), self._recorded(recipe)
        optimizer = recipe.optimizer.memory(self.dry_run(recipe).shapes)
        held = {**kept, **recorded, GRADIENTS: kept[ADAPTERS]}
        moments: list[Mapping[str, int]] = [{**held, "within the optimizer": optimizer.working}]
        # Every image size runs once eagerly before the first recording. With more sizes than graphs are kept
        # for, the rest go on running eagerly, on top of the recorded graphs' memory.
        graphs = recorded if self._more_than_recorded(recipe) else {}
        moments.append({**kept, **graphs, **step.peak.by_kind})
        if recorded and recipe.train.grad_accumulation > 1:
            moments.append({**held, GRADIENTS: 2 * kept[ADAPTERS]})
        if recipe.validation.wanted:
            # Validation runs at least before the first and after the last step; the last step's gradients
            # still exist.
            moments += [{**held, **_working(measured)} for measured in self._measured(recipe)]
        largest = max(moments, key=lambda parts: sum(parts.values()))
        on_host = {"activations put aside": step.host, **self._while_training(recipe)}
        return Phase("step", largest, on_host)

    def _more_than_recorded(self, recipe: Recipe) -> bool:
        """Returns True if there are more image and batch sizes than CUDA graphs are kept for."""
        by_resolution = not isinstance(recipe.train.batch_size, int)
        sizes = self.pictures.sizes.items()
        return (
            len({(side if by_resolution else 0, size) for side, own in sizes for size in own}) > MOST_SHAPES
        )

    def _on_host(self, recipe: Recipe) -> dict[str, int]:
        """Returns the host memory that stays in use from loading to the end of the run."""
        return {"packed blocks, page-locked": self.dry_run(recipe).visitors.host_bytes}

    def _on_host_from_then(self, recipe: Recipe) -> dict[str, int]:
        """Returns the host memory that stays in use from the first step to the end of the run."""
        return {**self._on_host(recipe), "libraries and compiled kernels": STARTED_BYTES}

    def _while_training(self, recipe: Recipe) -> dict[str, int]:
        """Returns the host memory that stays in use from the first step to the last."""
        dry_run = self.dry_run(recipe)
        weights = dry_run.held[ADAPTERS] * (2 if self._averages(recipe) else 1)
        copies = weights + recipe.optimizer.memory(dry_run.shapes).state
        return {"checkpoint's copy, page-locked": copies, **self._on_host_from_then(recipe)}

    def _encode_texts(self, recipe: Recipe) -> Phase:
        model = recipe.model
        key = (model.text_encoder_quant, model.stream_text_encoder)
        if key not in self._encoders:
            parts, on_host = text_encoder_bytes(self.family, *key)
            host = {"read ahead": READING_BYTES, "packed blocks, page-locked": on_host}
            device = parts | {WORKING: text_working_bytes(self.family)}
            self._encoders[key] = Phase("encode texts", device, host)
        return self._encoders[key]

    def _encode_pictures(self, recipe: Recipe, size: Size) -> Phase:
        dtype = DTYPES[recipe.model.vae_dtype]
        key = (dtype, size)
        if key not in self._encoders:
            weights, working = picture_encoder_bytes(self.family, dtype, *size)
            vae = "vae (fp32)" if dtype == torch.float32 else "vae (bf16)"
            self._encoders[key] = Phase("encode pictures", {vae: weights, WORKING: working}, {vae: weights})
        return self._encoders[key]

    def _load(self, recipe: Recipe) -> Phase:
        dry_run = self.dry_run(recipe)
        held = {kind: nbytes for kind, nbytes in dry_run.held.items() if kind != ADAPTERS}
        # Three copies of the largest weight, of 2 bytes per element: as stored, in the compute dtype, and the
        # next weight that arrives meanwhile; and the chunks that are read ahead.
        arriving = 3 * dry_run.largest_weight * 2 + _READ_AHEAD
        host = {"read ahead": READING_BYTES, **self._on_host(recipe)}
        return Phase("load and quantize", {**held, "weights on their way": arriving}, host)

    def _sample(self, recipe: Recipe) -> tuple[Phase, Work] | None:
        sample = recipe.sample
        if not sample.prompts:
            return None
        drawn = self._prediction(recipe, self._guided(recipe), (sample.width, sample.height))
        weights, decoding = self._decoder(DTYPES[recipe.quant.compute_dtype], sample.width, sample.height)
        predicting = sum(_working(drawn).values())
        kept = self._kept(recipe)
        parts = {
            **kept,
            **(self._recorded(recipe) if sample.every else {}),
            # The last step's gradients exist until the next step's backward.
            GRADIENTS: kept[ADAPTERS] if sample.every else 0,
            "weights that train, put aside": kept[ADAPTERS] if self._averages(recipe) else 0,
            "vae": weights,
            WORKING: max(decoding, predicting),
        }
        copies = self.dry_run(recipe).visitors.host_bytes
        work = Work(drawn.flops * sample.steps, drawn.calls * sample.steps, copies * sample.steps)
        on_host = self._while_training(recipe) if sample.every else self._on_host_from_then(recipe)
        return Phase("sample", parts, on_host), work

    def _decoder(self, dtype: torch.dtype, width: int, height: int) -> tuple[int, int]:
        key = (dtype, width, height)
        if key not in self._decoders:
            self._decoders[key] = decoder_bytes(self.family, *key)
        return self._decoders[key]

    def _guided(self, recipe: Recipe) -> int:
        """Returns the number of predictions in a sampling step: two with classifier-free guidance, else one."""
        nothing = torch.empty(0, device="meta")
        text = TextEmbedding(nothing, nothing)
        free = "negative_prompt_embeds" in self.family.sampling_inputs(text, text)
        return 2 if free and recipe.sample.guidance_scale > 1 else 1

    @staticmethod
    def _averages(recipe: Recipe) -> bool:
        return recipe.ema.decay is not None or recipe.optimizer.averages

    def _export(self, recipe: Recipe) -> Phase:
        kept = self._kept(recipe)
        held = self.dry_run(recipe).held
        base = sum(nbytes for kind, nbytes in held.items() if kind != ADAPTERS)
        # The adapter twice, once as it is written and once as it is read back; the base is written shard by
        # shard.
        host = {ADAPTERS: 2 * held[ADAPTERS], **self._on_host_from_then(recipe)}
        if recipe.output.export_base and recipe.quant.type != "none":
            host["a shard of the base"] = min(base, _SHARD)
        return Phase("export", kept, host)


def _without_accumulation(recipe: Recipe) -> Recipe:
    train = recipe.train.model_copy(update={"grad_accumulation": 1})
    return recipe.model_copy(update={"train": train})


def _working(step: DryRunStep) -> dict[str, int]:
    """Returns the memory that a forward uses only while it computes, by kind."""
    return {kind: step.peak.by_kind.get(kind, 0) for kind in (WORKING, INSIDE)}


_READ_AHEAD = 2 * READING_THREADS * CHUNK_BYTES  # bytes; two chunks per reading thread are in flight
_SHARD = 5 * 10**9  # bytes of a file
