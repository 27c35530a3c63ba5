"""Tests that `halfbyte sample` reproduces the samples of training, at any strength and from its own records."""

import functools
import json
import shutil

import numpy
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.sample.picture_files import read_record
from halfbyte.trainer.sample.sampler import PipelineCall

from runs import run_here, write_recipe
from sample_calls import drawn_pixels, invoke

SMALL = ("--width", 64, "--height", 64, "--steps", 2, "--max-sequence-length", 24)


@pytest.fixture(scope="module")
def run_of(request, tmp_path_factory):
    """Returns a cached function from family to its model and a run's folder, whose adapter has a visible effect."""

    @functools.cache
    def made(family):
        model = request.getfixturevalue(f"mini_{family}")
        folder = tmp_path_factory.mktemp(family)
        recipe = write_recipe(folder, model, family=family)
        changes = ["sample.prompts=[a gradient, a red one]", "optimizer.lr=0.02", "lora.alpha=12"]
        return model, run_here(recipe, *changes)

    return made


@pytest.fixture(params=["flux", "sd3"])
def finished(request, run_of):
    return run_of(request.param)


@pytest.fixture
def flux(run_of):
    """A run for tests that do not depend on the family."""
    return run_of("flux")


def trained(run, place):
    return numpy.asarray(Image.open(run / "samples" / f"step-000004-{place:02d}.png").convert("RGB"))


def same(one, other):
    return numpy.array_equal(one, other)


def apart(one, other):
    """Returns the largest difference of a color value, from 0 to 255."""
    return abs(one.astype(int) - other.astype(int)).max()


def test_samples_of_a_run_are_reproduced_exactly_and_strength_0_is_the_base(finished, tmp_path):
    model, run = finished
    drawn = drawn_pixels(tmp_path / "out", run, "--strength", "0,0.5,1")
    assert same(drawn["prompt00-strength1-seed0.png"], trained(run, 0))
    assert same(drawn["prompt01-strength1-seed1.png"], trained(run, 1))
    base = drawn_pixels(
        tmp_path / "base", model, "--prompt", "a gradient", *SMALL, "--cache", tmp_path / "cache"
    )
    assert same(drawn["prompt00-strength0-seed0.png"], base["prompt00-seed0.png"])
    halves = [drawn[f"prompt00-strength{strength}-seed0.png"] for strength in ("0", "0.5", "1")]
    assert apart(halves[0], halves[2]) > apart(halves[0], halves[1]) > 0


@pytest.mark.parametrize(
    "placed", [("--offload", "model"), ("--offload", "sequential"), ("--device-map", "auto")]
)
def test_offloading_and_device_maps_do_not_change_images(flux, tmp_path, placed):
    _, run = flux
    drawn = drawn_pixels(tmp_path / "out", run, "--strength", "1,0.5,0", *placed)
    reference = drawn_pixels(tmp_path / "reference", run, "--strength", "0.5,0,1")
    assert drawn.keys() == reference.keys()
    assert max(apart(drawn[name], reference[name]) for name in drawn) <= 1


def test_every_format_of_an_adapter_gives_the_same_image(flux, tmp_path):
    model, run = flux
    forms = ("", "adapter", f"adapter/{ADAPTER_FILE}", "adapter/adapter_model.safetensors")
    forms += ("adapter/comfyui/run.safetensors", "adapter/kohya/run.safetensors")
    for number, form in enumerate(forms):
        options = ("--model", model, *SMALL, "--cache", tmp_path / "cache") if form else ()
        drawn = drawn_pixels(tmp_path / str(number), run / form, "--prompt", "a gradient", *options)
        assert apart(drawn["prompt00-strength1-seed0.png"], trained(run, 0)) <= 1, form


def test_an_image_can_be_reproduced_from_its_record(flux, tmp_path):
    model, run = flux
    adapter = run / "adapter" / ADAPTER_FILE
    options = ["--prompt", "a gradient", "--prompt", "rouge, « ici »", "--seed", 3, "--seeds", 2]
    options += ["--strength", "0.7", "--quant", "int8", "--guidance-scale", 2, *SMALL]
    call = (adapter, "--model", model, "--cache", tmp_path / "cache")
    first = drawn_pixels(tmp_path / "first", *call, *options)
    assert len(first) == 4
    name = "prompt01-strength0.7-seed4.png"
    record = read_record(tmp_path / "first" / name)
    assert record["prompt"] == Image.open(tmp_path / "first" / name).info["prompt"] == "rouge, « ici »"
    listed = json.loads((tmp_path / "first" / "pictures.json").read_text())
    assert [entry["file"] for entry in listed] == sorted(first)
    assert record in listed
    again = drawn_pixels(
        tmp_path / "again",
        *call,
        *("--prompt", record["prompt"], "--seed", record["seed"], "--strength", record["strength"]),
        *("--quant", record["quant"]["quant_type"], "--guidance-scale", record["guidance_scale"]),
        *("--width", record["width"], "--height", record["height"], "--steps", record["steps"]),
        *("--max-sequence-length", record["max_sequence_length"], "--dtype", record["dtype"]),
    )
    assert same(again["prompt00-strength0.7-seed4.png"], first[name])
    other = read_record(tmp_path / "again" / "prompt00-strength0.7-seed4.png")
    assert {key for key in record if record[key] != other[key]} == {"file"}
    assert str(tmp_path) not in json.dumps(record)


def test_a_base_stored_in_4_bits_keeps_its_format(flux, tmp_path):
    model, run = flux
    package = tmp_path / "package"
    shutil.copytree(model, package)
    shutil.rmtree(package / "transformer")
    shutil.copytree(run / "transformer", package / "transformer")
    call = (package, "--prompt", "a gradient", *SMALL, "--cache", tmp_path / "cache")
    drawn = drawn_pixels(tmp_path / "out", *call)
    base = drawn_pixels(tmp_path / "base", run, "--strength", "0", "--prompt", "a gradient")
    assert same(drawn["prompt00-seed0.png"], base["prompt00-strength0-seed0.png"])
    refused = invoke(*call, "--quant", "int8")
    assert refused.exit_code == 2
    assert "--quant" in refused.output
    assert "nf4" in refused.output


def test_checkpoints_are_selected_and_damaged_ones_skipped(flux, tmp_path):
    _, run = flux
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    call = (copy, "--prompt", "a gradient")
    early = drawn_pixels(tmp_path / "early", *call, "--checkpoint", 2)["prompt00-strength1-seed0.png"]
    assert not same(early, trained(run, 0))
    absent = invoke(*call, "--checkpoint", 3)
    assert (absent.exit_code, "2, 4" in absent.output) == (2, True)
    newest = copy / "checkpoints" / "step-000004" / ADAPTER_FILE
    newest.write_bytes(newest.read_bytes()[:-4] + b"oops")
    older = drawn_pixels(tmp_path / "older", *call)["prompt00-strength1-seed0.png"]
    assert same(older, early), "the newest intact one"
    damaged = invoke(*call, "--checkpoint", 4)
    assert (damaged.exit_code, "step-000004" in damaged.output) == (2, True)


def test_folders_are_numbered_and_never_overwritten(flux, tmp_path):
    _, run = flux
    before = len(list((run / "pictures").glob("*"))) if (run / "pictures").exists() else 0
    for number in (before + 1, before + 2):
        assert invoke(run, "--prompt", "a gradient").exit_code == 0
        assert (run / "pictures" / f"{number:03d}" / "grid.png").is_file()
    (tmp_path / "thesis.txt").write_text("keep me")
    refused = invoke(run, "--prompt", "a gradient", "--output", tmp_path)
    assert (refused.exit_code, "--output" in refused.output) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_nearly_equal_strengths_get_separate_files(flux, tmp_path):
    _, run = flux
    close = ("0.1234567", "0.12345678", "1e-7")
    drawn = drawn_pixels(tmp_path / "out", run, "--prompt", "a", *SMALL, "--strength", ",".join(close))
    names = [f"prompt00-strength{strength}-seed0.png" for strength in ("0.1234567", "0.12345678", "1e-07")]
    assert sorted(drawn) == sorted(names)


@pytest.mark.parametrize("placed", [(), ("--offload", "model")])
def test_non_finite_predictions_are_an_error(flux, tmp_path, placed):
    model, run = flux
    adapter = run / "adapter" / ADAPTER_FILE
    with safe_open(adapter, "pt") as file:
        metadata = file.metadata()
    huge = {name: tensor * 1e30 for name, tensor in load_file(adapter).items()}
    save_file(huge, tmp_path / "huge.safetensors", metadata=metadata)
    result = invoke(
        *(tmp_path / "huge.safetensors", "--model", model, "--prompt", "a", *SMALL, *placed),
        *("--output", tmp_path / "out"),
    )
    assert result.exit_code == 2, result.output
    assert "seed 0 at strength 1:" in result.output
    assert "--strength" in result.output
    assert not (tmp_path / "out").exists()


def test_the_grid_has_a_row_per_prompt_and_a_column_per_strength_and_seed(flux, tmp_path):
    _, run = flux
    sizes = []
    for name, options in {
        "one": ("--prompt", "a"),
        "strengths": ("--prompt", "a", "--strength", "0,1"),
        "all": ("--prompt", "a", "--prompt", "b", "--strength", "0,1", "--seed", "7,3"),
    }.items():
        drawn_pixels(tmp_path / name, run, *options)
        sizes.append(Image.open(tmp_path / name / "grid.png").size)
    (width, height), (two, same_height), (four, taller) = sizes
    cell = two - width
    assert (same_height, four - two) == (height, 2 * cell)
    assert taller > height + cell


def test_ctrl_c_keeps_finished_images(flux, tmp_path, monkeypatch):
    _, run = flux
    draw, calls = PipelineCall.draw, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*arguments, **options)

    monkeypatch.setattr(PipelineCall, "draw", interrupted)
    result = invoke(run, "--prompt", "a gradient", "--seeds", 4, "--output", tmp_path / "out")
    assert result.exit_code == 130
    assert "2 of 4 " in result.output
    assert len(list((tmp_path / "out").glob("prompt*.png"))) == 2
    assert len(json.loads((tmp_path / "out" / "pictures.json").read_text())) == 2


def test_a_prompt_that_is_cut_off_gives_a_warning(flux, tmp_path, caplog):
    _, run = flux
    drawn_pixels(tmp_path / "out", run, "--prompt", "red " * 30 + "mushroom")
    (warning,) = [message for message in caplog.messages if "T5 tokens" in message]
    assert "24" in warning
    assert "mushroom" in warning


@pytest.mark.usefixtures("traced")
def test_blocks_are_compiled(run_of, tmp_path):
    _, run = run_of("flux")
    drawn = drawn_pixels(tmp_path / "out", run, "--prompt", "a gradient", "--compile")
    assert apart(drawn["prompt00-strength1-seed0.png"], trained(run, 0)) <= 1
    assert read_record(tmp_path / "out" / "prompt00-strength1-seed0.png")["compiled"]
