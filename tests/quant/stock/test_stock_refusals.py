"""What stock `from_pretrained` with our layers behind it refuses: by the tensor's name, and never a wrong weight."""

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
    """Class of model -> a folder with one of it, quantized."""
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


def in_full_precision(tensors, layer):
    without_statistics(tensors, layer)
    tensors[f"{layer}.weight"] = torch.zeros(64, 64)


def too_short(tensors, layer):
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"][:-1].clone()


def not_finite(tensors, layer):
    key = next(key for key in statistics_of(tensors, layer) if tensors[key].dtype == torch.float32)
    tensors[key] = torch.full_like(tensors[key], torch.nan)


def all_but_the_weight(tensors, layer):
    del tensors[f"{layer}.weight"]


def nothing(tensors, layer):
    for key in [key for key in tensors if key.startswith(f"{layer}.")]:
        del tensors[key]


def one_missing(tensors, layer):
    del tensors[f"{layer}.SCB" if f"{layer}.SCB" in tensors else f"{layer}.weight.absmax"]


def two_types(tensors, layer):
    state = next(key for key in tensors if key.startswith(f"{layer}.weight.quant_state"))
    for name in ("nf4", "fp4"):
        tensors[f"{layer}.weight.quant_state.bitsandbytes__{name}"] = tensors[state].clone()


def hostile_json(tensors, layer):
    state = next(key for key in tensors if key.startswith(f"{layer}.weight.quant_state"))
    tensors[state] = torch.tensor(list(b"[" * 3000), dtype=torch.uint8)


BAD = [without_statistics, in_full_precision, too_short, not_finite, all_but_the_weight, nothing, one_missing]
BAD_IN_4_BITS = [two_types, hostile_json]


def weights_file(folder):
    return next(folder.glob("*.safetensors"))


def damaged(folder, to, change):
    shutil.copytree(folder, to, dirs_exist_ok=True)
    tensors = load_file(weights_file(to))
    change(tensors)
    save_file(tensors, weights_file(to), metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("model_cls", [FluxTransformer2DModel, T5EncoderModel])
def test_bad_weights_are_refused_by_name(kind, model_cls, checkpoints, tmp_path):
    layer = LAYERS[model_cls]
    for change in BAD + ([] if kind == "int8" else BAD_IN_4_BITS):
        bad = damaged(checkpoints[model_cls], tmp_path, partial(change, layer=layer))
        with pytest.raises(ValueError, match=rf"^{re.escape(layer)}\."):
            model_cls.from_pretrained(bad, dtype=torch.bfloat16)


def test_what_is_not_quantized_is_refused_by_name_as_well(checkpoints, tmp_path):
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
    with pytest.raises(ValueError, match=f"^{re.escape(key)}: holds NaN"):
        T5EncoderModel.from_pretrained(bad, dtype=torch.bfloat16)
    folder = checkpoints[CLIPTextModel]
    key = next(key for key in load_file(weights_file(folder)) if key.endswith("k_proj.bias"))
    bad = damaged(folder, tmp_path / "clip", missing(key))
    with pytest.raises(ValueError, match=r"k_proj\.bias: missing from the checkpoint"):
        CLIPTextModel.from_pretrained(bad, dtype=torch.bfloat16)


def test_a_packed_weight_for_a_layer_that_is_skipped_is_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints[T5EncoderModel], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["q"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"SelfAttention\.q\.weight: packed in the file, though"):
        T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("model_cls", [FluxTransformer2DModel, T5EncoderModel])
def test_bad_weights_are_not_quantized(kind, model_cls, mini_flux, tmp_path):
    key, config = f"{LAYERS[model_cls]}.weight", CONFIGS[model_cls](**SETTINGS[kind])

    def nan(tensors):
        tensors[key][0, 0] = torch.nan

    for change, words in ((nan, ""), (lambda tensors: tensors.pop(key), "missing from the checkpoint")):
        bad = damaged(mini_flux / FOLDERS[model_cls], tmp_path, change)
        with pytest.raises(ValueError, match=f"^{re.escape(key)}: {words}"):
            model_cls.from_pretrained(bad, quantization_config=config, dtype=torch.float32)


def test_no_module_goes_to_the_disk(checkpoints, tmp_path):
    for model_cls, module in ((FluxTransformer2DModel, "proj_out"), (T5EncoderModel, "encoder.block.0")):
        with pytest.raises(ValueError, match=f"device_map: {re.escape(module)} would be on the disk"):
            model_cls.from_pretrained(
                checkpoints[model_cls], device_map={"": "cpu", module: "disk"}, offload_folder=tmp_path
            )
