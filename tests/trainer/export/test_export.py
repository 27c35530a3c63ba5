"""Tests exports of complete runs: stock diffusers and PEFT load them, and a failed check changes nothing."""

import json
import shutil

import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel
from typer.testing import CliRunner

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.load.text_encoder import load_text_encoder
from halfbyte.trainer.adapters.listed_digests import PROVENANCE_FILE
from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.cli.app import app
from halfbyte.trainer.errors import ExportError, RecipeError
from halfbyte.trainer.export import check_part as compared_part
from halfbyte.trainer.export import export, self_check
from halfbyte.trainer.export.from_run import ExportRequest, export_run
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.runtime.world import read_world

from judge import stock_bitsandbytes_on_cpu
from probe import prediction
from runs import run_here, write_recipe

QUICK = ("sample.prompts=[]", "output.export_base=false", "train.grad_accumulation=1", "optimizer.lr=0.02")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, mini_flux):
    folder = tmp_path_factory.mktemp("flux")
    return run_here(write_recipe(folder, mini_flux, name="dog"), *QUICK, "lora.rank_pattern={to_k: 2}")


@pytest.fixture
def run(finished, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(finished, tmp_path / "dog")


def request(root, **settings):
    world = read_world({"ACCELERATE_USE_CPU": "true"})
    return export_run(root, ExportRequest(**settings), world, Console(quiet=True))


def listing(root):
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def test_a_run_without_its_images_can_be_exported_again(run):
    written = run / "recipe.yaml"
    gone = yaml.safe_load(written.read_text())
    gone["data"]["path"] = gone["sample"]["references"] = gone["lora"]["init_from"] = "/nowhere/any/more"
    gone["sample"]["prompts"] = ["a dog"]
    written.write_text(yaml.safe_dump(gone))
    assert request(run, check=False).adapter == run / "adapter" / ADAPTER_FILE


def test_a_run_exports_every_format(finished):
    names = {
        str(p.relative_to(finished / "adapter")) for p in (finished / "adapter").rglob("*") if p.is_file()
    }
    assert names == {
        ADAPTER_FILE,
        PROVENANCE_FILE,
        "adapter_model.safetensors",
        "adapter_config.json",
        "comfyui/dog.safetensors",
        "kohya/dog.safetensors",
    }
    assert all(p.stat().st_mode & 0o444 == 0o444 for p in finished.rglob("*.safetensors"))
    fused = load_file(finished / "adapter" / "kohya" / "dog.safetensors")
    assert fused["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (7 * 64, 4 + 2 + 4 + 4)


def test_peft_loads_the_folder(finished, mini_flux):
    transformer = FluxTransformer2DModel.from_pretrained(
        mini_flux, subfolder="transformer", dtype=torch.float32
    )
    bare = prediction(transformer, torch.float32)
    # diffusers gets its own copy, because PEFT changes the model in place.
    other = FluxTransformer2DModel.from_pretrained(mini_flux, subfolder="transformer", dtype=torch.float32)
    other.load_lora_adapter(str(finished / "adapter"), prefix="transformer", weight_name=ADAPTER_FILE)
    adapted = prediction(other, torch.float32)
    tuned = PeftModel.from_pretrained(transformer, finished / "adapter")
    torch.testing.assert_close(prediction(tuned.get_base_model(), torch.float32), adapted)
    assert (adapted - bare).norm() / bare.norm() > 1e-3


def test_a_checkpoint_of_a_run_in_progress_is_exported_and_checked(run):
    shutil.rmtree(run / "adapter")
    before = listing(run)
    result = CliRunner().invoke(app, ["export", str(run), "--checkpoint", "2", "--base"])
    assert result.exit_code == 0, result.output
    folder = run / "exports" / "step-000002"
    for line in ("kohya: prediction on the plain base", "diffusers: prediction on the nf4 base", str(folder)):
        assert line in result.output
    after = listing(run)
    assert {name: time for name, time in after.items() if not name.startswith("exports/")} == before
    saved, exported = (
        load_file(place / ADAPTER_FILE) for place in (run / "checkpoints" / "step-000002", folder / "adapter")
    )
    assert all(saved[name].equal(exported[name]) for name in saved)
    with stock_bitsandbytes_on_cpu():
        FluxTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_sd3_is_checked_block_by_block(mini_sd3, tmp_path, monkeypatch):
    monkeypatch.setattr(compared_part, "_WHOLE_BYTES", 0)
    recipe = write_recipe(tmp_path, mini_sd3, family="sd3")
    # With a separate alpha for one of three layers that fuse.
    run = run_here(recipe, *QUICK, "train.steps=2", "lora.alpha_pattern={to_q: 8}", "lora.rslora=true")
    check = request(run, base=True, merged=True, text_encoder=True).check
    for start in (
        "diffusers: prediction on the plain base",
        "comfyui: prediction on the plain base",
        "kohya: prediction on the plain base",
        "peft: prediction on the plain base",
        "diffusers: prediction on the bf16 base",
        "diffusers: prediction on the nf4 base",
        "diffusers: prediction on the exported transformer/ base",
        "exported merged/: loaded by stock diffusers",
        "T5: loaded by stock transformers",
    ):
        assert any(line.startswith(start) and "bound" in line for line in check.checked), start
    assert check.moved > 1e-3
    assert ["blocks" in part for part in check.left_out] == [True, True]
    assert [line.partition(":")[0] for line in check.unread] == ["comfyui", "kohya"], (
        "diffusers has no conversion for SD3"
    )


def damage(file):
    def changed(adapter, formats, folder, names, **settings):
        write(adapter, formats, folder, names, **settings)
        tensors = load_file(folder / file)
        name = next(name for name in tensors if "img_mlp" in name and "up" in name)
        tensors[f"{name}.twin"] = tensors.pop(name)
        save_file(tensors, folder / file)
        scaled = folder / "kohya" / "dog.safetensors"
        tensors = load_file(scaled)
        tensors["lora_unet_double_blocks_0_img_mlp_0.alpha"] *= 2
        save_file(tensors, scaled)

    write = export.write_formats
    return changed


def test_a_failed_check_names_the_keys_and_changes_nothing(run, monkeypatch):
    monkeypatch.setattr(export, "write_formats", damage("comfyui/dog.safetensors"))
    before = listing(run)
    result = CliRunner().invoke(app, ["export", str(run)])
    assert result.exit_code == ExportError.exit_code == 7
    assert "comfyui:" in result.output
    assert "img_mlp" in result.output
    assert "kohya: transformer_blocks.0.ff.net.0.proj: its update differs" in result.output
    assert "diffusers:" not in result.output
    assert listing(run) == before


def zeroed(file, matches):
    tensors = load_file(file)
    chosen = [name for name in tensors if matches(name)]
    assert chosen
    for name in chosen:
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_peft_file_without_effect_fails(run, monkeypatch):
    def written(adapter, formats, folder, names, **settings):
        write(adapter, formats, folder, names, **settings)
        zeroed(folder / "adapter_model.safetensors", lambda name: "lora_B" in name)

    write = export.write_formats
    monkeypatch.setattr(export, "write_formats", written)
    before = listing(run)
    with pytest.raises(ExportError, match=r"peft: .*its update differs") as failure:
        request(run)
    assert "diffusers:" not in str(failure.value)
    assert listing(run) == before


@pytest.mark.parametrize("part", ["transformer", "merged", "text_encoder_2"])
def test_a_model_that_differs_from_memory_fails(run, monkeypatch, part):
    def base(denoiser, folder):
        save(denoiser, folder)
        if part in folder.name:
            damage_model(folder, "diffusion_pytorch_model.safetensors", ".to_q.weight")

    def text_encoder(source, folder, device):
        written = write(source, folder, device)
        if part in folder.name:
            damage_model(folder, "model.safetensors", ".q.weight")
        return written

    def damage_model(folder, file, ending):
        zeroed(folder / file, lambda name: name.endswith(ending))
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"nf4"', '"fp4"'))

    save, write = export.save_quantized, export.write_text_encoder
    monkeypatch.setattr(export, "save_quantized", base)
    monkeypatch.setattr(export, "write_text_encoder", text_encoder)
    before = listing(run)
    message = rf"{part}/ .*config\.json: quantization_config, \S*\.(to_)?q\.weight"
    with pytest.raises(ExportError, match=message):
        request(run, base=True, merged=True, text_encoder=True)
    assert listing(run) == before


def test_an_alpha_that_differs_from_training_fails(mini_flux, tmp_path, monkeypatch):
    """The tensors are correct, but the metadata has another alpha than the adapter was trained with."""

    def saved(denoiser, pipeline, folder):
        config = denoiser.peft_config["default"]
        config.lora_alpha *= 2
        save(denoiser, pipeline, folder)
        config.lora_alpha /= 2

    save = export.save_adapter
    monkeypatch.setattr(export, "save_adapter", saved)
    with pytest.raises(ExportError, match=r"diffusers: .*its update differs from the trained one, scale 2"):
        run_here(write_recipe(tmp_path, mini_flux), *QUICK, "train.steps=1", "output.self_check=true")
    assert not (tmp_path / "run" / "adapter").exists()


def test_layers_that_stock_diffusers_does_not_read_are_named(mini_flux, tmp_path):
    recipe = write_recipe(tmp_path, mini_flux)
    # An unquantized layer computes in the dtype of the base, also with an adapter in fp32.
    run = run_here(
        recipe, *QUICK, "train.steps=1", "lora.targets=[x_embedder, attn.to_q]", "quant.skip=[x_embedder]"
    )
    result = CliRunner().invoke(app, ["export", str(run), "--format", "comfyui", "--base"])
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.output.splitlines()]
    layers = len(load_file(run / "adapter" / ADAPTER_FILE)) // 2
    # The file for diffusers is always written too, and is checked.
    assert any(line.startswith(f"diffusers: {layers} layers") for line in lines)
    assert any(line.startswith(f"comfyui: {layers - 1} layers") for line in lines)
    (warning,) = [line for line in lines if line.startswith("warning: comfyui:")]
    assert f"1 of {layers} layers" in warning
    assert "x_embedder;" in warning


def test_an_adapter_that_differs_from_training_is_not_exported(finished, monkeypatch, tmp_path, mini_flux):
    state = export.adapter_state

    def other(denoiser):
        tensors = state(denoiser)
        tensors[next(iter(tensors))] += 1
        return tensors

    monkeypatch.setattr(export, "adapter_state", other)
    with pytest.raises(ExportError, match="in 1 entries"):
        run_here(write_recipe(tmp_path, mini_flux), *QUICK, "train.steps=1")
    assert not (tmp_path / "run" / "adapter").exists()


def test_merging_reports_how_much_of_the_update_is_kept(run):
    request(run, merged=True, check=False)
    report = json.loads((run / "merged" / "merge_report.json").read_text())
    assert len(report["layers"]) == 22
    assert 0 < report["kept"] < 1.5
    strong = max(report["layers"], key=lambda layer: layer["relative"])
    assert strong["error"] < 1.5
    with stock_bitsandbytes_on_cpu():
        merged = FluxTransformer2DModel.from_pretrained(run / "merged", dtype=torch.float32)
    merged_prediction = prediction(merged, torch.float32)
    bare, adapted = (plain(run, with_adapter) for with_adapter in (False, True))
    # The merged model is closer to the adapted model than the base is, so it keeps part of the update.
    assert (merged_prediction - adapted).norm() < (bare - adapted).norm()


def plain(run, with_adapter):
    recipe = load_recipe(run / "recipe.yaml")
    model = FluxTransformer2DModel.from_pretrained(
        recipe.model.path, subfolder="transformer", dtype=torch.float32
    )
    if with_adapter:
        model.load_lora_adapter(str(run / "adapter"), prefix="transformer", weight_name=ADAPTER_FILE)
    return prediction(model, torch.float32)


def test_an_invalid_request_is_rejected_before_anything_is_written(run, tmp_path):
    before = listing(run)
    with pytest.raises(RecipeError, match=r"\b3\b.*\b2, 4\b"):
        request(run, step=3, check=False)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        request(tmp_path, check=False)
    file = run / "checkpoints" / "step-000002" / ADAPTER_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    before = listing(run)
    with pytest.raises(RecipeError, match="step-000002"):
        request(run, step=2, check=False)
    assert listing(run) == before
    (run / "checkpoints" / "step-000004" / "manifest.json").write_text("{}")
    with pytest.raises(RecipeError, match="damaged"):
        request(run, check=False)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RecipeError, match="no checkpoint"):
        request(run, check=False)


def test_options_that_the_base_does_not_support_are_rejected_first(mini_flux, run, tmp_path):
    plain = run_here(
        write_recipe(tmp_path, mini_flux, name="plain"), *QUICK, "train.steps=1", "quant.type=none"
    )
    before = listing(plain)
    for option in ("base", "merged"):
        with pytest.raises(RecipeError, match=rf"^--{option}: .*quant\.type: none"):
            request(plain, **{option: True})
    assert listing(plain) == before

    model = shutil.copytree(mini_flux, tmp_path / "model")
    config = model / "text_encoder_2" / "config.json"
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": settings}))
    written = run / "recipe.yaml"
    written.write_text(written.read_text().replace(str(mini_flux), str(model)))
    (run / "base.json").unlink()  # so the changed base is not rejected for being another one
    before = listing(run)
    with pytest.raises(RecipeError, match=r"^--text-encoder: .*text_encoder_2.*quantized"):
        request(run, base=True, text_encoder=True)
    assert listing(run) == before


def test_an_export_keeps_the_users_files(run):
    notes = [run / "adapter" / "notes.txt", run / "adapter" / "comfyui" / "workflow.json"]
    for file in notes:
        file.write_text("mine")
    request(run, formats=("diffusers",), check=False)
    assert [file.read_text() for file in notes] == ["mine", "mine"]
    assert not (run / "adapter" / "comfyui" / "dog.safetensors").exists(), "an export's own file is replaced"


def test_stock_transformers_loads_the_exported_text_encoder(run, mini_flux):
    request(run, text_encoder=True, check=False)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        packed = T5EncoderModel.from_pretrained(
            run / "text_encoder_2", dtype=torch.float32, device_map={"": "cpu"}
        ).eval()
        for module in packed.modules():
            if type(module).__name__ == "Linear4bit":
                module.train()  # bitsandbytes' eval forward repacks weights on some CPUs
        ours = load_text_encoder(
            T5EncoderModel,
            mini_flux / "text_encoder_2",
            QuantRecipe("nf4"),
            dtype=torch.bfloat16,
            device="cpu",
        )
        assert "Linear4bit" in {type(module).__name__ for module in packed.modules()}
        theirs, expected = packed(tokens)[0].float(), ours(tokens)[0].float()
    assert (theirs - expected).norm() / expected.norm() < 0.02


def test_exports_only_one_format(run):
    request(run, formats=("comfyui",), check=False)
    names = {p.name for p in (run / "adapter").rglob("*") if p.is_file()}
    assert names == {ADAPTER_FILE, PROVENANCE_FILE, "dog.safetensors"}


def test_a_check_that_crashes_says_how_to_export_without_it(run, monkeypatch, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("raise SystemExit('no room on the device')")
    monkeypatch.setattr(self_check, "_PROGRAM", program)
    before = listing(run)
    with pytest.raises(ExportError, match=r"--no-self-check(.|\n)*no room on the device"):
        request(run)
    assert listing(run) == before


@pytest.mark.gpu
def test_everything_is_checked_on_a_gpu(run):
    everything = ExportRequest(base=True, merged=True, text_encoder=True)
    check = export_run(run, everything, read_world({}), Console(quiet=True)).check
    assert not any("on the CPU" in line for line in check.checked)
    for start in (
        "diffusers: prediction on the exported transformer/",
        "exported merged/: loaded",
        "T5: loaded",
    ):
        assert any(line.startswith(start) for line in check.checked), start
