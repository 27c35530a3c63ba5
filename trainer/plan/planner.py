"""What a run will take, told before anything is loaded: device and host memory by phase, steps, time.

From configurations and shapes alone, on any machine; the step is rehearsed (`rehearsal`), the rest is counted.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch

from halfbyte.quant.files.digest import CHUNK_BYTES, READING_THREADS
from halfbyte.trainer.cuda_graphs.denoiser import MOST_SHAPES
from halfbyte.trainer.data.buckets import Size
from halfbyte.trainer.data.size_limits import refuse_large
from halfbyte.trainer.denoiser.settings import DTYPES
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.plan.dry_run import ADAPTERS, BLOCK_KEEPS, GRADIENTS, Rehearsal, RehearsedStep
from halfbyte.trainer.plan.encoder_memory import (
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
from halfbyte.trainer.recipe.recipe import Recipe


class Planner:
    """Plans of one recipe and of what it could be instead; what two have in common is rehearsed once."""

    def __init__(self, recipe: Recipe, family: Family, notes: Sequence[str] = ()) -> None:
        """`notes`: what there is to say of the family. Raises RecipeError for pictures that it cannot take."""
        refuse_large(recipe, family)
        self.recipe = recipe
        self.family = family
        self.notes = notes
        self._rehearsals: dict[object, Rehearsal] = {}
        self._steps: dict[object, RehearsedStep] = {}
        self._predictions: dict[object, RehearsedStep] = {}
        self._encoders: dict[object, Phase] = {}
        self._decoders: dict[object, tuple[int, int]] = {}

    @cached_property
    def pictures(self) -> PlannedPictures:
        """Those that are trained on and held out. Raises DataError, see `planned_pictures`."""
        return planned_pictures(self.recipe, self.family)

    def size(self, recipe: Recipe) -> Size:
        """The largest size that is trained at, at the recipe's resolution, in pixels."""
        return self._at_resolution(recipe, self.pictures.largest)

    def _at_resolution(self, recipe: Recipe, size: Size) -> Size:
        """A size of the planner's recipe at the resolution of another."""
        if recipe.data.resolution == self.recipe.data.resolution:
            return size
        return (recipe.data.resolution, recipe.data.resolution)

    def plan(self, recipe: Recipe | None = None) -> RunPlan:
        """The plan of the recipe, or of another that differs in what `plan_fit` changes."""
        recipe = recipe or self.recipe
        size = self.size(recipe)
        step = self.step(recipe)
        sampling = self._sample(recipe)
        *before, export = self._without_steps(recipe)
        phases = [*before, self._train(recipe, step), *([sampling[0]] if sampling else []), export]
        train = recipe.train
        drawings = 2 + (train.steps - 1) // recipe.sample.every if recipe.sample.every else 2
        return RunPlan(
            phases,
            size,
            steps=train.steps,
            pictures=self.pictures.count,
            seen=train.steps * train.batch_size * train.grad_accumulation,
            step=Work(
                step.flops * train.grad_accumulation,
                0 if train.cuda_graphs else step.calls * train.grad_accumulation,
                (self.rehearsal(recipe).visitors.copied + step.host) * train.grad_accumulation,
            ),
            draws=drawings * len(recipe.sample.prompts),
            drawing=sampling[1] if sampling else Work(),
            notes=(*self.notes, *self.pictures.notes),
        )

    def fits(self, recipe: Recipe, budget: int) -> bool:
        """Whether each phase of the recipe's plan takes `budget` bytes at most; no step is rehearsed needlessly."""
        known = max(phase.device_bytes for phase in self._without_steps(recipe))
        return known <= budget and self.plan(recipe).largest.device_bytes <= budget

    def _without_steps(self, recipe: Recipe) -> list[Phase]:
        """The phases that need no rehearsed step: those ahead of the training, and the export."""
        return [
            self._encode_texts(recipe),
            self._encode_pictures(self._largest_encoded(recipe)),
            self._load(recipe),
            self._export(recipe),
        ]

    def step(self, recipe: Recipe) -> RehearsedStep:
        """One micro-batch of the recipe at its largest size."""
        if recipe.train.cuda_graphs and not self._more_than_recorded(recipe):
            # Recorded it finds no gradients, and the peak of the one that does is below what the recording adds to it.
            recipe = _without_accumulation(recipe)
        train, size = recipe.train, self.size(recipe)
        key = (
            *self._layers(recipe),
            train.gradient_checkpointing,
            train.batch_size,
            train.grad_accumulation == 1,
            size,
        )
        if key not in self._steps:
            self._steps[key] = self.rehearsal(recipe).step(recipe, *size)
        return self._steps[key]

    def _prediction(self, recipe: Recipe, batch_size: int, size: Size) -> RehearsedStep:
        """A forward alone."""
        key = (*self._layers(recipe), batch_size, size)
        if key not in self._predictions:
            self._predictions[key] = self.rehearsal(recipe).prediction(batch_size, *size)
        return self._predictions[key]

    def _largest_encoded(self, recipe: Recipe) -> Size:
        sizes = {self.pictures.largest}
        if recipe.validation.wanted:
            sizes.add(self.pictures.largest_held_out)
        return self._at_resolution(recipe, largest_size(sizes))

    def rehearsal(self, recipe: Recipe) -> Rehearsal:
        """The recipe's layers on meta. Raises RecipeError where they are none of the model's."""
        key = self._layers(recipe)
        if key not in self._rehearsals:
            self._rehearsals[key] = Rehearsal(recipe, self.family)
        return self._rehearsals[key]

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
        """Bytes that tensors take at the peak of a training step: what most changes are about."""
        return self._train(recipe, self.step(recipe)).allocated

    def _kept(self, recipe: Recipe) -> dict[str, int]:
        """What stays on the device throughout the training."""
        rehearsal = self.rehearsal(recipe)
        held = rehearsal.held
        optimizer = recipe.optimizer.memory(rehearsal.shapes)
        parts = {**held, f"optimizer state ({recipe.optimizer.name})": optimizer.state}
        if recipe.ema.decay is not None:
            parts["ema"] = held[ADAPTERS]
        return {**parts, "cuBLAS workspace": PRODUCTS_BYTES}

    def _recorded(self, recipe: Recipe) -> dict[str, int]:
        """What CUDA graphs hold from the second step to the last."""
        if not recipe.train.cuda_graphs:
            return {}
        within = self.step(_without_accumulation(recipe)).peak.by_kind
        memory = sum(within.get(kind, 0) for kind in (BLOCK_KEEPS, WORKING, INSIDE, GRADIENTS))
        memory += min(memory, RECORDED_GAPS)
        # cuBLAS has a workspace for the stream of the recording too.
        return {RECORDED: memory + PRODUCTS_BYTES, GATHERED: self.rehearsal(recipe).held[ADAPTERS]}

    def _train(self, recipe: Recipe, step: RehearsedStep) -> Phase:
        kept, recorded = self._kept(recipe), self._recorded(recipe)
        optimizer = recipe.optimizer.memory(self.rehearsal(recipe).shapes)
        held = {**kept, **recorded, GRADIENTS: kept[ADAPTERS]}
        moments: list[Mapping[str, int]] = [{**held, "within the optimizer": optimizer.working}]
        # All sizes run once ahead of the first recording; those beyond the most run beside what is recorded.
        beside = recorded if self._more_than_recorded(recipe) else {}
        moments.append({**kept, **beside, **step.peak.by_kind})
        if recorded and recipe.train.grad_accumulation > 1:
            moments.append({**held, GRADIENTS: 2 * kept[ADAPTERS]})
        if recipe.validation.wanted:
            # Before the first step and behind the last at least, when the last one's gradients are there.
            measured = self._at_resolution(recipe, self.pictures.largest_held_out)
            moments.append({**held, **_working(self._prediction(recipe, recipe.train.batch_size, measured))})
        largest = max(moments, key=lambda parts: sum(parts.values()))
        return Phase("step", largest, {"activations put aside": step.host, **self._on_host_from_then(recipe)})

    def _more_than_recorded(self, recipe: Recipe) -> bool:
        """Whether pictures come in more sizes than CUDA graphs are kept of."""
        return recipe.data.aspect_buckets and len(self.pictures.sizes) > MOST_SHAPES

    def _on_host(self, recipe: Recipe) -> dict[str, int]:
        """What stays in the host's memory from loading to the end."""
        return {"packed blocks, page-locked": self.rehearsal(recipe).visitors.host_bytes}

    def _on_host_from_then(self, recipe: Recipe) -> dict[str, int]:
        """The same from the first step on."""
        return {**self._on_host(recipe), "libraries and compiled kernels": STARTED_BYTES}

    def _encode_texts(self, recipe: Recipe) -> Phase:
        model = recipe.model
        key = (model.text_encoder_quant, model.stream_text_encoder)
        if key not in self._encoders:
            parts, on_host = text_encoder_bytes(self.family, *key)
            host = {"read ahead": READING_BYTES, "packed blocks, page-locked": on_host}
            device = parts | {WORKING: text_working_bytes(self.family)}
            self._encoders[key] = Phase("encode texts", device, host)
        return self._encoders[key]

    def _encode_pictures(self, size: Size) -> Phase:
        if size not in self._encoders:
            weights, working = picture_encoder_bytes(self.family, *size)
            parts = {"vae (fp32)": weights, WORKING: working}
            self._encoders[size] = Phase("encode pictures", parts, {"vae (fp32)": weights})
        return self._encoders[size]

    def _load(self, recipe: Recipe) -> Phase:
        rehearsal = self.rehearsal(recipe)
        held = {kind: nbytes for kind, nbytes in rehearsal.held.items() if kind != ADAPTERS}
        # The largest weight as it is stored, its copy in the compute dtype, and the next ones under way.
        arriving = 3 * rehearsal.largest_weight * 2 + _READ_AHEAD
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
            # The last step's, until the next one is in its backward.
            GRADIENTS: kept[ADAPTERS] if sample.every else 0,
            "weights that train, put aside": kept[ADAPTERS] if self._averages(recipe) else 0,
            "vae": weights,
            WORKING: max(decoding, predicting),
        }
        copies = self.rehearsal(recipe).visitors.host_bytes
        work = Work(drawn.flops * sample.steps, drawn.calls * sample.steps, copies * sample.steps)
        return Phase("sample", parts, self._on_host_from_then(recipe)), work

    def _decoder(self, dtype: torch.dtype, width: int, height: int) -> tuple[int, int]:
        key = (dtype, width, height)
        if key not in self._decoders:
            self._decoders[key] = decoder_bytes(self.family, *key)
        return self._decoders[key]

    def _guided(self, recipe: Recipe) -> int:
        """How many predictions a sampling step takes: two with classifier-free guidance."""
        nothing = torch.empty(0, device="meta")
        text = TextEmbedding(nothing, nothing)
        free = "negative_prompt_embeds" in self.family.sampling_inputs(text, text)
        return 2 if free and recipe.sample.guidance_scale > 1 else 1

    @staticmethod
    def _averages(recipe: Recipe) -> bool:
        return recipe.ema.decay is not None or recipe.optimizer.averages

    def _export(self, recipe: Recipe) -> Phase:
        kept = self._kept(recipe)
        held = self.rehearsal(recipe).held
        base = sum(nbytes for kind, nbytes in held.items() if kind != ADAPTERS)
        # The adapter as it is written and as it is read back; a shard of the base at a time.
        host = {ADAPTERS: 2 * held[ADAPTERS], **self._on_host_from_then(recipe)}
        if recipe.output.export_base and recipe.quant.type != "none":
            host["a shard of the base"] = min(base, _SHARD)
        return Phase("export", kept, host)


def _without_accumulation(recipe: Recipe) -> Recipe:
    train = recipe.train.model_copy(update={"grad_accumulation": 1})
    return recipe.model_copy(update={"train": train})


def _working(step: RehearsedStep) -> dict[str, int]:
    """What a step without a backward takes for as long as it computes."""
    return {kind: step.peak.by_kind.get(kind, 0) for kind in (WORKING, INSIDE)}


_READ_AHEAD = 2 * READING_THREADS * CHUNK_BYTES
_SHARD = 5 * 10**9
