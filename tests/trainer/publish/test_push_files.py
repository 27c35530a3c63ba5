"""Tests which files of a run are pushed, and that a damaged run fails before the Hub is contacted."""

import json
import re
import shutil

import numpy
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from halfbyte.trainer.cli.app import app
from halfbyte.trainer.publish.push import PushRequest, prepare_push

from hub_faults import Faults
from runs import run_here, write_recipe

ADAPTER = "adapter/pytorch_lora_weights.safetensors"
BASE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, mini_flux):
    """A finished run whose base is a local folder."""
    folder = tmp_path_factory.mktemp("files")
    return run_here(write_recipe(folder, mini_flux, name="dog"), "train.steps=2", "train.grad_accumulation=1")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(finished, tmp_path / "dog")


def dry(run, *options):
    """Runs a dry run. This process is offline, so contacting the Hub would be an error."""
    return CliRunner().invoke(app, ["push", str(run), "--repo", "ann/dog", "--dry-run", *options])


def test_a_dry_run_lists_files_with_sizes_and_shows_the_card(run):
    (run / "adapter" / ".env").write_text("HF_TOKEN=secret")
    (run / "adapter" / "notes.txt").write_text("mine")
    (run / "transformer" / "pickle.bin").write_bytes(b"")
    result = dry(run)
    assert result.exit_code == 0, result.output
    listed, _, card = result.output.partition("README.md:\n")
    for name in (ADAPTER.removeprefix("adapter/"), BASE, "halfbyte.json", "samples/00.png", "README.md"):
        assert name in listed
    size = (run / BASE).stat().st_size
    assert f"{size / 1000:.1f} kB" in listed
    assert "/ann/dog (private" in listed
    for never in (".env", "notes.txt", "pickle.bin", "recipe.yaml", "checkpoints", "samples.png"):
        assert never not in listed
    assert card.startswith("---\n")
    assert "local folder" in card
    assert str(run.parent) not in card.replace(str(run), "")
    assert '"path/to/the/base"' in card


def test_the_quantization_error_of_the_base_is_measured(run):
    measured = json.loads((run / "transformer" / "quantization_error.json").read_text())
    assert measured["relative"] == pytest.approx(0.092, rel=0.02), "NF4's error on Gaussian weights"
    assert measured["measured"] == measured["weights"] > 250_000
    assert f"Quantization error: {measured['relative']:.2%}" in dry(run).output


def cut(file):
    return lambda run: (run / file).write_bytes((run / file).read_bytes()[:-1])


def halve(file):
    return lambda run: (run / file).write_bytes((run / file).read_bytes()[:5000])


def write(file, text):
    return lambda run: (run / file).write_text(text)


def remove(name):
    def gone(run):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return gone


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (remove("recipe.yaml"), "recipe.yaml"),
        (write("recipe.yaml", "model: {family: llama}"), "recipe.yaml:1: model.family: got 'llama'"),
        (remove("adapter"), "adapter/pytorch_lora_weights.safetensors"),
        (remove(ADAPTER), "adapter/pytorch_lora_weights.safetensors"),
        (cut(ADAPTER), "adapter/pytorch_lora_weights.safetensors: "),
        (cut("adapter/kohya/dog.safetensors"), "kohya/dog.safetensors: "),
        (
            write("adapter/adapter_model.safetensors", "version https://git-lfs"),
            "adapter/adapter_model.safetensors: ",
        ),
        (
            lambda run: save_file({"x": numpy.zeros(2)}, run / ADAPTER),
            "adapter/pytorch_lora_weights.safetensors: ",
        ),
        (remove("adapter/halfbyte.json"), "has no halfbyte.json"),
        (write("adapter/halfbyte.json", "{"), "adapter/halfbyte.json: not a JSON file"),
        (write("adapter/halfbyte.json", "{}"), "adapter/halfbyte.json: damaged"),
        (write("adapter/halfbyte.json", "[]"), "adapter/halfbyte.json: expected a JSON object"),
        (cut(BASE), "transformer/diffusion_pytorch_model.safetensors: "),
        (remove(BASE), "no weights"),
        (remove("transformer/config.json"), "transformer/config.json: "),
        (write("transformer/config.json", "{"), "transformer/config.json: "),
        (write("transformer/quantization_error.json", "{}"), "transformer/quantization_error.json: "),
        (halve("samples/step-000002-00.png"), "samples/step-000002-00.png: "),
        (write("summary.json", "{}"), "summary.json: "),
        (write("summary.json", "null"), "summary.json: "),
    ],
)
def test_an_incomplete_run_is_reported_with_the_file(run, damage, fragment):
    damage(run)
    result = dry(run)
    assert result.exit_code == 2, result.output
    assert fragment in result.output
    assert result.output.count("error:") == 1
    assert isinstance(result.exception, SystemExit)


def test_a_folder_that_is_not_a_run_and_invalid_names_are_rejected(run, tmp_path):
    for folder in (tmp_path / "nowhere", run / "recipe.yaml"):
        result = dry(folder)
        assert result.exit_code == 2
        assert f"error: {folder}: " in result.output
    for name in ("dog", "ann/dog.git", "a/b/c", "ann/--x", "ann/", ""):
        result = CliRunner().invoke(app, ["push", str(run), "--repo", name])
        assert result.exit_code == 2, name
        assert "error: --repo: got " in result.output
        assert "owner/name" in result.output
    assert "output.push_to_hub" in CliRunner().invoke(app, ["push", str(run)]).output


def test_no_byte_names_a_folder_of_the_machine(run, finished, mini_flux):
    """The run, its images, the cache and the base are all inside one folder, which no pushed file may contain."""
    ready = prepare_push(PushRequest(run, "ann/dog"))
    below = str(mini_flux.parent.parent).encode()
    assert str(finished).startswith(below.decode())
    for file in ready.files:
        content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        assert below not in content, file.name


def test_offline_mode_is_reported(run, monkeypatch):
    """This process is offline, too."""
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    result = CliRunner().invoke(app, ["push", str(run), "--repo", "ann/dog"])
    assert result.exit_code == 4
    assert "HF_HUB_OFFLINE" in result.output


def test_a_run_that_moved_to_another_machine_is_pushed(run):
    """The folders in its recipe need not exist."""
    recipe = run / "recipe.yaml"
    text = recipe.read_text().replace(str(run.parent.parent), "/no/such/place")
    lines = [
        f"  path: /no/such/place{n}" if "  path: " in line else line
        for n, line in enumerate(text.splitlines())
    ]
    recipe.write_text("\n".join(lines))
    assert dry(run).exit_code == 0, dry(run).output


def test_a_run_without_a_base_or_samples_is_pushed_as_an_adapter(run):
    shutil.rmtree(run / "transformer")
    shutil.rmtree(run / "samples")
    result = dry(run)
    assert result.exit_code == 0, result.output
    for absent in ("transformer/", "FluxTransformer2DModel", "bitsandbytes", "## Samples"):
        assert absent not in result.output.partition("README.md:\n")[2].replace("by bitsandbytes", ""), absent


def test_an_exported_checkpoint_can_be_pushed(run):
    assert "--checkpoint 1" in dry(run, "--checkpoint", "1").output
    answer = CliRunner().invoke(app, ["export", str(run), "--checkpoint", "2", "--no-self-check"])
    assert answer.exit_code == 0, answer.output
    assert dry(run, "--checkpoint", "2").exit_code == 0
    # A resumed run: the exported adapter is still of step 2, not of the recipe's last step.
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 2\n", "steps: 8\n", 1))
    result = dry(run)
    assert "| steps | 2 of 8 |" in result.output


def test_a_large_file_is_reported_separately_and_sent_once(hub, pushed_run, tmp_path):
    run = shutil.copytree(pushed_run, tmp_path / "dog")
    big = run / "adapter" / "comfyui" / "big.safetensors"
    save_file({"x": numpy.zeros(3 * 10**6, dtype="float32")}, big)
    hub.hub.faults = Faults()
    answer = hub.worker.run("push", str(run), "--repo", "ann/big")
    assert answer.code == 0, answer.output
    assert "uploading comfyui/big.safetensors (12.0 MB), 0 B of 12." in answer.output
    (small,) = re.findall(r"small files \((\d+)\.?\d* kB\)", answer.output)
    assert 500 < int(small) < 1000
    assert "12.0 MB of 12." in answer.output
    assert hub.store.model("ann/big").tree["comfyui/big.safetensors"].content == big.read_bytes()
