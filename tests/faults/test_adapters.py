"""Tests that an adapter that is damaged or does not fit is refused before anything is encoded."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from opened_model import TRANSFORMER, copy_of, edit_tensors
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.quant.files.digest import sha256_file
from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.trainer.adapters.read import read_layers
from halfbyte.trainer.adapters.saved import read_tensors
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run import run
from halfbyte.trainer.runtime.world import read_world

from runs import write_recipe

FORMS = {
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "_"),
    "ComfyUI": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", "."),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", "."),
}


def opened(family: str, model: Path) -> Family:
    return FAMILIES[family].describe(str(model), None, 24)


def layers_of(model: Path) -> dict[str, tuple[int, int]]:
    """Returns outputs and inputs of each linear layer of the transformer's blocks, by diffusers' name."""
    tensors = load_file(model / TRANSFORMER)
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and "blocks." in name and ".norm" not in name
    }


def write_lora(
    file: Path, shapes: Mapping[str, tuple[int, int]], form: str, rank: int = 4
) -> dict[str, Tensor]:
    """Writes random updates under diffusers' names in one of FORMS; returns each update."""
    down, up, dots = FORMS[form]
    tensors, updates = {}, {}
    for name, (outputs, inputs) in shapes.items():
        a, b = torch.randn(rank, inputs), torch.randn(outputs, rank)
        updates[name] = b @ a
        key = name.replace(".", dots)
        tensors |= {down.format(key): a, up.format(key): b}
    save_file(tensors, file)
    return updates


@pytest.mark.parametrize("form", ["kohya", "ComfyUI"])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_diffusers_names_in_the_form_of_other_tools_are_read(
    tmp_path: Path, mini_flux: Path, mini_sd3: Path, family: str, form: str
) -> None:
    model = mini_flux if family == "flux" else mini_sd3
    updates = write_lora(tmp_path / "lora.safetensors", layers_of(model), form)
    read = read_layers(tmp_path / "lora.safetensors", opened(family, model).original_names())
    assert read.keys() == updates.keys()
    for name, layer in read.items():
        torch.testing.assert_close(layer.scale * layer.up @ layer.down, updates[name])


def refusal(tmp_path: Path, model: Path, *overrides: str) -> str:
    """Returns the message with which a run is refused, which must have encoded nothing."""
    recipe = load_recipe(write_recipe(tmp_path, model), overrides)
    world = read_world({"ACCELERATE_USE_CPU": "true"})
    with pytest.raises(RecipeError) as refused:
        run(recipe, world, console=Console(quiet=True), resume=False)
    encoded = [
        path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.parent.name != "digests"
    ]
    assert not encoded
    assert not recipe.output.dir.exists()
    return str(refused.value)


def test_an_adapter_that_does_not_fit_the_recipe_is_refused_before_encoding(
    tmp_path: Path, mini_flux: Path
) -> None:
    shapes = layers_of(mini_flux)
    file = tmp_path / "lora.safetensors"
    init_from = f"lora.init_from={file}"

    write_lora(file, shapes, "diffusers", rank=8)
    assert "lora.rank: 8" in refusal(tmp_path, mini_flux, init_from)

    write_lora(file, shapes, "diffusers")
    message = refusal(tmp_path, mini_flux, init_from, "lora.targets=attention")
    assert message.startswith("lora.init_from: ")
    assert "lora.targets" in message

    name, (outputs, inputs) = next(iter(shapes.items()))
    write_lora(file, {name: (outputs + 1, inputs)}, "diffusers")
    assert f"{name} has shape {outputs + 1} x {inputs}" in refusal(tmp_path, mini_flux, init_from)

    write_lora(file, shapes, "diffusers")
    edit_tensors(
        file,
        lambda t: t.update(
            {
                f"transformer.{name}.lora_magnitude_vector": torch.ones(shape[0])
                for name, shape in shapes.items()
            }
        ),
    )
    assert "lora.dora: true" in refusal(tmp_path, mini_flux, init_from)


def test_a_wrong_single_file_is_refused_before_encoding(tmp_path: Path, mini_flux: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"img_in.weight": torch.zeros(3, 3)}, file)
    message = refusal(tmp_path, mini_flux, f"model.transformer={file}")
    assert message.startswith(f"model.transformer: {file}: ")
    assert "missing" in message


def original_file(model: Path, file: Path, family: Family) -> None:
    """Writes the transformer as its authors do, in one file."""
    own = load_file(model / TRANSFORMER)
    tensors = {}
    for original in family.original_names():
        leaves = ("weight", "bias") if original.leaf == "weight" else (original.leaf,)
        for leaf in leaves:
            parts = [own[f"{part}.{'bias' if leaf == 'bias' else 'weight'}"] for part in original.parts]
            tensors[f"{original.name}.{leaf}"] = torch.cat(parts).clone()
    save_file(tensors, file)


def test_a_single_file_of_another_shape_or_with_exact_layers_is_refused_before_encoding(
    tmp_path: Path, mini_flux: Path
) -> None:
    file = tmp_path / "flux.safetensors"
    original_file(mini_flux, file, opened("flux", mini_flux))
    message = refusal(tmp_path, mini_flux, f"model.transformer={file}", "quant.exact=[proj_out]")
    assert message.startswith("quant.exact: ")
    assert str(file) in message
    edit_tensors(file, lambda t: t.update({"img_in.bias": torch.zeros(3)}))
    message = refusal(tmp_path, mini_flux, f"model.transformer={file}")
    assert "x_embedder.bias" in message


def test_every_flipped_bit_of_a_checkpoints_adapter_is_found(tmp_path: Path, mini_flux: Path) -> None:
    file = tmp_path / "step-000004" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    shapes = dict(list(layers_of(mini_flux).items())[:2])
    updates = write_lora(file, shapes, "diffusers")
    file.with_name("manifest.json").write_text(json.dumps({file.name: sha256_file(file)}))
    names = opened("flux", mini_flux).original_names()
    assert read_layers(file, names).keys() == updates.keys()
    content = file.read_bytes()
    for place in range(0, len(content), len(content) // 97):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        with pytest.raises(RecipeError, match=re.escape(str(file)) + ": does not match its checksum"):
            read_layers(file, names)
    file.write_bytes(content)
    file.with_name("manifest.json").write_text("{")
    with pytest.raises(RecipeError, match=r"manifest\.json: not a JSON file"):
        read_layers(file, names)


def test_a_tensor_type_that_torch_does_not_have_is_a_message(tmp_path: Path) -> None:
    header = {"transformer.a.lora_A.weight": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}
    encoded = json.dumps(header).encode()
    file = tmp_path / "lora.safetensors"
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"0")
    with pytest.raises(RecipeError, match="F8_E8M0"):
        read_tensors(file)


def test_a_manifest_of_another_program_is_ignored(tmp_path: Path, mini_flux: Path) -> None:
    file = tmp_path / "lora.safetensors"
    write_lora(file, dict(list(layers_of(mini_flux).items())[:1]), "diffusers")
    foreign: list[dict[str, Any]] = [{}, {"name": "site"}, {file.name: 5}, {file.name: "1.0"}]
    for manifest in foreign:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        assert read_tensors(file)[0]


def test_values_that_were_read_do_not_change_with_their_file(tmp_path: Path, mini_flux: Path) -> None:
    """A mapped file would change the values, and end the process with a bus error where it is cut."""
    lora = tmp_path / "lora.safetensors"
    write_lora(lora, layers_of(mini_flux), "diffusers")
    model = copy_of(mini_flux, tmp_path / "model")
    edit_tensors(model / TRANSFORMER, lambda t: None)
    with ShardedWeights(model / "transformer") as weights:
        name = weights.names[0]
        read, adapter = weights.read(name), read_tensors(lora)[0]
        expected = read.clone(), {key: tensor.clone() for key, tensor in adapter.items()}
        for file in (lora, model / TRANSFORMER):
            with file.open("r+b") as opened_file:
                opened_file.truncate(100)
        assert torch.equal(read, expected[0])
        assert all(torch.equal(adapter[key], tensor) for key, tensor in expected[1].items())
        with pytest.raises(ValueError, match="became shorter"):
            weights.read(name)
