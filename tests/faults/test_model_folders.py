"""Tests that damaged model folders end with one message that names the file, and never run their code."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from opened_model import (
    CLIP,
    LFS_POINTER,
    TRANSFORMER,
    VAE,
    copy_of,
    edit_json,
    edit_tensors,
    open_and_encode,
    replace,
)

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.load.serialize import save_quantized
from halfbyte.quant.load.transformer import load_quantized
from halfbyte.trainer.errors import RecipeError

Damage = Callable[[Path], object]

DEEP = "[" * 100_000
FLUX_INDEX, DENOISER, VAE_CONFIG = "model_index.json", "transformer/config.json", "vae/config.json"
CLIP_CONFIG, T5_CONFIG = "text_encoder/config.json", "text_encoder_2/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


def set_to(file: str, key: str, value: Any) -> tuple[str, Damage]:
    return file, lambda model: edit_json(model / file, lambda content: content.update({key: value}))


def without(file: str, key: str) -> tuple[str, Damage]:
    return file, lambda model: edit_json(model / file, lambda content: content.pop(key))


def content(file: str, text: str | bytes) -> tuple[str, Damage]:
    return file, lambda model: replace(model / file, text)


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> tuple[str, Damage]:
    return file.rpartition("/")[0], lambda model: edit_tensors(model / file, change)


def as_fifo(file: str) -> tuple[str, Damage]:
    def replaced(model: Path) -> None:
        (model / file).unlink()
        os.mkfifo(model / file)

    return file.partition("/")[0], replaced


def repository_code(file: str, entry: list[str]) -> tuple[str, Damage]:
    """Names a class of the repository, whose module would leave a file behind if it were imported."""

    def damage(model: Path) -> None:
        part = "text_encoder"
        module = f"open({str(model / 'RAN')!r}, 'w').close()\nclass Own: pass\nCLIPTextModel = Own\n"
        replace(model / part / "own_code.py", module)
        replace(model / "own_code.py", module)
        edit_json(model / file, lambda c: c.update({part: entry}))

    return file, damage


def auto_map(file: str, **more: Any) -> tuple[str, Damage]:
    def damage(model: Path) -> None:
        folder = (model / file).parent
        replace(folder / "own_code.py", f"open({str(model / 'RAN')!r}, 'w').close()\nclass Own: pass\n")
        names = {"AutoModel": "own_code.Own", "AutoConfig": "own_code.Own"}
        edit_json(model / file, lambda c: c.update({"auto_map": names, **more}))

    return file, damage


FAULTS: dict[str, tuple[str, Damage]] = {
    # the pipeline's index
    "index empty": content(FLUX_INDEX, ""),
    "index a list": content(FLUX_INDEX, "[]"),
    "index deep": content(FLUX_INDEX, DEEP),
    "index binary": content(FLUX_INDEX, b"\xff\xfe\x00"),
    "index pointer": content(FLUX_INDEX, LFS_POINTER),
    "transformer a number": set_to(FLUX_INDEX, "transformer", 5),
    "transformer a text": set_to(FLUX_INDEX, "transformer", "FluxTransformer2DModel"),
    "transformer short": set_to(FLUX_INDEX, "transformer", ["diffusers"]),
    "vae of numbers": set_to(FLUX_INDEX, "vae", [1, 2]),
    "vae an object": set_to(FLUX_INDEX, "vae", {"class": "AutoencoderKL"}),
    "vae another class": set_to(FLUX_INDEX, "vae", ["diffusers", "AutoencoderTiny"]),
    "clip another class": set_to(FLUX_INDEX, "text_encoder", ["transformers", "BertModel"]),
    "tokenizer another class": set_to(FLUX_INDEX, "tokenizer_2", ["transformers", "BertTokenizer"]),
    "scheduler another class": set_to(FLUX_INDEX, "scheduler", ["diffusers", "DPMSolverMultistepScheduler"]),
    "clip in own code": repository_code(FLUX_INDEX, ["own_code", "Own"]),
    "clip in own code with a known name": repository_code(FLUX_INDEX, ["own_code", "CLIPTextModel"]),
    # the transformer
    "denoiser empty": content(DENOISER, "{}"),
    "denoiser deep": content(DENOISER, DEEP),
    "denoiser null": content(DENOISER, "null"),
    "denoiser pointer": content(DENOISER, LFS_POINTER),
    "denoiser own code": auto_map(DENOISER),
    "no in_channels": without(DENOISER, "in_channels"),
    "in_channels a text": set_to(DENOISER, "in_channels", "64"),
    "no heads": without(DENOISER, "num_attention_heads"),
    "heads 0": set_to(DENOISER, "num_attention_heads", 0),
    "guidance a text": set_to(DENOISER, "guidance_embeds", "yes"),
    "no guidance": without(DENOISER, "guidance_embeds"),
    "a billion layers": set_to(DENOISER, "num_layers", 10**9),
    "900 layers": set_to(DENOISER, "num_layers", 900),
    "layers negative": set_to(DENOISER, "num_single_layers", -3),
    "layers a huge number": set_to(DENOISER, "num_layers", 10**300),
    "huge head": set_to(DENOISER, "attention_head_dim", 10**12),
    "large head": set_to(DENOISER, "attention_head_dim", 2**20),
    "rope of other sizes": set_to(DENOISER, "axes_dims_rope", [8, 12, 13]),
    "rope of texts": set_to(DENOISER, "axes_dims_rope", ["a", "b"]),
    "denoiser's class": set_to(DENOISER, "_class_name", ["Flux"]),
    "quantization a list": set_to(DENOISER, "quantization_config", []),
    "denoiser's tensor missing": tensors(TRANSFORMER, lambda t: t.pop("proj_out.bias")),
    "denoiser's tensor added": tensors(TRANSFORMER, lambda t: t.update(x=torch.zeros(2))),
    "denoiser's shape": tensors(TRANSFORMER, lambda t: t.update({"proj_out.bias": torch.zeros(3)})),
    "denoiser's weights a pointer": content(TRANSFORMER, LFS_POINTER),
    "denoiser's weights a pipe": as_fifo(TRANSFORMER),
    # the VAE
    "vae empty": content(VAE_CONFIG, "{}"),
    "vae deep": content(VAE_CONFIG, DEEP),
    "no scaling": without(VAE_CONFIG, "scaling_factor"),
    "scaling null": set_to(VAE_CONFIG, "scaling_factor", None),
    "scaling NaN": set_to(VAE_CONFIG, "scaling_factor", float("nan")),
    "no shift": without(VAE_CONFIG, "shift_factor"),
    "shift a text": set_to(VAE_CONFIG, "shift_factor", "0.1"),
    "channels a number": set_to(VAE_CONFIG, "block_out_channels", 16),
    "channels empty": set_to(VAE_CONFIG, "block_out_channels", []),
    "channels deep": set_to(VAE_CONFIG, "block_out_channels", [[16], [16], [32], [32]]),
    "blocks unknown": set_to(VAE_CONFIG, "down_block_types", ["Own"] * 4),
    "vae's layers": set_to(VAE_CONFIG, "layers_per_block", 10**9),
    "groups 0": set_to(VAE_CONFIG, "norm_num_groups", 0),
    "vae another class in its file": set_to(VAE_CONFIG, "_class_name", "AutoencoderTiny"),
    "vae's weights a pipe": as_fifo(VAE),
    # CLIP and T5
    "clip deep": content(CLIP_CONFIG, DEEP),
    "clip a list": content(CLIP_CONFIG, "[1]"),
    "clip own code": auto_map(CLIP_CONFIG, architectures=["Own"], model_type="own"),
    "clip's layers": set_to(CLIP_CONFIG, "num_hidden_layers", 10**9),
    "clip's width": set_to(CLIP_CONFIG, "hidden_size", 10**9),
    "clip's heads": set_to(CLIP_CONFIG, "num_attention_heads", 0),
    "clip's heads a text": set_to(CLIP_CONFIG, "num_attention_heads", "two"),
    "clip's activation": set_to(CLIP_CONFIG, "hidden_act", "own"),
    "clip's architecture": set_to(CLIP_CONFIG, "architectures", 5),
    "clip's positions": set_to(CLIP_CONFIG, "max_position_embeddings", 16),
    "t5 deep": content(T5_CONFIG, DEEP),
    "t5's layers": set_to(T5_CONFIG, "num_layers", 10**9),
    "t5's width": set_to(T5_CONFIG, "d_model", 2**20),
    "t5's quantization": set_to(T5_CONFIG, "quantization_config", {"quant_method": "gguf"}),
    "t5 own code": auto_map(T5_CONFIG),
    # the scheduler
    "scheduler deep": content(SCHEDULER, DEEP),
    "scheduler another class in its file": set_to(SCHEDULER, "_class_name", "DPMSolverMultistepScheduler"),
    "scheduler's shift": set_to(SCHEDULER, "shift", "three"),
    "scheduler's steps": set_to(SCHEDULER, "num_train_timesteps", 10**12),
    "scheduler's flag": set_to(SCHEDULER, "use_dynamic_shifting", "yes"),
    "scheduler's kind": set_to(SCHEDULER, "time_shift_type", "own"),
}


def names_file(message: str, model: Path, file: str) -> bool:
    """Tests whether a message names the file, or for a contradiction to the weights, the folder of both."""
    part = file.partition("/")[0]
    return file in message or f"{part} missing" in message or f"{model / part}/" in message


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused_by_file(tmp_path: Path, mini_flux: Path, fault: str) -> None:
    model = copy_of(mini_flux, tmp_path / "model")
    file, damage = FAULTS[fault]
    damage(model)
    with pytest.raises(RecipeError) as refused:
        open_and_encode("flux", model, tmp_path / "memo")
    message = str(refused.value)
    assert message.startswith("model.")
    assert names_file(message, model, file)
    assert len(message) < 2000
    assert not (model / "RAN").exists()


SD3_FAULTS: dict[str, tuple[str, Damage]] = {
    "a huge table of positions": set_to(DENOISER, "pos_embed_max_size", 2**20),
    "positions a text": set_to(DENOISER, "pos_embed_max_size", "32"),
    "dual layers a number": set_to(DENOISER, "dual_attention_layers", 3),
    "dual layers of texts": set_to(DENOISER, "dual_attention_layers", ["0"]),
    "patches": set_to(DENOISER, "patch_size", 4),
    "norm": set_to(DENOISER, "qk_norm", "own"),
    "layers": set_to(DENOISER, "num_layers", 10**9),
    "second clip's projection": set_to("text_encoder_2/config.json", "projection_dim", 5),
    "second clip's class": set_to(FLUX_INDEX, "text_encoder_2", ["transformers", "CLIPTextModel"]),
    "third encoder's width": set_to("text_encoder_3/config.json", "d_kv", 10**9),
    "clip's tensor": tensors(CLIP, lambda t: t.pop("text_projection.weight")),
}


@pytest.mark.parametrize("fault", SD3_FAULTS)
def test_a_damaged_sd3_folder_is_refused_by_file(tmp_path: Path, mini_sd3: Path, fault: str) -> None:
    model = copy_of(mini_sd3, tmp_path / "model")
    file, damage = SD3_FAULTS[fault]
    damage(model)
    with pytest.raises(RecipeError) as refused:
        open_and_encode("sd3", model, tmp_path / "memo")
    assert names_file(str(refused.value), model, file)


VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    3,
    10**9,
    10**40,
    0.5,
    float("nan"),
    "",
    "own",
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
]
CONFIGURATIONS = ("model_index.json", DENOISER, VAE_CONFIG, CLIP_CONFIG, T5_CONFIG, SCHEDULER)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_any_value_in_a_configuration_is_used_or_refused_in_one_message(
    tmp_path: Path, mini_flux: Path, mini_sd3: Path, family: str, seed: int
) -> None:
    """Other exceptions than RecipeError are tracebacks for the user."""
    chosen = random.Random(f"{family} {seed}")
    model = copy_of(mini_flux if family == "flux" else mini_sd3, tmp_path / "model")
    file = model / chosen.choice(CONFIGURATIONS)
    configuration = json.loads(file.read_text())
    for key in chosen.sample(sorted(configuration), k=2):
        configuration[key] = chosen.choice(VALUES)
    replace(file, json.dumps(configuration))
    refused = ""
    try:
        text, latents = open_and_encode(family, model, tmp_path / "memo")
        assert text.prompt_embeds.isfinite().all()
        assert latents.mean.isfinite().all()
    except RecipeError as error:
        refused = str(error)
    assert not refused or refused.startswith("model.")


def test_a_loaded_packed_base_does_not_change_with_its_files(tmp_path: Path, mini_flux: Path) -> None:
    """A mapped file would end the process with a bus error where it is cut."""
    recipe = QuantRecipe("nf4", compute_dtype=torch.float32)
    made = load_quantized(
        FluxTransformer2DModel, mini_flux / "transformer", recipe, dtype=torch.float32, device="cpu"
    )
    save_quantized(made, tmp_path / "packed")
    loaded = load_quantized(
        FluxTransformer2DModel, tmp_path / "packed", recipe, dtype=torch.float32, device="cpu"
    )
    for file in (tmp_path / "packed").glob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.truncate(100)
    expected = made.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
