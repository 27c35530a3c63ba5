"""Settings that make a run fit a card: one change after the other, the cheapest first, each with what it costs."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.optimizers import AdamW, AdamW8Bit
from halfbyte.trainer.recipe import Recipe
from halfbyte.trainer.recipe_fields import Section
from halfbyte.trainer.registry import FAMILIES
from halfbyte.trainer.run_plan import GIB, Planner, RunPlan
from halfbyte.trainer.source import resolve_configurations

_CARDS = (4, 6, 8, 10, 12, 16, 24, 32, 40, 48, 80, 96, 141)  # GB
_LEAST_RANK = 4
_RESOLUTIONS = (1024, 768, 512)
_KEEPING = ("none", "selective", "full", "offload")


@dataclass(frozen=True)
class Change:
    """A recipe that takes less, and what it gives up."""

    settings: Sequence[str]  # as the command line takes them
    cost: str
    recipe: Recipe
    instead_of: str | None = None  # a setting of an earlier change, which this one takes back


@dataclass(frozen=True)
class Fit:
    """What became of a recipe that was to fit."""

    recipe: Recipe
    plan: RunPlan
    changes: Sequence[Change]
    fits: bool


@dataclass(frozen=True)
class Saving:
    """A single change of a recipe, and the bytes that a step takes less by it."""

    change: Change
    saved: int


def parse_budget(text: str) -> int:
    """`8GB` as bytes: GB as cards are named, 2**30 bytes. Raises RecipeError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:gb|gib|g)\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise RecipeError(f"--fit: got {text!r}, expected a card's memory such as 8GB")
    return int(float(found[1]) * GIB)


def smallest_card(plan: RunPlan) -> str:
    """The smallest usual card that the plan fits, as `12 GB`."""
    needed = plan.largest.device_bytes
    return next((f"{card} GB" for card in _CARDS if card * GIB >= needed), f"{needed / GIB:.0f} GB")


def fit(planner: Planner, budget: int) -> Fit:
    """Changes the planner's recipe until every phase fits `budget` bytes, or nothing is left to change."""
    recipe, made = planner.recipe, list[Change]()
    plan = planner.plan(recipe)
    while plan.largest.device_bytes > budget:
        change = next(_changes(planner, recipe, plan.largest.name), None)
        if change is None:
            return Fit(recipe, plan, made, fits=False)
        made = [earlier for earlier in made if change.instead_of not in earlier.settings]
        made.append(change)
        recipe = change.recipe
        plan = planner.plan(recipe)
    return Fit(recipe, plan, made, fits=True)


def cheapest_savings(planner: Planner, phase: str = "step", count: int = 3) -> list[Saving]:
    """The cheapest single changes of the recipe that make a phase of its plan smaller."""

    def taken(recipe: Recipe) -> int:
        return (
            planner.training_bytes(recipe) if phase == "step" else planner.plan(recipe).phase(phase).allocated
        )

    recipe = planner.recipe
    before = taken(recipe)
    found: list[Saving] = []
    for change in _changes(planner, recipe, phase):
        saved = before - taken(change.recipe)
        if saved > 0:
            found.append(Saving(change, saved))
        if len(found) == count:
            break
    return found


def _changes(planner: Planner, recipe: Recipe, phase: str) -> Iterator[Change]:
    """What would make a phase smaller, the cheapest first."""
    if phase == "encode texts":
        yield from _text_changes(recipe)
    elif phase == "sample":
        yield from _graphs(planner, recipe)
        yield from _sample_changes(recipe)
    if phase == "encode pictures":
        yield from _resolution(planner, recipe)
    elif phase != "encode texts":
        yield from _step_changes(planner, recipe)


def _step_changes(planner: Planner, recipe: Recipe) -> Iterator[Change]:
    rules: tuple[Callable[[Planner, Recipe], Iterator[Change]], ...] = (
        _optimizer,
        _batch,
        _checkpointing,
        _graphs,
        _streaming,
        _rank,
        _resolution,
    )
    for rule in rules:
        yield from rule(planner, recipe)


def _with(recipe: Recipe, section: str, **fields: object) -> Recipe:
    changed: Section = getattr(recipe, section).model_copy(update=fields)
    return recipe.model_copy(update={section: changed})


def _optimizer(_: Planner, recipe: Recipe) -> Iterator[Change]:
    if type(recipe.optimizer) is AdamW:
        settings = recipe.optimizer.model_dump(exclude={"name"})
        smaller = recipe.model_copy(update={"optimizer": AdamW8Bit(name="adamw_8bit", **settings)})
        yield Change(["optimizer.name=adamw_8bit"], "the optimizer's state in 8 bits, no slower", smaller)


def _batch(_: Planner, recipe: Recipe) -> Iterator[Change]:
    size, times = recipe.train.batch_size, recipe.train.grad_accumulation
    if size > 1:
        smaller = size // 2 if size % 2 == 0 else 1
        times *= size // smaller
        yield Change(
            [f"train.batch_size={smaller}", f"train.grad_accumulation={times}"],
            "the same pictures a step, in more parts",
            _with(recipe, "train", batch_size=smaller, grad_accumulation=times),
        )


def _checkpointing(planner: Planner, recipe: Recipe) -> Iterator[Change]:
    """The next one that keeps less."""
    now = _KEEPING.index(recipe.train.gradient_checkpointing)
    flops = planner.step(recipe).flops
    bytes_now = planner.training_bytes(recipe)
    for name in _KEEPING[now + 1 :]:
        if name == "offload" and recipe.train.cuda_graphs:
            continue  # those go first
        smaller = _with(recipe, "train", gradient_checkpointing=name)
        step = planner.step(smaller)
        if planner.training_bytes(smaller) >= bytes_now:
            continue
        cost = f"{100 * (step.flops / flops - 1):.0f} % more arithmetic"
        if name == "offload":
            cost = f"{step.host / GIB:.1f} GB of host memory, and copies beside the step"
        yield Change([f"train.gradient_checkpointing={name}"], cost, smaller)


def _graphs(_: Planner, recipe: Recipe) -> Iterator[Change]:
    if recipe.train.cuda_graphs:
        yield Change(
            ["train.cuda_graphs=false"],
            "kernels launched one by one: slower where the device waits for the processor",
            _with(recipe, "train", cuda_graphs=False),
        )


def _streaming(planner: Planner, recipe: Recipe) -> Iterator[Change]:
    """Blocks in the host's memory; then activations need not be there as well."""
    if recipe.train.cuda_graphs or recipe.train.stream_blocks:
        return
    if recipe.quant.type == "none" or recipe.lora.dora:
        return
    settings, changed = ["train.stream_blocks=true"], dict[str, object](stream_blocks=True)
    if recipe.train.gradient_checkpointing == "offload":
        settings.append("train.gradient_checkpointing=full")
        changed["gradient_checkpointing"] = "full"
    smaller = _with(recipe, "train", **changed)
    visitors = planner.rehearsal(smaller).visitors
    copied = visitors.copied * recipe.train.grad_accumulation
    yield Change(
        settings,
        f"{visitors.host_bytes / GIB:.1f} GB of page-locked host memory, {copied / GIB:.1f} GB copied from it a step",
        smaller,
        instead_of="train.gradient_checkpointing=offload",
    )


def _rank(_: Planner, recipe: Recipe) -> Iterator[Change]:
    rank = recipe.lora.rank
    if rank >= 2 * _LEAST_RANK:
        alpha = recipe.lora.alpha / rank * (rank // 2)
        yield Change(
            [f"lora.rank={rank // 2}", f"lora.alpha={alpha:g}"],
            "an adapter that holds half as much",
            _with(recipe, "lora", rank=rank // 2, alpha=alpha),
        )


def _resolution(planner: Planner, recipe: Recipe) -> Iterator[Change]:
    multiple = planner.family.size_multiple
    for resolution in _RESOLUTIONS:
        if resolution < recipe.data.resolution and resolution % multiple == 0:
            yield Change(
                [f"data.resolution={resolution}"],
                "pictures are learned with less detail",
                _with(recipe, "data", resolution=resolution),
            )
            return


def _text_changes(recipe: Recipe) -> Iterator[Change]:
    held, streamed = recipe.model.text_encoder_quant, recipe.model.stream_text_encoder
    if held == "none":
        yield _text_change(recipe, "text_encoder_quant", "int8", "embeddings 1 % off")
    elif not streamed:
        cost = "T5's blocks in page-locked host memory, copied to the device for each caption"
        yield _text_change(recipe, "stream_text_encoder", True, cost)
    if held in ("auto", "int8") and not streamed:
        yield _text_change(recipe, "text_encoder_quant", "nf4", "ten times int8's error in the embeddings")


def _text_change(recipe: Recipe, field: str, value: object, cost: str) -> Change:
    written = str(value).lower()
    return Change([f"model.{field}={written}"], cost, _with(recipe, "model", **{field: value}))


def _sample_changes(recipe: Recipe) -> Iterator[Change]:
    sample = recipe.sample
    for side in _RESOLUTIONS:
        if side < max(sample.width, sample.height):
            yield Change(
                [f"sample.width={side}", f"sample.height={side}"],
                "smaller sample pictures",
                _with(recipe, "sample", width=side, height=side),
            )
            return


def open_planner(recipe: Recipe) -> Planner:
    """The planner of a recipe. Raises RecipeError or HubError, see `source.resolve_configurations`."""
    model, family_class = recipe.model, FAMILIES[recipe.model.family]
    source = resolve_configurations(
        model.path, model.revision, family_class.components(), family_class.denoiser_class.__name__
    )
    family = family_class(source, model.max_sequence_length)
    if model.transformer is not None:
        family.take_transformer(model.transformer)
    return Planner(recipe, family)
