"""Tests saving quantized models: diffusers and this package load the folders, and reject damaged files."""

import json

import pytest
import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.files.shards import INDEX_FILE, WEIGHTS_FILE
from halfbyte.quant.formats.nf4 import QuantSpec, dequantize, quantize
from halfbyte.quant.formats.packing import pack_state, split_key, unpack_state
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.load import serialize
from halfbyte.quant.load.serialize import quantization_config, read_quantization_config, save_quantized
from halfbyte.quant.load.transformer import load_quantized

from judge import stock_bitsandbytes_on_cpu
from probe import prediction

CLASSES = [FluxTransformer2DModel, SD3Transformer2DModel]
STATE = "quant_state.bitsandbytes__nf4"


def load(folder, recipe=None, model_cls=SD3Transformer2DModel):
    return load_quantized(model_cls, folder, recipe, dtype=torch.bfloat16, device="cpu")


@pytest.fixture
def sd3(mini_sd3):
    return load(mini_sd3 / "transformer", QuantRecipe())


def bnb_config(recipe):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.quant_type,
        bnb_4bit_use_double_quant=recipe.double_quant,
        bnb_4bit_compute_dtype=recipe.compute_dtype,
        llm_int8_skip_modules=list(recipe.skip) or None,
    )


RECIPES = [
    QuantRecipe(),
    QuantRecipe(skip=("proj_out",), double_quant=False),
    QuantRecipe("fp4", compute_dtype=torch.float16, skip=("norm_out", "context_embedder")),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_config_equals_that_of_diffusers_and_reads_back(recipe):
    config = quantization_config(recipe)
    assert json.loads(json.dumps(config)) == json.loads(json.dumps(bnb_config(recipe).to_dict()))
    assert read_quantization_config(config, "config.json") == recipe


@pytest.mark.parametrize("model_cls", CLASSES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("max_shard_bytes", [10**10, 100_000])
def test_diffusers_loads_saved_models(model_cls, recipe, max_shard_bytes, request, tmp_path):
    name = "mini_flux" if model_cls is FluxTransformer2DModel else "mini_sd3"
    ours = load(request.getfixturevalue(name) / "transformer", recipe, model_cls)
    save_quantized(ours, tmp_path / "q", recipe, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "q" / INDEX_FILE).exists() == (max_shard_bytes < 10**10)
    with stock_bitsandbytes_on_cpu():
        stock, info = model_cls.from_pretrained(
            tmp_path / "q", torch_dtype=torch.bfloat16, output_loading_info=True
        )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, loaded = ours.state_dict(), stock.state_dict()
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert torch.equal(prediction(stock), prediction(ours))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_saved_file_is_byte_identical_to_that_of_bitsandbytes(quant_type, mini_sd3, tmp_path):
    recipe = QuantRecipe(quant_type, double_quant=False, skip=("proj_out",))
    folder = mini_sd3 / "transformer"
    save_quantized(load(folder, recipe), tmp_path / "ours", recipe)
    with stock_bitsandbytes_on_cpu():
        stock = SD3Transformer2DModel.from_pretrained(
            folder, torch_dtype=torch.bfloat16, quantization_config=bnb_config(recipe)
        )
        stock.save_pretrained(tmp_path / "stock")
    files = [tmp_path / side / WEIGHTS_FILE for side in ("ours", "stock")]
    if quant_type == "nf4":
        assert files[0].read_bytes() == files[1].read_bytes()
    ours, theirs = (load_file(file) for file in files)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # FP4 has two codes for zero. bitsandbytes' CPU code uses a different one than its CUDA kernel and this package.
        if quant_type == "nf4" or split_key(name) is not None:
            assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "stock")]
    configs[1].pop("_name_or_path")
    assert configs[0] == configs[1]


def test_folder_of_save_pretrained_loads(sd3, tmp_path):
    sd3.save_pretrained(tmp_path)
    assert torch.equal(prediction(load(tmp_path)), prediction(sd3))


def test_weight_and_statistics_are_in_the_same_shard(sd3, tmp_path):
    save_quantized(sd3, tmp_path / "q", max_shard_bytes=1)
    weight_map = json.loads((tmp_path / "q" / INDEX_FILE).read_text())["weight_map"]
    files = {path.name for path in (tmp_path / "q").glob("*.safetensors")}
    assert set(weight_map.values()) == files
    for name, file in weight_map.items():
        if split_key(name) is not None:
            assert weight_map[split_key(name)[0]] == file


def test_shards_do_not_exceed_the_requested_size(sd3, tmp_path):
    save_quantized(sd3, tmp_path / "q", max_shard_bytes=150_000)
    index = json.loads((tmp_path / "q" / INDEX_FILE).read_text())
    sizes = []
    for path in (tmp_path / "q").glob("*.safetensors"):
        sizes.append(sum(tensor.nbytes for tensor in load_file(path).values()))
    assert len(sizes) > 2
    assert max(sizes) <= 150_000
    assert sum(sizes) == index["metadata"]["total_size"]


def test_adapters_are_not_saved(sd3, mini_sd3, tmp_path):
    expected = {name: tensor.clone() for name, tensor in sd3.state_dict().items()}
    sd3.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_out"]))
    save_quantized(sd3, tmp_path / "q", QuantRecipe())
    saved = load(tmp_path / "q").state_dict()
    assert list(saved) == list(expected)
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_saved_config_does_not_contain_the_models_path(sd3, tmp_path):
    sd3.register_to_config(_name_or_path="/home/somebody/model")
    save_quantized(sd3, tmp_path / "q")
    assert "somebody" not in (tmp_path / "q" / "config.json").read_text()


def test_folder_with_files_is_rejected_and_unchanged(sd3, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"/q: .*files"):
        save_quantized(sd3, tmp_path / "q")
    assert [path.name for path in tmp_path.rglob("*")] == ["q", "notes.txt"]


def test_failed_save_leaves_no_files(sd3, tmp_path, monkeypatch):
    def disk_full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(serialize, "write_weights", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_quantized(sd3, tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_saving_with_a_different_recipe_is_rejected(sd3, tmp_path):
    with pytest.raises(ValueError, match=r"quantized with QuantSpec\(quant_type='nf4'"):
        save_quantized(sd3, tmp_path / "q", QuantRecipe("fp4"))
    with pytest.raises(ValueError, match="proj_out: quantized with"):
        save_quantized(sd3, tmp_path / "q", QuantRecipe(skip=("proj_out",)))
    sd3.proj_out = nn.Linear(64, 64)
    with pytest.raises(ValueError, match="proj_out: not quantized"):
        save_quantized(sd3, tmp_path / "q", QuantRecipe())
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_not_quantized_or_not_of_diffusers_are_rejected(mini_sd3, tmp_path):
    with pytest.raises(ValueError, match=r"^SD3Transformer2DModel: .*not quantized"):
        save_quantized(load(mini_sd3 / "transformer"), tmp_path / "q")
    with pytest.raises(ValueError, match=r"^Sequential: .*diffusers model"):
        save_quantized(nn.Sequential(), tmp_path / "q")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"quant_method": "torchao"}, "quant_method 'torchao'"),
        ({"load_in_4bit": False}, "load_in_4bit"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage.*'bfloat16'.*uint8"),
        ({"bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype.*'int8'.*float32"),
        ({"bnb_4bit_compute_dtype": ["float32"]}, r"bnb_4bit_compute_dtype.*\['float32'\]"),
        ({"bnb_4bit_quant_type": "int4"}, "quant_type: got 'int4'"),
        ({"bnb_4bit_quant_type": ["nf4"]}, "quant_type: got"),
        ({"llm_int8_skip_modules": "proj_out"}, "llm_int8_skip_modules.*'proj_out'"),
        ({"llm_int8_skip_modules": [1]}, r"llm_int8_skip_modules.*\[1\]"),
    ],
)
def test_unsupported_config_is_rejected(change, pattern):
    with pytest.raises(ValueError, match="^config.json: .*" + pattern):
        read_quantization_config(quantization_config(QuantRecipe()) | change, "config.json")


def packed_weight(**spec):
    weight = torch.randn(10, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, state = quantize(weight, QuantSpec(**spec))
    return packed, state, pack_state(state)


def encoded(facts):
    text = facts if isinstance(facts, str) else json.dumps(facts)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def decoded(statistics):
    return json.loads(bytes(statistics[STATE].tolist()))


@pytest.mark.parametrize("spec", [{}, {"double_quant": False}, {"quant_type": "fp4", "blocksize": 32}])
def test_state_round_trip(spec):
    packed, state, statistics = packed_weight(**spec)
    read_state = unpack_state("w", packed, statistics)
    assert torch.equal(dequantize(packed, read_state), dequantize(packed, state))
    assert (read_state.shape, read_state.dtype, read_state.blocksize) == (
        state.shape,
        state.dtype,
        state.blocksize,
    )
    repeated = pack_state(read_state)
    assert list(repeated) == list(statistics)
    assert all(torch.equal(repeated[suffix], tensor) for suffix, tensor in statistics.items())


def test_state_json_is_byte_identical_to_that_of_bitsandbytes():
    text = bytes(packed_weight(double_quant=False)[2][STATE].tolist()).decode()
    assert text == '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [10, 20]}'
    assert list(decoded(packed_weight()[2])) == [
        "quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset",
    ]  # fmt: skip


def test_split_key():
    assert split_key("a.b.weight.absmax") == ("a.b.weight", "absmax")
    assert split_key("a.weight." + STATE) == ("a.weight", STATE)
    assert split_key("a.weight") is None
    assert split_key("a.absmax") is None


@pytest.mark.parametrize("suffix", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_missing_statistic_is_rejected_by_name(suffix):
    packed, _, statistics = packed_weight()
    del statistics[suffix]
    with pytest.raises(ValueError, match=rf"blocks\.0\.weight\.{suffix}: missing"):
        unpack_state("blocks.0.weight", packed, statistics)


@pytest.mark.parametrize("suffix", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
@pytest.mark.parametrize(
    "change",
    [lambda tensor: torch.cat([tensor, tensor[:1]]), lambda tensor: tensor.double(), lambda t: t[None]],
)
def test_statistic_of_the_wrong_shape_or_dtype_is_rejected_by_name(suffix, change):
    packed, _, statistics = packed_weight()
    statistics[suffix] = change(statistics[suffix])
    with pytest.raises(ValueError, match=rf"^w\.{suffix}: .*torch\..*torch\."):
        unpack_state("w", packed, statistics)


@pytest.mark.parametrize("suffix", ["quant_map", "nested_absmax", "nested_quant_map"])
def test_statistic_that_is_not_finite_is_rejected_by_name(suffix):
    packed, _, statistics = packed_weight()
    statistics[suffix][0] = float("nan")
    with pytest.raises(ValueError, match=rf"^w\.{suffix}: .*NaN"):
        unpack_state("w", packed, statistics)


@pytest.mark.parametrize("suffix", ["absmax", "nested_absmax"])
def test_negative_scales_are_rejected(suffix):
    packed, _, statistics = packed_weight(double_quant=suffix == "nested_absmax")
    statistics[suffix] = -statistics[suffix]
    with pytest.raises(ValueError, match=rf"^w\.{suffix}: .*negative"):
        unpack_state("w", packed, statistics)


def test_foreign_table_is_rejected():
    packed, _, statistics = packed_weight()
    statistics["quant_map"] = statistics["quant_map"].roll(1)
    with pytest.raises(ValueError, match=r"^w\.quant_map: .*table"):
        unpack_state("w", packed, statistics)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda s: s.pop(STATE), "expected one .* found none"),
        (lambda s: s.update({"quant_state.bitsandbytes__fp4": s[STATE]}), "expected one .* found .*nf4.*fp4"),
        (
            lambda s: s.update({"quant_state.bitsandbytes__fp4": s.pop(STATE)}),
            "quant_type.*'nf4'.*'fp4'",
        ),
        (lambda s: s.update({"quant_state.bitsandbytes__int4": s.pop(STATE)}), "int4: unknown statistic"),
        (lambda s: s.update(scales=s["absmax"]), "scales: unknown statistic"),
    ],
)
def test_exactly_one_state_of_a_known_type_is_accepted(change, pattern):
    packed, _, statistics = packed_weight()
    change(statistics)
    with pytest.raises(ValueError, match="^w.*" + pattern):
        unpack_state("w", packed, statistics)


@pytest.mark.parametrize("length", [99, 101])
def test_packed_weight_of_the_wrong_size_is_rejected_by_name(length):
    packed, _, statistics = packed_weight()
    with pytest.raises(ValueError, match=r"^w: .*torch.uint8 \(100, 1\).*torch.uint8 \(\d+, 1\)"):
        unpack_state("w", torch.zeros(length, 1, dtype=torch.uint8), statistics)
    with pytest.raises(ValueError, match=r"^w: .*torch.uint8 \(100, 1\).*torch.uint8 \(1, 100\)"):
        unpack_state("w", packed.T.contiguous(), statistics)


@pytest.mark.parametrize(
    "facts",
    [
        {"quant_type": 4}, {"quant_type": None}, {"blocksize": 64.0}, {"blocksize": True}, {"blocksize": -64},
        {"blocksize": 10**30}, {"blocksize": "64"}, {"dtype": "float64"}, {"dtype": "__class__"}, {"dtype": ["a"]},
        {"shape": None}, {"shape": []}, {"shape": 200}, {"shape": [10, -20]}, {"shape": [0, 20]},
        {"shape": [10.0, 20]}, {"shape": [True, 200]}, {"shape": [10**18, 10**18]}, {"shape": [2**39, 2**39]},
        {"shape": [1] * 1000}, {"shape": [[10], [20]]}, {"shape": [20, 10, 1, 2]}, {"shape": "10,20"},
        {"nested_blocksize": 0}, {"nested_blocksize": 100}, {"nested_dtype": "float16"},
        {"nested_offset": 10**400}, {"nested_offset": 1e39}, {"nested_offset": -1}, {"nested_offset": -1e-9},
        {"nested_offset": 0}, {"nested_offset": 1e30}, {"nested_offset": 2**63}, {"nested_offset": 1e-4},
        {"nested_offset": 7e4, "dtype": "float16"},
        {"nested_offset": "1"}, {"nested_offset": None}, {"nested_offset": True}, {"nested_offset": [1.0]},
        {"nested_offset": float("nan")}, {"nested_offset": float("inf")}, {"surplus": 1},
    ],
)  # fmt: skip
def test_hostile_facts_are_rejected_by_name(facts):
    packed, _, statistics = packed_weight()
    statistics[STATE] = encoded(decoded(statistics) | facts)
    with pytest.raises(ValueError, match=r"^blocks\.0\.weight"):
        unpack_state("blocks.0.weight", packed, statistics)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("kind", ["normal", "one", "equal", "zeros", "spike", "tiny", "huge", "heavy"])
def test_offset_of_any_weight_is_accepted(kind, quant_type):
    weight = torch.randn(96, 512, generator=torch.Generator().manual_seed(3))
    if kind == "one":
        weight = weight[0, :1]
    elif kind == "equal":  # scales that differ only by rounding
        weight = weight.sign() * (1 + 1e-7 * torch.rand(96, 512))
    elif kind == "zeros":
        weight = torch.zeros_like(weight)
    elif kind == "spike":
        weight = torch.zeros_like(weight).index_put_((torch.tensor(5), torch.tensor(7)), torch.tensor(3.0))
    elif kind == "heavy":
        weight = weight**9
    weight = weight * {"tiny": 1e-37, "huge": 5e37}.get(kind, 1.0)
    packed, state = quantize(weight, QuantSpec(quant_type))
    read = unpack_state("w", packed, pack_state(state))
    assert torch.equal(read.nested.offset, state.nested.offset)


@pytest.mark.parametrize(
    "key", ["quant_type", "blocksize", "dtype", "shape", "nested_dtype", "nested_offset"]
)
def test_missing_facts_are_rejected_by_name(key):
    packed, _, statistics = packed_weight()
    facts = decoded(statistics)
    del facts[key]
    statistics[STATE] = encoded(facts)
    with pytest.raises(ValueError, match=rf"^w\..*missing.*'{key}'"):
        unpack_state("w", packed, statistics)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "1",
        "[" * 4000,
        '{"a":' * 600,
        '{"shape": [1], "shape": [2]}',
        "\udc00",
        "x" * 5000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_hostile_json_is_rejected_by_name(text):
    packed, _, statistics = packed_weight()
    statistics[STATE] = torch.tensor(list(text.encode(errors="surrogatepass")), dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"^w\.{STATE}: "):
        unpack_state("w", packed, statistics)


def test_packed_weight_of_another_shape_than_the_layer_is_rejected():
    packed, _, statistics = packed_weight()
    layer = Linear4bit(10, 20, spec=QuantSpec(), compute_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^w: .*\(20, 10\).*\(10, 20\)"):
        layer.load_packed(packed, statistics, "w")
