"""What can be changed in a recipe that is to take less: each change with its settings and what it gives up."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from halfbyte.trainer.optim.optimizers import AdamW, AdamW8Bit, OptimizerChoice, Prodigy, ScheduleFreeAdamW
from halfbyte.trainer.plan.planner import Planner
from halfbyte.trainer.recipe.fields import SIDE_STEP
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.sizes import GIB

_LEAST_RANK = 4
_RESOLUTIONS = (1024, 768, 512)
_KEEPING = ("none", "selective", "full", "offload")
_SLICE = 11  # as prodigyopt's authors recommend


@dataclass(frozen=True)
class Setting:
    """A field of the recipe and its value."""

    section: str
    field: str | None  # None: the section as a whole
    value: Any
    written: str | None = None  # for the command line, where that is not section.field=value

    @property
    def text(self) -> str:
        """As the command line takes it."""
        value = self.value
        shown = (
            str(value).lower() if isinstance(value, bool) else f"{value:g}" if _is_number(value) else value
        )
        return self.written or f"{self.section}.{self.field}={shown}"

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe with it. Nothing is validated."""
        value = self.value
        if self.field is not None:
            value = getattr(recipe, self.section).model_copy(update={self.field: value})
        return recipe.model_copy(update={self.section: value})

    def is_in(self, recipe: Recipe) -> bool:
        """Whether the recipe says so."""
        section = getattr(recipe, self.section)
        # Another optimizer may have no such field.
        held = section if self.field is None else getattr(section, self.field, None)
        return bool(held == self.value)


@dataclass(frozen=True)
class RecipeChange:
    """Settings that take less together, and what they give up."""

    made: Sequence[Setting]
    cost: str | Callable[[Recipe], str]  # told of the recipe that has the change, where that decides it

    @property
    def settings(self) -> list[str]:
        """As the command line takes them."""
        return [setting.text for setting in self.made]

    def cost_in(self, recipe: Recipe) -> str:
        """What it gives up in a recipe that has it, with whatever else is changed there."""
        return self.cost if isinstance(self.cost, str) else self.cost(recipe)

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe with it. Nothing is validated."""
        for setting in self.made:
            recipe = setting.applied(recipe)
        return recipe


def changes(planner: Planner, recipe: Recipe, phase: str) -> Iterator[RecipeChange]:
    """What may make a phase of the recipe's plan smaller, the cheapest first; all are accepted by the recipe."""
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
    """Whether none of a changed recipe's settings contradict each other."""
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
            yield RecipeChange([Setting("train", field, True)], "the same up to rounding, and faster")


def _optimizer(_: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    optimizer = recipe.optimizer
    if type(optimizer) is AdamW:
        settings = optimizer.model_dump(exclude={"name"})
        smaller = AdamW8Bit(name="adamw_8bit", **settings)
        setting = Setting("optimizer", None, smaller, "optimizer.name=adamw_8bit")
        yield RecipeChange([setting], "the optimizer's state in 8 bits, no slower")
    elif isinstance(optimizer, Prodigy):
        if optimizer.slice_p < _SLICE:
            cost = f"the rate estimated from every {_SLICE}th number alone"
            yield RecipeChange([Setting("optimizer", "slice_p", _SLICE)], cost)
        yield _plain_adamw(optimizer, "the rate is no longer estimated: optimizer.lr is yours to choose")
    elif isinstance(optimizer, ScheduleFreeAdamW):
        yield _plain_adamw(optimizer, "no average of the weights: lr_schedule is yours to choose, or ema")


def _plain_adamw(optimizer: OptimizerChoice, cost: str) -> RecipeChange:
    """AdamW with 8-bit state, at its own usual rate: that of the others means something else."""
    kept = optimizer.model_dump(include={"weight_decay", "betas", "eps"})
    smaller = AdamW8Bit(name="adamw_8bit", **kept)
    default = AdamW8Bit(name="adamw_8bit")
    fields = {"name": smaller.name, "lr": smaller.lr}
    fields |= {name: value for name, value in kept.items() if value != getattr(default, name)}
    written = ", ".join(
        f"{name}: {list(value) if isinstance(value, tuple) else value}" for name, value in fields.items()
    )
    return RecipeChange([Setting("optimizer", None, smaller, f"optimizer={{{written}}}")], cost)


def _batch(_: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    size, times = recipe.train.batch_size, recipe.train.grad_accumulation
    if size > 1:
        smaller = size // 2 if size % 2 == 0 else 1
        parts = [
            Setting("train", "batch_size", smaller),
            Setting("train", "grad_accumulation", times * (size // smaller)),
        ]
        yield RecipeChange(parts, "the same pictures a step, in more parts")


def _checkpointing(planner: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    """The next one that keeps less; layer by layer selective and offload are full, and not offered."""
    kept = {name: Setting("train", "gradient_checkpointing", name) for name in _KEEPING}
    full = kept["full"].applied(recipe)
    # Recorded steps exclude offload, whose graphs go first.
    within = [name for name in _KEEPING if is_accepted(kept[name].applied(recipe))]
    now = _KEEPING.index(recipe.train.gradient_checkpointing)
    before = kept[planner.recipe.train.gradient_checkpointing]

    def arithmetic(changed: Recipe) -> str:
        more = planner.step(changed).flops / planner.step(before.applied(changed)).flops - 1
        return f"{100 * more:.0f} % more arithmetic"

    def memory(changed: Recipe) -> str:
        # Those of one micro-batch are there at a time.
        return f"{planner.step(changed).host / GIB:.1f} GB of host memory, and copies beside the step"

    for name in within:
        if _KEEPING.index(name) <= now:
            continue
        smaller = kept[name].applied(recipe)
        if name != "full" and planner.training_bytes(smaller) == planner.training_bytes(full):
            continue
        yield RecipeChange([kept[name]], memory if name == "offload" else arithmetic)


def _graphs(_: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    if recipe.train.cuda_graphs:
        cost = "kernels launched one by one: slower where the device waits for the processor"
        yield RecipeChange([Setting("train", "cuda_graphs", False)], cost)


def _dora(_: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    if recipe.lora.dora:
        cost = "a plain LoRA, faster: further from full fine-tuning at low ranks"
        yield RecipeChange([Setting("lora", "dora", False)], cost)


def _base(_: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    if recipe.quant.type in ("none", "int8"):
        cost = "the error of 4 bits in the base's weights, which halfbyte quant-report measures"
        yield RecipeChange([Setting("quant", "type", "nf4")], cost)


def _streaming(planner: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    """Blocks in the host's memory; then activations need not be there as well."""
    if recipe.train.stream_blocks:
        return
    settings = [Setting("train", "stream_blocks", True)]
    if recipe.train.gradient_checkpointing == "offload":
        settings.append(Setting("train", "gradient_checkpointing", "full"))
    streamed = RecipeChange(settings, "").applied(recipe)
    if not is_accepted(streamed) or not planner.rehearsal(recipe).streams:
        return

    def copies(changed: Recipe) -> str:
        visitors = planner.rehearsal(changed).visitors
        copied = visitors.copied * changed.train.grad_accumulation
        return (
            f"{visitors.host_bytes / GIB:.1f} GB of page-locked host memory, {copied / GIB:.1f} GB copied from it a"
            " step"
        )

    yield RecipeChange(settings, copies)


def _rank(planner: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    rank = recipe.lora.rank
    if rank >= 2 * _LEAST_RANK:
        alpha = recipe.lora.alpha / rank * (rank // 2)
        cost = f"an adapter of rank {rank // 2} instead of {planner.recipe.lora.rank}, which holds less"
        yield RecipeChange(
            [Setting("lora", "rank", rank // 2), Setting("lora", "alpha", alpha)],
            cost,
        )


def _resolution(planner: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    multiple = planner.family.size_multiple
    for resolution in _RESOLUTIONS:
        if resolution < recipe.data.resolution and resolution % multiple == 0:
            cost = "pictures are learned with less detail"
            yield RecipeChange([Setting("data", "resolution", resolution)], cost)
            return


def _texts(_: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    held, streamed = recipe.model.text_encoder_quant, recipe.model.stream_text_encoder
    if held == "none":
        yield RecipeChange([Setting("model", "text_encoder_quant", "int8")], "embeddings 1 % off")
    elif not streamed:
        cost = "T5's blocks in page-locked host memory, copied to the device for each caption"
        yield RecipeChange([Setting("model", "stream_text_encoder", True)], cost)
    if held in ("auto", "int8"):
        yield RecipeChange(
            [Setting("model", "text_encoder_quant", "nf4")], "ten times int8's error in the embeddings"
        )


def _drawings(_: Planner, recipe: Recipe) -> Iterator[RecipeChange]:
    """Of the same proportions, so that the area falls."""
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
                "smaller sample pictures",
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
