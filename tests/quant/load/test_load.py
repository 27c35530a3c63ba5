"""Tests loading a folder into 4-bit layers: bits equal to bitsandbytes', memory, and errors that name the file."""

import json
import logging
import shutil
import weakref

import bitsandbytes as bnb
import pytest
import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.files.read_ahead import ReadAhead
from halfbyte.quant.files.shards import INDEX_FILE, WEIGHTS_FILE
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.load.serialize import save_quantized
from halfbyte.quant.load.transformer import load_quantized

from judge import stock_bitsandbytes_on_cpu
from probe import prediction

CLASSES = [FluxTransformer2DModel, SD3Transformer2DModel]


def folder_of(model_cls, request):
    name = "mini_flux" if model_cls is FluxTransformer2DModel else "mini_sd3"
    return request.getfixturevalue(name) / "transformer"


def load(folder, recipe=None, model_cls=SD3Transformer2DModel, dtype=torch.bfloat16, **options):
    return load_quantized(model_cls, folder, recipe, dtype=dtype, device="cpu", **options)


@pytest.fixture
def sd3(mini_sd3, tmp_path):
    """Returns a copy of the tiny SD3 transformer's folder, which a test can damage."""
    return shutil.copytree(mini_sd3 / "transformer", tmp_path / "transformer")


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})


@pytest.mark.parametrize("model_cls", CLASSES)
@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_scales_equal_those_of_from_pretrained_with_bitsandbytes(
    model_cls, stored_dtype, request, tmp_path
):
    source = model_cls.from_pretrained(folder_of(model_cls, request), torch_dtype=stored_dtype)
    source.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["proj_out"],
    )
    with stock_bitsandbytes_on_cpu():
        stock = model_cls.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, quantization_config=config)
    ours = load(tmp_path, QuantRecipe(double_quant=False, skip=("proj_out",)), model_cls)
    expected, loaded = stock.state_dict(), ours.state_dict()
    assert list(loaded) == list(expected)
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name
    assert not ours.training
    assert torch.equal(prediction(ours), prediction(stock))


@pytest.mark.parametrize("model_cls", CLASSES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_folder_of_bitsandbytes_loads_bitwise_identical(
    model_cls, quant_type, double_quant, request, tmp_path
):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    folder = folder_of(model_cls, request)
    with stock_bitsandbytes_on_cpu():
        stock = model_cls.from_pretrained(folder, torch_dtype=torch.bfloat16, quantization_config=config)
    stock.save_pretrained(tmp_path / "stock")
    ours = load(tmp_path / "stock", model_cls=model_cls)
    for path, module in stock.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(ours.get_submodule(path).dequantize(), weight), path
    assert torch.equal(prediction(ours), prediction(stock))
    save_quantized(ours, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS_FILE).read_bytes() == (
        tmp_path / "stock" / WEIGHTS_FILE
    ).read_bytes()


@pytest.mark.parametrize("model_cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_recipe_the_model_equals_from_pretrained(model_cls, dtype, request):
    folder = folder_of(model_cls, request)
    stock = model_cls.from_pretrained(folder, torch_dtype=dtype)
    ours = load(folder, model_cls=model_cls, dtype=dtype)
    expected, loaded = stock.state_dict(), ours.state_dict()
    assert list(loaded) == list(expected)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert all(loaded[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert {name: p.requires_grad for name, p in ours.named_parameters()} == {
        name: p.requires_grad for name, p in stock.named_parameters()
    }
    assert not any(tensor.is_meta for tensor in ours.buffers())
    assert torch.equal(prediction(ours, dtype), prediction(stock, dtype))


def test_shards_load_like_a_single_file(mini_sd3, tmp_path):
    whole = mini_sd3 / "transformer"
    SD3Transformer2DModel.from_pretrained(whole).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ours, expected = load(tmp_path, QuantRecipe()), load(whole, QuantRecipe())
    assert torch.equal(prediction(ours), prediction(expected))


def test_weight_and_statistics_may_be_in_different_files(mini_sd3, tmp_path):
    save_quantized(load(mini_sd3 / "transformer", QuantRecipe()), tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / WEIGHTS_FILE)
    parts = [{n: t for n, t in tensors.items() if ("absmax" in n) == is_scale} for is_scale in (False, True)]
    separate = tmp_path / "separate"
    separate.mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", separate)
    files = ["a.safetensors", "b.safetensors"]
    for part, file in zip(parts, files, strict=True):
        save_file(part, separate / file)
    weight_map = {name: file for part, file in zip(parts, files, strict=True) for name in part}
    (separate / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(prediction(load(separate)), prediction(load(tmp_path / "whole")))


def test_tensor_in_two_shards_is_rejected(mini_sd3, tmp_path):
    SD3Transformer2DModel.from_pretrained(mini_sd3 / "transformer").save_pretrained(
        tmp_path, max_shard_size="200KB"
    )
    weight_map = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map["proj_out.weight"])
    save_file(load_file(tmp_path / other) | {"proj_out.weight": torch.zeros(1)}, tmp_path / other)
    with pytest.raises(ValueError, match=rf"{other}: .*proj_out\.weight.*{weight_map['proj_out.weight']}"):
        load(tmp_path, QuantRecipe())


@pytest.mark.parametrize("recipe", [QuantRecipe(skip=("proj_out",)), QuantRecipe("int8")])
def test_few_full_precision_weights_are_in_memory_while_loading(mini_sd3, monkeypatch, recipe):
    full_weights, most_alive = [], 0
    finished = ReadAhead._finished

    def counted(self, name):
        nonlocal most_alive
        tensor = finished(self, name)
        if tensor.dim() == 2:
            full_weights.append(weakref.ref(tensor))
        most_alive = max(most_alive, sum(ref() is not None for ref in full_weights))
        return tensor

    monkeypatch.setattr(ReadAhead, "_finished", counted)
    load(mini_sd3 / "transformer", recipe)
    assert len(full_weights) > 20
    # The weight to place next, the one before it, and the two unquantized weights, which stay in the model.
    assert most_alive <= 4


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [True, False])
def test_gpu_quantizes_to_the_same_codes_as_the_cpu(mini_sd3, double_quant):
    recipe = QuantRecipe(double_quant=double_quant)
    on_cpu = load(mini_sd3 / "transformer", recipe).state_dict()
    on_gpu = load_quantized(
        SD3Transformer2DModel, mini_sd3 / "transformer", recipe, dtype=torch.bfloat16, device="cuda"
    )
    assert all(parameter.is_cuda for parameter in on_gpu.parameters())
    for name, tensor in on_gpu.state_dict().items():
        if not double_quant or name.endswith((".weight", ".bias")):
            assert torch.equal(tensor.cpu(), on_cpu[name]), name


@pytest.mark.parametrize("quantized_before", [False, True])
def test_progress_reports_bytes(mini_sd3, tmp_path, quantized_before):
    folder = mini_sd3 / "transformer"
    if quantized_before:
        save_quantized(load(folder, QuantRecipe()), tmp_path / "q")
        folder = tmp_path / "q"
    calls = []
    load(folder, QuantRecipe(), progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS_FILE).values())
    assert calls[-1] == (total, total)
    assert {call[1] for call in calls} == {total}
    assert [call[0] for call in calls] == sorted({call[0] for call in calls})
    assert len(calls) > 50


def test_quantized_folder_keeps_its_settings_and_warns_about_differences(mini_sd3, tmp_path, caplog):
    save_quantized(load(mini_sd3 / "transformer", QuantRecipe("fp4", skip=("proj_out",))), tmp_path / "q")
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path / "q", QuantRecipe("nf4", compute_dtype=torch.float32))
    (record,) = caplog.records
    assert record.args[0] == tmp_path / "q"
    assert "fp4" in record.getMessage()
    assert "nf4" in record.getMessage()
    layer = model.transformer_blocks[0].attn.to_q
    assert (layer.spec.quant_type, layer.compute_dtype) == ("fp4", torch.float32)
    assert not isinstance(model.proj_out, Linear4bit)
    caplog.clear()
    load(tmp_path / "q", QuantRecipe("fp4", skip=("proj_out",), compute_dtype=torch.float16))
    assert not caplog.records


def test_missing_and_unexpected_tensors_are_both_named(sd3):
    rewrite(sd3, lambda tensors: tensors.update(surplus=tensors.pop("proj_out.bias")))
    with pytest.raises(ValueError, match=r"1 missing \(proj_out\.bias\); 1 unexpected \(surplus\)"):
        load(sd3, QuantRecipe())


@pytest.mark.parametrize("name", ["proj_out.weight", "proj_out.bias", "pos_embed.pos_embed"])
@pytest.mark.parametrize("recipe", [QuantRecipe(), None])
def test_wrong_shape_is_rejected_with_tensor_and_file(sd3, name, recipe):
    rewrite(sd3, lambda tensors: tensors.update({name: tensors[name][..., :-1].contiguous()}))
    with pytest.raises(ValueError, match=WEIGHTS_FILE + f": {name}: .*shape"):
        load(sd3, recipe)


def test_weight_that_is_not_finite_is_rejected_with_tensor_and_file(sd3):
    rewrite(sd3, lambda tensors: tensors["proj_out.weight"].view(-1)[3].fill_(float("inf")))
    with pytest.raises(ValueError, match=WEIGHTS_FILE + r": proj_out\.weight: .*infinite"):
        load(sd3, QuantRecipe())


@pytest.mark.parametrize("name", ["proj_out.weight", "proj_out.bias"])
@pytest.mark.parametrize("packed", [False, True])
def test_unquantized_tensors_must_be_finite_too(sd3, name, packed, tmp_path):
    recipe = QuantRecipe(skip=("proj_out",))
    if packed:
        save_quantized(load(sd3, recipe), tmp_path / "packed", recipe)
        sd3 = tmp_path / "packed"
    rewrite(sd3, lambda tensors: tensors.update({name: torch.full_like(tensors[name], 1e5).float()}))
    load(sd3, recipe)
    with pytest.raises(ValueError, match=WEIGHTS_FILE + f": {name}: .*infinite.*torch.float16"):
        load(sd3, recipe, dtype=torch.float16)


@pytest.mark.parametrize("name", ["proj_out.weight", "proj_out.bias"])
def test_integer_weights_are_rejected(sd3, name):
    rewrite(sd3, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(ValueError, match=rf"{WEIGHTS_FILE}: {name}: .*torch\.int8"):
        load(sd3, QuantRecipe())


def drop_weights(folder):
    (folder / WEIGHTS_FILE).unlink()


def only_a_pickle(folder):
    (folder / WEIGHTS_FILE).rename(folder / "diffusion_pytorch_model.bin")


def only_a_variant(folder):
    (folder / WEIGHTS_FILE).rename(folder / "diffusion_pytorch_model.fp16.safetensors")


def truncate(folder):
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])


def git_lfs_pointer(folder):
    (folder / WEIGHTS_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def drop_config(folder):
    (folder / "config.json").unlink()


def write_config(text):
    return lambda folder: (folder / "config.json").write_text(text)


def write_index(text):
    return lambda folder: (folder / INDEX_FILE).write_text(text)


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (drop_weights, r"/transformer: no weights.*diffusion_pytorch_model\.safetensors"),
        (only_a_pickle, r"/transformer: .*diffusion_pytorch_model\.bin.*runs the code"),
        (only_a_variant, r"/transformer: no weights.*diffusion_pytorch_model\.fp16\.safetensors"),
        (truncate, WEIGHTS_FILE + ": .*safetensors file"),
        (git_lfs_pointer, WEIGHTS_FILE + ": .*safetensors file"),
        (drop_config, r"config\.json: missing"),
        (write_config("{"), r"config\.json: .*JSON"),
        (write_config("[" * 100_000), r"config\.json: .*JSON"),
        (write_config("[]"), r"config\.json: .*JSON object.*list"),
        (
            write_config('{"_class_name": "UNet2DModel"}'),
            r"config\.json: .*UNet2DModel.*SD3Transformer2DModel",
        ),
        (write_config('{"quantization_config": []}'), r"config\.json: quantization_config"),
        (
            write_config('{"quantization_config": {"quant_method": "gguf"}}'),
            r"config\.json: .*quant_method 'gguf'.*bitsandbytes",
        ),
        (write_index("{}"), INDEX_FILE + ": .*weight_map"),
        (
            write_index('{"weight_map": {"a": "../b.safetensors"}}'),
            rf"{INDEX_FILE}: a .*'\.\./b\.safetensors'",
        ),
        (write_index('{"weight_map": {"a": "b.bin"}}'), rf"{INDEX_FILE}: a .*'b\.bin'"),
        (write_index('{"weight_map": {"a": 1}}'), rf"{INDEX_FILE}: a .*\b1\b"),
        (write_index('{"weight_map": {"a": "b.safetensors"}}'), rf"b\.safetensors: missing.*{INDEX_FILE}"),
        (
            write_index(json.dumps({"weight_map": {"a": WEIGHTS_FILE}})),
            rf"{WEIGHTS_FILE}: .*\ba\b.*{INDEX_FILE}",
        ),
    ],
)
def test_damaged_folder_is_rejected_with_the_file(sd3, damage, pattern):
    damage(sd3)
    with pytest.raises(ValueError, match=pattern):
        load(sd3, QuantRecipe())


def test_default_dtype_is_restored_after_a_failure(sd3):
    before = torch.get_default_dtype()
    write_config('{"num_layers": "many"}')(sd3)
    with pytest.raises(ValueError, match=r"config\.json: .*SD3Transformer2DModel.*'str'"):
        load(sd3, None)
    assert torch.get_default_dtype() == before
