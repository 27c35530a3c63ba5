"""Tests that `from_pretrained` with our layers rejects damaged checkpoints and names the tensor."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig as TransformersBitsAndBytesConfig
from transformers import CLIPTextModel, T5EncoderModel

from judge import our_layers_on_cpu

SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}
FOLDERS = {
    FluxTransformer2DModel: "transformer",
    T5EncoderModel: "text_encoder_2",
    CLIPTextModel: "text_encoder",
}
CONFIGS = {
    FluxTransformer2DModel: BitsAndBytesConfig,
    T5EncoderModel: TransformersBitsAndBytesConfig,
    CLIPTextModel: TransformersBitsAndBytesConfig,
}
LAYERS = {FluxTransformer2DModel: "x_embedder", T5EncoderModel: "encoder.block.0.layer.0.SelfAttention.q"}


@pytest.fixture(autouse=True, scope="module")
def ours():
    with our_layers_on_cpu():
        yield


@pytest.fixture(scope="module", params=SETTINGS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoints(ours, kind, mini_flux, tmp_path_factory):
    """Saves a quantized model of each class; returns class -> folder."""
    folders = {}
    for model_cls, name in FOLDERS.items():
        folders[model_cls] = tmp_path_factory.mktemp("good") / name
        config = CONFIGS[model_cls](**SETTINGS[kind])
        model = model_cls.from_pretrained(mini_flux / name, quantization_config=config, dtype=torch.float32)
        model.save_pretrained(folders[model_cls])
    return folders


def statistics_of(tensors, layer):
    return [key for key in tensors if key.startswith(f"{layer}.weight.") or key == f"{layer}.SCB"]


def without_statistics(tensors, layer):
    for key in statistics_of(tensors, layer):
        del tensors[key]


def with_full_precision_weight(tensors, layer):
    without_statistics(tensors, layer)
    tensors[f"{layer}.weight"] = torch.zeros(64, 64)


def with_short_weight(tensors, layer):
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"][:-1].clone()


def with_nan_statistic(tensors, layer):
    key = next(key for key in statistics_of(tensors, layer) if tensors[key].dtype == torch.float32)
    tensors[key] = torch.full_like(tensors[key], torch.nan)


def without_weight(tensors, layer):
    del tensors[f"{layer}.weight"]


def without_layer(tensors, layer):
    for key in [key for key in tensors if key.startswith(f"{layer}.")]:
        del tensors[key]


def without_scales(tensors, layer):
    del tensors[f"{layer}.SCB" if f"{layer}.SCB" in tensors else f"{layer}.weight.absmax"]


def with_two_types(tensors, layer):
    state = next(key for key in tensors if key.startswith(f"{layer}.weight.quant_state"))
    for name in ("nf4", "fp4"):
        tensors[f"{layer}.weight.quant_state.bitsandbytes__{name}"] = tensors[state].clone()


def with_hostile_json(tensors, layer):
    state = next(key for key in tensors if key.startswith(f"{layer}.weight.quant_state"))
    tensors[state] = torch.tensor(list(b"[" * 3000), dtype=torch.uint8)


BAD = [
    without_statistics,
    with_full_precision_weight,
    with_short_weight,
    with_nan_statistic,
    without_weight,
    without_layer,
    without_scales,
]
BAD_IN_4_BITS = [with_two_types, with_hostile_json]


def weights_file(folder):
    return next(folder.glob("*.safetensors"))


def damaged(folder, to, change):
    shutil.copytree(folder, to, dirs_exist_ok=True)
    tensors = load_file(weights_file(to))
    change(tensors)
    save_file(tensors, weights_file(to), metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("model_cls", [FluxTransformer2DModel, T5EncoderModel])
def test_damaged_quantized_weights_are_rejected_by_name(kind, model_cls, checkpoints, tmp_path):
    layer = LAYERS[model_cls]
    for change in BAD + ([] if kind == "int8" else BAD_IN_4_BITS):
        bad = damaged(checkpoints[model_cls], tmp_path, partial(change, layer=layer))
        with pytest.raises(ValueError, match=rf"^{re.escape(layer)}\."):
            model_cls.from_pretrained(bad, dtype=torch.bfloat16)


def test_damaged_unquantized_tensors_are_rejected_by_name(checkpoints, tmp_path):
    def nan(key):
        def change(tensors):
            tensors[key] = torch.full_like(tensors[key], torch.nan)

        return change

    def missing(key):
        return lambda tensors: tensors.pop(key)

    for key in ("x_embedder.bias", "transformer_blocks.0.attn.norm_q.weight"):
        for change in (nan(key), missing(key)):
            bad = damaged(checkpoints[FluxTransformer2DModel], tmp_path / "flux", change)
            with pytest.raises(ValueError, match=f"^{re.escape(key)}: "):
                FluxTransformer2DModel.from_pretrained(bad, dtype=torch.bfloat16)
    key = "shared.weight"
    bad = damaged(checkpoints[T5EncoderModel], tmp_path / "t5", nan(key))
    with pytest.raises(ValueError, match=f"^{re.escape(key)}: .*NaN"):
        T5EncoderModel.from_pretrained(bad, dtype=torch.bfloat16)
    folder = checkpoints[CLIPTextModel]
    key = next(key for key in load_file(weights_file(folder)) if key.endswith("k_proj.bias"))
    bad = damaged(folder, tmp_path / "clip", missing(key))
    with pytest.raises(ValueError, match=r"k_proj\.bias: missing"):
        CLIPTextModel.from_pretrained(bad, dtype=torch.bfloat16)


def test_packed_weight_of_a_skipped_layer_is_rejected(checkpoints, tmp_path):
    shutil.copytree(checkpoints[T5EncoderModel], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["q"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"SelfAttention\.q\.weight: .*quantization_config"):
        T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("model_cls", [FluxTransformer2DModel, T5EncoderModel])
def test_damaged_weights_are_not_quantized(kind, model_cls, mini_flux, tmp_path):
    key, config = f"{LAYERS[model_cls]}.weight", CONFIGS[model_cls](**SETTINGS[kind])

    def nan(tensors):
        tensors[key][0, 0] = torch.nan

    for change, pattern in ((nan, ".*NaN"), (lambda tensors: tensors.pop(key), "missing")):
        bad = damaged(mini_flux / FOLDERS[model_cls], tmp_path, change)
        with pytest.raises(ValueError, match=f"^{re.escape(key)}: {pattern}"):
            model_cls.from_pretrained(bad, quantization_config=config, dtype=torch.float32)


def test_modules_on_the_disk_are_rejected(checkpoints, tmp_path):
    for model_cls, module in ((FluxTransformer2DModel, "proj_out"), (T5EncoderModel, "encoder.block.0")):
        with pytest.raises(ValueError, match=f"^device_map: {re.escape(module)} .*disk"):
            model_cls.from_pretrained(
                checkpoints[model_cls], device_map={"": "cpu", module: "disk"}, offload_folder=tmp_path
            )
