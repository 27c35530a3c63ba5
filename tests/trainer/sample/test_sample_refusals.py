"""Tests of requests that `halfbyte sample` refuses before a model is loaded: exit codes and messages."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from halfbyte.trainer.adapters.formats import PEFT_CONFIG, PEFT_FILE
from halfbyte.trainer.denoiser import base
from halfbyte.trainer.errors import HubError
from halfbyte.trainer.families import encoders
from halfbyte.trainer.sample.request import SampleRequest
from halfbyte.trainer.sample.source import find_subject

from loopback_hub import COMMIT
from sample_calls import invoke

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    def loaded(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(base, "_read", loaded)
    monkeypatch.setattr(encoders, "PipelineEncoders", loaded)


def write_adapter(file, *, layer=LAYER, inputs=64, outputs=64):
    file.parent.mkdir(exist_ok=True)
    tensors = {
        f"transformer.{layer}.lora_A.weight": torch.ones(4, inputs),
        f"transformer.{layer}.lora_B.weight": torch.ones(outputs, 4),
    }
    save_file(tensors, file)
    return file


def refusal(*arguments):
    result = invoke(*arguments)
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--strength", "half"], "--strength: got 'half'"),
        (["--strength", "0,nan"], "--strength: got 'nan'"),
        (["--strength", "1e300"], "--strength: got '1e300', expected numbers from -1000 to 1000,"),
        (["--strength", "1"], "--strength: "),
        (["--prompt", "a\udcff"], r"--prompt: got 'a\udcff',"),
        (["--seed", "-1"], "--seed: got '-1'"),
        (["--seed", "1,2", "--seeds", "2"], "--seeds"),
        (["--width", "100"], "--width: got 100"),
        (["--height", "8"], "--height: got 8"),
        (["--steps", "0"], "--steps"),
        (["--quant", "nf5"], "--quant: got 'nf5', expected nf4, int8 or none"),
        (["--text-encoder-quant", "int4"], "--text-encoder-quant"),
        (["--dtype", "float16"], "--dtype: float16"),
        (["--offload", "disk"], "--offload"),
        (["--offload", "model", "--device-map", "auto"], "--device-map"),
        (["--device-map", "everywhere"], "--device-map"),
        (["--compile", "--offload", "sequential"], "--compile"),
        (["--compile", "--device-map", "auto"], "--compile"),
        (["--checkpoint", "3"], "--checkpoint: "),
        (["--model", "."], "--model: "),
        (["--revision", "main"], "--revision: "),
        (["--prompts-file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_invalid_options_are_refused(mini_flux, options, fragment):
    code, output = refusal(mini_flux, "--prompt", "a", *options)
    assert code == 2, output
    assert fragment in output


def test_a_prompt_is_required(mini_flux, tmp_path):
    code, output = refusal(mini_flux)
    assert (code, "--prompt" in output) == (2, True)
    (tmp_path / "prompts.txt").write_text("\n \n")
    code, output = refusal(mini_flux, "--prompts-file", tmp_path / "prompts.txt")
    assert (code, "--prompts-file" in output) == (2, True)


@pytest.mark.parametrize(
    ("adapter", "fragment"),
    [
        ({"layer": "transformer_blocks.9.attn.to_q"}, "no linear layer transformer_blocks.9.attn.to_q"),
        ({"inputs": 128}, f"its {LAYER} is 64 x 128"),
        ({"layer": "transformer_blocks.0.attn"}, "no linear layer transformer_blocks.0.attn "),
    ],
)
def test_an_adapter_for_another_base_is_refused(mini_flux, tmp_path, adapter, fragment):
    file = write_adapter(tmp_path / "cat.safetensors", **adapter)
    code, output = refusal(file, "--model", mini_flux, "--prompt", "a")
    assert code == 2
    assert str(file) in output
    assert fragment in output


def test_sources_without_an_adapter_are_refused(mini_flux, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.safetensors").write_bytes(b"\0" * 100)
    save_file({"weight": torch.ones(2)}, tmp_path / "foreign.safetensors")
    for name, fragment in {
        "nowhere": "no such file or folder",
        "empty": "safetensors",
        "torn.safetensors": "safetensors file",
        "foreign.safetensors": "weight",
    }.items():
        code, output = refusal(tmp_path / name, "--model", mini_flux, "--prompt", "a")
        assert (code, str(tmp_path / name) in output) == (2, True), output
        assert fragment in output.replace(str(tmp_path / name), "")
        assert "lora.init_from" not in output, "there is no recipe"


def test_a_missing_run_is_not_taken_for_a_repository(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    code, output = refusal("runs/dog", "--prompt", "a")
    assert (code, "runs/dog: no such file" in output) == (2, True), output


def test_an_adapter_without_a_named_base_is_refused(tmp_path):
    code, output = refusal(write_adapter(tmp_path / "cat.safetensors"), "--prompt", "a")
    assert (code, "--model" in output) == (2, True)


@pytest.mark.parametrize("part", ["vae", "text_encoder_2", "transformer"])
def test_a_pipeline_with_missing_weights_is_refused(mini_flux, tmp_path, part):
    shutil.copytree(mini_flux, tmp_path / "model")
    for file in (tmp_path / "model" / part).glob("*.safetensors"):
        file.unlink()
    code, output = refusal(tmp_path / "model", "--prompt", "a")
    assert code == 2
    assert part in output
    assert "model.path" not in output


def test_a_run_without_a_checkpoint_is_refused(mini_flux, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{family: flux, path: {mini_flux}}}\ndata: {{path: ./pictures}}\noutput: {{dir: {tmp_path}}}\n"
    )
    code, output = refusal(tmp_path, "--prompt", "a")
    assert (code, "checkpoint" in output) == (2, True), output
    code, output = refusal(tmp_path, "--prompt", "a", "--model", mini_flux)
    assert (code, "--model: " in output) == (2, True)


def test_a_hub_that_cannot_be_reached():
    code, output = refusal("nobody/nothing", "--prompt", "a")
    assert code == 4
    assert "nobody/nothing" in output


def test_dora_cannot_be_offloaded_layer_by_layer(mini_flux, tmp_path):
    file = write_adapter(tmp_path / "dora.safetensors")
    tensors = {
        f"base_model.model.{LAYER}.lora_A.weight": torch.ones(4, 64),
        f"base_model.model.{LAYER}.lora_B.weight": torch.ones(64, 4),
        f"base_model.model.{LAYER}.lora_magnitude_vector": torch.ones(64),
    }
    file = tmp_path / PEFT_FILE
    save_file(tensors, file)
    (tmp_path / PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, "r": 4}))
    code, output = refusal(file, "--model", mini_flux, "--prompt", "a", "--offload", "sequential")
    assert (code, "DoRA" in output) == (2, True), output


def test_the_base_named_by_peft_comes_from_the_hub(mini_flux, tmp_path, monkeypatch):
    """The base's name and revision resolve to a snapshot in the Hub client's cache folder."""
    snapshot = tmp_path / "hub" / "models--someone--flux" / "snapshots" / COMMIT
    shutil.copytree(mini_flux, snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    file = tmp_path / PEFT_FILE
    prefix = f"base_model.model.{LAYER}"
    save_file(
        {f"{prefix}.lora_A.weight": torch.ones(4, 64), f"{prefix}.lora_B.weight": torch.ones(64, 4)}, file
    )
    config = {"peft_type": "LORA", "lora_alpha": 4, "r": 4, "base_model_name_or_path": "someone/flux"}
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config | {"revision": COMMIT}))
    subject = find_subject(SampleRequest(str(file)), torch.device("cpu"))
    assert (subject.family.source.name, subject.family.source.revision) == ("someone/flux", COMMIT)
    assert subject.adapter.layers.keys() == {LAYER}
    other = SampleRequest(str(file), revision="f" * 40)
    with pytest.raises(HubError):
        find_subject(other, torch.device("cpu"))
