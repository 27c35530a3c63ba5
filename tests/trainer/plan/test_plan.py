"""`halfbyte plan`: what it says of a run, what it changes to fit a card, and what is said when memory runs out."""

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
from halfbyte.trainer.errors import DataError, OutOfMemory, RecipeError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.sd3.family import SD3
from halfbyte.trainer.plan import advice as full_device
from halfbyte.trainer.plan.fit import CARDS, open_planner
from halfbyte.trainer.plan.output import plan_lines
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
from halfbyte.trainer.training.module import DiffusionModule

from repository import RECIPES
from runs import PICTURES, run_here, write_recipe

FOLDER = RECIPES
FLUX = "black-forest-labs/FLUX.1-dev"


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_configurations(tmp_path_factory.mktemp("full_size") / "flux", FLUX)


@pytest.fixture(scope="module")
def planner(flux: Path) -> Planner:
    """FLUX.1-dev as flux_lora trains it, kernel by kernel; rehearsed once for all tests."""
    settings = [f"model.path={flux}", "train.cuda_graphs=false"]
    return open_planner(load_recipe(FOLDER / "flux_lora.yaml", settings))


def with_graphs(recipe: Recipe) -> Recipe:
    """The same, recorded."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"cuda_graphs": True})})


@pytest.fixture
def toy(tmp_path: Path, mini_flux: Any) -> Path:
    return write_recipe(tmp_path, mini_flux)


def test_a_base_that_is_quantized_already_is_planned_as_it_is_stored(toy: Path, tmp_path: Path) -> None:
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
def test_the_model_on_meta_is_the_loaded_one(
    family_class: type[Family], fixture: str, request: pytest.FixtureRequest
) -> None:
    """SD3's table of positions, 0.4 GB of SD3.5 medium in bf16, is a buffer."""
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
    # 59.5 + 59.5 of linears and 14.9 + 37.2 of attention, and most of the forward again (FIELD.md, section 3).
    assert 171 < plan.step.flops / 1e12 < 171 + 59.5 + 14.9
    assert step.device["optimizer state (adamw)"] == pytest.approx(2 * step.device["adapters"], rel=0.01)
    # The blocks' inputs: 57 of (4608, 3072) in bf16.
    assert step.device["kept for the backward"] == pytest.approx(57 * 4608 * 3072 * 2, rel=0.05)
    # T5-XXL in int8 with its embedding in bf16: 4.9 GB.
    texts = plan.phase("encode texts")
    assert texts.device["text_encoder_2"] / 1e9 == pytest.approx(4.9, abs=0.05)
    assert plan.largest is step
    assert step.device_bytes > step.allocated + CONTEXT_BYTES
    # What was seen of the host, with the process, at a start from nothing (docs/benchmarks/start.md).
    on_host = [plan.phase(name).host_bytes / 1e9 for name in ("encode texts", "load and quantize", "step")]
    assert on_host == pytest.approx([2.1, 2.1, 2.8], rel=0.06)
    assert plan.pictures == 20
    assert plan.seen == planner.recipe.train.steps


def test_a_plan_is_read_and_parsed(planner: Planner) -> None:
    text = "\n".join(plan_lines(planner.plan()))
    for said in ("encode texts", "packed: attention", "optimizer state (adamw)", "an estimate", "TFLOP"):
        assert said in text
    assert "fits 10 GB" in text


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_recorded_step_that_adds_up_gradients_is_rehearsed_as_it_is_recorded(
    toy: Path, checkpointing: str
) -> None:
    """Finding none; what those of others add stays below the recording's own memory."""
    settings = ["train.cuda_graphs=true", f"train.gradient_checkpointing={checkpointing}"]
    planner = open_planner(load_recipe(toy, [*settings, "train.grad_accumulation=4", "lora.rank=64"]))
    recipe = planner.recipe
    phase, step = planner.plan().phase("step"), planner.step(recipe)
    assert len(planner._steps) == 1
    adding = planner.rehearsal(recipe).step(recipe, *planner.size(recipe))
    assert adding.peak.nbytes > step.peak.nbytes
    assert sum({**planner._kept(recipe), **adding.peak.by_kind}.values()) <= phase.allocated
    assert (adding.flops, adding.host, adding.kept) == (step.flops, step.host, step.kept)


def test_recorded_steps_keep_their_memory(planner: Planner) -> None:
    plain, recorded = planner.plan(), planner.plan(with_graphs(planner.recipe))
    step, before = recorded.phase("step"), plain.phase("step")
    adapters = before.device["adapters"]
    # What a step computes in, its gradients, and those that are gathered from them; then those that the run adds up.
    parts = ("kept for the backward", "working memory", "inside a kernel", "gradients")
    within = sum(before.device.get(part, 0) for part in parts)
    assert step.device[RECORDED] == within + RECORDED_GAPS + PRODUCTS_BYTES
    assert step.device[GATHERED] == step.device["gradients"] == adapters
    assert recorded.phase("encode texts") == plain.phase("encode texts")
    # Where pictures are drawn in between, nothing of it is free for them.
    sampled = planner.recipe.model_copy(
        update={"sample": planner.recipe.sample.model_copy(update={"prompts": ("a dog",), "every": 100})}
    )
    drawn = planner.plan(with_graphs(sampled)).phase("sample").allocated
    taken = step.device[RECORDED] + adapters
    assert drawn == planner.plan(sampled).phase("sample").allocated + taken
    after = sampled.model_copy(update={"sample": sampled.sample.model_copy(update={"every": 0})})
    assert planner.plan(with_graphs(after)).phase("sample") == planner.plan(after).phase("sample")
    # The processor is no limit then.
    assert recorded.seconds(1e6)[0] == pytest.approx(recorded.step.flops / 1e18)
    assert "operations where its processor" not in "\n".join(plan_lines(recorded))


def test_more_sizes_than_are_recorded_run_beside_the_others(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = open_planner(load_recipe(toy, ["train.cuda_graphs=true", "train.grad_accumulation=1"]))
    few = planner.plan().phase("step")
    monkeypatch.setattr("halfbyte.trainer.plan.planner.MOST_SHAPES", 0)
    many = planner.plan().phase("step")
    assert many.allocated > few.allocated
    assert many.device[RECORDED] == few.device[RECORDED]


def test_the_command_plans_without_pictures(toy: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "pictures")
    result = CliRunner().invoke(app, ["plan", str(toy), "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["pictures"] is None
    assert any("planned at data.resolution" in note for note in content["notes"])
    assert {phase["name"] for phase in content["phases"]} >= {"encode texts", "step", "sample", "export"}


def test_the_command_fits_and_refuses(toy: Path) -> None:
    fitted = CliRunner().invoke(app, ["plan", str(toy), "--fit", "8GB"])
    assert fitted.exit_code == 0, fitted.output
    assert "fits 8 GB as it is" in fitted.stdout
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
    with pytest.raises(RecipeError, match="holds a SD3Transformer2DModel"):
        open_planner(recipe)


def test_out_of_memory_names_the_cheapest_changes_and_keeps_the_checkpoint(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = DiffusionModule.training_step

    def full_at_the_third(self: DiffusionModule, batch: Any, number: int) -> Any:
        if self.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, batch, number)

    monkeypatch.setattr(DiffusionModule, "training_step", full_at_the_third)
    with pytest.raises(OutOfMemory) as caught:
        run_here(toy, "train.gradient_checkpointing=none", "train.grad_accumulation=1", "sample.prompts=[]")
    assert caught.value.exit_code == 6
    message = str(caught.value)
    assert "the last checkpoint is whole" in message
    assert "optimizer.name=adamw_8bit" in message
    assert "train.gradient_checkpointing=selective" in message
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


def test_the_message_says_where_nothing_is_left_to_change(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_device, "cheapest_savings", lambda planner, phase: [])
    recipe: Recipe = load_recipe(toy)
    message = full_device.out_of_memory(recipe, open_planner(recipe).family, "in training", "step")
    assert "a larger card" in message


@pytest.mark.parametrize(
    ("place", "said", "change"),
    [
        (
            "families.encoders.PipelineEncoders.encode_texts",
            r"in encoding.*\(encode ",
            "model.text_encoder_quant=int8",
        ),
        ("families.encoders.PipelineEncoders.encode_images", r"in encoding.*\(encode ", ""),
        ("run.load_denoiser", r"in loading.*\(load and quantize\)", ""),
        ("run.export_trained", r"behind the last step.*\((export|sample)\)", ""),
    ],
)
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_wherever_the_device_is_full_one_message_says_so(
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    said: str,
    change: str,
    error: Exception,
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(f"halfbyte.trainer.{place}", full)
    with pytest.raises(OutOfMemory, match=said) as caught:
        run_here(toy, "model.text_encoder_quant=none", f"data.cache_dir={tmp_path / 'cache'}")
    assert caught.value.exit_code == 6
    assert change in str(caught.value)


def test_time_is_of_the_products_or_of_the_processor(planner: Planner) -> None:
    plan = planner.plan()
    doubled = replace(plan, steps=2 * plan.steps)
    assert doubled.seconds(100.0)[1] == pytest.approx(2 * plan.seconds(100.0)[1])
    assert plan.seconds(100.0)[0] == pytest.approx(plan.step.flops / 1e14)
    assert plan.seconds(1e6)[0] == pytest.approx(plan.step.calls * SECONDS_A_CALL)


def test_time_is_of_the_bus_where_that_is_slowest(planner: Planner) -> None:
    plan = planner.plan()
    slow = replace(plan, step=replace(plan.step, copies=220 * GIB))
    assert slow.seconds(MEASURED_RATE)[0] == pytest.approx(220 / BUS_RATE)
    assert slow.seconds(MEASURED_RATE)[1] == pytest.approx(plan.steps * 220 / BUS_RATE)
    text = "\n".join(plan_lines(slow))
    assert f"{220 / BUS_RATE:.2f} s a step" in text
    assert "left out: encoding" in text


def test_streamed_blocks_and_activations_are_copied(toy: Path) -> None:
    def copies(*settings: str) -> int:
        return open_planner(load_recipe(toy, settings)).plan().step.copies

    assert copies() == 0
    streamed, put_aside = (
        copies("train.stream_blocks=true"),
        copies("train.gradient_checkpointing=offload"),
    )
    assert min(streamed, put_aside) > 0
    assert copies("train.stream_blocks=true", "train.gradient_checkpointing=offload") == streamed + put_aside


def test_blocks_without_packed_weights_are_refused_to_stream_as_by_a_run(toy: Path) -> None:
    skip = "quant.skip=[transformer_blocks, single_transformer_blocks]"
    result = CliRunner().invoke(app, ["plan", str(toy), "train.stream_blocks=true", skip])
    assert result.exit_code == 2, result.output
    assert "quant.skip leaves nothing packed in the blocks" in result.output
    fitted = CliRunner().invoke(app, ["plan", str(toy), "--fit", "0.1GB", skip])
    assert "does not fit 0.1 GB" in fitted.output
    assert "stream_blocks" not in fitted.output


def test_what_fits_no_card_says_so(toy: Path) -> None:
    plan = open_planner(load_recipe(toy)).plan()
    first, *rest = plan.phases
    huge = replace(plan, phases=[replace(first, device={"weights": 971 * GIB}), *rest])
    text = "\n".join(plan_lines(huge))
    assert f"fits no card there is, the largest has {CARDS[-1]} GB; --fit finds" in text
    needed = re.search(r"largest: encode texts, ([\d.]+) GB", text)
    assert needed is not None
    assert 0 <= float(needed[1]) * GIB - huge.largest.device_bytes <= 0.1 * GIB


@pytest.mark.parametrize("held_out", [PICTURES, 50])
def test_as_many_held_out_as_there_are_is_refused_as_by_a_run(toy: Path, held_out: int) -> None:
    setting = f"validation.held_out={held_out}"
    result = CliRunner().invoke(app, ["plan", str(toy), setting])
    assert result.exit_code == 3, result.output
    with pytest.raises(DataError) as caught:
        run_here(toy, setting)
    setting, _, said = str(caught.value).partition(": ")
    assert setting == "validation.held_out"
    assert f"command line: validation.held_out={held_out}: {said}" in result.output


def test_held_out_pictures_are_not_trained_on(toy: Path) -> None:
    assert open_planner(load_recipe(toy, ["validation.held_out=2"])).plan().pictures == PICTURES - 2


def test_pictures_that_are_held_out_and_trained_on_are_refused_as_by_a_run(toy: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(toy), f"validation.path={tmp_path / 'pictures'}"])
    assert result.exit_code == 3, result.output
    assert "is in validation.path and" in result.output


def test_validation_is_counted_wherever_it_is_wanted(toy: Path) -> None:
    """Behind the last step it finds what is recorded still there."""

    def step(*settings: str) -> Phase:
        return open_planner(load_recipe(toy, ["train.cuda_graphs=true", *settings])).plan().phase("step")

    without, wanted = step(), step("validation.held_out=2")
    assert wanted.allocated > without.allocated
    assert wanted == step("validation.held_out=2", "validation.every=2")


def test_train_can_fit_the_plan(toy: Path, tmp_path: Path) -> None:
    planned = CliRunner().invoke(train_app, [str(toy), "--plan", "--fit", "8GB"])
    assert planned.exit_code == 0, planned.output
    assert "fits 8 GB as it is" in planned.stdout
    alone = CliRunner().invoke(train_app, [str(toy), "--fit", "8GB"])
    assert alone.exit_code == 2
    assert "--fit: it chooses settings and trains nothing; add --plan" in alone.output
    assert not (tmp_path / "run").exists()
