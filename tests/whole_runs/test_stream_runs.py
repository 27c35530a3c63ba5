"""Runs with train.stream_blocks: bitwise the same files as other runs, from every kind of base."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.serialize import save_quantized
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.denoiser.load import load_denoiser
from halfbyte.trainer.denoiser.settings import quant_recipe
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.export import export
from halfbyte.trainer.export.export import ADAPTER_FILE
from halfbyte.trainer.export.from_run import ExportRequest, export_run
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.families.sd3.blocks import JointTransformerBlock
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.runtime.world import read_world

from runs import run_here, write_recipe

CPU = read_world({"ACCELERATE_USE_CPU": "true"})
LONGER = ("train.steps=4", "validation.held_out=1", "validation.every=2", "sample.every=2")
STREAMED = "train.stream_blocks=true"


def content(folder: Path) -> dict[str, bytes]:
    """Returns the run's files whose content does not depend on the time of day."""
    names = (
        "transformer/diffusion_pytorch_model.safetensors",
        "samples/step-000002-00.png",
        "samples/step-000004-00.png",
    )
    adapter = load_file(folder / "adapter" / ADAPTER_FILE)  # The order of its header is not fixed.
    measured = (folder / "validation.csv").read_bytes().splitlines()
    return (
        {name: (folder / name).read_bytes() for name in names}
        | {name: tensor.numpy().tobytes() for name, tensor in adapter.items()}
        | {"validation": b"".join(row for row in measured if row.startswith((b"0,", b"2,", b"4,")))}
    )


@pytest.mark.parametrize(("family", "fixture"), [("flux", "mini_flux"), ("sd3", "mini_sd3")])
def test_a_streamed_run_writes_the_same_files(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    fixture: str,
) -> None:
    """The streamed run trains, resumes in the middle, validates, samples and exports."""
    model = request.getfixturevalue(fixture)
    plain = run_here(write_recipe(tmp_path, model, family=family, name="plain"), *LONGER)
    recipe = write_recipe(tmp_path, model, family=family, name="streamed")
    run_here(recipe, *LONGER, STREAMED, "train.steps=2")
    streamed = run_here(recipe, *LONGER, STREAMED, resume=True)
    assert content(streamed) == content(plain)
    # A second export reads the base without ever placing its blocks on the device.
    (streamed / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    held = []
    save = export.save_quantized

    def noted(model: Any, folder: Path) -> None:
        layers = [part for part in model.modules() if isinstance(part, QuantizedLayer)]
        held.append(sum(layer.on_host for layer in layers) / len(layers))
        save(model, folder)

    monkeypatch.setattr(export, "save_quantized", noted)
    export_run(streamed, ExportRequest(base=True, check=False), CPU, Console(quiet=True))
    assert content(streamed) == content(plain)
    assert 0.7 < held[0] < 1


@pytest.mark.parametrize("start", ["folder", "cache", "cache again", "packed folder"])
def test_the_device_never_holds_the_blocks_while_they_load(
    mini_sd3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """Each layer of a block moves to the host as soon as its weight is loaded, whatever the source."""
    cached = str("cache" in start).lower()
    recipe = load_recipe(
        write_recipe(tmp_path, mini_sd3, family="sd3"), [STREAMED, f"model.cache_base={cached}"]
    )
    model = recipe.model
    family = FAMILIES[model.family].open(model.path, model.revision, model.max_sequence_length)
    if start == "cache again":
        load_denoiser(recipe, family, CPU, Console(quiet=True))
    if start == "packed folder":
        base = load_base(family, quant_recipe(recipe), device=CPU.device, dtype=torch.float32)
        save_quantized(base, tmp_path / "packed" / "transformer")
        shutil.copytree(mini_sd3, tmp_path / "packed", dirs_exist_ok=True, ignore=lambda *_: ["transformer"])
        family = FAMILIES[model.family].open(str(tmp_path / "packed"), None, model.max_sequence_length)
    filled, waited = list[QuantizedLayer](), list[QuantizedLayer]()
    place = QuantizedLayer.__setattr__

    def noted(layer: QuantizedLayer, name: str, value: Any) -> None:
        if name == "on_host":
            waited.extend(other for other in filled if not other.on_host and other is not layer)
        place(layer, name, value)
        if name == "weight" and not value.is_meta and layer not in filled:
            filled.append(layer)

    monkeypatch.setattr(QuantizedLayer, "__setattr__", noted)
    loaded = load_denoiser(recipe, family, CPU, Console(quiet=True))
    blocks = [module for module in loaded.denoiser.modules() if isinstance(module, JointTransformerBlock)]
    layers = [part for block in blocks for part in block.modules() if isinstance(part, QuantizedLayer)]
    assert len(layers) > 30
    assert all(layer.on_host for layer in layers)
    # While a layer loads, only layers outside the blocks are on the device.
    assert waited
    assert not any(layer is other for layer in layers for other in waited)


@pytest.mark.parametrize("other", ["quant.type=none", "lora.dora=true"])
def test_settings_that_cannot_be_streamed_are_refused(mini_flux: Any, tmp_path: Path, other: str) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    with pytest.raises(RecipeError, match=r"train\.stream_blocks(=true)?: .*true.*false"):
        load_recipe(recipe, [STREAMED, other])


def test_blocks_without_packed_layers_are_refused(mini_flux: Any, tmp_path: Path) -> None:
    skip = "quant.skip=[transformer_blocks, single_transformer_blocks]"
    recipe = load_recipe(write_recipe(tmp_path, mini_flux), [STREAMED, skip, "model.cache_base=false"])
    family = FAMILIES["flux"].open(recipe.model.path, None, 24)
    with pytest.raises(RecipeError, match=r"train\.stream_blocks: .*true.*quant\.skip"):
        load_denoiser(recipe, family, CPU, Console(quiet=True))
