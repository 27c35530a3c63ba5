"""The changes that reduce a recipe's memory: the settings of each change, and its cost."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from halfbyte.trainer.optim.optimizers import AdamW, AdamW8Bit, OptimizerChoice, Prodigy, ScheduleFreeAdamW
from halfbyte.trainer.plan.planner import Planner
from halfbyte.trainer.recipe.data_section import as_resolutions
from halfbyte.trainer.recipe.fields import SIDE_STEP
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.sizes import memory_size

_LEAST_RANK = 4
_RESOLUTIONS = (1024, 768, 512)
_KEEPING = ("none", "selective", "full", "offload")
_SLICE = 11  # as prodigyopt's authors recommend


@dataclass(frozen=True)
class Setting:
    """A field of the recipe and its new value."""

    section: str
    field: str | None  # None: the whole section
    value: Any
    written: str | None = None  # the command-line form, if it is not section.field=value

    @property
    def text(self) -> str:
        """The setting in the form that the command line takes."""
        value = list(self.value) if isinstance(self.value, tuple) else self.value
        formatted = (
            str(value).lower() if isinstance(value, bool) else f"{value:g}" if _is_number(value) else value
        )
        return self.written or f"{self.section}.{self.field}={formatted}"

    def applied(self, recipe: Recipe) -> Recipe:
        """Returns a copy of the recipe with this setting, without validating it."""
        value = self.value
        if self.field is not None:
            value = getattr(recipe, self.section).model_copy(update={self.field: value})
        return recipe.model_copy(update={self.section: value})

    def is_in(self, recipe: Recipe) -> bool:
        """Returns True if the recipe has this value."""
        section = getattr(recipe, self.section)
        # The field may not exist: each optimizer has its own fields.
        current = section if self.field is None else getattr(section, self.field, None)
        return bool(current == self.value)


@dataclass(frozen=True)
class RecipeChange:
    """Settings that together reduce memory, and the cost of changing them."""

    made: Sequence[Setting]
    cost: str | Callable[[Recipe], str]  # a function of the changed recipe, if the cost depends on it

    @property
    def settings(self) -> list[str]:
        """The settings in the form that the command line takes."""
        return [setting.text for setting in self.made]

    def cost_in(self, recipe: Recipe) -> str:
        """Returns the cost in `recipe`, which has this change and perhaps others."""
        return self.cost if isinstance(self.cost, str) else self.cost(recipe)

    def applied(self, recipe: Recipe) -> Recipe:
        """Returns a copy of the recipe with this change, without validating it."""
        for setting in self.made:
            recipe = setting.applied(recipe)
        return recipe


def changes(planner: Planner, recipe: Recipe, phase: str) -> Iterator[RecipeChange]:
    """Yields the changes that may shrink a phase of the recipe's plan, cheapest first.

    phase: the name of the phase. Every change gives a valid recipe.
    """
    rules: Sequence[Callable[[Planner, Recipe], Iterator[RecipeChange]]] = _STEP
    if phase == "encode texts":
        rules = (_texts,)
    elif phase == "encode pictures":
        rules = (_resolution,)
    elif phase == "sample":
        rules = (_graphs, _drawings, *_STEP)
    for rule in rules:
        for change in rule(planner, recipe):
            if is_accepted(change.applied(recipe)):
                yield change


def is_accepted(recipe: Recipe) -> bool:
    """Returns True if a changed recipe is valid, so that no settings contradict each other."""
    try:
        Recipe.model_validate(recipe.model_dump())
    except ValidationError:
        return False
    return True


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _fused(_: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    for field in ("fused_adapters", "fused_blocks"):
        if not getattr(recipe.train, field):
            yield RecipeChange([Setting("train", field, True)], "the same result up to rounding, and faster")


def _optimizer(_: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    optimizer = recipe.optimizer
    if type(optimizer) is AdamW:
        settings = optimizer.model_dump(exclude={"name"})
        smaller = AdamW8Bit(name="adamw_8bit", **settings)
        setting = Setting("optimizer", None, smaller, "optimizer.name=adamw_8bit")
        yield RecipeChange([setting], "8-bit optimizer state, at the same speed")
    elif isinstance(optimizer, Prodigy):
        if optimizer.slice_p < _SLICE:
            cost = f"the learning rate is estimated from every {_SLICE}th value only"
            yield RecipeChange([Setting("optimizer", "slice_p", _SLICE)], cost)
        yield _plain_adamw(optimizer, "no learning-rate estimate: set optimizer.lr yourself")
    elif isinstance(optimizer, ScheduleFreeAdamW):
        yield _plain_adamw(optimizer, "no weight averaging: set lr_schedule or ema yourself")


def _plain_adamw(optimizer: OptimizerChoice, cost: str) -> RecipeChange:
    """Returns the change to 8-bit AdamW with its default learning rate.

    The other optimizer's rate is not copied: Prodigy's scales an estimate, and schedule-free AdamW's is
    usually 1 to 10 times higher.
    """
    kept = optimizer.model_dump(include={"weight_decay", "betas", "eps"})
    smaller = AdamW8Bit(name="adamw_8bit", **kept)
    default = AdamW8Bit(name="adamw_8bit")
    fields = {"name": smaller.name, "lr": smaller.lr}
    fields |= {name: value for name, value in kept.items() if value != getattr(default, name)}
    written = ", ".join(
        f"{name}: {list(value) if isinstance(value, tuple) else value}" for name, value in fields.items()
    )
    return RecipeChange([Setting("optimizer", None, smaller, f"optimizer={{{written}}}")], cost)


def _batch(planner: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    size, times = recipe.train.batch_size, recipe.train.grad_accumulation
    if not isinstance(size, int):
        largest = planner.largest_batch(recipe)
        if largest.samples > 1:
            fewer = dict(size) | {largest.resolution: largest.samples // 2}
            cost = f"fewer images per step at {largest.resolution} px"
            yield RecipeChange([Setting("train", "batch_size", fewer)], cost)
    elif size > 1:
        smaller = size // 2 if size % 2 == 0 else 1
        parts = [
            Setting("train", "batch_size", smaller),
            Setting("train", "grad_accumulation", times * (size // smaller)),
        ]
        yield RecipeChange(parts, "the same images per step, in more micro-batches")


def _checkpointing(planner: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    """Yields the checkpointing modes that keep less than the current one.

    Without fused blocks, selective and offload behave like full, and are not offered.
    """
    kept = {name: Setting("train", "gradient_checkpointing", name) for name in _KEEPING}
    full = kept["full"].applied(recipe)
    # A recipe with CUDA graphs does not accept offload; `_graphs` turns the graphs off first.
    within = [name for name in _KEEPING if is_accepted(kept[name].applied(recipe))]
    now = _KEEPING.index(recipe.train.gradient_checkpointing)
    before = kept[planner.recipe.train.gradient_checkpointing]

    def arithmetic(changed: Recipe) -> str:
        more = planner.step(changed).flops / planner.step(before.applied(changed)).flops - 1
        return f"{100 * more:.0f} % more computation"

    def memory(changed: Recipe) -> str:
        # The host holds the activations of one micro-batch at a time.
        return f"{memory_size(planner.step(changed).host)} of host memory, and copies during the step"

    for name in within:
        if _KEEPING.index(name) <= now:
            continue
        smaller = kept[name].applied(recipe)
        if name != "full" and planner.training_bytes(smaller) == planner.training_bytes(full):
            continue
        yield RecipeChange([kept[name]], memory if name == "offload" else arithmetic)


def _graphs(_: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    if recipe.train.cuda_graphs:
        cost = "kernels are launched one by one: slower if the device waits for the CPU"
        yield RecipeChange([Setting("train", "cuda_graphs", False)], cost)


def _dora(_: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    if recipe.lora.dora:
        cost = "plain LoRA: faster, but further from full fine-tuning at low ranks"
        yield RecipeChange([Setting("lora", "dora", False)], cost)


def _base(_: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    if recipe.quant.type in ("none", "int8"):
        cost = "4-bit quantization error in the base's weights; halfbyte quant-report measures it"
        yield RecipeChange([Setting("quant", "type", "nf4")], cost)


def _streaming(planner: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    """Yields block streaming, which keeps the packed blocks in host memory.

    Offloaded activations then go back to full checkpointing, to save host memory.
    """
    if recipe.train.stream_blocks:
        return
    settings = [Setting("train", "stream_blocks", True)]
    if recipe.train.gradient_checkpointing == "offload":
        settings.append(Setting("train", "gradient_checkpointing", "full"))
    streamed = RecipeChange(settings, "").applied(recipe)
    if not is_accepted(streamed) or not planner.dry_run(recipe).streams:
        return

    def copies(changed: Recipe) -> str:
        visitors = planner.dry_run(changed).visitors
        copied = visitors.copied * changed.train.grad_accumulation
        return (
            f"{memory_size(visitors.host_bytes)} of page-locked host memory, {memory_size(copied)} copied from it per"
            " step"
        )

    yield RecipeChange(settings, copies)


def _rank(planner: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    rank = recipe.lora.rank
    if rank >= 2 * _LEAST_RANK:
        alpha = recipe.lora.alpha / rank * (rank // 2)
        cost = f"adapter rank {rank // 2} instead of {planner.recipe.lora.rank}: less capacity"
        yield RecipeChange(
            [Setting("lora", "rank", rank // 2), Setting("lora", "alpha", alpha)],
            cost,
        )


def _resolution(planner: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    multiple, data = planner.family.size_multiple, recipe.data
    if any(given.resolution is not None for given in data.sets):
        return  # lowering data.resolution would not change these sets
    present = as_resolutions(data.resolution)
    for resolution in _RESOLUTIONS:
        if resolution < present[-1] and resolution % multiple == 0:
            lower = tuple(dict.fromkeys(min(side, resolution) for side in present))
            parts = [Setting("data", "resolution", lower if len(lower) > 1 else lower[0])]
            batch = recipe.train.batch_size
            if not isinstance(batch, int):
                kept = {side: batch[side] if side in batch else batch[present[-1]] for side in lower}
                parts.append(Setting("train", "batch_size", kept))
            yield RecipeChange(parts, "training images have less detail")
            return


def _texts(_: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    quant, streamed = recipe.model.text_encoder_quant, recipe.model.stream_text_encoder
    if quant == "none":
        yield RecipeChange(
            [Setting("model", "text_encoder_quant", "int8")], "1 % error in the text embeddings"
        )
    elif not streamed:
        cost = "T5's blocks stay in page-locked host memory and are copied to the device for each caption"
        yield RecipeChange([Setting("model", "stream_text_encoder", True)], cost)
    if quant in ("auto", "int8"):
        yield RecipeChange(
            [Setting("model", "text_encoder_quant", "nf4")], "ten times the embedding error of int8"
        )


def _drawings(_: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    """Yields a smaller size for the sample images, with the same proportions."""
    sample = recipe.sample
    longest = max(sample.width, sample.height)
    for side in _RESOLUTIONS:
        if side < longest:
            sides = {"width": sample.width, "height": sample.height}
            yield RecipeChange(
                [
                    Setting("sample", name, max(now * side // longest // SIDE_STEP, 1) * SIDE_STEP)
                    for name, now in sides.items()
                ],
                "smaller sample images",
            )
            return


_STEP = (
    _fused,
    _optimizer,
    _batch,
    _checkpointing,
    _graphs,
    _streaming,
    _dora,
    _base,
    _rank,
    _resolution,
)
