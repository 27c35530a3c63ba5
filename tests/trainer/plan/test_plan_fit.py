"""`halfbyte plan --fit`: the settings it changes so that a recipe fits a card, and the settings it keeps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.plan.fit import (
    FittedRecipe,
    cheapest_savings,
    describe_card,
    fit_to_budget,
    open_planner,
    parse_budget,
)
from halfbyte.trainer.plan.output import fit_lines, plan_lines
from halfbyte.trainer.plan.phases import CONTEXT_BYTES
from halfbyte.trainer.plan.planner import Planner
from halfbyte.trainer.plan.published_configs import write_configurations
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.sizes import GIB, memory_size

from repository import RECIPES
from runs import write_recipe

FOLDER = RECIPES
FLUX = "black-forest-labs/FLUX.1-dev"
Opened = Callable[..., Planner]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_configurations(tmp_path_factory.mktemp("full_size") / "flux", FLUX)


@pytest.fixture(scope="module")
def planner(flux: Path) -> Planner:
    """A planner for FLUX.1-dev with recipes/flux_lora.yaml, without CUDA graphs; its dry run is shared by all
    tests."""
    settings = [f"model.path={flux}", "train.cuda_graphs=false"]
    return open_planner(load_recipe(FOLDER / "flux_lora.yaml", settings))


@pytest.fixture
def shallow(shallow_flux: Path) -> Opened:
    """Returns a function that plans a shallow FLUX with recipes/flux_lora.yaml and the given settings."""

    def planner_of(*settings: str) -> Planner:
        return open_planner(load_recipe(FOLDER / "flux_lora.yaml", [f"model.path={shallow_flux}", *settings]))

    return planner_of


@pytest.fixture
def toy(tmp_path: Path, mini_flux: Any) -> Path:
    return write_recipe(tmp_path, mini_flux)


def with_graphs(recipe: Recipe) -> Recipe:
    """Returns the recipe with CUDA graphs."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"cuda_graphs": True})})


def made(fitted: FittedRecipe) -> list[str]:
    """Returns the changed settings."""
    return [setting for change in fitted.changes for setting in change.settings]


def all_offered(toy: Path, *settings: str) -> list[str]:
    """Returns every setting that would shrink the toy model's step, cheapest first."""
    savings = cheapest_savings(open_planner(load_recipe(toy, settings)), count=99)
    return [setting for saving in savings for setting in saving.change.settings]


def test_the_cheapest_settings_that_fit_a_card_are_chosen(planner: Planner) -> None:
    fitted = fit_to_budget(planner, 8 * GIB)
    assert fitted.fits
    assert fitted.plan.largest.device_bytes <= 8 * GIB
    made = [change.settings[0] for change in fitted.changes]
    assert made == ["optimizer.name=adamw_8bit", "train.gradient_checkpointing=offload"]
    assert all(change.cost_in(fitted.recipe) for change in fitted.changes)
    first, *rest = fit_lines(fitted)
    assert first.startswith(f"fits {describe_card(8)}")
    assert len(rest) == len(fitted.changes)


def test_a_small_card_streams_blocks_instead_of_activations(planner: Planner) -> None:
    fitted = fit_to_budget(planner, 6 * GIB)
    assert fitted.fits
    made = [change.settings for change in fitted.changes]
    # Smaller optimizer state and offloading were tried first, were not enough, and were dropped again.
    assert made == [["train.stream_blocks=true"]]
    assert fitted.recipe.train.gradient_checkpointing == "full"
    # All of the base except embeddings and head; a step copies it twice, in the forward and the backward.
    step = fitted.plan.phase("step")
    assert step.host["packed blocks, page-locked"] / GIB == pytest.approx(5.69, abs=0.02)
    assert fitted.plan.step.copies / GIB == pytest.approx(10.9, abs=0.1)
    assert step.allocated / GIB < 4.5
    (line,) = [line for line in plan_lines(fitted.plan) if "packed blocks and activations" in line]
    assert memory_size(fitted.plan.step.copies) in line
    smaller = fit_to_budget(planner, 4 * GIB)
    assert smaller.fits
    assert smaller.recipe.model.stream_text_encoder
    # The parts of T5 that stay on the device: the embedding and two blocks.
    texts = smaller.plan.phase("encode texts")
    assert texts.device["text_encoder_2"] / GIB == pytest.approx(0.6, abs=0.05)
    assert texts.host["packed blocks, page-locked"] / GIB == pytest.approx(4.32, abs=0.02)


def test_graphs_are_turned_off_before_the_settings_that_exclude_them(planner: Planner, flux: Path) -> None:
    def made(budget: int) -> list[str]:
        other = open_planner(with_graphs(planner.recipe))
        other._dry_runs, other._steps = planner._dry_runs, planner._steps
        fitted = fit_to_budget(other, budget)
        assert fitted.fits
        # The command line accepts the same settings.
        settings = [setting for change in fitted.changes for setting in change.settings]
        load_recipe(
            FOLDER / "flux_lora.yaml", [f"model.path={flux}", *(s for s in settings if "optimizer" not in s)]
        )
        return [change.settings[0] for change in fitted.changes]

    assert made(12 * GIB) == []
    assert made(8 * GIB) == [
        "optimizer.name=adamw_8bit",
        "train.cuda_graphs=false",
        "train.gradient_checkpointing=offload",
    ]
    assert made(6 * GIB) == ["train.cuda_graphs=false", "train.stream_blocks=true"]


def test_sd3_text_encoders_fit_a_small_card_with_streamed_t5(tmp_path: Path) -> None:
    folder = write_configurations(tmp_path, "stabilityai/stable-diffusion-3.5-medium")
    fitted = fit_to_budget(
        open_planner(load_recipe(FOLDER / "sd3_lora.yaml", [f"model.path={folder}"])), 6 * GIB
    )
    assert fitted.fits
    assert [change.settings for change in fitted.changes] == [["model.stream_text_encoder=true"]]


def test_a_recipe_that_cannot_fit_names_the_nearest_card_that_is_enough(toy: Path) -> None:
    budget = CONTEXT_BYTES
    fitted = fit_to_budget(open_planner(load_recipe(toy)), budget)
    assert not fitted.fits
    text = "\n".join(fit_lines(fitted))
    assert text.startswith(f"does not fit {describe_card(budget / GIB)}")
    assert describe_card(4) in text


def test_a_recipe_that_fits_is_not_changed(planner: Planner) -> None:
    fitted = fit_to_budget(planner, 80 * GIB)
    assert fitted.recipe == planner.recipe
    (line,) = fit_lines(fitted)
    assert line.startswith(f"fits {describe_card(80)}")


def test_single_changes_save_the_memory_they_claim(toy: Path) -> None:
    planner = open_planner(load_recipe(toy, ["train.gradient_checkpointing=none"]))
    savings = cheapest_savings(planner)
    assert len(savings) == 3
    assert all(saving.saved > 0 for saving in savings)
    before = planner.training_bytes(planner.recipe)
    for saving in savings:
        assert before - planner.training_bytes(saving.change.applied(planner.recipe)) == saving.saved


def test_a_larger_batch_is_split_before_images_shrink(toy: Path) -> None:
    recipe = load_recipe(toy, ["train.batch_size=4", "optimizer={name: adafactor}"])
    change = cheapest_savings(open_planner(recipe))[0].change
    assert change.settings == ["train.batch_size=2", "train.grad_accumulation=4"]
    train = change.applied(recipe).train
    assert train.batch_size * train.grad_accumulation == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GB", 8 * GIB),
        ("8GiB", 8 * GIB),
        ("8 gib", 8 * GIB),
        ("8g", 8 * GIB),
        ("7.5 gb", int(7.5 * GIB)),
        ("24", None),
        ("0GB", None),
        ("8MB", None),
    ],
)
def test_budgets(text: str, expected: int | None) -> None:
    if expected is None:
        with pytest.raises(RecipeError, match=f"--fit: .*{text}"):
            parse_budget(text)
    else:
        assert parse_budget(text) == expected


def test_the_nearest_card_is_reported_with_its_changes(planner: Planner) -> None:
    fitted = fit_to_budget(planner, GIB)
    assert not fitted.fits
    # Everything was tried; each setting is listed once, with its last value.
    assert {"data.resolution=512", "train.gradient_checkpointing=offload"} <= set(made(fitted))
    names = [setting.partition("=")[0] for setting in made(fitted)]
    assert len(names) == len(set(names))
    assert fitted.nearest is not None
    assert fitted.nearest.fits
    assert fitted.nearest.budget == 4 * GIB
    assert made(fitted.nearest) == made(fit_to_budget(planner, 4 * GIB))
    assert not {"data", "lora"} & {setting.partition(".")[0] for setting in made(fitted.nearest)}
    lines = list(fit_lines(fitted))
    assert describe_card(4) in lines[0]
    assert len(lines) == 1 + len(fitted.nearest.changes)


def test_every_change_is_needed(planner: Planner) -> None:
    for card in (4, 6, 8):
        fitted = fit_to_budget(planner, card * GIB)
        for left_out in fitted.changes:
            recipe = planner.recipe
            for change in fitted.changes:
                recipe = recipe if change is left_out else change.applied(recipe)
            assert planner.plan(recipe).largest.device_bytes > card * GIB, (card, left_out.settings)


def test_no_dry_run_is_made_if_another_phase_does_not_fit(toy: Path) -> None:
    planner = open_planner(load_recipe(toy))
    assert not planner.fits(planner.recipe, CONTEXT_BYTES)
    assert not planner._steps
    assert planner.fits(planner.recipe, planner.plan().largest.device_bytes)
    assert not planner.fits(planner.recipe, planner.plan().largest.device_bytes - 1)


def test_a_base_in_full_precision_is_quantized_before_adapter_and_images_shrink(shallow: Opened) -> None:
    fitted = fit_to_budget(shallow("quant.type=none"), 5 * GIB)
    assert fitted.fits
    assert made(fitted) == ["quant.type=nf4"]
    assert "4-bit" in fitted.changes[0].cost_in(fitted.recipe)


def test_costs_are_those_of_the_recipe_that_fits(shallow: Opened) -> None:
    """Intermediate recipes may have another batch size, resolution or accumulation, and so other costs."""
    planner = shallow("train.cuda_graphs=false", "train.batch_size=2", "data.resolution=2048")
    fitted = fit_to_budget(planner, int(2.25 * GIB))
    assert fitted.fits
    assert {"train.gradient_checkpointing=offload", "data.resolution=1024"} <= set(made(fitted))
    text = "\n".join(fit_lines(fitted))
    step = fitted.plan.phase("step")
    assert f"({memory_size(step.host['activations put aside'])} of host memory" in text
    visitors = planner.dry_run(fitted.recipe).visitors
    copied = visitors.copied * fitted.recipe.train.grad_accumulation
    assert f"{memory_size(copied)} copied from it" in text


def test_dora_is_turned_off_before_the_adapter_shrinks(toy: Path) -> None:
    offered = all_offered(
        toy, "lora.dora=true", "optimizer={name: adamw_8bit}", "lora.rank=8", "lora.alpha=8"
    )
    assert offered.index("lora.dora=false") < offered.index("lora.rank=4")


@pytest.mark.parametrize("field", ["fused_blocks", "fused_adapters"])
def test_layers_and_blocks_are_fused_first(toy: Path, field: str) -> None:
    assert (
        all_offered(toy, f"train.{field}=false", "train.gradient_checkpointing=none")[0]
        == f"train.{field}=true"
    )


def test_selective_checkpointing_needs_fused_blocks(toy: Path) -> None:
    """Without fused blocks, selective and offload behave like full."""
    by_layer = all_offered(toy, "train.fused_blocks=false", "train.gradient_checkpointing=none")
    assert [s for s in by_layer if "checkpointing" in s] == ["train.gradient_checkpointing=full"]
    whole = all_offered(toy, "train.gradient_checkpointing=none")
    assert [s.partition("=")[2] for s in whole if "checkpointing" in s] == ["selective", "full", "offload"]


@pytest.mark.parametrize(
    ("optimizer", "offered"),
    [
        ("{name: prodigy}", ["optimizer.slice_p=11", "optimizer={name: adamw_8bit, lr: 0.0001}"]),
        (
            "{name: prodigy, slice_p: 11, weight_decay: 0, betas: [0.9, 0.99]}",
            ["optimizer={name: adamw_8bit, lr: 0.0001, weight_decay: 0.0, betas: [0.9, 0.99]}"],
        ),
        ("{name: schedule_free_adamw, lr: 0.01}", ["optimizer={name: adamw_8bit, lr: 0.0001}"]),
        ("{name: adamw, lr: 0.01, eps: 1.0e-6}", ["optimizer.name=adamw_8bit"]),
    ],
)
def test_every_optimizer_with_large_state_can_be_replaced(
    toy: Path, optimizer: str, offered: list[str]
) -> None:
    before = [f"optimizer={optimizer}"]
    planner = open_planner(load_recipe(toy, before))
    savings = cheapest_savings(planner, count=len(offered))
    assert [saving.change.settings for saving in savings] == [[setting] for setting in offered]
    # The command line gives the same recipe.
    for saving in savings:
        changed = load_recipe(toy, [*before, *saving.change.settings])
        assert changed.optimizer == saving.change.applied(planner.recipe).optimizer


def test_sample_images_shrink_in_proportion(toy: Path) -> None:
    planner = open_planner(load_recipe(toy, ["sample.width=1024", "sample.height=512"]))
    saving = cheapest_savings(planner, "sample", count=1)[0]
    assert saving.change.settings == ["sample.width=768", "sample.height=384"]
    small = open_planner(load_recipe(toy, ["sample.width=512", "sample.height=256"]))
    offered = [
        setting for saving in cheapest_savings(small, "sample", 9) for setting in saving.change.settings
    ]
    assert not any(setting.startswith("sample.") for setting in offered)
