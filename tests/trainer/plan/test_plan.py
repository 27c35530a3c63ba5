"""`halfbyte plan`: its numbers and its text, and refusals."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.load.on_meta import model_on_meta
from halfbyte.trainer.cli.app import app, train_app
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.errors import DataError, RecipeError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.sd3.family import SD3
from halfbyte.trainer.plan import advice as full_device
from halfbyte.trainer.plan.fit import CARDS, describe_card, fit_to_budget, open_planner
from halfbyte.trainer.plan.output import fit_lines, plan_lines
from halfbyte.trainer.plan.phases import (
    BUS_RATE,
    CONTEXT_BYTES,
    GATHERED,
    MEASURED_RATE,
    PRODUCTS_BYTES,
    RECORDED,
    RECORDED_GAPS,
    SECONDS_A_CALL,
    Phase,
)
from halfbyte.trainer.plan.planner import Planner
from halfbyte.trainer.plan.published_configs import write_configurations
from halfbyte.trainer.quantize.run import quantize
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.sizes import GIB
from halfbyte.trainer.runtime.world import read_world

from repository import RECIPES
from runs import PICTURES, run_here, write_recipe

FOLDER = RECIPES
FLUX = "black-forest-labs/FLUX.1-dev"


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_configurations(tmp_path_factory.mktemp("full_size") / "flux", FLUX)


@pytest.fixture(scope="module")
def planner(flux: Path) -> Planner:
    """A planner for FLUX.1-dev with recipes/flux_lora.yaml, without CUDA graphs; its dry run is shared by all
    tests."""
    settings = [f"model.path={flux}", "train.cuda_graphs=false"]
    return open_planner(load_recipe(FOLDER / "flux_lora.yaml", settings))


def with_graphs(recipe: Recipe) -> Recipe:
    """Returns the recipe with CUDA graphs."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"cuda_graphs": True})})


@pytest.fixture
def toy(tmp_path: Path, mini_flux: Any) -> Path:
    return write_recipe(tmp_path, mini_flux)


def test_a_quantized_base_is_planned_in_its_stored_format(toy: Path, tmp_path: Path) -> None:
    def packed(*overrides: str) -> dict[str, int]:
        return open_planner(load_recipe(toy, overrides)).plan().phase("step").device

    quiet = Console(quiet=True)
    as_int8 = load_recipe(toy, ["quant.type=int8"])
    quantize(as_int8, tmp_path / "int8", 0, read_world({"ACCELERATE_USE_CPU": "true"}), quiet)
    assert packed(f"model.transformer={tmp_path / 'int8'}") == packed("quant.type=int8")
    assert packed(f"model.transformer={tmp_path / 'int8'}") != packed()
    with pytest.raises(RecipeError, match=r"model\.transformer"):
        packed(f"model.transformer={tmp_path}")


@pytest.mark.parametrize(("family_class", "fixture"), [(Flux, "mini_flux"), (SD3, "mini_sd3")])
def test_the_model_on_meta_has_the_tensors_of_the_loaded_one(
    family_class: type[Family], fixture: str, request: pytest.FixtureRequest
) -> None:
    """Buffers count too: SD3's position table is one, and has 0.4 GB in bf16 for SD3.5 medium."""
    family = family_class.open(str(request.getfixturevalue(fixture)), None, 24)
    recipe = QuantRecipe(compute_dtype=torch.bfloat16)
    loaded = load_base(family, recipe, device=torch.device("cpu"), dtype=torch.bfloat16)
    on_meta = model_on_meta(family.denoiser_class, family.denoiser_config, recipe, torch.bfloat16)

    def sizes(model: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors}

    assert sizes(on_meta) == sizes(loaded)


def test_the_plan_of_flux_has_the_known_sizes_and_work(planner: Planner) -> None:
    plan = planner.plan()
    step = plan.phase("step")
    packed = sum(nbytes for part, nbytes in step.device.items() if part.startswith("packed"))
    # 11.9 billion parameters at 4.127 bits.
    assert packed / GIB == pytest.approx(5.72, abs=0.02)
    # 59.5 + 59.5 TFLOP in linear layers and 14.9 + 37.2 in attention (forward + backward), and most of the
    # forward again for checkpointing (FIELD.md, section 3).
    assert 171 < plan.step.flops / 1e12 < 171 + 59.5 + 14.9
    assert step.device["optimizer state (adamw)"] == pytest.approx(2 * step.device["adapters"], rel=0.01)
    # The blocks' inputs: 57 tensors of (4608, 3072) in bf16.
    assert step.device["kept for the backward"] == pytest.approx(57 * 4608 * 3072 * 2, rel=0.05)
    # T5-XXL in int8 with its embedding in bf16: 4.9 GB.
    texts = plan.phase("encode texts")
    assert texts.device["text_encoder_2"] / 1e9 == pytest.approx(4.9, abs=0.05)
    assert plan.largest is step
    assert step.device_bytes > step.allocated + CONTEXT_BYTES
    # Host memory measured in a start without any cache, including the process (docs/benchmarks/start.md).
    on_host = [plan.phase(name).host_bytes / 1e9 for name in ("encode texts", "load and quantize", "step")]
    # A checkpoint is written from a copy of the adapter and both moments; that start saved none.
    copies = step.host["checkpoint's copy, page-locked"]
    assert copies == pytest.approx(3 * step.device["adapters"], rel=0.01)
    on_host[2] -= copies / 1e9
    assert on_host == pytest.approx([2.1, 2.1, 2.8], rel=0.06)
    assert plan.pictures == 20
    assert plan.seen == planner.recipe.train.steps


def test_the_text_of_a_plan_has_its_parts(planner: Planner) -> None:
    text = "\n".join(plan_lines(planner.plan()))
    for part in ("encode texts", "packed: attention", "optimizer state (adamw)", "estimate", "TFLOP"):
        assert part in text
    assert f"fits {describe_card(10)}" in text


def test_a_plan_prints_memory_in_gib(shallow_flux: Path) -> None:
    """GB stands only in the names of cards."""
    settings = [f"model.path={shallow_flux}", "train.cuda_graphs=false"]
    planner = open_planner(load_recipe(FOLDER / "flux_lora.yaml", settings))
    plan = planner.plan()
    # With copies, so that the lines about the bus are printed too; and a plan that fits no card.
    copying = replace(plan, step=replace(plan.step, copies=220 * GIB))
    huge = replace(plan, phases=[replace(plan.largest, device={"weights": 971 * GIB})])
    lines = [line for printed in (plan, copying, huge) for line in plan_lines(printed)]
    fitted = fit_to_budget(planner, 2 * GIB)
    assert fitted.changes
    lines += [
        line for result in (fitted, replace(fitted, fits=False, nearest=fitted)) for line in fit_lines(result)
    ]
    lines.append(full_device.out_of_memory(planner.recipe, planner.family, "in a test", "step"))
    text = "\n".join(lines)
    assert re.search(r"\d\.\d\d GiB", text)
    without_cards = re.sub(r"\b(an?) [\d.]+ GB card \(([\d.]+) GiB\)", "", text)
    assert without_cards != text
    # The example of a card's name in the advice when memory runs out.
    without_cards = without_cards.replace("one sold with 8 GB", "").replace("--fit 8GB", "")
    assert re.findall(r".*(?:GB|MB)\b.*", without_cards) == []


@pytest.mark.parametrize(
    ("name", "described"),
    [
        (8, "an 8 GB card (8 GiB)"),
        (11, "an 11 GB card (11 GiB)"),
        (24, "a 24 GB card (24 GiB)"),
        (7.5, "a 7.5 GB"),
    ],
)
def test_a_card_is_described_by_its_name_and_its_memory(name: float, described: str) -> None:
    assert describe_card(name).startswith(described)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_graphed_step_with_accumulation_is_planned_without_old_gradients(
    toy: Path, checkpointing: str
) -> None:
    """A recorded step starts without gradients. What an eager step with gradients adds is less than what
    recording adds."""
    settings = ["train.cuda_graphs=true", f"train.gradient_checkpointing={checkpointing}"]
    planner = open_planner(load_recipe(toy, [*settings, "train.grad_accumulation=4", "lora.rank=64"]))
    recipe = planner.recipe
    phase, step = planner.plan().phase("step"), planner.step(recipe)
    assert len(planner._steps) == 1
    adding = planner.dry_run(recipe).step(recipe, *planner.size(recipe))
    assert adding.peak.nbytes > step.peak.nbytes
    assert sum({**planner._kept(recipe), **adding.peak.by_kind}.values()) <= phase.allocated
    assert (adding.flops, adding.host, adding.kept) == (step.flops, step.host, step.kept)


def test_cuda_graphs_keep_the_memory_of_a_step(planner: Planner) -> None:
    plain, recorded = planner.plan(), planner.plan(with_graphs(planner.recipe))
    step, before = recorded.phase("step"), plain.phase("step")
    adapters = before.device["adapters"]
    # A step's working memory and gradients, then the gradients gathered from the graphs, then the accumulated
    # ones.
    parts = ("kept for the backward", "working memory", "inside a kernel", "gradients")
    within = sum(before.device.get(part, 0) for part in parts)
    assert step.device[RECORDED] == within + RECORDED_GAPS + PRODUCTS_BYTES
    assert step.device[GATHERED] == step.device["gradients"] == adapters
    assert recorded.phase("encode texts") == plain.phase("encode texts")
    # Sample images between the steps cannot use any of the graphs' memory.
    sampled = planner.recipe.model_copy(
        update={"sample": planner.recipe.sample.model_copy(update={"prompts": ("a dog",), "every": 100})}
    )
    drawn = planner.plan(with_graphs(sampled)).phase("sample").allocated
    taken = step.device[RECORDED] + adapters
    assert drawn == planner.plan(sampled).phase("sample").allocated + taken
    after = sampled.model_copy(update={"sample": sampled.sample.model_copy(update={"every": 0})})
    assert planner.plan(with_graphs(after)).phase("sample") == planner.plan(after).phase("sample")
    # The CPU is not a limit then, because it launches no single operations.
    assert recorded.seconds(1e6)[0] == pytest.approx(recorded.step.flops / 1e18)
    assert plain.step.calls > 0 == recorded.step.calls
    assert f"{plain.step.calls} operations" in "\n".join(plan_lines(plain))
    assert not re.search(r"\d operations", "\n".join(plan_lines(recorded)))


def test_sizes_beyond_the_graph_limit_run_next_to_the_recorded_ones(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = open_planner(load_recipe(toy, ["train.cuda_graphs=true", "train.grad_accumulation=1"]))
    few = planner.plan().phase("step")
    monkeypatch.setattr("halfbyte.trainer.plan.planner.MOST_SHAPES", 0)
    many = planner.plan().phase("step")
    assert many.allocated > few.allocated
    assert many.device[RECORDED] == few.device[RECORDED]


def test_the_command_plans_without_images(toy: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "pictures")
    result = CliRunner().invoke(app, ["plan", str(toy), "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["pictures"] is None
    assert any(note.startswith("data.path: ") and "data.resolution" in note for note in content["notes"])
    assert {phase["name"] for phase in content["phases"]} >= {"encode texts", "step", "sample", "export"}


def test_the_command_fits_and_refuses(toy: Path) -> None:
    fitted = CliRunner().invoke(app, ["plan", str(toy), "--fit", "8GB"])
    assert fitted.exit_code == 0, fitted.output
    assert fitted.stdout.startswith(f"fits {describe_card(8)}")
    same = CliRunner().invoke(app, ["plan", str(toy), "--fit", "8GiB"])
    assert same.stdout == fitted.stdout
    small = CliRunner().invoke(app, ["plan", str(toy), "--fit", "0.1GB", "--json"])
    assert small.exit_code == 2
    assert json.loads(small.stdout)["fit"]["fits"] is False
    wrong = CliRunner().invoke(app, ["plan", str(toy), "--fit", "much"])
    assert wrong.exit_code == 2
    assert "--fit: got 'much'" in wrong.output


def test_train_can_plan_instead(toy: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(train_app, [str(toy), "--plan"])
    assert result.exit_code == 0, result.output
    assert "largest:" in result.stdout
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_family_is_refused(toy: Path, mini_sd3: Any) -> None:
    recipe = load_recipe(toy, [f"model.path={mini_sd3}"])
    with pytest.raises(RecipeError, match="SD3Transformer2DModel"):
        open_planner(recipe)


def test_the_slower_of_products_and_cpu_decides_the_time(planner: Planner) -> None:
    plan = planner.plan()
    doubled = replace(plan, steps=2 * plan.steps)
    assert doubled.seconds(100.0)[1] == pytest.approx(2 * plan.seconds(100.0)[1])
    assert plan.seconds(100.0)[0] == pytest.approx(plan.step.flops / 1e14)
    assert plan.seconds(1e6)[0] == pytest.approx(plan.step.calls * SECONDS_A_CALL)


def test_the_bus_decides_the_time_if_it_is_slowest(planner: Planner) -> None:
    plan = planner.plan()
    slow = replace(plan, step=replace(plan.step, copies=220 * GIB))
    assert slow.seconds(MEASURED_RATE)[0] == pytest.approx(220 / BUS_RATE)
    assert slow.seconds(MEASURED_RATE)[1] == pytest.approx(plan.steps * 220 / BUS_RATE)
    text = "\n".join(plan_lines(slow))
    assert f"{220 / BUS_RATE:.2f} s per step" in text
    assert f"{BUS_RATE} GiB/s" in text
    assert "encoding, loading and quantizing, validation, checkpoints" in text


def test_streamed_blocks_and_activations_are_copied(toy: Path) -> None:
    def copies(*settings: str) -> int:
        return open_planner(load_recipe(toy, settings)).plan().step.copies

    assert copies() == 0
    streamed, offloaded = (
        copies("train.stream_blocks=true"),
        copies("train.gradient_checkpointing=offload"),
    )
    assert min(streamed, offloaded) > 0
    assert copies("train.stream_blocks=true", "train.gradient_checkpointing=offload") == streamed + offloaded


def test_streaming_blocks_without_packed_weights_is_refused_as_in_a_run(toy: Path) -> None:
    skip = "quant.skip=[transformer_blocks, single_transformer_blocks]"
    result = CliRunner().invoke(app, ["plan", str(toy), "train.stream_blocks=true", skip])
    assert result.exit_code == 2, result.output
    assert "quant.skip" in result.output
    assert "blocks" in result.output
    fitted = CliRunner().invoke(app, ["plan", str(toy), "--fit", "0.1GB", skip])
    assert fitted.exit_code == 2
    assert describe_card(0.1) in fitted.output
    assert "stream_blocks" not in fitted.output


def test_a_plan_that_fits_no_card_says_so(toy: Path) -> None:
    plan = open_planner(load_recipe(toy)).plan()
    first, *rest = plan.phases
    huge = replace(plan, phases=[replace(first, device={"weights": 971 * GIB}), *rest])
    text = "\n".join(plan_lines(huge))
    assert "no card" in text
    assert describe_card(CARDS[-1]) in text
    assert "--fit" in text
    needed = re.search(r"largest: encode texts, ([\d.]+) GiB", text)
    assert needed is not None
    assert 0 <= float(needed[1]) * GIB - huge.largest.device_bytes <= 0.1 * GIB


@pytest.mark.parametrize("held_out", [PICTURES, 50])
def test_holding_out_all_images_is_refused_as_in_a_run(toy: Path, held_out: int) -> None:
    setting = f"validation.held_out={held_out}"
    result = CliRunner().invoke(app, ["plan", str(toy), setting])
    assert result.exit_code == 3, result.output
    with pytest.raises(DataError) as caught:
        run_here(toy, setting)
    setting, _, reason = str(caught.value).partition(": ")
    assert setting == "validation.held_out"
    assert f"command line: validation.held_out={held_out}: {reason}" in result.output


def test_held_out_images_do_not_count_as_training_images(toy: Path) -> None:
    assert open_planner(load_recipe(toy, ["validation.held_out=2"])).plan().pictures == PICTURES - 2


def test_images_that_are_held_out_and_trained_on_are_refused_as_in_a_run(toy: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(toy), f"validation.path={tmp_path / 'pictures'}"])
    assert result.exit_code == 3, result.output
    assert "validation.path" in result.output


def test_validation_counts_for_any_interval(toy: Path) -> None:
    """Validation after the last step runs while the recorded graphs still hold their memory."""

    def step(*settings: str) -> Phase:
        return open_planner(load_recipe(toy, ["train.cuda_graphs=true", *settings])).plan().phase("step")

    without, wanted = step(), step("validation.held_out=2")
    assert wanted.allocated > without.allocated
    assert wanted == step("validation.held_out=2", "validation.every=2")


def test_train_can_fit_the_plan(toy: Path, tmp_path: Path) -> None:
    planned = CliRunner().invoke(train_app, [str(toy), "--plan", "--fit", "8GB"])
    assert planned.exit_code == 0, planned.output
    assert planned.stdout.startswith(f"fits {describe_card(8)}")
    alone = CliRunner().invoke(train_app, [str(toy), "--fit", "8GB"])
    assert alone.exit_code == 2
    assert "--fit" in alone.output
    assert "--plan" in alone.output
    assert not (tmp_path / "run").exists()
